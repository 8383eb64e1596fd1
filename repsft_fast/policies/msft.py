"""mSFT: train a mixture, find the task that overfits first, go back to its best snapshot, go on without it.

rule "paper" (Koh et al. 2026, arXiv 2603.21606, as their code does it). A stage rolls out C epochs of the
active mixture. The peak of a task is its first maximum over the stage's evaluations, the one at 0.00 included
(none where only NaN came after it: that is no fall); m is the earliest peak of an active task. If m is the
last evaluation the next stage goes on from the end with nothing excluded; else one task with peak m (ties by
name) is excluded and the run goes back to m. It ends after max_stages or with no active task.

rule "tested" (ours). The peak is the *last* maximum over the unbroken stretch of training with these active
tasks, stage borders included. A task is overfit when at each of the last `patience` evaluations it lies below
its peak by more than min_delta and by more than the noise of items and looks explains (`overfit`), and not
before its `min_looks`-th look. A task that has only ever fallen leaves too, back to the first moment. The
roll-out ends with the first task found overfit. That is an *online* rule: what later evaluations would have
shown (a task with an earlier peak whose fall is not yet significant, a better pooled score further on) is not
looked at; that is the price of not training on past the decision.

exclude_on "saturation" (ours): a task leaves where it stands, without a roll-back, at the end of the epoch
whose training pass had its token accuracy at the threshold. The rule above is then not used.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from repsft_fast.errors import describe
from repsft_fast.policies.bounds import AT_END, is_shorter_than_an_interval, out_of_bounds
from repsft_fast.policies.decisions import Continue, Decision, NewStage, Reset, RollBack, Stop
from repsft_fast.policies.history import History
from repsft_fast.policies.overfit import bound, chance, looks_seen, said_of_rows
from repsft_fast.policies.protocol import Policy, trained
from repsft_fast.policies.records import Evaluation
from repsft_fast.policies.statistics import Pool, difference, reaches
from repsft_fast.policies.student import normal_quantile

REHEARSAL = 0.05  # rule tested's; docs/positive_control.md has what it is from


@dataclass(frozen=True)
class MsftSettings:
    rule: Literal["paper", "tested"] = "tested"
    compute_budget: float = 1.0  # C, epochs of the active mixture per stage
    evaluations_per_epoch: int = 4
    max_stages: int = 10
    exclude_on: Literal["overfit", "saturation"] = "overfit"
    optimizer: Literal["reset", "restore"] = "reset"  # at every stage
    schedule: Literal["continue", "rewind"] = "continue"  # after a roll-back
    data: Literal["continue", "rewind"] = "continue"  # after a roll-back
    rehearsal: float | None = None  # sampling rate that excluded tasks keep, relative to their own; 0: none
    weights: dict[str, float] = field(default_factory=dict)  # sampling rate of a task, where it is not 1
    pool: Pool = "items"  # the mean that names the result: over items (the paper's), or over tasks
    keep: Literal["last", "best"] | None = None  # which moment is the result; None: best, saturation's last
    # rule tested
    alpha: float = 0.1  # share of whole runs in which noise alone may exclude somebody
    z: float | None = None  # standard errors, in place of what alpha makes of tasks and looks
    min_delta: float = 0.0  # a fall counts above this, in units of the metric
    patience: int = 2  # evaluations in a row below the peak
    min_looks: int = 8  # nobody leaves before so many looks at a task, earlier stages' counted
    # exclude_on saturation
    token_accuracy: float = 0.97

    @property
    def looks(self) -> int:
        """Looks at every task that a whole run makes at most, the one before training left out."""
        return max(1, round(self.compute_budget * self.evaluations_per_epoch * self.max_stages))

    @property
    def rehearsed(self) -> float:
        """The rate of `rehearsal`; where that is None REHEARSAL under rule "tested", else none."""
        if self.rehearsal is not None:
            return self.rehearsal
        return REHEARSAL if (self.rule, self.exclude_on) == ("tested", "overfit") else 0.0

    @property
    def keeps_best(self) -> bool:
        """Whether the result is the best moment; else it is the last state."""
        return (self.keep or ("last" if self.exclude_on == "saturation" else "best")) == "best"

    def problems(self) -> list[str]:
        """What cannot be used, in the settings' names; empty when all is well."""
        found = []
        budget, per_epoch = self.compute_budget, self.evaluations_per_epoch

        # The shortest budget is told in intervals, so there has to be an interval first.
        if per_epoch < 1:
            wrong = "is too small"
            found.append(
                describe("mixture.evaluations_per_epoch", wrong, expected="at least 1", got=per_epoch)
            )
        elif not math.isfinite(budget) or is_shorter_than_an_interval(budget, per_epoch):
            wrong, expected = "is shorter than one evaluation interval", f"at least {1 / per_epoch:g} epochs"
            todo = "raise it, or mixture.evaluations_per_epoch"
            found.append(describe("mixture.compute_budget", wrong, expected=expected, got=budget, todo=todo))
        found += out_of_bounds(
            [
                ("max_stages", self.max_stages, 1, math.inf),
                ("patience", self.patience, 1, math.inf),
                ("rehearsal", self.rehearsed, 0.0, 1.0),
                ("min_delta", self.min_delta, 0.0, math.inf),
                ("min_looks", self.min_looks, 0, math.inf),
                *([] if self.z is None else [("z", self.z, 0.0, math.inf)]),
            ]
        )
        if not 0 < self.alpha < 1:
            expected = "above 0, below 1"
            found.append(describe("mixture.alpha", "is not a share", expected=expected, got=self.alpha))

        # The threshold is another rule's setting, judged only where this one uses it.
        accuracy = self.token_accuracy
        if self.exclude_on == "saturation" and not 0 < accuracy <= 1:
            wrong, expected = "is not an accuracy", "above 0, at most 1"
            found.append(describe("stop.token_accuracy", wrong, expected=expected, got=accuracy))
        for task, rate in sorted(self.weights.items()):
            if not (math.isfinite(rate) and rate >= 0):
                where, expected = f"mixture.weights.{task}", "a finite number, at least 0"
                found.append(describe(where, "is not a rate", expected=expected, got=rate))
        return found


