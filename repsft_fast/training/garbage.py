"""Python's cyclic collector, kept out of updates.

A full collection walks every object there is: torch, transformers, the model and the data, some hundred
milliseconds in which the host launches nothing. It is asked for by how many objects were made, so it comes in
the middle of an update. While the loop runs, what stood before it is taken out of the collector's sight
(`gc.freeze`) and nothing is collected by itself: only where the loop waits anyway, and where more than
MOST_YOUNG objects have gathered, over those that are new since.

The process gets its collector back as it was, however the run ends.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

MOST_YOUNG = 100_000  # objects made and not freed since the last collection, which take about 10 ms
_inside = 0  # how many runs of this process are in `kept_out`


@contextmanager
def kept_out() -> Iterator[None]:
    """Inside, nothing is collected by itself; afterwards the collector is as it was.

    A run inside another, and a process that has frozen objects of its own, freeze nothing: `gc.unfreeze`
    knows no difference between theirs and ours.
    """
    global _inside
    was_on, ours = gc.isenabled(), gc.get_freeze_count() == 0
    gc.collect()  # what is frozen stays: no garbage among it
    gc.disable()
    if ours:
        gc.freeze()
    _inside += 1
    try:
        yield
    finally:
        _inside -= 1
        if ours:
            gc.unfreeze()
        if was_on:
            gc.enable()


def collect() -> None:
    """Where the loop waits anyway: what is new and was left in circles goes."""
    if _inside:
        gc.collect()


def collect_when_many() -> None:
    """Between any two updates; nearly always nothing to do. It bounds what a process may hold in circles."""
    if _inside and gc.get_count()[0] > MOST_YOUNG:
        gc.collect()
