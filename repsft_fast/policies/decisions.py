"""What a policy can decide. Eight words; the trainer obeys each in one place, and the table of decisions is
JSON.

A policy reads the history and returns one decision. The trainer obeys it, records it, and asks again until it
hears Continue. So a decision never needs a second thought inside: a roll-back names the snapshot and who
leaves, and the new stage that follows it says how to go on. Where something depends on why a run ends it
depends on a code; the reason beside it is for people, and nobody reads anything out of it.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from repsft_fast.errors import TrainingError, describe

# What ends a run, as result.json says it: a rule on the training pass, a budget, or a mixture's own policy
Code = Literal["budget", "token_accuracy", "plateau", "policy"]


@dataclass(frozen=True)
class Continue:
    """Train on. The only decision that is not recorded."""


@dataclass(frozen=True)
class RollBack:
    """Put snapshot `to` back, whole, and take task `drop` (None: nobody) out of the active ones."""

    to: str
    drop: str | None


@dataclass(frozen=True)
class Reset:
    """What a new stage takes from its start snapshot, and what it does not."""

    optimizer: Literal["reset", "restore"] = "reset"  # Adam's moments: zeros, or those of the start snapshot
    # the schedule's update goes on from the branch left, or from the start's
    schedule: Literal["continue", "rewind"] = "continue"
    # a fresh data order, or the order of the stage the start snapshot lies in
    data: Literal["continue", "rewind"] = "continue"


@dataclass(frozen=True)
class NewStage:
    """Begin a stage at snapshot `start` (None: from the state as it is, which no evaluation has named) on the
    `active` tasks.

    weights: sampling rate of every task that is trained, active or rehearsed, relative to the natural mixture
    (1 = each sample once per epoch); None = 1 for every active task. `shares` turns rates into probabilities.
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
    """Look one update ahead on each of these tasks, put the state back, and record the losses before and
    after."""

    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Decay:
    """Start the schedule's decay now: the run ends when it is done."""

    code: Code  # of the Stop that follows
    reason: str  # why it starts
    updates: int | None = None  # its length; None = the schedule's own
    stop_reason: str | None = None  # why the run ended, once the decay is done; None = `reason` says it too


@dataclass(frozen=True)
class Stop:
    """End the run. Ending by rule is success."""

    code: Code
    reason: str


Decision = Continue | RollBack | NewStage | Reweight | SkipSamples | Probe | Decay | Stop
KINDS: dict[str, type] = {
    k.__name__: k for k in (Continue, RollBack, NewStage, Reweight, SkipSamples, Probe, Decay, Stop)
}


def to_json(decision: Decision) -> dict[str, Any]:
    """The decision as JSON, its word under "kind"."""
    return {"kind": type(decision).__name__, **asdict(decision)}


def from_json(values: dict[str, Any]) -> Decision:
    """The way back. Raises TrainingError for a word, a field or a code this version does not know."""
    kind = KINDS.get(values.get("kind", ""))
    if kind is None:
        raise TrainingError(
            describe(
                "policy table", "holds an unknown decision", expected=", ".join(KINDS), got=values.get("kind")
            )
        )
    # Tuples are lists in JSON; the records compare as they were only with tuples.
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if name != "kind"
    }
    # Left out silently, a field of a newer version would change what the run does.
    unknown = set(given) - {f.name for f in fields(kind)}
    if unknown:
        raise TrainingError(
            describe("policy table", f"{kind.__name__} has unknown fields", got=sorted(unknown))
        )
    if kind is NewStage:
        given["reset"] = Reset(**given["reset"])
    if kind in (Decay, Stop):
        given = _with_code(kind, given)
    return kind(**given)


def _with_code(kind: type, given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a Decay or Stop with their code, which the first versions did not write.

    Only their sentences tell it, and this is the one place that reads any. Those listed were the trainer's
    and the saturation rule's, for whom the end of a schedule is a budget's too; all others are of mixtures'
    policies.
    """
    if "code" in given:
        if given["code"] not in get_args(Code):
            expected = ", ".join(get_args(Code))
            raise TrainingError(
                describe("policy table", "holds an unknown code", expected=expected, got=given["code"])
            )
        return given
    reason = str(given["reason"])
    begins: dict[str, Code] = {
        "the budget ": "budget",
        "the schedule ": "budget",
        "token accuracy has not risen ": "plateau",
        "token accuracy ": "token_accuracy",
    }
    code = next((code for beginning, code in begins.items() if reason.startswith(beginning)), "policy")
    nearly = " is nearly spent"
    if kind is Decay and reason.endswith(nearly):
        given["stop_reason"] = f"{reason.removesuffix(nearly)} is spent"
    return {"code": code, **given}
