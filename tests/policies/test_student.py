"""The quantiles against printed tables and against integrals of the density."""

import math

import pytest

from repsft_fast.policies.student import normal_quantile, student_quantile, student_tail

# One-sided, from printed tables (five to six figures).
TABLE = [
    (0.05, 1, 6.3138), (0.025, 2, 4.3027), (0.025, 5, 2.5706), (0.01, 10, 2.7638), (0.005, 30, 2.7500),
    (0.0005, 4, 8.6103), (0.025, 120, 1.9799),
]  # fmt: skip


@pytest.mark.parametrize(("p", "df", "t"), TABLE)
def test_tables(p, df, t):
    assert student_quantile(p, df) == pytest.approx(t, abs=5.1e-5)


@pytest.mark.parametrize("p", [0.3, 0.01, 1e-4, 1e-7])
def test_closed_forms(p):
    """df = 1: cot(πp); df = 2: (1 − 2p) · sqrt(2 / (4p(1 − p)))."""
    assert student_quantile(p, 1) == pytest.approx(1 / math.tan(math.pi * p), rel=1e-11)
    assert student_quantile(p, 2) == pytest.approx((1 - 2 * p) * math.sqrt(2 / (4 * p * (1 - p))), rel=1e-11)


@pytest.mark.parametrize("df", [0.6, 1.8, 3.6, 7.2, 23.4])
@pytest.mark.parametrize("t", [0.2, 2.0, 11.0])
def test_degrees_of_freedom_that_are_not_whole(df, t):
    """The tail beside Simpson's rule over the density, in u = artanh(x / sqrt(x² + df))."""
    norm = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    steps, top = 20_000, math.atan2(t, math.sqrt(df))
    # with x = sqrt(df) · tan(a) the density becomes norm · cos(a)^(df − 1)
    values = [math.cos(top * k / steps) ** (df - 1) for k in range(steps + 1)]
    area = (values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2])) * top / steps / 3
    assert student_tail(t, df) == pytest.approx(0.5 - norm * area, abs=1e-12)
    assert student_quantile(student_tail(t, df), df) == pytest.approx(t, rel=1e-11)


def test_edges():
    assert student_quantile(0.5, 3.0) == 0.0
    assert student_quantile(0.01, 0.0) == math.inf, "nothing is known of the spread"
    assert student_quantile(1e-300, 0.1) == math.inf
    assert student_quantile(0.025, 1e9) == pytest.approx(normal_quantile(0.025), rel=2e-7), "lgamma's digits"
    assert normal_quantile(0.025) == pytest.approx(1.959963984540054, rel=1e-14)
    for p in (0.0, 0.6, math.nan):
        with pytest.raises(ValueError, match="must lie in"):
            student_quantile(p, 3.0)
