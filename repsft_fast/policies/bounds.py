"""Bounds of policies' settings: what may stand in each, and how what may not is told."""

import math
from collections.abc import Iterable

from repsft_fast.errors import describe

AT_END = 1e-9  # epochs are sums of fractions of an epoch


def out_of_bounds(bounds: Iterable[tuple[str, float, float, float]]) -> list[str]:
    """The problem of each (setting of mixture.*, value, least, most) that does not hold, or is no finite
    number."""
    found = []
    for name, value, low, high in bounds:
        # a whole number is finite, however many digits it has
        finite = isinstance(value, int) or math.isfinite(value)
        if not low <= value <= high or not finite:
            expected = f"at least {low:g}" + (f", at most {high:g}" if high < math.inf else "")
            found.append(describe(f"mixture.{name}", "cannot be used", expected=expected, got=value))
    return found


def is_shorter_than_an_interval(compute_budget: float, evaluations_per_epoch: int) -> bool:
    """Whether so many epochs end before the first evaluation, so that nothing would ever be decided. NaN
    does."""
    return not compute_budget * evaluations_per_epoch >= 1 - AT_END
