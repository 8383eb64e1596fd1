"""The prediction of the finished model's accuracy: what its three parts add, by hand."""

import math

import pytest

from repsft_fast.policies.foresight import GIVEN_BACK, PER_WOBBLE, predicted


def looks(*losses, total=10**9):
    """Looks whose log(1 - accuracy) are these."""
    return [(total - round(total * math.exp(loss)), total) for loss in losses]


def gained(found, now):
    """What lies between now and the end, in the unit of log(1 - accuracy)."""
    return now - math.log(1 - found)


class TestParts:
    def test_one_look_has_only_what_every_decay_gives(self):
        now, later = predicted(looks(-2.0), 3.0)
        assert gained(now, -2.0) == pytest.approx(GIVEN_BACK, abs=1e-6)
        assert later == now

    def test_a_straight_line_is_gone_on_with(self):
        now, later = predicted(looks(-1.0, -1.2, -1.4, -1.6, -1.8), 3.0)
        assert gained(now, -1.8) == pytest.approx(GIVEN_BACK + 3 * 0.2, abs=1e-6)
        assert gained(later, -1.8) == pytest.approx(GIVEN_BACK + 3.5 * 0.2, abs=1e-6)

    def test_wobble_is_given_back(self):
        """Second differences of a line that swings by ± d are ± 4 d: d · 4 / sqrt(6) of wobble."""
        d = 0.03
        swinging = [-1.0 + d * (-1) ** k for k in range(8)]
        slope = 0.4 * d  # of the last four by least squares: + - + - at -1.5 … 1.5, over 5
        now, _ = predicted(looks(*swinging), 2.0)
        expected = GIVEN_BACK + PER_WOBBLE * 4 * d / math.sqrt(6) + 2 * slope
        assert gained(now, swinging[-1]) == pytest.approx(expected, abs=1e-6)

    def test_the_slope_is_of_the_last_four(self):
        long_ago = [0.0, -0.5, -1.0, -1.5]
        now, _ = predicted(looks(*long_ago, -1.6, -1.6, -1.6, -1.6), 5.0)
        seconds = [0, 0, 0.4, 0.1, 0, 0]
        wobble = math.sqrt(sum(s * s for s in seconds) / (6 * len(seconds)))
        assert gained(now, -1.6) == pytest.approx(GIVEN_BACK + PER_WOBBLE * wobble, abs=1e-6)

    def test_the_wobble_is_of_the_last_eight(self):
        assert predicted(looks(0.0, *([-1.6] * 8)), 5.0) == predicted(looks(*([-1.6] * 8)), 5.0)

    def test_getting_worse_is_no_reason_to_wait_half_an_epoch(self):
        now, later = predicted(looks(-2.0, -1.9), 1.0)
        assert gained(now, -1.9) == pytest.approx(GIVEN_BACK - 0.1, abs=1e-6)
        assert later == now


def test_nothing_wrong_is_half_a_token_wrong():
    now, _ = predicted([(100, 100)], 1.0)
    assert gained(now, math.log(0.5 / 100)) == pytest.approx(GIVEN_BACK, abs=1e-9)


def test_never_below_none_right():
    """A run that loses what it knew is not predicted at less than nothing."""
    assert predicted([(90, 100), (2, 100)], 10.0) == (0.0, 0.0)
