"""Which few lengths rows take, and how many samples a row: chosen from the plan before the first update.

A pure function of the plan (its index, batch settings, seed and ranks) and of the longest sample of any
split, so every rank and every resumption of the same version gets the same answer; no clock and no device is
asked. The longest length holds what any row can be, whatever stage, epoch, active tasks, weights or skipped
samples come. The others are where they cost least over the updates of a few planned epochs:

one sample an update   optimal quantisation of the samples' lengths, exact, by dynamic programming
packed                 the same of the rows that packing leaves, or lengths whose sums over two or three rows
                       meet what updates hold; each is tried on the planned updates, the cheapest is taken
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from repsft_fast.data.packing import pack
from repsft_fast.data.plan import Plan
from repsft_fast.data.row_lengths import COUNTED_ROWS, MOST_LENGTHS, ROW_SLOTS, RowLengths

# A product computes whole tiles of 128 rows, so nothing is won between their multiples; rows that are short
# themselves are the launch's cost, and take finer steps only so that their padding stays a small share.
TILE, FINEST = 128, 8
STEPS = 256  # places for a length up to the longest
PLACES = 64  # of these, tried when sums are searched for
EPOCHS = 2
UPDATES, SAMPLES = 96, 24_576  # looked at, of each epoch
CLOSING = 0.005  # more rows and slots that closing rows may cost
CLOSING_ALONE, TASKS, UPDATES_ALONE = 0.05, 8, 8  # the same where one task is left; of so many, looked at
DOCUMENT_STEP = 8


def choose_lengths(
    plan: Plan,
    *,
    most: int = MOST_LENGTHS,
    longest: int | None = None,
    lengths: tuple[int, ...] | None = None,
) -> RowLengths:
    """The shapes of the rows of `plan`, which has none yet.

    most: lengths. longest: positions of the longest sample of any split, None = of the plan. lengths: these
    and no others, ascending, the last as long as any row. About a second.
    """
    longest = max(int(plan.index.lengths.max()), longest or 1)
    top = longest_row(plan, longest)
    if plan.batch_samples == 1 and plan.ranks == 1:
        real = plan.index.lengths
        made = quantised(real, top, most) if lengths is None else lengths
        return RowLengths(made, 1, longest)
    updates = _looked_at(plan)
    unlimited = max(map(len, updates))
    plain = [pack(sizes, top, bucket=TILE, ranks=plan.ranks, apart=plan.apart) for sizes in updates]
    rows = [
        int(sizes[row].sum())
        for sizes, of in zip(updates, plain, strict=True)
        for row in itertools.chain(*of)
        if len(row)
    ]
    real = np.array(rows, dtype=np.int64)
    tried = [quantised(real, top, most)] if lengths is None else [lengths]
    totals = np.array([int(sizes.sum()) for sizes in updates], dtype=np.int64)
    if lengths is None and most > 1:
        # dear rows lead the search to other lengths, which are sometimes the better ones at their price too
        tried += [summed(totals, tried[0], top, price) for price in (ROW_SLOTS, 4 * ROW_SLOTS)]
    all_made = [RowLengths(each, unlimited, longest) for each in tried]
    best = min(all_made, key=lambda each: _cost(plan, updates, each))
    return replace(best, documents=_documents(plan, updates, best))


def longest_row(plan: Plan, longest: int) -> int:
    """Slots of the longest row there can be, in whole tiles where `batch.row_tokens` allows."""
    if plan.batch_samples is not None:
        most = plan.batch_samples * longest  # draws may repeat the longest sample
    else:
        most = max(plan.batch_tokens or 0, longest)
    unit = _unit(min(most, plan.row_tokens))
    return min(-(-most // unit) * unit, plan.row_tokens)


def quantised(real: np.ndarray, top: int, most: int = MOST_LENGTHS) -> tuple[int, ...]:
    """At most `most` lengths, `top` the last, so that rows of `real` positions padded to the next are fewest
    slots. real: [n] int64, at most `top`."""
    edges = _edges(top, int(real.max()))
    counts = np.bincount(np.searchsorted(edges, real), minlength=len(edges)).astype(np.int64)
    below = np.concatenate([[0], np.cumsum(counts)])  # rows that end before place n
    # cost[n]: slots of the rows below place n, the last length at place n − 1
    cost = edges * below[1:]
    chosen = [np.zeros(len(edges), dtype=np.int64)]
    for _ in range(most - 1):
        # grown[n, m]: rows between place m and place n go to edges[n]; m = n: one length fewer
        grown = cost[None, :] + edges[:, None] * (below[1:, None] - below[None, 1:])
        grown[np.triu_indices(len(edges), 1)] = np.iinfo(np.int64).max
        # the last of equals: no length that no row needs
        chosen.append(len(edges) - 1 - grown[:, ::-1].argmin(axis=1))
        cost = grown.min(axis=1)
    n, found = len(edges) - 1, {top}
    for step in reversed(chosen[1:]):
        n = int(step[n])
        found.add(int(edges[n]))
    return tuple(sorted(found))


def summed(
    totals: np.ndarray, start: tuple[int, ...], top: int, row_slots: int = ROW_SLOTS
) -> tuple[int, ...]:
    """As many lengths as `start`, `top` the last, whose sums over up to three rows lie closest above what
    updates hold. totals: [n] int64 positions. row_slots: what a row more is worth.

    Samples are taken to fill what they are given, which many short ones do. One length at a time is moved to
    its best place until none moves.
    """
    free = len(start) - 1
    edges = _edges(top, top)
    places = edges[np.linspace(0, len(edges) - 1, PLACES).round().astype(int)[:-1]]
    # More than three rows: all but the last few are full.
    totals = totals - top * np.maximum(-(-totals // top) - (COUNTED_ROWS - 1), 0)
    combined = [
        np.array(list(itertools.combinations_with_replacement(range(free + 1), rows)))
        for rows in range(1, COUNTED_ROWS + 1)
    ]

    def cost(lengths: np.ndarray) -> int:
        sums = np.concatenate([lengths[which].sum(axis=1) for which in combined])
        costs = np.concatenate(
            [lengths[which].sum(axis=1) + row_slots * which.shape[1] for which in combined]
        )
        order = np.argsort(sums, kind="stable")
        least = np.minimum.accumulate(costs[order][::-1])[::-1]
        return int(least[np.searchsorted(sums[order], totals)].sum())

    spread = edges[np.linspace(0, len(edges) - 1, free + 2).round().astype(int)[1:]]
    found = min((_moved(begin, places, cost) for begin in (np.array(start), spread)), key=cost)
    return tuple(sorted({int(length) for length in found}))


def _moved(lengths: np.ndarray, places: np.ndarray, cost) -> np.ndarray:  # type: ignore[no-untyped-def]
    best = cost(lengths)
    moved = True
    while moved:
        moved = False
        for n in range(len(lengths) - 1):
            for place in places:
                other = lengths.copy()
                other[n] = place
                if (now := cost(other)) < best:
                    lengths, best, moved = other, now, True
    return lengths


def _unit(longest: int) -> int:
    return min(TILE, max(FINEST, 1 << max(longest // 64, 1).bit_length() - 1))


def _edges(top: int, longest: int) -> np.ndarray:
    """Places for a length, ascending, `top` the last, none but it past what rows of at most `longest`
    positions need. [n] int64."""
    unit = _unit(longest)
    step = max(unit, -(-longest // (STEPS * unit)) * unit)
    return np.append(np.arange(step, min(longest + step, top), step), top).astype(np.int64)


def _looked_at(
    plan: Plan, epochs: int = EPOCHS, most: int = UPDATES, active: list[int] | None = None
) -> list[np.ndarray]:
    """The lengths of the samples of updates of the first epochs, evenly spread."""
    found = []
    for number in range(epochs):
        epoch = plan.epoch(0, number, active=active)
        per_update = max(len(epoch.order) / len(epoch), 1.0)
        count = min(len(epoch), most, max(int(SAMPLES / per_update), 1))
        for n in np.linspace(0, len(epoch) - 1, count).round().astype(int).tolist():
            found.append(plan.index.lengths[epoch.samples_of(n)])
    return found


def _alone(plan: Plan) -> list[list[np.ndarray]]:
    """Updates of each of the tasks of the shortest samples, alone, as a mixture may shrink to it."""
    tasks = np.unique(plan.index.tasks)
    if len(tasks) == 1:
        return []
    means = [plan.index.lengths[plan.index.tasks == task].mean() for task in tasks]
    shortest = tasks[np.argsort(means, kind="stable")[:TASKS]]
    return [_looked_at(plan, 1, UPDATES_ALONE, active=[int(task)]) for task in shortest]


def _packed(plan: Plan, updates: list[np.ndarray], to: RowLengths) -> tuple[int, int]:
    """(rows, slots) of the updates."""
    rows = slots = 0
    for sizes in updates:
        for of_rank in pack(sizes, to.capacity, ranks=plan.ranks, apart=plan.apart, to=to):
            rows += len(of_rank)
            slots += sum(to.slots(int(sizes[row].sum())) for row in of_rank)
    return rows, slots


def _cost(plan: Plan, updates: list[np.ndarray], to: RowLengths) -> int:
    rows, slots = _packed(plan, updates, to)
    return slots + ROW_SLOTS * rows


def _documents(plan: Plan, updates: list[np.ndarray], to: RowLengths) -> int:
    """The fewest samples a row, in steps, at which closing full rows costs next to nothing, and little where
    one task is left."""
    looked = [(updates, CLOSING), *((alone, CLOSING_ALONE) for alone in _alone(plan))]
    free = [_packed(plan, each, to) for each, _ in looked]

    def enough(documents: int) -> bool:
        closing = replace(to, documents=documents)
        for (each, more), before in zip(looked, free, strict=True):
            closed = _packed(plan, each, closing)
            if any(now > was * (1 + more) for now, was in zip(closed, before, strict=True)):
                return False
        return True

    low, high = 1, -(-to.documents // DOCUMENT_STEP)
    while low < high:
        middle = (low + high) // 2
        if enough(middle * DOCUMENT_STEP):
            high = middle
        else:
            low = middle + 1
    return min(high * DOCUMENT_STEP, to.documents)
