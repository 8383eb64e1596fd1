"""The rows of an epoch, planned, assembled and on their way to the device before they are asked for.

One thread packs the updates in their order and makes each row of this rank (`make`, as the loop would); at
most `depth` rows wait. On a GPU it puts the copy and what follows from it on a stream of its own, so that
neither the copy nor the host's work on it stands in the way of the row before. Whoever takes a row makes the
current stream wait for it, on the device; the host does not wait.

Who may touch what: the thread writes the rows it makes and the page-locked memory they travel from
(`data.staging`), which nobody else holds; a row that was handed over is not written any more. Nothing here is
state: a row depends on its update alone, so what is left when the plan ends, or no longer holds, is dropped,
and a resumed run makes it again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import torch

from repsft_fast.data.planned import PlannedRow, Update
from repsft_fast.row import Row

DEPTH = 4  # rows that wait; one would do on a fast host, and each is a few hundred KB of device memory
Make = Callable[[Update, PlannedRow], Row]


@dataclass(frozen=True)
class _Made:
    """A row and, on a GPU, the event behind which it is whole."""

    row: Row
    whole: Any = None  # torch.cuda.Event


class _Stopped(Exception):
    """The loop has left."""


class RowsAhead:
    """Iterates the updates of `updates` from `start` on; `rows_of` gives the rows of the one given last.

    A context manager: leaving it stops the thread and drops the rows that wait. An error of the thread is
    raised where its update or row is asked for. waited_s: seconds that the loop stood still for the thread.
    """

    def __init__(
        self,
        updates: Sequence[Update],
        start: int,
        make: Make,
        *,
        rank: int = 0,
        depth: int = DEPTH,
        stream: Any = None,
    ):
        """make: the row of an update and its plan; called in the thread. stream: torch.cuda.Stream for its
        work on the device, which waits for what is queued there now; None = the host's memory is the
        device's."""
        self._updates, self._start, self._make, self._rank = updates, start, make, rank
        self._stream = stream
        self._ready: SimpleQueue[Update | _Made | BaseException | None] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()  # a word for every row that may be made
        for _ in range(depth):
            self._room.put(None)
        self._given: Update | None = None  # whose rows come next
        self._failed: BaseException | None = None
        self._left = False
        self.waited_s = 0.0
        self._thread = threading.Thread(target=self._run, name="rows", daemon=True)

    # In the loop --------------------------------------------------------------------------------------

    def __enter__(self) -> RowsAhead:
        if self._stream is not None:  # the tokens that rows are gathered from were put there
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._given, self._left = None, True
        self._room.put(None)
        self._thread.join()
        while True:
            try:
                self._ready.get_nowait()
            except Empty:
                return

    def __iter__(self) -> Iterator[Update]:
        while True:
            got = self._next()
            if got is None:
                return
            if isinstance(got, Update):
                self._given = got
                yield got
            else:  # a row of an update that was passed over
                self._room.put(None)

    def rows_of(self, update: Update) -> Iterator[Row] | None:
        """This rank's rows of the update that was given last, once; None for any other."""
        if update is not self._given:
            return None
        self._given = None
        return self._rows(len(update.ranks[self._rank]))

    def _rows(self, count: int) -> Iterator[Row]:
        for _ in range(count):
            made = self._next()
            assert isinstance(made, _Made)
            if made.whole is not None:
                _hand_over(made)
            self._room.put(None)
            yield made.row

    def take_waited(self) -> float:
        """Seconds waited since it was last asked."""
        waited, self.waited_s = self.waited_s, 0.0
        return waited

    def _next(self) -> Update | _Made | None:
        if self._failed is not None:
            raise self._failed
        try:
            got = self._ready.get_nowait()
        except Empty:
            asked = time.perf_counter()
            got = self._ready.get()
            self.waited_s += time.perf_counter() - asked
        if isinstance(got, BaseException):
            self._failed = got
            raise got
        return got

    # In the thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                for i in range(self._start, len(self._updates)):
                    if self._left:
                        return
                    update = self._updates[i]
                    self._ready.put(update)
                    for planned in update.ranks[self._rank]:
                        self._ready.put(self._one(update, planned))
            self._ready.put(None)
        except _Stopped:
            pass
        except BaseException as error:
            self._ready.put(error)

    def _one(self, update: Update, planned: PlannedRow) -> _Made:
        self._room.get()
        if self._left:
            raise _Stopped
        row = self._make(update, planned)
        return _Made(row, None if self._stream is None else self._stream.record_event())


def _hand_over(made: _Made) -> None:
    """The current stream goes on when the row is whole, and the allocator keeps its memory until that stream
    has read it."""
    row = made.row
    current = torch.cuda.current_stream(row.tokens.device)
    current.wait_event(made.whole)
    for tensor in (row.tokens, row.targets, row.weights):  # the other parts lie beside the weights
        tensor.record_stream(current)
