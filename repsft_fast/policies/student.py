"""Quantiles of the normal and of Student's distribution, for any degrees of freedom."""

import functools
import math
from statistics import NormalDist


def normal_quantile(p: float) -> float:
    """The z that a standard normal number exceeds with probability p, 0 < p < 1. To 1e-9 for
    p ≥ 1e-300."""
    return -NormalDist().inv_cdf(p)


@functools.lru_cache(maxsize=4096)
def student_quantile(p: float, df: float) -> float:
    """The t that Student's variable with `df` degrees of freedom exceeds with probability p.

    0 < p ≤ 1/2; df > 0, whole or not. inf for df ≤ 0 (nothing is known of the spread) and where t² is no
    number any more. Relative error below 1e-11 up to df of
    some hundreds, 2e-7 at 1e9 (tests/policies/test_student.py).
    """
    if not 0 < p <= 0.5:
        raise ValueError(f"student_quantile: p must lie in (0, 0.5], got {p}")
    if not df > 0:
        return math.inf
    if p == 0.5:
        return 0.0

    # P(T > t) falls in t: bracketed by doubling, then halved. In t's logarithm, as t may be 1e-8 or 1e+30.
    high = 1.0
    while student_tail(high, df) > p:
        high *= 2.0
        if high > 1e150:
            return math.inf
    low = high / 2.0
    while student_tail(low, df) < p:
        low /= 2.0
    for _ in range(200):
        middle = math.sqrt(low * high)
        if not low < middle < high:
            break
        if student_tail(middle, df) > p:
            low = middle
        else:
            high = middle
    return high


def student_tail(t: float, df: float) -> float:
    """P(T > t) for t ≥ 0: half of I_x(df/2, 1/2) with x = df / (df + t²) (Abramowitz and Stegun 26.7.1)."""
    square = t * t
    return 0.5 * _incomplete_beta(df / 2.0, 0.5, df / (df + square), square / (df + square))


def _incomplete_beta(a: float, b: float, x: float, rest: float) -> float:
    """The regularised incomplete beta function I_x(a, b); rest = 1 − x, given because x may round to 1."""
    if x <= 0.0:
        return 0.0
    if rest <= 0.0:
        return 1.0
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)
    if x < (a + 1.0) / (a + b + 2.0):
        return math.exp(scale) * _fraction(a, b, x) / a
    return 1.0 - math.exp(scale) * _fraction(b, a, rest) / b


def _fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of I_x(a, b) (DLMF 8.17.22), from the front, by Lentz's method."""
    tiny = 1e-300
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1.0)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    value = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for step in (even, odd):
            d = 1.0 + step * d
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = 1.0 + step / c
            c = c if abs(c) > tiny else tiny
            value *= d * c
        if abs(d * c - 1.0) < 1e-15:
            break
    return value
