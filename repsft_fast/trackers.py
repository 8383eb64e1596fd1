"""Experiment trackers by name: wandb, trackio, tensorboard. None by default, none imported unless asked for.

Only rank 0 makes them. Each works in a thread of its own: one that breaks during a run is switched off and
said once, one that blocks is left behind. None may end the run or hold it up.
"""

import importlib
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from repsft_fast.errors import ConfigError, describe

START_S, FINISH_S = 60.0, 120.0  # a tracker that does not answer holds the run up for so long, once each
MOST_WAITING = 4096  # records that a tracker may be behind
MOST_WORDS = 500  # of an error
# name → (module that must be importable, what to install)
PACKAGES = {
    "wandb": ("wandb", "pip install wandb"),
    "trackio": ("trackio", "pip install trackio"),
    "tensorboard": ("torch.utils.tensorboard", "pip install tensorboard"),
}


class Tracker(Protocol):
    def log(self, numbers: Mapping[str, float], update: int) -> None: ...

    def finish(self, summary: Mapping[str, Any]) -> None: ...


def check_there(names: Sequence[str]) -> None:
    """ConfigError naming every package that is missing, with the line that installs it."""
    if problems := [problem for name in names if (problem := _missing(name))]:
        raise ConfigError(problems)


class Trackers:
    """All trackers of a run as one. `log` takes the records of metrics.jsonl."""

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        settings: Mapping[str, Any],
        *,
        note: Callable[[str], None] = print,
    ):
        """Starts them. Raises ConfigError as `check_there`."""
        check_there(names)
        self._note = note
        self._open = {name: _Apart(name, partial(_MAKERS[name], folder, settings)) for name in names}
        for name, tracker in self._open.items():
            if not tracker.wait_for(START_S):
                note(
                    f"log.trackers: {name} has not started within {START_S:g} s; the run goes on, and tells"
                    " it when it does"
                )
        self._drop_failed()

    def log(self, record: Mapping[str, Any]) -> None:
        """One record of metrics.jsonl: its numbers under its kind (`update/loss`, `epoch/tasks/boolq/loss`).
        Never waits."""
        self._drop_failed()
        kind = str(record.get("kind", "update"))
        numbers = dict(
            flat_numbers({k: v for k, v in record.items() if k not in ("kind", "update")}, f"{kind}/")
        )
        if numbers:
            for name, tracker in self._open.items():
                if not tracker.log(numbers, int(record.get("update") or 0)) and tracker.left_out == 1:
                    self._note(
                        f"log.trackers: {name} does not keep up; what it has no room for is in metrics.jsonl"
                        " only"
                    )

    def finish(self, summary: Mapping[str, Any], patience_s: float = FINISH_S) -> None:
        """Hands over how the run ended and closes them. One that stands still for so many seconds is left
        where it is."""
        for name, tracker in self._open.items():
            if not tracker.finish(summary, patience_s):
                self._note(
                    f"log.trackers: {name} has not ended within {patience_s:g} s; metrics.jsonl has"
                    " everything"
                )
        self._drop_failed()
        self._open.clear()

    def _drop_failed(self) -> None:
        for name, tracker in list(self._open.items()):
            if tracker.failed:
                del self._open[name]
                self._note(
                    f"log.trackers: {name} is switched off ({tracker.failed}); metrics.jsonl has everything"
                )


class _Apart:
    """One tracker in a thread of its own: nothing that it does, or does not, ends the run or holds it up for
    long.

    failed: what it raised, whatever that was; it is asked nothing more then. left_out: records there was no
    room for.
    """

    def __init__(self, name: str, make: Callable[[], Tracker]):
        self.failed, self.left_out = "", 0
        self.tracker: Tracker | None = None
        self._jobs: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(MOST_WAITING)
        self._started, self._ended = threading.Event(), threading.Event()
        self._done = 0  # jobs, to see whether it moves
        self._thread = threading.Thread(target=self._run, args=(make,), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def wait_for(self, seconds: float) -> bool:
        """Whether it has started, or failed to, within so many seconds."""
        return self._started.wait(seconds)

    def log(self, numbers: Mapping[str, float], update: int) -> bool:
        return self._hand_over(lambda tracker: tracker.log(numbers, update))

    def finish(self, summary: Mapping[str, Any], patience_s: float) -> bool:
        """Whether it took all and ended. Waited for as long as it moves, five times as long at most."""
        ends_at = time.monotonic() + 5 * patience_s
        self._hand_over(lambda tracker: tracker.finish(summary), patience_s)
        self._hand_over(None, patience_s)
        done = -1
        while not self._ended.is_set() and done != self._done and time.monotonic() < ends_at:
            done = self._done
            self._ended.wait(patience_s)
        return self._ended.is_set()

    def _hand_over(self, job: Callable[[Tracker], None] | None, patience_s: float = 0.0) -> bool:
        try:
            self._jobs.put(job, block=patience_s > 0, timeout=patience_s)
        except queue.Full:
            self.left_out += 1
            return False
        return True

    def _run(self, make: Callable[[], Tracker]) -> None:
        try:
            self.tracker = make()
            self._started.set()
            while (job := self._jobs.get()) is not None:
                job(self.tracker)
                self._done += 1
        except BaseException as error:  # a tracker's server, disk or sys.exit
            self.failed = failed_with(error)
        finally:
            self._started.set()
            self._ended.set()


def failed_with(error: BaseException) -> str:
    """An error in words that are few and cannot fail."""
    try:
        words = f"{type(error).__name__}: {error}"
    except Exception:
        words = type(error).__name__
    return words if len(words) <= MOST_WORDS else f"{words[:MOST_WORDS]}…"


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
    except Exception as error:  # it is not there, or what is there cannot be imported
        return describe(
            "log.trackers",
            f"{name} cannot be imported ({error})",
            todo=f"{install}, or drop it from log.trackers",
        )
    return None


class _Wandb:
    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        import wandb

        self._run = wandb.init(project="repsft", name=folder.name, dir=str(folder), config=dict(settings))

    def log(self, numbers: Mapping[str, float], update: int) -> None:
        # Several records share an update; wandb wants steps that only grow, so the update is a number among
        # the others.
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
