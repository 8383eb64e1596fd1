"""The rows of the table policies read: what was measured, decided and opened, each as it happened."""

from dataclasses import dataclass

from repsft_fast.policies.decisions import Decision
from repsft_fast.policies.statistics import Score

KEEP_LOSSES = 5  # epochs whose per-sample losses stay in the table: three second differences need five


@dataclass(frozen=True)
class Evaluation:
    """All tasks scored at one point of training, which has a name whether a copy of its state is kept or not.

    A stage's first one (epochs 0) repeats its start's.
    """

    stage: int
    snapshot_id: str
    update: int  # the schedule's update: updates done on this branch as Reset.schedule counts them
    epochs: float  # epochs of the active mixture since the stage's start
    scores: dict[str, Score]


@dataclass(frozen=True)
class Epoch:
    """The training pass over one whole epoch, as it ended."""

    clock: int
    stage: int
    update: int
    epochs: float
    tokens: dict[str, tuple[int, int]]  # task → (correct, total) trained tokens
    losses: dict[int, float] | None  # sample id → its mean loss, for IES; dropped after KEEP_LOSSES epochs
    # (correct, total) of the model itself at the end, on the same training samples each time; None: no look
    own: tuple[int, int] | None = None


@dataclass(frozen=True)
class Probed:
    """What a Probe found: mean loss of each task before and after one update on it."""

    clock: int
    stage: int
    update: int
    losses: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Stage:
    """One stretch of training with fixed active tasks."""

    number: int  # 0, 1, …
    start: str | None  # the snapshot it began at
    follows: bool  # began where the stage before it ended (no roll-back)
    update: int  # the schedule's update at its start
    data_key: int  # which data order: the `stage` argument of the plan
    active: tuple[str, ...]
    weights: dict[str, float] | None


@dataclass(frozen=True)
class Taken:
    """A decision and when it was taken."""

    clock: int
    stage: int
    update: int
    decision: Decision


@dataclass
class Position:
    """Where training stands. The trainer keeps it current with History.tick; reading it needs no device."""

    update: int = 0
    epochs: float = 0.0  # since the stage's start
    tokens: int = 0  # real tokens trained, discarded branches included
    schedule_finished: bool = False  # the learning rate has come to its end