class Msft(Policy):
    """The state is the history; this holds settings only."""

    settings_type: ClassVar[type] = MsftSettings
    settings: MsftSettings

    @property
    def accuracy_target(self) -> float | None:
        return self.settings.token_accuracy if self.settings.exclude_on == "saturation" else None

    def most_rollouts(self, tasks: int) -> tuple[int, str]:
        most = self.settings.max_stages
        return most, f"max_stages {most}"

    def decide(self, history: History, active: frozenset[str]) -> Decision:
        s = self.settings
        if not history.stages:
            return self._stage(history, None, active)
        if not active:
            return Stop("policy", "no task is active any more")
        if unscored := self._unscored(history, active):
            return Stop("policy", unscored)
        last = history.last_decision
        if isinstance(last, RollBack):
            return self._stage(history, last.to, active)
        now = history.at_evaluation()
        if now is None:
            return Continue()

        # These look at every evaluation: a task leaves in the middle of a roll-out. In the last stage nobody
        # leaves any more, which could change nothing: it only offers candidates for the result.
        last_stage = len(history.stages) >= s.max_stages
        if s.exclude_on == "saturation":
            left = active - saturated_tasks(history, active, s.token_accuracy)
            if not left:
                return Stop("policy", "every task is memorised")
            if left < active and not last_stage:
                return self._stage(history, now.snapshot_id, left)
        elif s.rule == "tested" and not last_stage:
            task = first_overfit(history.window(), active, history, s)
            if task is not None:
                peak = last_peak(history.window(), task)
                return RollBack(history.window()[peak].snapshot_id, task)

        # All else waits for the end of the roll-out: only then is the paper's earliest peak known.
        if now.epochs < s.compute_budget - AT_END:
            return Continue()
        if last_stage:
            return Stop("policy", f"{s.max_stages} stage{' is' if s.max_stages == 1 else 's are'} done")
        if s.exclude_on == "overfit" and s.rule == "paper":
            back = earliest_peak(history.of_stage(history.stage.number), active)
            if back is not None:
                return back
        return self._stage(history, now.snapshot_id, active)

    def kept(self, history: History, active: frozenset[str]) -> set[str]:
        """The snapshots a decision or the result can still name; all else may be forgotten."""
        s = self.settings
        if s.exclude_on == "saturation":
            peaks: Literal["first", "last"] | None = None
        else:
            peaks = "first" if s.rule == "paper" else "last"
        return kept_snapshots(history, active, peaks, s.pool if s.keeps_best else None)

    def most_kept(self, tasks: int) -> int:
        """Every task's peak and the best so far."""
        peaks = 0 if self.settings.exclude_on == "saturation" else tasks
        return peaks + (1 if self.settings.keeps_best else 0)

    def result(self, history: History) -> str | None:
        """The snapshot with the best score over all tasks, discarded branches included; strictly better wins.
        None, the last state, under keep "last"."""
        if not self.settings.keeps_best:
            return None
        best = history.best(pool=self.settings.pool)
        return best.snapshot_id if best else None

    def at_start(self, rows: Mapping[str, int], shares: bool) -> list[str]:
        """Rule "tested": which falls can be seen, and from when on somebody can leave."""
        s = self.settings
        if s.rule != "tested" or s.exclude_on != "overfit":
            return []
        tasks = sum(n > 0 for task, n in rows.items() if s.weights.get(task, 1.0) > 0)
        z = normal_quantile(chance(s.alpha, tasks, s.looks)) if s.z is None else s.z
        return said_of_rows(rows, z, shares) + self._said_of_looks()

    def _said_of_looks(self) -> list[str]:
        """When the first task can leave: at the `min_looks`-th look, the one before training counted."""
        s = self.settings
        per_stage = max(1, math.floor(s.compute_budget * s.evaluations_per_epoch + AT_END))
        needed = max(s.min_looks, s.patience + 1) - 1  # after the one at 0.00
        stage, within = divmod(needed - 1, per_stage)
        if stage >= s.max_stages - 1:
            todo = "raise mixture.max_stages, mixture.compute_budget or mixture.evaluations_per_epoch"
            return [f"nobody can leave: it takes {needed + 1} looks at a task before the last stage; {todo}"]
        if stage == 0:
            return []
        epochs = (within + 1) / s.evaluations_per_epoch
        where = f"in stage {stage}, at {epochs:.2f} epochs"
        return [f"nobody leaves before look {needed + 1} at a task: that is {where}"]

    def _unscored(self, history: History, active: frozenset[str]) -> str | None:
        """Why it ends though tasks are left: none of them ever had a score, and some that left had."""
        measured = set(history.measured_tasks())
        if self.settings.exclude_on == "saturation" or active & measured or not measured:
            return None
        names = ", ".join(f"`{task}`" for task in sorted(active))
        return f"no task with a score is active any more: {names} alone would be trained by no measure"

    def _stage(self, history: History, start: str | None, active: frozenset[str]) -> NewStage:
        s = self.settings
        active = trained(active, s.weights)
        rates = {task: s.weights.get(task, 1.0) for task in sorted(active)}
        if s.rehearsed > 0:
            gone = trained(set(history.tasks) - active, s.weights)
            rates |= {task: s.rehearsed * s.weights.get(task, 1.0) for task in sorted(gone)}
        plain = set(rates) == active and all(rate == 1.0 for rate in rates.values())
        went_back = isinstance(history.last_decision, RollBack)
        reset = Reset(s.optimizer, s.schedule, s.data) if went_back else Reset(s.optimizer)
        return NewStage(start, tuple(sorted(active)), None if plain else rates, reset)


