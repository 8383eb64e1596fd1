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

from repsft_fast.errors import ConfigError, DataError, describe

# A token's attention costs as much as everything else at about 12 · H tokens of context (causal, forward and
# backward); 16,384 stands for H ≈ 1,400. It only ranks rows against each other, so its exact value matters
# little.
TOKENS_AT_EQUAL_ATTENTION = 16_384.0

# Its work grows with the square of the samples: at 48 it still plans 200,000 samples a second, and best-fit
# is good by then.
FEW_SAMPLES = 48

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
) -> list[list[np.ndarray]]:  # per rank its rows, each [S] int64 indices into lengths
    """Pack samples into rows of at most `capacity` positions and deal the rows to `ranks` ranks.

    apart: which samples may not share a row, because of the model.

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
    for group in apart.groups(order, sizes):
        few = bucket > 1 and len(group) <= FEW_SAMPLES
        rows += _fullest_rows(group, sizes, needed) if few else _best_fit_decreasing(group, sizes, needed)
    if ranks == 1:
        return [[np.array(row, dtype=np.int64) for row in rows]]
    return _deal(_split_until_divisible(rows, sizes, ranks), sizes, capacity, bucket, ranks)


def padded_length(real: int, capacity: int, bucket: int) -> int:
    """Slots computed for a row of `real` positions: up to the next bucket, never past the capacity, never
    none."""
    return min(max(-(-real // bucket), 1) * bucket, capacity)


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


def _best_fit_decreasing(order: list[int], sizes: list[int], capacity: int) -> list[list[int]]:
    """Rows of indices. `order` lists the indices longest first."""
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
        if free >= shortest:  # less room than the shortest sample: nothing will ever fit, forget the row
            open_rows = rows_with.setdefault(free, [])
            if not open_rows:
                mask |= 1 << free
            open_rows.append(row)
    return rows


def _fullest_rows(order: list[int], sizes: list[int], capacity: int) -> list[list[int]]:
    """Rows of indices, each started by the longest sample left and filled up by the subset of others that
    fits best."""
    rows: list[list[int]] = []
    while order:
        first, *others = order
        free = capacity - sizes[first]
        within = (1 << (free + 1)) - 1
        reached = [1]  # bit n of reached[k]: some of the first k others are n slots together
        for i in others:
            reached.append((reached[-1] | reached[-1] << sizes[i]) & within)
            if reached[-1] >> free:
                break
        left = reached[-1].bit_length() - 1
        taken = []
        for k in range(len(reached) - 1, 0, -1):
            if not reached[k - 1] >> left & 1:  # not without the k-th
                taken.append(others[k - 1])
                left -= sizes[others[k - 1]]
        rows.append([first, *reversed(taken)])
        order = [i for i in others if i not in taken]
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


def _cost(row: list[int], sizes: list[int], capacity: int, bucket: int) -> float:
    """Work of a row in tokens: its padded slots, and Σ len² for attention."""
    lengths = [sizes[i] for i in row]
    padded = padded_length(sum(lengths), capacity, bucket)
    return padded + sum(length * length for length in lengths) / TOKENS_AT_EQUAL_ATTENTION


def _deal(
    rows: list[list[int]], sizes: list[int], capacity: int, bucket: int, ranks: int
) -> list[list[np.ndarray]]:
    """Longest processing time first, in rounds of one row per rank."""
    costs = [_cost(row, sizes, capacity, bucket) for row in rows]
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
