"""The policies mSFT is compared with, behind the same interface. All of them get the same number of epochs C.

sft        one stage over everything, best pooled snapshot
sft_resets the same with a new optimizer every C epochs, max_stages times: what mSFT does when nobody leaves
continual  tasks one after another, each taken to its own (first) peak
sro        single roll-out: one full run finds every peak, a second one from the base drops each task at its
           peak
soft_sro   the same first run, then static sampling rates proportional to the peaks' epochs
ies        instance-dependent early stopping (ICLR 2025): samples whose loss moves in a straight line skip the
           backward pass
dynamix    DynamixSFT (arXiv 2508.12116): a bandit over tasks, rewarded by a one-update look-ahead
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from repsft_fast.errors import describe
from repsft_fast.policies.bounds import AT_END, is_shorter_than_an_interval, out_of_bounds
from repsft_fast.policies.decisions import (
    Continue,
    Decision,
    NewStage,
    Probe,
    Reset,
    Reweight,
    RollBack,
    SkipSamples,
    Stop,
)
from repsft_fast.policies.history import History
from repsft_fast.policies.msft import first_peak
from repsft_fast.policies.protocol import Policy, trained
from repsft_fast.policies.records import Epoch, Probed
from repsft_fast.policies.statistics import Pool, softmax

GO_ON = Reset("restore", "continue", "continue")
FROM_BASE = Reset("reset", "rewind", "continue")


@dataclass(frozen=True)
class BaselineSettings:
    compute_budget: float = 1.0  # C: epochs of a whole run (continual: of each task; sft_resets: of a stage)
    evaluations_per_epoch: int = 4
    max_stages: int = 10  # sft_resets: stages
    pool: Pool = "items"  # the mean that names the result: over items, or over tasks
    keep: Literal["last", "best"] | None = None  # which moment is the result; None: the policy's own, below
    order: tuple[str, ...] = ()  # continual: tasks first to last; empty: by name
    # ies: mastered below this mean second difference (nats). Our choice: PAPERS gives none
    delta: float = 0.001
    first_epoch: int = 6  # ies: nothing is mastered before this many epochs
    every_updates: int = 50  # dynamix: T
    beta: float = 1.0  # dynamix: sharpness. Our choice
    memory: float = 0.95  # dynamix: Q ← memory·Q + (1 − memory)·r
    explore: float = 0.3  # dynamix: share of the uniform distribution over tasks
    weights: dict[str, float] = field(default_factory=dict)  # sampling rate of a task, where it is not 1

    def problems(self) -> list[str]:
        """What cannot be used, in the settings' names; empty when all is well."""
        per_epoch = self.evaluations_per_epoch
        found = out_of_bounds(
            [
                ("evaluations_per_epoch", per_epoch, 1, math.inf),
                ("max_stages", self.max_stages, 1, math.inf),
                ("delta", self.delta, 0.0, math.inf),
                ("first_epoch", self.first_epoch, 5, math.inf),
                ("every_updates", self.every_updates, 1, math.inf),
                ("beta", self.beta, 0.0, math.inf),
                ("memory", self.memory, 0.0, 1.0),
                ("explore", self.explore, 0.0, 1.0),
            ]
        )
        if per_epoch >= 1 and is_shorter_than_an_interval(self.compute_budget, per_epoch):
            wrong, expected = "is shorter than one evaluation interval", f"at least {1 / per_epoch:g} epochs"
            found.append(
                describe("mixture.compute_budget", wrong, expected=expected, got=self.compute_budget)
            )
        if len(set(self.order)) < len(self.order):
            found.append(describe("mixture.order", "names a task twice", got=self.order))
        return found


class Sft(Policy):
    """One stage over everything; the base of the others."""

    settings_type: ClassVar[type] = BaselineSettings
    settings: BaselineSettings

    def decide(self, history: History, active: frozenset[str]) -> Decision:
        if not history.stages:
            return self._stage(None, tuple(sorted(active)), Reset())
        if self._stage_ended(history):
            budget = self.settings.compute_budget
            return Stop("policy", f"{budget:g} epoch{' is' if budget == 1 else 's are'} done")
        return Continue()

    def kept(self, history: History, active: frozenset[str]) -> set[str]:
        """The best snapshot so far."""
        best = self.result(history)
        return {best} if best else set()

    def most_kept(self, tasks: int) -> int:
        """One at a time."""
        return 1

    def result(self, history: History) -> str | None:
        """The snapshot with the best score over all tasks; None, the last state, under keep "last"."""
        return self._best(history)

    def _best(self, history: History, since_stage: int = 0) -> str | None:
        if self.settings.keep == "last":
            return None
        best = history.best(since_stage, self.settings.pool)
        return best.snapshot_id if best else None

    def _stage_ended(self, history: History) -> bool:
        now = history.at_evaluation()
        return now is not None and now.epochs >= self.settings.compute_budget - AT_END

    def _stage(self, start: str | None, active: tuple[str, ...], reset: Reset) -> NewStage:
        weights = self.settings.weights
        rates = {task: weights.get(task, 1.0) for task in active if task in trained(active, weights)}
        plain = all(rate == 1.0 for rate in rates.values())
        return NewStage(start, tuple(rates), None if plain else rates, reset)


