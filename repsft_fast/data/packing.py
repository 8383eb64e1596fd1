"""Packing: which samples share a row. It never changes what an update means, only how many slots are computed
for it.

Best-fit decreasing: the samples go longest first, each into the fullest row that still has room. The rows
with c free slots are found by one bit mask of all free capacities, `mask & -mask` after a shift being the
tightest fit, so a sample costs a few integer operations (Johnson 1973 bounds the rows by 11/9 of the optimum
+ 4).

An update of few samples leaves best-fit few choices, and what a row lacks to its bucket is computed for
nothing. There each row is filled as full as any subset of the remaining samples can make it (minimum bin
slack, Gupta and Ho 1999): the sums that can be reached are the bits of one integer, so a sample costs a
shift. At T = 1,024 with median 256, buckets of 128 and updates of 8·T tokens 98.3 % of the slots are real
instead of 97.5 %.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from repsft_fast.data.fitting import FEW_SAMPLES, fit, fullest
from repsft_fast.data.planned import PlannedRow
from repsft_fast.data.row_lengths import RowLengths
from repsft_fast.errors import ConfigError, DataError, describe

# A token's attention costs as much as everything else at about 12 · H tokens of context (causal, forward and
# backward); 16,384 stands for H ≈ 1,400. It only ranks rows against each other, so its exact value matters
# little.
TOKENS_AT_EQUAL_ATTENTION = 16_384.0

EMPTY = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Apart:
    """Samples that may not share a row: those on different sides of a length at which the model computes
    something else, and those longer than `alone_above`, each of which gets a row of its own. Default: all
    may."""

    lengths: tuple[int, ...] = ()  # a sample of n positions and one of more than n never meet
    alone_above: int | None = None  # 0: one sample a row

    def groups(self, order: list[int], sizes: list[int]) -> Iterator[list[int]]:
        """`order`, longest first, cut into lists whose samples may share rows."""
        if self == TOGETHER:
            yield order
            return
        borders = sorted(self.lengths, reverse=True)
        group: list[int] = []
        for i in order:
            if self.alone_above is not None and sizes[i] > self.alone_above:
                yield [i]
                continue
            if group and any(sizes[i] <= border < sizes[group[-1]] for border in borders):
                yield group
                group = []
            group.append(i)
        if group:
            yield group


TOGETHER = Apart()


def pack(
    lengths: np.ndarray,  # [M] integer, positions of every sample, 1 … capacity
    capacity: int,  # T
    *,
    bucket: int = 1,
    ranks: int = 1,
    apart: Apart = TOGETHER,
    to: RowLengths | None = None,
) -> list[list[np.ndarray]]:  # per rank its rows, each [S] int64 indices into lengths
    """Pack samples into rows of at most `capacity` positions and deal the rows to `ranks` ranks.

    apart: which samples may not share a row, because of the model. to: the lengths rows are padded to, in
    place of multiples of `bucket`, and the most samples a row takes; a row holds no more than the longest.

    Every rank gets the same number of rows, so no rank waits for a microbatch that never comes. Where the
    rows do not divide, the costliest are split in two (a short row wastes less than a padding-only one);
    empty rows come only when there are fewer samples than places. The n-th rows of all ranks run at the same
    time, so neighbours in cost are dealt together, the costliest of them to the rank with the least so far.
    Deterministic: ties go by index.

    Raises DataError naming the sample that is longer than `capacity` (or not positive), ConfigError for
    impossible arguments.
    """
    for name, value in (("batch.row_tokens", capacity), ("batch.bucket_tokens", bucket), ("ranks", ranks)):
        if value < 1:
            raise ConfigError(
                describe(name, "is too small", expected="at least 1", got=value, todo="raise it")
            )
    capacity = capacity if to is None else min(capacity, to.capacity)
    most = len(lengths) if to is None else to.documents
    lengths = np.asarray(lengths)
    if len(lengths) == 0:
        return [[] for _ in range(ranks)]
    sizes: list[int] = lengths.tolist()
    # Python's sort beats numpy's calls on the few samples of an update; both are stable, so both give the
    # same order.
    if len(sizes) <= 512:
        order = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
    else:
        order = np.argsort(-lengths, kind="stable").tolist()
    if lengths.dtype.kind != "i" or sizes[order[0]] > capacity or sizes[order[-1]] < 1:
        check_lengths(lengths, capacity)
    if len(sizes) == 1:  # one sample per update has nothing to weigh; this is its whole planning cost
        return [[np.zeros(1, dtype=np.int64)]] + [[EMPTY] for _ in range(ranks - 1)]
    rows: list[list[int]] = []
    # a row that takes them all is long enough, and the masks have a bit for every slot
    needed = min(capacity, sum(sizes))
    grouped = 0
    for group in apart.groups(order, sizes):
        few = (bucket > 1 or to is not None) and len(group) <= FEW_SAMPLES
        made = (_fullest_rows if few else _best_fit_decreasing)(group, sizes, needed, most)
        rows += made if to is None or ranks > 1 else fit(made, sizes, to)
        grouped += 1
    if ranks == 1:
        return [[np.array(row, dtype=np.int64) for row in rows]]
    rows = _split_until_divisible(rows, sizes, ranks)
    if to is not None and grouped == 1:
        rows = fit(rows, sizes, to, as_many=True)
    costs = [_cost([sizes[i] for i in row], capacity, bucket, to) for row in rows]
    return _deal(rows, costs, ranks)


def padded_length(real: int, capacity: int, bucket: int) -> int:
    """Slots computed for a row of `real` positions: up to the next bucket, never past the capacity, never
    none."""
    return min(max(-(-real // bucket), 1) * bucket, capacity)


def planned_row(
    samples: np.ndarray, real: int, capacity: int, bucket: int, to: RowLengths | None
) -> PlannedRow:
    """A row of these samples, `real` positions together. samples: [S] int64 ids."""
    if to is None:
        return PlannedRow(samples, real, padded_length(real, capacity, bucket))
    slots = to.slots(real)
    return PlannedRow(samples, real, slots, to.segments, to.max_seqlen(slots))


def check_lengths(lengths: np.ndarray, capacity: int) -> None:
    """DataError for the first sample that no row can hold."""
    if len(lengths) == 0:
        return
    if not np.issubdtype(lengths.dtype, np.integer):
        raise DataError(
            describe("lengths", "are not whole numbers", expected="an integer array", got=str(lengths.dtype))
        )
    if int(lengths.max()) > capacity:
        i = int(np.argmax(lengths > capacity))
        todo = "raise the row length, or let over-long samples be dropped or truncated when they are loaded"
        wrong = "is longer than a row"
        raise DataError(
            describe(
                f"sample {i}", wrong, expected=f"at most {capacity} positions", got=int(lengths[i]), todo=todo
            )
        )
    if int(lengths.min()) < 1:
        i = int(np.argmax(lengths < 1))
        todo = "drop samples of fewer than two tokens"
        raise DataError(
            describe(
                f"sample {i}",
                "has no position to train",
                expected="at least 1",
                got=int(lengths[i]),
                todo=todo,
            )
        )


def _best_fit_decreasing(order: list[int], sizes: list[int], capacity: int, most: int) -> list[list[int]]:
    """Rows of at most `most` indices. `order` lists the indices longest first."""
    shortest = sizes[order[-1]]
    rows: list[list[int]] = []
    rows_with: dict[int, list[list[int]]] = {}  # free slots → the open rows that have exactly so many
    mask = 0  # bit c is set when rows_with[c] is not empty
    for i in order:
        size = sizes[i]
        fitting = mask >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            open_rows = rows_with[free]
            row = open_rows.pop()
            if not open_rows:
                mask ^= 1 << free
            row.append(i)
        else:
            free = capacity
            row = [i]
            rows.append(row)
        free -= size
        # less room than the shortest sample, or as many as may be: nothing will ever fit, forget the row
        if free >= shortest and len(row) < most:
            open_rows = rows_with.setdefault(free, [])
            if not open_rows:
                mask |= 1 << free
            open_rows.append(row)
    return rows


def _fullest_rows(order: list[int], sizes: list[int], capacity: int, most: int) -> list[list[int]]:
    """Rows of at most `most` indices, each started by the longest sample left and filled up by the subset of
    others that fits best."""
    rows: list[list[int]] = []
    while order:
        row, order = fullest(order, sizes, capacity, most)
        rows.append(row)
    return rows


def _split_until_divisible(rows: list[list[int]], sizes: list[int], ranks: int) -> list[list[int]]:
    """Halve the longest row that has two samples until the rows divide by the ranks, or none can be
    halved."""
    missing = -len(rows) % ranks
    if missing == 0:
        return rows
    whole = [row for row in rows if len(row) == 1]
    heap = [(-sum(sizes[i] for i in row), n, row) for n, row in enumerate(rows) if len(row) > 1]
    heapq.heapify(heap)
    for n in range(len(rows), len(rows) + missing):
        if not heap:
            break
        _, age, row = heapq.heappop(heap)
        for key, half in zip((age, n), _halve(row, sizes)):
            if len(half) > 1:
                heapq.heappush(heap, (-sum(sizes[i] for i in half), key, half))
            else:
                whole.append(half)
    return whole + [row for _, _, row in heap]


def _halve(row: list[int], sizes: list[int]) -> tuple[list[int], list[int]]:
    """Two parts of about equal length. `row` is longest first, so both parts are, and neither is empty."""
    left, right = [row[0]], [row[1]]
    left_size, right_size = sizes[row[0]], sizes[row[1]]
    for i in row[2:]:
        if left_size <= right_size:
            left.append(i)
            left_size += sizes[i]
        else:
            right.append(i)
            right_size += sizes[i]
    return left, right


def _cost(lengths: list[int], capacity: int, bucket: int, to: RowLengths | None) -> float:
    """Work of a row in tokens: its padded slots, and Σ len² for attention."""
    real = sum(lengths)
    padded = padded_length(real, capacity, bucket) if to is None else to.slots(real)
    return padded + sum(length * length for length in lengths) / TOKENS_AT_EQUAL_ATTENTION


def _deal(rows: list[list[int]], costs: list[float], ranks: int) -> list[list[np.ndarray]]:
    """Longest processing time first, in rounds of one row per rank."""
    by_cost = sorted(range(len(rows)), key=lambda n: (-costs[n], rows[n]))
    loads = [0.0] * ranks
    dealt: list[list[np.ndarray]] = [[] for _ in range(ranks)]
    for start in range(0, len(by_cost), ranks):
        lightest_first = sorted(range(ranks), key=loads.__getitem__)
        for place, rank in enumerate(lightest_first):
            n = start + place
            if n < len(by_cost):
                row = by_cost[n]
                dealt[rank].append(np.array(rows[row], dtype=np.int64))
                loads[rank] += costs[row]
            else:
                dealt[rank].append(EMPTY)
    return dealt
