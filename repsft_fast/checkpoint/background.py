"""Saves in the background: training goes on while one thread writes a frozen snapshot."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from repsft_fast.checkpoint.pieces import Piece
from repsft_fast.checkpoint.retention import prune
from repsft_fast.checkpoint.seconds import SaveSeconds
from repsft_fast.checkpoint.writer import leave_word, save, writing_folder
from repsft_fast.errors import CheckpointError, describe
from repsft_fast.state import JSON, decode_values, encode_values


@dataclass(frozen=True)
class Outcome:
    """How one save ended."""

    generation: int
    seconds: float  # in the background, all told
    path: Path | None = None
    error: CheckpointError | None = None
    deleted: tuple[int, ...] = ()
    spent: SaveSeconds = field(default_factory=SaveSeconds)  # what they went into


class BackgroundWriter:
    """Writes generations one at a time, follows the branch, and deletes old ones after each success.

    parent          the generation the run comes from now: set it after a resume or a revert
    waited_seconds  of the training loop, here, for saves to end. No part of what a save itself costs it: the
                    copy it is of
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        parent: int | None = None,
        keep_last: int = 2,
        keep_best: int = 0,
        rank: int = 0,
        world_size: int = 1,
        attempt: str = "",
        identity: Mapping[str, JSON] | None = None,
    ):
        self.folder, self.parent = Path(folder), parent
        self.waited_seconds = 0.0
        self._keep = {"keep_last": keep_last, "keep_best": keep_best}
        self._ranks: dict[str, Any] = {"rank": rank, "world_size": world_size, "attempt": attempt}
        self._identity = identity
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._running: tuple[Future[Outcome], Callable[[], None] | None] | None = None
        self._generation = -1  # of the save under way
        self._ended: list[Outcome] = []

    def submit(
        self,
        generation: int,
        tensors: Mapping[str, Tensor | Piece],
        values: Mapping[str, JSON],
        *,
        done: Callable[[], None] | None = None,
        protect: Collection[int] = (),
        **more: Any,
    ) -> None:
        """Starts a save of frozen tensors. `done` is called in this thread, by a later call here, when they
        may change again.

        Waits for the save before it. `more` goes to `save`: write_model, score. On several ranks all pass the
        same number.
        """
        self.wait()
        frozen = decode_values(encode_values(values))
        future = self._thread.submit(
            self._save, generation, tensors, frozen, self.parent, tuple(protect), more
        )
        self._running, self._generation = (future, done), generation

    def _save(
        self,
        generation: int,
        tensors: Mapping[str, Tensor | Piece],
        values: dict,
        parent: int | None,
        protect: tuple,
        more: dict,
    ) -> Outcome:
        start, spent = time.perf_counter(), SaveSeconds()
        more = {"parent": parent, "identity": self._identity, "seconds": spent, **self._ranks, **more}
        try:
            path = save(self.folder, generation, tensors, values, **more)
        except CheckpointError as error:
            return Outcome(generation, time.perf_counter() - start, error=error, spent=spent)
        deleted: list[int] = []
        problem = None
        if self._ranks["rank"] == 0:
            try:
                deleted = prune(self.folder, **self._keep, protect=protect)
            except OSError as error:
                problem = CheckpointError(
                    describe(
                        str(self.folder),
                        "old generations could not be deleted",
                        got=error,
                        todo="delete them by hand",
                    )
                )
        return Outcome(generation, time.perf_counter() - start, path, problem, tuple(deleted), spent)

    def poll(self) -> list[Outcome]:
        """Saves that ended since the last call. An Outcome with a path was written whole, whatever its error
        says."""
        if self._running is not None and self._running[0].done():
            self._finish()
        ended, self._ended = self._ended, []
        return ended

    def wait(self) -> None:
        """Waits for the save under way, if any; the time is counted in `waited_seconds`."""
        if self._running is not None:
            start = time.perf_counter()
            self._running[0].exception()
            self.waited_seconds += time.perf_counter() - start
            self._finish()

    def _finish(self) -> None:
        assert self._running is not None
        (future, done), self._running = self._running, None
        if done is not None:
            done()
        outcome = future.result()
        if outcome.path is not None:
            self.parent = outcome.generation
        self._ended.append(outcome)

    def give_up(self, reason: str) -> None:
        """Another rank is gone: the save under way does not wait for a part that will not come. It fails, or
        was whole."""
        if self._running is not None:
            for rank in range(self._ranks["world_size"]):
                leave_word(
                    writing_folder(self.folder, self._generation, self._ranks["attempt"]), rank, reason
                )

    def close(self) -> list[Outcome]:
        """Waits, ends the thread and returns the last outcomes."""
        self.wait()
        self._thread.shutdown(wait=True)
        return self.poll()