def first_peak(evaluations: Sequence[Evaluation], task: str) -> int | None:
    """Index of the task's first maximum; None when it is undefined everywhere. An undefined score is never
    the maximum."""
    scored = [(i, e.scores[task].value) for i, e in enumerate(evaluations) if e.scores[task].defined]
    return max(scored, key=lambda pair: pair[1])[0] if scored else None  # max keeps the first of equals


def last_peak(evaluations: Sequence[Evaluation], task: str) -> int:
    """Index of the task's last maximum; -1 when it is undefined everywhere."""
    scored = [(e.scores[task].value, i) for i, e in enumerate(evaluations) if e.scores[task].defined]
    return max(scored)[1] if scored else -1


def earliest_peak(rolled_out: Sequence[Evaluation], active: frozenset[str]) -> RollBack | None:
    """Rule "paper" at the end of a roll-out: back to the earliest peak of an active task, ties by name; None
    where that is the last evaluation. A peak that only undefined scores follow is no fall."""
    peaks = {
        task: peak
        for task in active
        if (peak := first_peak(rolled_out, task)) is not None
        and any(e.scores[task].defined for e in rolled_out[peak + 1 :])
    }
    if not peaks:
        return None
    earliest = min(peaks.values())
    first_by_name = min(task for task, peak in peaks.items() if peak == earliest)
    return RollBack(rolled_out[earliest].snapshot_id, first_by_name)


