"""Experiment trackers by name: wandb, trackio, tensorboard. None by default, none imported unless asked for.

Only rank 0 makes them. A tracker that breaks during a run is switched off and said once: it must never end the run.
"""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from repsft_fast.errors import ConfigError, describe

# name → (module that must be importable, what to install)
PACKAGES = {
    "wandb": ("wandb", "pip install wandb"),
    "trackio": ("trackio", "pip install trackio"),
    "tensorboard": ("torch.utils.tensorboard", "pip install tensorboard"),
}


class Tracker(Protocol):
    def log(self, numbers: Mapping[str, float], update: int) -> None: ...

    def finish(self, summary: Mapping[str, Any]) -> None: ...


class Trackers:
    """All trackers of a run as one. `log` takes the records of metrics.jsonl."""

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any], *, note: Callable[[str], None] = print):
        """Starts them. Raises ConfigError naming every package that is missing, with the line that installs it."""
        problems = [problem for name in names if (problem := _missing(name))]
        if problems:
            raise ConfigError(problems)
        self._note = note
        self._open: dict[str, Tracker] = {}
        for name in names:
            self._try(name, partial(self._start, name, folder, settings))

    def log(self, record: Mapping[str, Any]) -> None:
        """One record of metrics.jsonl: its numbers under its kind (`update/loss`, `epoch/tasks/boolq/loss`)."""
        kind = str(record.get("kind", "update"))
        numbers = dict(flat_numbers({k: v for k, v in record.items() if k not in ("kind", "update")}, f"{kind}/"))
        if numbers:
            for name, tracker in list(self._open.items()):
                self._try(name, partial(tracker.log, numbers, int(record.get("update") or 0)))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Hands over how the run ended and closes them."""
        for name, tracker in list(self._open.items()):
            self._try(name, partial(tracker.finish, summary))
        self._open.clear()

    def _start(self, name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        self._open[name] = _MAKERS[name](folder, settings)

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a tracker's server or disk; whatever it is, the run goes on
            self._open.pop(name, None)
            self._note(f"log.trackers: {name} is switched off ({type(error).__name__}: {error}); metrics.jsonl has everything")


def flat_numbers(record: Mapping[str, Any], above: str = "") -> list[tuple[str, float]]:
    """The finite numbers of a nested record under slashed names; texts, nulls and NaN are left out."""
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        if isinstance(value, Mapping):
            found += flat_numbers(value, f"{above}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found.append((f"{above}{key}", value))
    return found


def _missing(name: str) -> str | None:
    if name not in PACKAGES:
        return describe("log.trackers", "is not a tracker", expected=", ".join(PACKAGES), got=name)
    module, install = PACKAGES[name]
    try:
        importlib.import_module(module)
    except ImportError as error:
        return describe("log.trackers", f"{name} cannot be imported ({error})", todo=f"{install}, or drop it from log.trackers")
    return None


class _Wandb:
    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        import wandb

        self._run = wandb.init(project="repsft", name=folder.name, dir=str(folder), config=dict(settings))

    def log(self, numbers: Mapping[str, float], update: int) -> None:
        # Several records share an update; wandb wants steps that only grow, so the update is a number among the others.
        self._run.log({**numbers, "update": update})

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish()


class _Trackio:
    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        import trackio

        self._run = trackio.init(project="repsft", name=folder.name, config=dict(settings))

    def log(self, numbers: Mapping[str, float], update: int) -> None:
        self._run.log({**numbers, "update": update})

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, numbers: Mapping[str, float], update: int) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, update)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._writer.close()


_MAKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "wandb": _Wandb,
    "trackio": _Trackio,
    "tensorboard": _TensorBoard,
}
