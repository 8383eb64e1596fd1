"""The few statistics policies need: exact accuracy thresholds, pooled scores, the paired test, a stable
softmax."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal

from repsft_fast.errors import TrainingError, describe

Pool = Literal["items", "tasks"]  # how the scores of several tasks become one


@dataclass(frozen=True)
class Score:
    """A task's score at one evaluation; higher is better (a loss comes in negated). NaN or n = 0:
    undefined."""

    value: float  # the mean over the task's n validation items
    n: int
    items: tuple[float, ...] | None = None  # [n] per-item scores in a fixed order, for paired tests

    def __post_init__(self) -> None:
        if self.items is not None and len(self.items) != self.n:
            raise TrainingError(
                describe("score", "items and n disagree", expected=f"{self.n} items", got=len(self.items))
            )

    @staticmethod
    def of(items: Iterable[float]) -> "Score":
        """The score of these per-item values; no items, or one among them that is no finite number, makes it
        undefined."""
        kept = tuple(float(item) for item in items)
        known = bool(kept) and all(map(math.isfinite, kept))
        return Score(math.fsum(kept) / len(kept) if known else math.nan, len(kept), kept)

    @property
    def defined(self) -> bool:
        return self.n > 0 and math.isfinite(self.value)

    @cached_property
    def total(self) -> float:
        """Sum over the items: exact for counts (0/1 items, or a mean of them), so that equal counts compare
        equal."""
        if self.items is not None:
            return math.fsum(self.items)
        total = self.value * self.n
        return float(round(total)) if abs(total - round(total)) <= 1e-9 * self.n else total

    @cached_property
    def is_binary(self) -> bool:
        return self.items is not None and all(item in (0.0, 1.0) for item in self.items)


def pooled(scores: Mapping[str, Score], tasks: Iterable[str], pool: Pool = "items") -> float:
    """Mean over all items of `tasks` (the paper's pooled accuracy) or over the tasks, each weighing the same;
    NaN when one of them is undefined here."""
    wanted = [scores.get(task) for task in sorted(tasks)]
    if not wanted or any(score is None or not score.defined for score in wanted):
        return math.nan
    if pool == "tasks":
        return math.fsum(s.value for s in wanted if s is not None) / len(wanted)
    return math.fsum(s.total for s in wanted if s is not None) / sum(s.n for s in wanted if s is not None)


@dataclass(frozen=True)
class Difference:
    """before − after of one task between two evaluations, over the same items."""

    mean: float
    standard_error: float  # of the mean; inf when it cannot be known
    null_error: float  # the same if there were no difference: sqrt(sum d²)/n. Never 0 unless nothing moved
    correction: float = 0.0  # continuity: one item's worth for 0/1 scores, so that few items do not decide


def difference(before: Score, after: Score) -> Difference:
    """Paired where both carry items; otherwise from the binomial variances when scores are shares; else
    unknowable (inf)."""
    if not (before.defined and after.defined):
        return Difference(math.nan, math.inf, math.inf)
    mean = before.value - after.value

    # Most items stay right or wrong from one evaluation to the next: paired, that part of the noise cancels.
    if before.items is not None and after.items is not None:
        if before.n != after.n:
            wrong = "two scores of one task are over different items"
            raise TrainingError(describe("evaluation", wrong, expected=before.n, got=after.n))
        n = before.n
        moved = [a - b for a, b in zip(before.items, after.items)]
        mean = math.fsum(moved) / n
        if n < 2:
            return Difference(mean, math.inf, math.inf)
        error = math.sqrt(math.fsum((d - mean) ** 2 for d in moved) / (n - 1) / n)
        null = math.sqrt(math.fsum(d * d for d in moved)) / n
        return Difference(mean, error, null, 1 / n if before.is_binary and after.is_binary else 0.0)

    # Without items only the variance of a share is known; a mean loss says nothing of its own spread.
    shares = all(0.0 <= s.value <= 1.0 and s.n > 1 for s in (before, after))
    if not shares:
        return Difference(mean, math.inf, math.inf)
    error = math.sqrt(sum(s.value * (1 - s.value) / s.n for s in (before, after)))
    middle = (before.total + after.total) / (before.n + after.n)
    null = math.sqrt(middle * (1 - middle) * (1 / before.n + 1 / after.n))
    return Difference(mean, error, null, 1 / before.n)


def as_ratio(threshold: float) -> Fraction:
    """The decimal number the user wrote: 0.97 is 97/100, not the nearest binary fraction."""
    return Fraction(repr(float(threshold)))


def reaches(correct: int, total: int, threshold: float) -> bool:
    """correct / total >= threshold, in integers. Nothing trained reaches nothing."""
    ratio = as_ratio(threshold)
    return total > 0 and correct * ratio.denominator >= ratio.numerator * total


def softmax(logits: Sequence[float]) -> list[float]:
    """exp(x) / sum exp(x); -inf gets 0. Empty for nothing."""
    top = max(logits, default=0.0)
    weights = [math.exp(x - top) for x in logits]
    total = math.fsum(weights)
    return [w / total for w in weights]
