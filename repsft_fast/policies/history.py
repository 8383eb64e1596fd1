"""The table policies read: what was measured and decided, in order. Append-only, JSON; a checkpoint holds it
beside the closed list of state.

A roll-back does not shorten it: the model goes back, the history remembers (otherwise the same decision would
come again). Its clock counts records, so "has this been answered?" is a comparison of integers.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from repsft_fast.errors import TrainingError, describe
from repsft_fast.policies import history_json
from repsft_fast.policies.decisions import Code, Continue, Decision, NewStage, Probe, RollBack, Stop
from repsft_fast.policies.records import KEEP_LOSSES, Epoch, Evaluation, Position, Probed, Stage, Taken
from repsft_fast.policies.statistics import Pool, Score, pooled


@dataclass
class History:
    """Everything a policy may know. tasks: name → number of training samples."""

    tasks: dict[str, int]
    stages: list[Stage] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    epochs: list[Epoch] = field(default_factory=list)
    probes: list[Probed] = field(default_factory=list)
    decisions: list[Taken] = field(default_factory=list)
    position: Position = field(default_factory=Position)
    clock: int = 0
    here: str | None = None  # the snapshot the state equals exactly; None after an update

    @staticmethod
    def start(tasks: Iterable[tuple[str, int]]) -> "History":
        """An empty table over these (name, training samples). Raises TrainingError for no tasks or two of one
        name."""
        listed = list(tasks)
        names = [name for name, _ in listed]
        if not names:
            raise TrainingError(describe("mixture", "has no tasks", expected="at least 1", got=0))
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise TrainingError(
                describe("mixture", "two tasks have one name", expected="different names", got=twice)
            )
        return History(dict(listed))

    # What the trainer appends -----------------------------------------------------------------------------

    def tick(self, update: int, epochs: float, tokens: int, schedule_finished: bool = False) -> None:
        """Say where training stands. Called before anything is appended or asked."""
        if update != self.position.update:
            self.here = None
        self.position = Position(update, epochs, tokens, schedule_finished)

    def evaluated(self, snapshot_id: str, scores: Mapping[str, Score]) -> Evaluation:
        """All tasks have been scored at the current position, whose snapshot is called `snapshot_id` from now
        on."""
        missing = set(self.tasks) ^ set(scores)
        if missing:
            raise TrainingError(
                describe(
                    "evaluation", "must cover every task", expected=sorted(self.tasks), got=sorted(scores)
                )
            )
        if any(e.snapshot_id == snapshot_id for e in self.evaluations):
            raise TrainingError(
                describe("evaluation", "moment id is taken", expected="a new one", got=snapshot_id)
            )
        record = Evaluation(
            self.stage.number, snapshot_id, self.position.update, self.position.epochs, dict(scores)
        )
        self.evaluations.append(record)
        self.here = snapshot_id
        self.clock += 1
        return record

    def epoch_ended(
        self,
        tokens: Mapping[str, tuple[int, int]],
        losses: Mapping[int, float] | None = None,
        own: tuple[int, int] | None = None,
    ) -> Epoch:
        """An epoch has ended at the current position with these exact counts."""
        self.clock += 1
        at = self.position
        record = Epoch(
            self.clock,
            self.stage.number,
            at.update,
            at.epochs,
            dict(tokens),
            dict(losses) if losses else None,
            own,
        )
        self.epochs.append(record)
        old = len(self.epochs) - KEEP_LOSSES - 1
        if old >= 0 and self.epochs[old].losses is not None:
            self.epochs[old] = replace(self.epochs[old], losses=None)
        return record

    def probed(self, losses: Mapping[str, tuple[float, float]]) -> Probed:
        """The probe asked for has been made at the current position."""
        self.clock += 1
        record = Probed(self.clock, self.stage.number, self.position.update, dict(losses))
        self.probes.append(record)
        return record

    def took(self, decision: Decision) -> None:
        """Record a decision. A NewStage opens its stage: the trainer then takes over `stage.update` and
        `stage.data_key`.

        Raises TrainingError for a snapshot nobody evaluated, and for a probe asked again because nobody made
        it.
        """
        if isinstance(decision, Continue):
            return
        last = self.last_decision
        if isinstance(decision, Probe) and isinstance(last, Probe) and self.decisions[-1].clock == self.clock:
            raise TrainingError(
                describe(
                    "policy",
                    "asks again for a probe",
                    expected="History.probed after a Probe",
                    got="no record",
                )
            )
        self.decisions.append(
            Taken(self.clock, self.stages[-1].number if self.stages else 0, self.position.update, decision)
        )
        if isinstance(decision, RollBack):
            self.evaluation_of(decision.to)  # raises for a snapshot never evaluated
            self.here = decision.to
        if isinstance(decision, NewStage):
            self._open_stage(decision, rolled_back=isinstance(last, RollBack))

    def take_back_stop(self) -> None:
        """The run goes on after all: under a larger budget it would not have ended here."""
        if self.ended_by is not None:
            self.decisions.pop()

    def _open_stage(self, decision: NewStage, rolled_back: bool) -> None:
        origin = self.evaluation_of(decision.start) if decision.start is not None else None
        number = len(self.stages)
        rewind_schedule = origin is not None and decision.reset.schedule == "rewind"
        rewind_data = origin is not None and decision.reset.data == "rewind"
        stage = Stage(
            number=number,
            start=decision.start,
            follows=decision.start is None or (decision.start == self.here and not rolled_back),
            update=origin.update if rewind_schedule and origin else self.position.update,
            data_key=self.stages[origin.stage].data_key if rewind_data and origin else number,
            active=decision.active,
            weights=decision.weights,
        )
        self.stages.append(stage)
        self.position = Position(stage.update, 0.0, self.position.tokens, False)
        self.here = decision.start
        if origin is not None:
            self.evaluations.append(Evaluation(number, origin.snapshot_id, stage.update, 0.0, origin.scores))
        self.clock += 1

    # What policies read -----------------------------------------------------------------------------------

    @property
    def stage(self) -> Stage:
        if not self.stages:
            raise TrainingError(
                describe("history", "no stage is open", todo="obey the policy's first NewStage")
            )
        return self.stages[-1]

    @property
    def active(self) -> frozenset[str]:
        """The current stage's active tasks, less one dropped by a roll-back that no new stage has followed
        yet."""
        last = self.last_decision
        dropped = {last.drop} if isinstance(last, RollBack) else set()
        return frozenset(self.stages[-1].active if self.stages else self.tasks) - dropped

    @property
    def last_decision(self) -> Decision | None:
        return self.decisions[-1].decision if self.decisions else None

    @property
    def ended_by(self) -> Code | None:
        """What ended the run, or None while it goes on."""
        last = self.last_decision
        return last.code if isinstance(last, Stop) else None

    def answered(self, kind: type) -> bool:
        """Whether a decision of this kind has been taken since the last record."""
        return any(isinstance(t.decision, kind) for t in self.decisions if t.clock == self.clock)

    def of_stage(self, number: int) -> list[Evaluation]:
        return [e for e in self.evaluations if e.stage == number]

    def window(self) -> list[Evaluation]:
        """Evaluations of the unbroken stretch that ends here: back over stages that followed on with the same
        active tasks."""
        first = len(self.stages) - 1
        while (
            first > 0
            and self.stages[first].follows
            and self.stages[first - 1].active == self.stages[first].active
        ):
            first -= 1
        found: list[Evaluation] = []
        for evaluation in self.evaluations:
            if evaluation.stage >= first and not (found and found[-1].snapshot_id == evaluation.snapshot_id):
                found.append(evaluation)
        return found

    def at_evaluation(self) -> Evaluation | None:
        """The evaluation made at exactly this position of this stage, if there is one."""
        last = self.evaluations[-1] if self.evaluations else None
        if (
            last is None
            or not self.stages
            or last.stage != self.stage.number
            or last.update != self.position.update
        ):
            return None
        return last

    def evaluation_of(self, snapshot_id: str) -> Evaluation:
        """The evaluation that named this snapshot. Raises TrainingError for a name none has given."""
        for evaluation in self.evaluations:
            if evaluation.snapshot_id == snapshot_id:
                return evaluation
        raise TrainingError(
            describe("history", "no such moment", expected="one that was evaluated", got=snapshot_id)
        )

    def measured_tasks(self) -> list[str]:
        """Tasks with a defined score at least once. A task that never had one (no validation rows) counts
        nowhere."""
        return [
            t
            for t in sorted(self.tasks)
            if any(t in e.scores and e.scores[t].defined for e in self.evaluations)
        ]

    def best(self, since_stage: int = 0, pool: Pool = "items") -> Evaluation | None:
        """The evaluation with the best score over all measured tasks, the earliest of equals; None when none
        is defined."""
        tasks = self.measured_tasks()
        found, top = None, -math.inf
        for evaluation in self.evaluations:
            value = pooled(evaluation.scores, tasks, pool) if evaluation.stage >= since_stage else math.nan
            if value > top:  # strict, and False for NaN
                found, top = evaluation, value
        return found

    # JSON -------------------------------------------------------------------------------------------------

    def values(self) -> dict[str, Any]:
        """The whole table as strict JSON: what is not a finite number becomes null."""
        return history_json.dump(vars(self))

    @staticmethod
    def load(values: Mapping[str, Any]) -> "History":
        """The way back; null is NaN again. Raises TrainingError for a decision this version does not know."""
        return History(**history_json.parse(values))


def due(before: Fraction, after: Fraction, per_epoch: int) -> bool:
    """Whether a multiple of 1/per_epoch epochs was reached on the way from `before` to `after`; per_epoch 1 =
    an epoch's end.

    In an epoch of U updates that is after update ceil(k·U/per_epoch), k = 1 … per_epoch, each once where they
    coincide.
    """
    return per_epoch > 0 and math.floor(after * per_epoch) > math.floor(before * per_epoch)


def shares(
    tasks: Mapping[str, int], weights: Mapping[str, float] | None, active: Iterable[str]
) -> dict[str, float]:
    """Probability of drawing each task: rate · number of samples, normalised over the tasks trained."""
    rates = dict.fromkeys(active, 1.0) if weights is None else dict(weights)
    mass = {task: rate * tasks[task] for task, rate in rates.items()}
    total = math.fsum(mass.values())
    if not (math.isfinite(total) and total > 0) or min(mass.values()) < 0:
        raise TrainingError(
            describe(
                "mixture",
                "weights cannot be sampled from",
                expected="finite, not negative, not all 0",
                got=rates,
            )
        )
    return {task: m / total for task, m in mass.items()}