def kept_snapshots(
    history: History,
    active: frozenset[str],
    peaks: Literal["first", "last"] | None,
    pool: Pool | None = "items",
) -> set[str]:
    """Each active task's peak (in the stage for "first", in the unbroken stretch for "last") and the best
    snapshot overall by this mean (None: not kept).

    Stage starts and ends need no place of their own: they are kept while they are somebody's peak, and going
    on from the end needs no copy. A snapshot that enters this set is always the one just evaluated.
    """
    best = history.best(pool=pool) if pool is not None else None
    kept = {best.snapshot_id} if best else set()
    if peaks is None or not history.stages:
        return kept
    evaluations = history.of_stage(history.stage.number) if peaks == "first" else history.window()
    for task in active:
        index = first_peak(evaluations, task) if peaks == "first" else last_peak(evaluations, task)
        if index is not None and index >= 0:
            kept.add(evaluations[index].snapshot_id)
    # The roll-back has been decided and its stage has not been opened: the way back must still be there.
    if isinstance(history.last_decision, RollBack):
        kept.add(history.last_decision.to)
    return kept


def first_overfit(
    window: Sequence[Evaluation], active: frozenset[str], history: History, settings: MsftSettings
) -> str | None:
    """The task to exclude now under rule "tested": of those found overfit the one with the earliest peak,
    ties by name."""
    found = []
    for task in active:
        peak = last_peak(window, task)
        if peak < 0 or not window[-1].scores[task].defined:
            continue
        after = [e.scores[task] for e in window[peak + 1 :] if e.scores[task].defined][-settings.patience :]
        if len(after) < settings.patience or looks_seen(history, task) < settings.min_looks:
            continue
        top = window[peak].scores[task]
        if not all(difference(top, score).mean > settings.min_delta for score in after):
            continue
        since = len(window) - 1 - peak
        limit = bound(history, task, settings.alpha, settings.looks, settings.z, since)
        if all(limit.exceeded(top, score) for score in after):
            found.append((peak, task))
    return min(found)[1] if found else None


def saturated_tasks(history: History, active: frozenset[str], threshold: float) -> frozenset[str]:
    """Active tasks memorised in the epoch that ended at this position of this stage; none when no epoch ended
    here."""
    last = history.epochs[-1] if history.epochs else None
    if last is None or last.stage != history.stage.number or last.update != history.position.update:
        return frozenset()
    return frozenset(task for task in active if reaches(*last.tokens.get(task, (0, 0)), threshold))
