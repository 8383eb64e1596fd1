"""What a policy can decide. Eight words; the trainer obeys each in one place, and the table of decisions is JSON.

A policy reads the history and returns one decision. The trainer obeys it, records it, and asks again until it hears
Continue. So a decision never needs a second thought inside: a roll-back names the moment and who leaves, and the new stage that
follows it says how to go on.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from repsft_fast.errors import TrainingError, describe


@dataclass(frozen=True)
class Continue:
    """Train on. The only decision that is not recorded."""


@dataclass(frozen=True)
class RollBack:
    """Put the state of moment `to` back, whole, and take task `drop` (None: nobody) out of the active ones."""

    to: str
    drop: str | None


@dataclass(frozen=True)
class Reset:
    """What a new stage takes from its start moment, and what it does not."""

    optimizer: Literal["reset", "restore"] = "reset"  # new moments (zeros), or those of the start moment
    schedule: Literal["continue", "rewind"] = (
        "continue"  # the schedule's update goes on from the branch left, or from the start's
    )
    data: Literal["continue", "rewind"] = "continue"  # a fresh data order, or the order of the stage the start moment lies in


@dataclass(frozen=True)
class NewStage:
    """Begin a stage at moment `start` (None: from the state as it is, with no moment to name) on the `active` tasks.

    weights: sampling rate of every task that is trained, active or rehearsed, relative to the natural mixture (1 = each
    sample once per epoch); None = 1 for every active task. `shares` turns rates into probabilities.
    """

    start: str | None
    active: tuple[str, ...]
    weights: dict[str, float] | None = None
    reset: Reset = Reset()


@dataclass(frozen=True)
class Reweight:
    """From the next update on, draw tasks with these rates (same meaning as NewStage.weights).

    It closes the running epoch plan.
    """

    weights: dict[str, float]


@dataclass(frozen=True)
class SkipSamples:
    """Leave these samples out of the backward pass of the epoch that begins now, and of that one only."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Probe:
    """Look one update ahead on each of these tasks, put the state back, and record the losses before and after."""

    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Decay:
    """Start the schedule's decay now. updates: its length; None = the schedule's own."""

    reason: str
    updates: int | None = None


@dataclass(frozen=True)
class Stop:
    """End the run. Ending by rule is success."""

    reason: str


Decision = Continue | RollBack | NewStage | Reweight | SkipSamples | Probe | Decay | Stop
KINDS: dict[str, type] = {k.__name__: k for k in (Continue, RollBack, NewStage, Reweight, SkipSamples, Probe, Decay, Stop)}


def to_json(decision: Decision) -> dict[str, Any]:
    """The decision as JSON, its word under "kind"."""
    return {"kind": type(decision).__name__, **asdict(decision)}


def from_json(values: dict[str, Any]) -> Decision:
    """The way back. Raises TrainingError for a word or a field this version does not know."""
    kind = KINDS.get(values.get("kind", ""))
    if kind is None:
        raise TrainingError(
            describe("policy table", "holds an unknown decision", expected=", ".join(KINDS), got=values.get("kind"))
        )
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if name != "kind"
    }
    unknown = set(given) - {f.name for f in fields(kind)}
    if unknown:
        raise TrainingError(describe("policy table", f"{kind.__name__} has unknown fields", got=sorted(unknown)))
    if kind is NewStage:
        given["reset"] = Reset(**given["reset"])
    return kind(**given)