class SftResets(Sft):
    """Plain SFT whose optimizer begins anew every C epochs: the control for what a stage's new moments do."""

    def most_rollouts(self, tasks: int) -> tuple[int, str]:
        return self.settings.max_stages, f"max_stages {self.settings.max_stages}"

    def decide(self, history: History, active: frozenset[str]) -> Decision:
        if not history.stages:
            return self._stage(None, tuple(sorted(active)), Reset())
        if not self._stage_ended(history):
            return Continue()
        done, most = len(history.stages), self.settings.max_stages
        if done >= most:
            return Stop("policy", f"{most} stage{' is' if most == 1 else 's are'} done")
        return self._stage(history.here, tuple(sorted(active)), Reset())


class Continual(Sft):
    """Task after task, C epochs each, going on from its first peak. The result is the last task's peak."""

    def most_rollouts(self, tasks: int) -> tuple[int, str]:
        return tasks, f"{tasks} tasks"

    def decide(self, history: History, active: frozenset[str]) -> Decision:
        if not history.stages:
            return self._stage(None, (self._order(history)[0],), Reset())
        last = history.last_decision
        if not isinstance(last, RollBack):
            if not self._stage_ended(history):
                return Continue()
            task = history.stage.active[0]
            peak = self._peak(history)
            if peak != history.here:
                return RollBack(peak, task)
        done = len(history.stages)
        order = self._order(history)
        if done == len(order):
            return Stop("policy", "every task has had its turn")
        return self._stage(history.here, (order[done],), Reset())

    def kept(self, history: History, active: frozenset[str]) -> set[str]:
        """The peak so far of the task in training."""
        peak = self.result(history)
        return {peak} if peak else set()

    def result(self, history: History) -> str | None:
        return self._peak(history) if history.evaluations else None

    def _order(self, history: History) -> tuple[str, ...]:
        named = self.settings.order
        order = named + tuple(sorted(set(history.tasks) - set(named)))
        drawn = trained(order, self.settings.weights)
        return tuple(task for task in order if task in drawn)

    def _peak(self, history: History) -> str:
        """First maximum of the one task in training; the last evaluation when its score is undefined
        everywhere."""
        evaluations = history.of_stage(history.stage.number)
        index = first_peak(evaluations, history.stage.active[0])
        return evaluations[-1 if index is None else index].snapshot_id


class Sro(Sft):
    """Two runs from the base. A peak counts the task's own epochs, which are the epochs of every mixture it
    was active in."""

    def most_rollouts(self, tasks: int) -> tuple[int, str]:
        return 2, "2 runs"

    def decide(self, history: History, active: frozenset[str]) -> Decision:
        if not history.stages:
            return self._stage(None, tuple(sorted(active)), Reset())
        if len(history.stages) == 1:
            return self._second_run(history) if self._stage_ended(history) else Continue()
        now = history.at_evaluation()
        if now is None:
            return Continue()
        own = now.epochs + sum(history.of_stage(stage.number)[-1].epochs for stage in history.stages[1:-1])
        peaks = peak_epochs(history)
        left = tuple(task for task in sorted(active) if peaks[task] > own + AT_END)
        if not left:
            return Stop("policy", "every task has been dropped at its peak")
        return Continue() if len(left) == len(active) else self._stage(now.snapshot_id, left, GO_ON)

    def kept(self, history: History, active: frozenset[str]) -> set[str]:
        """The base while the first run lasts, then the best snapshot of the second."""
        if len(history.stages) == 1:
            return {history.evaluations[0].snapshot_id} if history.evaluations else set()
        return super().kept(history, active)

    def result(self, history: History) -> str | None:
        """The best pooled snapshot of the second run: with the first run's it would be at least SFT by
        construction."""
        return self._best(history, since_stage=1) if len(history.stages) > 1 else None

    def _second_run(self, history: History) -> Decision:
        peaks = peak_epochs(history)
        active = tuple(task for task in sorted(history.stages[0].active) if peaks[task] > 0)
        if not active:
            return Stop("policy", "no task ever rose above the base")
        return self._stage(history.evaluations[0].snapshot_id, active, FROM_BASE)


class SoftSro(Sro):
    """Second run: tasks that peak past 0.00, for C epochs, at rates ∝ peak epochs; an epoch is as long as a
    natural one."""

    def decide(self, history: History, active: frozenset[str]) -> Decision:
        if len(history.stages) < 2:
            return super().decide(history, active)
        return Sft.decide(self, history, active)

    def _second_run(self, history: History) -> Decision:
        peaks = peak_epochs(history)
        rated = {
            task: peaks[task] * self.settings.weights.get(task, 1.0)
            for task in sorted(history.stages[0].active)
            if peaks[task] > 0
        }
        drawn = math.fsum(rate * history.tasks[task] for task, rate in rated.items())
        if not drawn > 0:
            return Stop("policy", "no task ever rose above the base")
        natural = sum(history.tasks[task] for task in rated)
        rates = {task: rate * natural / drawn for task, rate in rated.items()}
        return NewStage(history.evaluations[0].snapshot_id, tuple(rates), rates, FROM_BASE)


