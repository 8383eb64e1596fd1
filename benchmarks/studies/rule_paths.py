"""Rule "tested" of msft on many simulated tasks at once: the worlds they live in and the look at which each
of them would leave.

A *path* is one task over a whole run in which nobody has left yet: one unbroken branch. As long as that is
so, tasks do not know of each other, so the chance that somebody of T leaves is 1 − (1 − q)^T with q from
single paths. Whether this decides as `repsft_fast.policies` does is what
tests/benchmarks/studies/test_rule_paths.py asks.

A world gives looks one after the other: values [W, P] of P paths at W wobbles (higher is better), and how far
items lie from those of each path's peak. Wobbles share their draws, so columns of a table differ by the
wobble alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from repsft_fast.policies.overfit import DF_PER_DIFFERENCE, chance
from repsft_fast.policies.student import normal_quantile, student_quantile

Floats = NDArray[np.float64]
NEVER = 10**6
MOST_ROWS = 2040  # 255 words of eight bytes: their lanes hold no more


class World(Protocol):
    rows: int
    correction: float  # taken off a fall: one item's worth for 0/1 items

    def look(self) -> Floats:
        """The next look's values, [W, P]."""

    def keep(self, here: NDArray[np.bool_]) -> None:
        """Where true ([W, P]) this look is the peak from now on."""

    def squares(self) -> Floats:
        """Sum over the items of (peak − now)², [W, P]."""


