"""result.json: how a run ended, in one small file that scripts and `torchrun` users can read."""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args
from uuid import uuid4

from repsft_fast.errors import RepsftError, describe

FILE = "result.json"
Code = Literal[
    "token_accuracy", "plateau", "budget", "policy", "interrupted", "terminated", "nonfinite", "out_of_memory", "error"
]  # fmt: skip
# Ending by a rule or by the budget is success. The process of an interrupted run exits like any interrupted program.
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
    """Over the last whole epoch's training pass (or the probe); None before the first."""
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
        return EXIT_CODES[self.code]


def write(result: RunResult) -> Path:
    """Write result.json into the run's folder: whole or not at all, and on the disk when this returns."""
    folder = Path(result.folder)
    target = folder / FILE
    text = json.dumps({"success": result.success, **asdict(result)}, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    written = folder / f".{FILE}.{uuid4().hex}"
    try:
        with open(written, "x", encoding="utf-8") as file:  # whose mode is the umask's
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(written, target)
    except BaseException:
        written.unlink(missing_ok=True)
        raise
    return target


def read(folder: Path | str) -> RunResult:
    """The result of a run. Raises RepsftError when there is none or it is damaged."""
    path = Path(folder) / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("code") not in get_args(Code):
            raise ValueError("it is not a run's result")
        known = {f.name for f in fields(RunResult)}
        return RunResult(**{name: value for name, value in values.items() if name in known})
    except (OSError, ValueError, TypeError) as error:
        raise RepsftError(describe(str(path), f"cannot be read ({error})", todo="is this a run's folder?")) from error
