"""Rows made by a thread: the same ones, in order, few at a time, and gone when the loop leaves."""

import contextlib
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from repsft_fast.data.plan import Plan
from repsft_fast.data.rows_ahead import RowsAhead
from repsft_fast.data.sample import Sample
from repsft_fast.data.store import TokenStore

DRAW = np.random.default_rng(0)
SAMPLES = [
    Sample(DRAW.integers(0, 50, n).tolist(), [False, *[True] * (n - 1)]) for n in DRAW.integers(2, 20, 30)
]
STORE = TokenStore(SAMPLES, "cpu")


def make(update, planned):
    return STORE.row(planned, denominator=update.denominator, average="sample")


def epoch(**changes):
    made = Plan(
        STORE.index, **{"seed": 7, "row_tokens": 32, "bucket_tokens": 8, "batch_samples": 6, **changes}
    )
    return made.epoch(0, 0)


def same(row, other):
    return all(
        torch.equal(value, getattr(other, name))
        if isinstance(value, torch.Tensor)
        else value == getattr(other, name)
        for name, value in vars(row).items()
    )


def settled(seen, seconds=0.05):
    """What the thread has done once it does no more."""
    while True:
        count = len(seen)
        time.sleep(seconds)
        if len(seen) == count:
            return count


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("depth", [1, 2, 100])
@pytest.mark.parametrize("start", [0, 3, 5])
def test_the_same_updates_and_rows_bit_for_bit(start, depth, ranks):
    updates, rank = epoch(ranks=ranks), ranks - 1
    seen = []
    with RowsAhead(updates, start, make, rank=rank, depth=depth) as ahead:
        for update in ahead:
            rows = list(ahead.rows_of(update))
            expected = [make(update, planned) for planned in update.ranks[rank]]
            assert len(rows) == len(expected)
            assert all(map(same, rows, expected))
            seen.append(update.cursor.update)
    assert seen == list(range(start, len(updates)))
    assert len(updates) == 5


def test_no_more_than_depth_wait():
    made = []
    updates = epoch(batch_samples=1)
    with RowsAhead(updates, 0, lambda *which: made.append(1) or make(*which), depth=3) as ahead:
        for taken, update in enumerate(ahead, start=1):
            if taken < 6:
                assert settled(made) == taken + 2
            list(ahead.rows_of(update))
    assert len(made) == 30


def test_rows_of_an_update_that_is_passed_over_are_dropped_and_make_room():
    updates = epoch()
    assert max(len(update.ranks[0]) for update in updates) > 1
    with RowsAhead(updates, 0, make, depth=1) as ahead:
        for number, update in enumerate(ahead):
            if number % 2:
                rows = list(ahead.rows_of(update))
                assert all(map(same, rows, [make(update, planned) for planned in update.ranks[0]]))
            elif number == 2:  # left in the middle of it
                assert same(next(ahead.rows_of(update)), make(update, update.ranks[0][0]))


def test_rows_are_given_once_and_of_the_update_given_last_alone():
    updates = epoch()
    with RowsAhead(updates, 0, make) as ahead:
        given = iter(ahead)
        first = next(given)
        assert ahead.rows_of(updates[0]) is None, "equal, and not the one that was given"
        assert len(list(ahead.rows_of(first))) == len(first.ranks[0])
        assert ahead.rows_of(first) is None
        next(given)
        assert ahead.rows_of(first) is None


@pytest.mark.parametrize("leave", ["break", "error", "before any", "with a row under way"])
def test_leaving_stops_the_thread_and_makes_no_more_than_the_row_under_way(leave):
    made, go = [], threading.Event()

    def slow(update, planned):
        if leave == "with a row under way" and len(made) == 2:
            go.wait(10)
        made.append(1)
        return make(update, planned)

    with contextlib.suppress(KeyError), RowsAhead(epoch(batch_samples=1), 0, slow, depth=4) as ahead:
        assert ahead._thread.is_alive()
        for update in ahead if leave != "before any" else ():
            list(ahead.rows_of(update))
            if leave == "with a row under way":
                threading.Timer(0.05, go.set).start()
            if leave == "error":
                raise KeyError
            break
    assert not ahead._thread.is_alive()
    assert len(made) <= (3 if leave == "with a row under way" else 6)
    assert ahead._ready.empty(), "rows that wait hold memory of the device"