class Ies(Sft):
    """Mastered samples skip the backward pass of one epoch and are judged again at its end: their losses are
    recorded too."""

    needs_losses = True
    needs_tasks = False  # it judges single samples

    def decide(self, history: History, active: frozenset[str]) -> Decision:
        decision = super().decide(history, active)
        if not isinstance(decision, Continue) or not history.epochs or history.answered(SkipSamples):
            return decision
        last = history.epochs[-1]
        if last.update != history.position.update or last.stage != history.stage.number:
            return decision
        ids = mastered(history.epochs, self.settings.delta, self.settings.first_epoch)
        return SkipSamples(ids) if ids else decision


class Dynamix(Sft):
    """Every T updates: probe, then reweight. Q is folded over the probes in the history, so nothing else is
    state."""

    looks_ahead = True

    def decide(self, history: History, active: frozenset[str]) -> Decision:
        decision = super().decide(history, active)
        at = history.position.update
        if not isinstance(decision, Continue) or at == 0 or at % self.settings.every_updates:
            return decision
        last = history.probes[-1] if history.probes else None
        if last is None or (last.update, last.stage) != (at, history.stage.number):
            return Probe(tuple(sorted(active)))
        if any(isinstance(t.decision, Reweight) and t.clock >= last.clock for t in history.decisions):
            return decision
        return Reweight(self._rates(history, active))

    def next_call(self, history: History) -> int | None:
        """The next multiple of T."""
        every = self.settings.every_updates
        return (history.position.update // every + 1) * every

    def _rates(self, history: History, active: frozenset[str]) -> dict[str, float]:
        s = self.settings
        natural = {task: float(history.tasks[task]) * s.weights.get(task, 1.0) for task in sorted(active)}
        total = math.fsum(natural.values())
        prior = {task: mass / total for task, mass in natural.items()}
        drawn = dynamix_probabilities(values_of(history.probes, s.memory), prior, s.beta, s.explore)
        samples = sum(history.tasks[task] for task in drawn)
        return {task: p * samples / history.tasks[task] for task, p in drawn.items() if history.tasks[task]}


def peak_epochs(history: History) -> dict[str, float]:
    """Epochs of each task's first maximum in the first run; 0 where the score is undefined throughout."""
    evaluations = history.of_stage(0)
    found = {}
    for task in history.tasks:
        index = first_peak(evaluations, task)
        found[task] = 0.0 if index is None else evaluations[index].epochs
    return found


def mastered(epochs: Sequence[Epoch], delta: float, first_epoch: int = 6) -> tuple[int, ...]:
    """Samples whose last three second differences L(e) − 2·L(e−1) + L(e−2) are below delta in mean absolute
    value.

    A sample without a finite loss in each of the last five epochs is not mastered, and nothing is before
    `first_epoch` epochs.
    """
    if len(epochs) < max(first_epoch, 5):
        return ()
    recent = [epoch.losses or {} for epoch in epochs[-5:]]
    found = []
    for sample in recent[-1]:
        path = [losses.get(sample, math.nan) for losses in recent]
        second = [path[i] - 2 * path[i - 1] + path[i - 2] for i in (2, 3, 4)]
        if math.fsum(abs(d) for d in second) / 3 < delta:  # False for NaN
            found.append(sample)
    return tuple(sorted(found))


def values_of(probes: Sequence[Probed], memory: float = 0.95) -> dict[str, float]:
    """Q of every task: Q ← memory·Q + (1 − memory)·r, from 0, with r the relative loss drop, min-max scaled
    over the tasks.

    A probe without a finite drop leaves that task's Q alone; when all drops are equal nobody is preferred (r
    = 0).
    """
    value: dict[str, float] = {}
    for probe in probes:
        drops = {
            task: (before - after) / before for task, (before, after) in probe.losses.items() if before > 0
        }
        drops = {task: drop for task, drop in drops.items() if math.isfinite(drop)}
        low, high = min(drops.values(), default=0.0), max(drops.values(), default=0.0)
        for task, drop in drops.items():
            reward = (drop - low) / (high - low) if high > low else 0.0
            value[task] = memory * value.get(task, 0.0) + (1 - memory) * reward
    return value


def dynamix_probabilities(
    values: Mapping[str, float], prior: Mapping[str, float], beta: float = 1.0, explore: float = 0.3
) -> dict[str, float]:
    """p = (1 − explore)·softmax(beta·Q + log p0) + explore / K over the tasks of `prior`."""
    tasks = sorted(prior)
    logits = [beta * values.get(t, 0.0) + (math.log(prior[t]) if prior[t] > 0 else -math.inf) for t in tasks]
    return {t: (1 - explore) * p + explore / len(tasks) for t, p in zip(tasks, softmax(logits))}