class Shares:
    """0/1 items: an item is right where its number lies below the task's level, which wobbles as a whole.

    At every look a share `churn` of the numbers is drawn anew, in 256ths. `lasting`: a redrawn item keeps its
    new number; else the next look goes back to its own one, as in tests/helpers/policies_simulation.py.
    """

    def __init__(
        self, rng: np.random.Generator, paths: int, rows: int, wobbles: Sequence[float], curve: Floats,
        churn: float = 0.3, lasting: bool = True,
    ) -> None:  # fmt: skip
        if rows > MOST_ROWS:
            raise ValueError(f"Shares: rows do not fit, expected at most {MOST_ROWS}, got {rows}")
        self.rng, self.paths, self.rows, self.curve = rng, paths, rows, curve
        self.wobbles, self.correction, self.now = np.array(wobbles), 1.0 / rows, -1
        self.width = -(-rows // 8) * 8
        self.cut = round(churn * 256)
        self.number = self._draw(np.uint16)
        self.own = None if lasting else self.number
        self.right = np.zeros((len(wobbles), paths, self.width), bool)
        self.peak = self.right.copy()

    def _draw(self, dtype: type) -> NDArray:
        count = self.paths * self.width
        words = -(-count * np.dtype(dtype).itemsize // 8)
        drawn = self.rng.bit_generator.random_raw(words).view(dtype)[:count]
        return drawn.reshape(self.paths, self.width)

    def look(self) -> Floats:
        self.now += 1
        if self.now:
            base = self.number if self.own is None else self.own
            new = self._draw(np.uint16)
            if self.cut < 256:  # base where it stays, new where it is redrawn
                mask = np.negative((self._draw(np.uint8) < self.cut).astype(np.int16)).view(np.uint16)
                new ^= base
                new &= mask
                new ^= base
            self.number = new
        noise = self.rng.standard_normal(self.paths)
        for w, wobble in enumerate(self.wobbles):
            level = np.clip(self.curve[self.now] + wobble * noise, 0.0, 1.0)
            cut = np.minimum(np.round(level * 65536), 65535).astype(np.uint16)
            np.less(self.number, cut[:, None], out=self.right[w])
        self.right[..., self.rows :] = False
        return count_true(self.right) / self.rows

    def keep(self, here: NDArray[np.bool_]) -> None:
        self.peak[here] = self.right[here]

    def squares(self) -> Floats:
        return count_true(self.right ^ self.peak).astype(np.float64)


class Losses:
    """Negated losses: each item has a difficulty, which cancels in paired differences and so is left out, and
    noise N(0, sigma) that forgets a share 1 − `lasting` of itself from look to look (0: none of it stays)."""

    correction = 0.0

    def __init__(
        self, rng: np.random.Generator, paths: int, rows: int, wobbles: Sequence[float], curve: Floats,
        sigma: float = 0.3, lasting: float = 0.0,
    ) -> None:  # fmt: skip
        self.rng, self.rows, self.curve, self.sigma, self.lasting = rng, rows, curve, sigma, lasting
        self.wobbles, self.now = np.array(wobbles), -1
        self.noise = np.zeros((paths, rows), np.float32)
        self.fresh = np.empty_like(self.noise)
        self.peak = np.zeros((len(wobbles), paths, rows), np.float32)
        self.shift = np.zeros((len(wobbles), paths))
        self.peak_shift, self.peak_mean = self.shift.copy(), self.shift.copy()

    def look(self) -> Floats:
        self.now += 1
        self.rng.standard_normal(dtype=np.float32, out=self.fresh)
        kept = self.lasting if self.now else 0.0
        self.noise *= np.float32(kept)
        self.fresh *= np.float32(self.sigma * np.sqrt(1.0 - kept * kept))
        self.noise += self.fresh
        self.mean = self.noise.mean(axis=1, dtype=np.float64)
        drawn = self.rng.standard_normal(len(self.mean))
        self.shift = self.curve[self.now] + self.wobbles[:, None] * drawn
        return self.shift + self.mean

    def keep(self, here: NDArray[np.bool_]) -> None:
        w, path = np.nonzero(here)
        self.peak[w, path] = self.noise[path]
        self.peak_shift[w, path] = self.shift[w, path]
        self.peak_mean[w, path] = self.mean[path]

    def squares(self) -> Floats:
        found = np.empty_like(self.shift)
        for w, peak in enumerate(self.peak):
            moved = self.noise - peak
            found[w] = np.einsum("ij,ij->i", moved, moved)
        as_a_whole = self.shift - self.peak_shift
        found += self.rows * as_a_whole * (2.0 * (self.mean - self.peak_mean) + as_a_whole)
        return np.maximum(found, 0.0)


def count_true(bits: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How many are true along the last axis, whose length is a multiple of 8 and at most MOST_ROWS.

    Eight bytes are added as one word; no byte of the sum can overflow.
    """
    words = bits.view(np.uint64).sum(axis=-1)
    return words.view(np.uint8).reshape(*words.shape, 8).sum(axis=-1, dtype=np.int64)


@dataclass(frozen=True)
class Cell:
    """A run: how many tasks, looks a stage, stages; the rule's settings."""

    tasks: int
    looks: int
    stages: int = 10
    alpha: float = 0.1
    patience: int = 2
    min_looks: int = 8

    @property
    def chance(self) -> float:
        return chance(self.alpha, self.tasks, self.looks * self.stages)

    @property
    def last(self) -> int:
        """The last look (0: before training) at which somebody may leave: none in the last stage."""
        return self.looks * (self.stages - 1)

    @property
    def first_stage(self) -> int:
        """The last look of the first stage in which somebody may leave."""
        return -(-(self.min_looks - 1) // self.looks) * self.looks


class Curves:
    """What the rule knows of every path so far: its peak, and the second differences of its curve."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.seen = 0
        self.since = np.zeros(shape, np.int64)  # looks since the peak, the last of equals
        self.top = np.full(shape, -np.inf)
        self.value = self.step = np.zeros(shape)
        self.total = np.zeros(shape)  # of the squared second differences
        self.steepest = np.full(shape, np.inf)  # the smallest step since the peak, the first of equals
        self.age = np.zeros(shape, np.int64)  # looks since that step
        self.left_out = np.zeros(shape)  # the squares that hold it
        self.left_count = np.zeros(shape, np.int64)

    def add(self, values: Floats) -> NDArray[np.bool_]:
        """The next look; where it is the peak."""
        step = values - self.value
        square = (step - self.step) ** 2 if self.seen >= 2 else np.zeros_like(values)
        self.total = self.total + square
        peak = values >= self.top
        self.top = np.where(peak, values, self.top)
        self.since = np.where(peak, 0, self.since + 1)
        if self.seen:
            self.age += 1
            after = (self.age == 1) & ~peak  # the difference behind the steepest step
            steeper = ~peak & (step < self.steepest)
            self.left_out = np.where(steeper, square, self.left_out + np.where(after, square, 0.0))
            self.left_count = np.where(steeper, int(self.seen >= 2), self.left_count + after)
            self.steepest = np.where(steeper, step, np.where(peak, np.inf, self.steepest))
            self.age[steeper] = 0
            for sums in (self.left_out, self.left_count):
                sums[peak] = 0
            self.age[peak] = 2  # no steepest step, so none behind it
        self.value, self.step = values, step
        self.seen += 1
        return peak

    def wobble(self) -> tuple[Floats, NDArray[np.int64]]:
        """(√2 · wobble, second differences it rests on); (0, 0) without any."""
        count = max(0, self.seen - 2) - self.left_count
        squares = np.maximum(self.total - self.left_out, 0.0)
        return np.sqrt(squares / np.maximum(count, 1) / 3.0), count


def leaving(world: World, looks: int, cells: Sequence[Cell]) -> NDArray[np.int64]:
    """The look at which each path leaves under each cell, [C, W, P]; NEVER where it does not.

    looks: beside the one at 0.00. The cells' patience and min_looks are the first one's.
    """
    ends = [min(looks, cell.last) for cell in cells]
    z = np.array([normal_quantile(cell.chance) for cell in cells])
    t = student_table(tuple(cell.chance for cell in cells), looks)
    patience, first = cells[0].patience, max(cells[0].min_looks - 1, 2)
    values = world.look()
    curves, left = Curves(values.shape), np.full((len(cells), *values.shape), NEVER)
    past: list[tuple[Floats, Floats]] = []  # fall less correction, item error; of the last looks
    for now in range(max(ends) + 1):
        if now:
            values = world.look()
        world.keep(curves.add(values))
        fall = curves.top - values
        past = [*past, (fall - world.correction, np.sqrt(world.squares()) / world.rows)][-patience:]
        if now < first:
            continue
        wobble, count = curves.wobble()
        may = (curves.since >= patience) & (count > 0)
        for excess, _ in past:
            may &= (excess >= 0) & (excess > -world.correction)
        at = np.nonzero(may)
        for c in sorted(range(len(cells)), key=lambda c: -cells[c].chance):
            # A smaller chance asks for a larger fall: who does not leave here does not there.
            if now > ends[c] or not len(at[0]):
                continue
            whole = t[c, count[at]] * wobble[at]
            out = np.ones(len(at[0]), bool)
            for excess, error in past:
                out &= excess[at] >= np.hypot(z[c] * error[at], whole)
            at = tuple(index[out] for index in at)
            left[c][at] = np.minimum(left[c][at], now)
        if all(now > end or (left[c] < NEVER).all() for c, end in enumerate(ends)):
            break
    return left


@functools.cache
def student_table(chances: tuple[float, ...], looks: int) -> Floats:
    """Quantiles [C, looks] by the second differences they rest on."""
    return np.array(
        [[student_quantile(p, DF_PER_DIFFERENCE * count) for count in range(looks)] for p in chances]
    )
