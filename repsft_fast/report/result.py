"""result.json: how a run ended, in one small file that scripts and `torchrun` users can read."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from repsft_fast.errors import RepsftError, describe
from repsft_fast.files import replace_file
from repsft_fast.report.records import read_json

FILE = "result.json"
Code = Literal[
    "token_accuracy", "plateau", "budget", "policy",
    "interrupted", "terminated", "nonfinite", "out_of_memory", "error",
]  # fmt: skip
# Ending by a rule or by the budget is success. The process of an interrupted run exits like any interrupted
# program.
EXIT_CODES: dict[str, int] = {
    "token_accuracy": 0,
    "plateau": 0,
    "budget": 0,
    "policy": 0,
    "interrupted": 130,
    "terminated": 143,
    "nonfinite": 1,
    "out_of_memory": 1,
    "error": 1,
}


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    code: Code
    """Which rule, limit or misfortune ended it."""
    reason: str
    """The same in words, with the figures that decided."""
    folder: str
    """The run's folder."""
    updates: int
    """Optimizer steps applied."""
    epochs: float
    """Passes over the training data."""
    token_accuracy: float | None
    """Over the last whole epoch's training pass, under the weights as they were then (or the probe at its
    end); None before the first."""
    seconds: float
    """Wall time in the loop."""
    tokens: int
    """Real tokens passed through the model."""
    trained_tokens: int
    """Those that carried loss."""
    seed: int
    loss: float | None = None
    """Mean loss of the last whole epoch."""
    validation_loss: float | None = None
    saved_token_accuracy: float | None = None
    """The saved model's own: one forward pass at the end over the probe's, or at most 200, training samples
    (`more.saved_token_accuracy` has the counts). None where the run was cut short or memory ran out."""
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Per task: loss, token_accuracy, correct, total."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of this package, Python, torch, transformers, and the device's name."""
    more: dict[str, Any] = field(default_factory=dict)
    """Whatever else a part of the trainer has to tell."""

    @property
    def success(self) -> bool:
        return self.exit_code == 0

    @property
    def exit_code(self) -> int:
        number = self.more.get("signal")  # which one it was that ended the run
        return 128 + number if self.code == "terminated" and type(number) is int else EXIT_CODES[self.code]


def write(result: RunResult) -> Path:
    """Write result.json into the run's folder: whole or not at all, and on the disk when this returns.

    A number that is not finite is null in it, and `more.not_finite` names its place: it is no reason to lose
    the others.
    """
    target = Path(result.folder) / FILE
    places: list[str] = []
    values = _writable({"success": result.success, **asdict(result)}, "", places)
    if places:
        values["more"]["not_finite"] = places
    text = json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    # half a surrogate pair (in a path) as JSON spells it
    data = text.encode("utf-8", "backslashreplace")
    # an error after which the file stood there would make a success of a run that failed
    replace_file(target, data, FILE, durable=False)
    return target


def read(folder: Path | str) -> RunResult:
    """The result of a run. Raises RepsftError, at once, when there is none or it is damaged."""
    path = Path(folder) / FILE
    try:
        values = read_json(path)
        if not isinstance(values.get("code"), str) or values["code"] not in get_args(Code):
            raise ValueError("it is not a run's result")
        wrong = [name for name, kind in _KINDS.items() if name in values and not _is_a(values[name], kind)]
        if wrong:
            raise ValueError(f"{wrong[0]} is not what a run writes there")
        known = {f.name for f in fields(RunResult)}
        return RunResult(**{name: value for name, value in values.items() if name in known})
    except (OSError, ValueError, TypeError) as error:
        raise RepsftError(
            describe(str(path), f"cannot be read ({error})", todo="is this a run's folder?")
        ) from error


_KINDS: dict[str, Any] = {
    "reason": str, "folder": str, "updates": int, "epochs": int | float, "token_accuracy": int | float | None,
    "seconds": int | float, "tokens": int, "trained_tokens": int, "seed": int, "loss": int | float | None,
    "validation_loss": int | float | None, "saved_token_accuracy": int | float | None,
    "tasks": dict, "versions": dict, "more": dict,
}  # fmt: skip


def _is_a(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _writable(value: Any, place: str, places: list[str]) -> Any:
    """The value as JSON can write it. places: gets the names of the numbers that are not finite."""
    if isinstance(value, dict):
        return {
            str(name): _writable(one, f"{place}.{name}" if place else str(name), places)
            for name, one in value.items()
        }
    if isinstance(value, list | tuple):
        return [_writable(one, f"{place}[{number}]", places) for number, one in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        places.append(place)
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    return _writable(value.item(), place, places) if getattr(value, "ndim", None) == 0 else str(value)
