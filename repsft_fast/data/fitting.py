"""Rows made to fit the few lengths they are padded to: what best-fit leaves over is packed again.

Packing for the longest row leaves rows that are nearly full, and one or two that are not: what they lack to
the next length is computed for nothing. With few lengths that is much, unless two or three rows together
choose theirs: 16 lengths make 968 sums of up to three, and one of them lies just above what the rows hold.
"""

from __future__ import annotations

from repsft_fast.data.row_lengths import COUNTED_ROWS, ROW_SLOTS, RowLengths

# Subsets are tried of so many samples, the shortest: their work grows with the square of it.
FEW_SAMPLES = 48
MOST_REFITTED = 512  # samples of an update on several ranks


def fullest(
    order: list[int], sizes: list[int], free: int, most: int, *, started: bool = False
) -> tuple[list[int], list[int]]:
    """(the samples of a row with `free` slots, the others), both in the order they came in, longest first.

    The first sample is taken, unless the row is `started`, and the subset of the others that fits best; at
    most `most` samples.
    """
    taken, others = ([], order) if started else ([order[0]], order[1:])
    free -= 0 if started else sizes[order[0]]
    within = (1 << (free + 1)) - 1
    reached = [1]  # bit n of reached[k]: some of the first k others are n slots together
    for i in others:
        reached.append((reached[-1] | reached[-1] << sizes[i]) & within)
        if reached[-1] >> free:
            break
    left = reached[-1].bit_length() - 1
    chosen = []
    for k in range(len(reached) - 1, 0, -1):
        if not reached[k - 1] >> left & 1:  # not without the k-th
            chosen.append(others[k - 1])
            left -= sizes[others[k - 1]]
    taken = [*taken, *reversed(chosen)][:most]
    return taken, [i for i in others if i not in taken]


def fit(rows: list[list[int]], sizes: list[int], to: RowLengths, *, as_many: bool = False) -> list[list[int]]:
    """The rows, with the emptiest of them packed again where that costs fewer slots. Each row is longest
    first, before and after. as_many: all of them, and into as many rows again."""
    pool, kept = (rows, []) if as_many else _emptiest(rows, sizes)
    many = sum(map(len, pool))
    if not pool or many < 2 or many > MOST_REFITTED:
        return rows
    real = [sum(sizes[i] for i in row) for row in pool]
    total, before = sum(real), _cost(real, to)
    order = sorted((i for row in pool for i in row), key=lambda i: (-sizes[i], i))
    counts = (len(pool),) if as_many else range(1, COUNTED_ROWS + 1)
    offered = [lengths for count in counts for lengths in to.sums(total, count)]
    offered.sort(key=lambda lengths: sum(lengths) + ROW_SLOTS * len(lengths))
    for lengths in offered:
        if sum(lengths) + ROW_SLOTS * len(lengths) >= before:
            break
        made = _filled(order, sizes, lengths, to.documents)
        if made is not None:
            return kept + made
    return rows


def _cost(real: list[int], to: RowLengths) -> int:
    return sum(to.slots(n) for n in real) + ROW_SLOTS * len(real)


def _emptiest(rows: list[list[int]], sizes: list[int]) -> tuple[list[list[int]], list[list[int]]]:
    """(a few rows that lack most, the others in their order)."""
    if len(rows) == 1:
        return rows, []
    real = [sum(sizes[i] for i in row) for row in rows]
    pool: list[int] = []
    many = 0
    for n in sorted(range(len(rows)), key=lambda n: (real[n], n))[:COUNTED_ROWS]:
        many += len(rows[n])
        if pool and many > FEW_SAMPLES:
            break
        pool.append(n)
    return [rows[n] for n in pool], [row for n, row in enumerate(rows) if n not in pool]


def _filled(
    order: list[int], sizes: list[int], lengths: tuple[int, ...], most: int
) -> list[list[int]] | None:
    """The samples in rows of at most these lengths, none of them empty; None where they were not made to
    fit."""
    rows: list[list[int]] = [[] for _ in lengths]
    free = list(lengths)
    # Of many the longer ones go where most room is; the short ones then fill it exactly.
    for i in order[:-FEW_SAMPLES]:
        n = max(range(len(free)), key=free.__getitem__)
        if sizes[i] > free[n]:
            return None
        rows[n].append(i)
        free[n] -= sizes[i]
    rest = order[-FEW_SAMPLES:]
    for n in range(len(rows) - 1):
        if not rest or len(rows[n]) >= most or (not rows[n] and sizes[rest[0]] > free[n]):
            return None
        taken, rest = fullest(rest, sizes, free[n], most - len(rows[n]), started=bool(rows[n]))
        rows[n] += taken
    rows[-1] += rest
    over = sum(sizes[i] for i in rest) > free[-1]
    return None if over or not all(0 < len(row) <= most for row in rows) else rows