@pytest.mark.parametrize("kind", [ValueError, torch.OutOfMemoryError, KeyboardInterrupt])
def test_an_error_of_a_row_is_raised_where_the_row_is_asked_for(kind):
    made = []

    def third(update, planned):
        made.append(1)
        if len(made) == 3:
            raise kind("the third row")
        return make(update, planned)

    with RowsAhead(epoch(batch_samples=1), 0, third) as ahead:
        updates = iter(ahead)
        for _ in range(2):
            assert len(list(ahead.rows_of(next(updates)))) == 1
        rows = ahead.rows_of(next(updates))
        for _ in range(2):
            with pytest.raises(kind, match="the third row"):
                next(rows)
            rows = ahead._rows(1)
        with pytest.raises(kind):  # and it is no end of the epoch
            next(updates)


def test_an_error_of_the_plan_is_raised_where_the_update_is_asked_for():
    updates = epoch()
    updates.plan.row_tokens = 1
    with (
        RowsAhead(updates, 0, make) as ahead,
        pytest.raises(ValueError, match="longer than a row"),
    ):
        list(ahead)


def test_the_wait_for_the_thread_is_told_once():
    updates = epoch(batch_samples=1)
    with RowsAhead(updates, 0, lambda *which: time.sleep(0.01) or make(*which)) as ahead:
        for update in ahead:
            list(ahead.rows_of(update))
            break
        assert 0.005 < ahead.take_waited() < 5.0
        assert ahead.take_waited() == 0.0


class Streams:
    """Two streams that write down what is put on them, and by whom."""

    def __init__(self, monkeypatch):
        self.log, self.main, self.made = [], threading.get_ident(), -1
        self.side, self.current = self._stream("side"), self._stream("main")
        monkeypatch.setattr(torch.cuda, "stream", self._inside)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)

    def _stream(self, name):
        def record_event():  # an event is known by the row that was made last
            self.log.append(("record", name, self.made))
            return self.made

        return SimpleNamespace(
            device="cuda",
            name=name,
            record_event=record_event,
            wait_event=lambda event: self.log.append(("wait", name, event)),
            wait_stream=lambda other: self.log.append(("wait for", name, other.name)),
        )

    @contextlib.contextmanager
    def _inside(self, stream):
        assert threading.get_ident() != self.main, "the loop's stream stays the loop's"
        self.log.append(("on", stream.name))
        yield

    def row(self, number):
        """Stands for a row: its parts write down who keeps their memory."""
        part = lambda name: SimpleNamespace(  # noqa: E731
            device="cuda", record_stream=lambda stream: self.log.append(("keep", number, name, stream.name))
        )
        return SimpleNamespace(
            number=number, **{name: part(name) for name in ("tokens", "targets", "weights")}
        )


def test_the_loop_s_stream_waits_for_the_event_of_each_row_and_the_host_for_none(monkeypatch):
    streams, count = Streams(monkeypatch), iter(range(100))

    def write(update, planned):
        streams.made = number = next(count)
        streams.log.append(("make", number))
        return streams.row(number)

    updates = epoch(batch_samples=1)
    with RowsAhead(updates, 0, write, depth=2, stream=streams.side) as ahead:
        for update in ahead:
            (row,) = ahead.rows_of(update)
            streams.log.append(("use", row.number))
    log = streams.log
    assert log[0] == ("wait for", "side", "main"), (
        "what the rows are gathered from was put on the main stream"
    )
    assert ("on", "side") in log
    for number in range(len(updates)):
        steps = ("make", number), ("record", "side", number), ("wait", "main", number), ("use", number)
        places = [log.index(step) for step in steps]
        assert places == sorted(places)
        used = places[-1]
        kept = [entry[2:] for entry in log[:used] if entry[:2] == ("keep", number)]
        assert kept == [("tokens", "main"), ("targets", "main"), ("weights", "main")]
