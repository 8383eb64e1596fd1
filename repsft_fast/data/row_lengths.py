"""The few lengths that rows take, as values: what a row is padded to, and the shapes beside it that stay the
same for a whole run.

CUDA graphs are made for one shape each, compiled layers for a few, and new sizes break up the GPU's memory.
So a run knows its shapes before its first update: at most `MOST_LENGTHS` lengths of a row, one number of
borders between documents, and for every length one bound on its longest document. Which they are is
`choose_lengths`' business.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from repsft_fast.errors import ConfigError, describe

# One graph serves them all (`models.compiled`), so they cost what is done once before the first update: a
# pass of each through all layers, and a second of search. Sixteen are the fewest that pad one sample an
# update by less than 12 % of slots on every distribution looked at (a lognormal of spread 0.8: with 6 lengths
# 27 %, with 12 14, with 16 11, with 24 7 %) and packed rows by less than 3 %.
MOST_LENGTHS = 16

# What a row more is worth, in slots: on paper 250 to 330. It adds its gradients to those of the rows before,
# 10 bytes a parameter at 3 TB/s, the time of so many tokens' products (6 operations a parameter and token at
# 450 to 600 TFLOP/s); less where the product itself adds. Host time comes on top where the GPU waits for it:
# 2 ms are 140 tokens of a 0.6B model at 70,000 tokens/s. With six lengths this price padded updates of 16
# short chats by 4.6 % and was set to 64; with sixteen it pads 2.5 %, in 1.09 rows an update (at 64: 1.2 %,
# 1.59 rows). Its time is unmeasured.
ROW_SLOTS = 256

COUNTED_ROWS = 3  # of so many rows at once every choice of lengths is weighed
TRIES = 3  # choices near the least that are offered for a number of rows


@dataclass(frozen=True)
class RowLengths:
    """The shapes of a run's rows. Host; the same on every rank."""

    lengths: tuple[int, ...]  # slots, ascending; the last is the longest a row can be
    documents: int  # most samples a row
    longest: int  # positions of the longest sample there is, in any split

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in itertools.pairwise((0, *self.lengths)))
        if not self.lengths or not rising or self.documents < 1 or self.longest < 1:
            raise ValueError(f"lengths ascending from 1, documents and longest at least 1, got {self}")

    @property
    def capacity(self) -> int:
        """Positions that fit into a row."""
        return self.lengths[-1]

    @property
    def segments(self) -> int:
        """S': every row's borders without the leading 0. The documents, and the padding as one of its own."""
        return self.documents + 1

    def slots(self, real: int) -> int:
        """Slots computed for a row of `real` positions, at most `capacity`."""
        return self.lengths[bisect_left(self.lengths, real)]

    def max_seqlen(self, slots: int) -> int:
        """Bound on the longest segment of a row of so many slots, padding included: one value a length.

        FlashAttention 2 starts a block for every 128 positions below it, of every segment and head; those
        past a segment's end return at once. So the bound is no looser than the length makes it.
        """
        n = self.lengths.index(slots)
        padding = slots - (self.lengths[n - 1] + 1 if n else 0)
        return min(slots, max(self.longest, padding))

    def sums(self, total: int, rows: int) -> Iterator[tuple[int, ...]]:
        """Lengths of so many rows, longest first, that hold `total` positions together: the least sums
        first, a few of them."""
        if rows <= COUNTED_ROWS:
            sums, chosen = self._counted[rows]
            at = bisect_left(sums, total)
            yield from chosen[at : at + TRIES]
            return
        # Two neighbours around the mean: the sum is met within their difference, and the rows take about as
        # long, which several ranks want.
        high = bisect_left(self.lengths, -(-total // rows))
        if high == len(self.lengths):
            return
        long, short = self.lengths[high], self.lengths[max(high - 1, 0)]
        least = -(-(total - rows * short) // (long - short)) if long > short else rows
        for of_long in range(least, min(least + TRIES, rows + 1)):
            yield (long,) * of_long + (short,) * (rows - of_long)

    @cached_property
    def _counted(self) -> dict[int, tuple[list[int], list[tuple[int, ...]]]]:
        """By number of rows, ascending: (sums, the lengths that make each, longest first)."""
        found = {}
        for rows in range(1, COUNTED_ROWS + 1):
            combined = itertools.combinations_with_replacement(reversed(self.lengths), rows)
            chosen = sorted(combined, key=lambda lengths: (sum(lengths), lengths))
            found[rows] = ([sum(lengths) for lengths in chosen], chosen)
        return found

    def to_json(self) -> dict[str, Any]:
        return {"lengths": list(self.lengths), "documents": self.documents, "longest": self.longest}

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> RowLengths:
        """ConfigError for a value that `to_json` cannot have written."""
        try:
            lengths, rest = value["lengths"], [value[name] for name in ("documents", "longest")]
            if any(type(number) is not int for number in (*lengths, *rest)):
                raise TypeError("not whole numbers")
            return cls(tuple(lengths), *rest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                describe(
                    "row lengths",
                    "are none",
                    expected="{lengths: ascending, documents, longest}, whole numbers",
                    got=repr(value)[:200],
                    todo="resume from another checkpoint, or set batch.row_lengths",
                )
            ) from error
