"""What the trainer needs of a policy: the one list of questions it asks. It knows no policy by its name."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

from repsft_fast.policies.decisions import Decision
from repsft_fast.policies.history import History


class Policy(Protocol):
    """A policy is settings and pure functions of the history: it holds no state of its own.

    The facts of the class are known before a run has data; a policy that says nothing of one has the value
    given here. docs/policies.md has the loop that asks.
    """

    settings_type: ClassVar[type]
    """The dataclass that the class is called with: `problems()` names what cannot be used. A field that
    `mixture.*` has under the same name is filled from there, `weights` with each task's sampling rate."""
    needs_losses: ClassVar[bool] = False
    """History.epoch_ended wants the mean loss of every sample of the epoch, skipped ones too."""
    looks_ahead: ClassVar[bool] = False
    """It decides a Probe: one more snapshot is held, of the whole state."""
    needs_tasks: ClassVar[bool] = True
    """It has nothing to decide unless the samples' tasks are named."""
    names_result: ClassVar[bool] = True
    """`result` chooses among the evaluations; otherwise the run's result is its last state, or the best
    validation's."""

    settings: Any
    """Of `settings_type`."""
    evaluations_per_epoch: int
    """How often every task is scored on its validation rows; 0: never."""

    def __init__(self, settings: Any = None):
        """settings: None = its defaults."""
        self.settings = self.settings_type() if settings is None else settings
        self.evaluations_per_epoch = self.settings.evaluations_per_epoch

    @property
    def accuracy_target(self) -> float | None:
        """The training pass's token accuracy that decides; None: none does."""
        return None

    def most_rollouts(self, tasks: int) -> tuple[int, str]:
        """How many times compute_budget epochs a run over so many tasks lasts at most; the same in words."""
        return 1, "one run"

    def at_start(self, rows: Mapping[str, int], shares: bool) -> list[str]:
        """What is to be said before training of what it can decide. rows: validation rows of each task;
        shares: their scores are right or wrong."""
        return []

    def wants_own(self, history: History, correct: int, total: int) -> bool:
        """Whether the epoch that ends now, with these counts of its training pass, wants a look at the model
        itself (Epoch.own). The same on every rank."""
        return False

    def decide(self, history: History, active: frozenset[str]) -> Decision:
        """The next decision, the same on every rank. Asked again after each one until it is Continue or
        Stop."""
        ...

    def next_call(self, history: History) -> int | None:
        """The next update at which to ask even if nothing has been recorded; None: nothing is decided between
        evaluations and epochs' ends."""
        return None

    def kept(self, history: History, active: frozenset[str]) -> set[str]:
        """Snapshots that must stay available; every other one may be forgotten."""
        ...

    def most_kept(self, tasks: int) -> int:
        """The most snapshots `kept` ever names at once in a mixture of so many tasks: as many must find
        room."""
        ...

    def result(self, history: History) -> str | None:
        """The snapshot that is the run's result; None: the state at the end."""
        ...


def trained(tasks: Iterable[str], weights: Mapping[str, float]) -> frozenset[str]:
    """Those of the tasks that are ever drawn: a weight of 0 leaves a task out of training, and it is still
    scored."""
    return frozenset(task for task in tasks if weights.get(task, 1.0) > 0)
