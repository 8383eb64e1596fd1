"""The prediction of the finished model's accuracy: what its two parts add, by hand."""

import math

import pytest

from repsft_fast.policies.foresight import PER_WOBBLE, predicted


def looks(*losses, total=10**9):
    """Looks whose log(1 - accuracy) are these."""
    return [(total - round(total * math.exp(loss)), total) for loss in losses]


def gained(found, now):
    """What lies between now and the end, in the unit of log(1 - accuracy)."""
    return now - math.log(1 - found)


class TestParts:
    def test_one_look_is_gone_on_with_as_it_is(self):
        now, later = predicted(looks(-2.0), 3.0, 9)
        assert gained(now, -2.0) == pytest.approx(0, abs=1e-6)
        assert later == now

    def test_a_straight_line_is_gone_on_with(self):
        now, later = predicted(looks(-1.0, -1.2, -1.4, -1.6, -1.8), 3.0, 1)
        assert gained(now, -1.8) == pytest.approx(3 * 0.2, abs=1e-6)
        assert gained(later, -1.8) == pytest.approx(3.5 * 0.2, abs=1e-6)

    def test_wobble_is_given_back_and_the_line_is_begun_from(self):
        """Second differences of a line that swings by ± d are ± 4 d: d · 4 / sqrt(6) of wobble. The line
        through its last four (d, -d, d, -d) falls by 0.4 d and ends 0.6 d below their mean."""
        d = 0.03
        now, later = predicted(looks(*[-1.0 + d * (-1) ** k for k in range(8)]), 2.0, 9)
        expected = 0.6 * d + 9 / 12 * PER_WOBBLE * 4 * d / math.sqrt(6) + 2 * 0.4 * d
        assert gained(now, -1.0) == pytest.approx(expected, abs=1e-6)
        assert gained(later, -1.0) == pytest.approx(expected + 0.2 * d, abs=1e-6)

    def test_the_line_is_of_the_last_four_and_the_wobble_of_the_last_eight(self):
        now, _ = predicted(looks(5.0 - 9, 0.0, -0.5, -1.0, -1.5, -1.6, -1.6, -1.6, -1.6), 5.0, 6)
        seconds = [0, 0, 0.4, 0.1, 0, 0]
        wobble = math.sqrt(sum(s * s for s in seconds) / (6 * len(seconds)))
        assert gained(now, -1.6) == pytest.approx(6 / 9 * PER_WOBBLE * wobble, abs=1e-6)

    @pytest.mark.parametrize(("updates", "share"), [(1, 1 / 4), (3, 1 / 2), (30, 10 / 11)])
    def test_a_decay_of_few_updates_gives_back_little_of_it(self, updates, share):
        """Two looks more than a line needs, one of them 0.1 off: a wobble of 0.2 / sqrt(12)."""
        now, _ = predicted(looks(-1.0, -1.1, -1.0, -1.1), 0.0, updates)
        line = predicted(looks(-1.0, -1.1, -1.0, -1.1), 0.0, 0)[0]
        wobble = math.sqrt(2 * 0.2**2 / 12)
        assert math.log(1 - line) - math.log(1 - now) == pytest.approx(share * PER_WOBBLE * wobble, abs=1e-6)

    def test_getting_worse_is_no_reason_to_wait_half_an_epoch(self):
        now, later = predicted(looks(-2.0, -1.9), 1.0, 1)
        assert gained(now, -1.9) == pytest.approx(-0.1, abs=1e-6)
        assert later == now


def test_nothing_wrong_is_half_a_token_wrong():
    now, _ = predicted([(100, 100)], 1.0, 1)
    assert gained(now, math.log(0.5 / 100)) == pytest.approx(0, abs=1e-9)


def test_never_below_none_right():
    """A run that loses what it knew is not predicted at less than nothing."""
    assert predicted([(90, 100), (2, 100)], 10.0, 1) == (0.0, 0.0)
