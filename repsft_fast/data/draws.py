"""Draws of tasks by their shares, for mixtures that are not the natural one: a pure function of a key."""

from __future__ import annotations

import numpy as np

from repsft_fast import seeded


def draw_tasks(
    order: np.ndarray, tasks: np.ndarray, shares: np.ndarray, key: tuple[int, ...], draws: int
) -> np.ndarray:
    """[draws] sample ids: tasks drawn by their shares, a task's samples in rounds of fresh permutations."""
    if len(order) == 0:
        return order
    uniform = (seeded.words(seeded.key_of(*key, "task"), draws) >> np.uint64(11)).astype(
        np.float64
    ) * 2.0**-53
    # Only tasks that can be drawn take part, so a rounded total below 1 cannot give a task of share 0.
    drawable = np.flatnonzero(shares)
    steps = np.minimum(np.searchsorted(np.cumsum(shares[drawable]), uniform, side="right"), len(drawable) - 1)
    drawn = drawable[steps]
    # A task's samples all come once before any comes again, however often the task is drawn.
    out = np.empty(draws, dtype=np.int64)
    for task in drawable.tolist():
        places = np.flatnonzero(drawn == task)
        members = np.sort(order[tasks[order] == task])
        rounds = -(-len(places) // len(members))
        drawn_words = seeded.words(seeded.key_of(*key, "within", task), rounds * len(members))
        ranks = drawn_words.reshape(rounds, len(members))
        out[places] = members[np.argsort(ranks, axis=1, kind="stable").reshape(-1)[: len(places)]]
    return out
