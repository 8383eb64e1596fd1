"""The paired test against textbook values, pooled scores, exact thresholds."""

import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repsft_fast.errors import TrainingError
from repsft_fast.policies.overfit import Bound
from repsft_fast.policies.statistics import Score, difference, pooled, reaches, softmax

NAN = float("nan")
NO_NOISE = Bound(0.0, 0.0, 0.0)


def binary(right: int, n: int) -> Score:
    return Score.of([1.0] * right + [0.0] * (n - right))


class TestScore:
    def test_of_items(self):
        score = Score.of([1, 0, 0, 1])
        assert (score.value, score.n, score.total, score.is_binary, score.defined) == (
            0.5,
            4,
            2.0,
            True,
            True,
        )

    def test_undefined(self):
        assert not Score.of([]).defined
        assert not Score.of([1.0, NAN]).defined
        assert not Score(0.5, 0).defined
        assert not Score(NAN, 9).defined

    def test_items_and_n_must_agree(self):
        with pytest.raises(TrainingError, match="items and n disagree, expected 3 items, got 2"):
            Score(0.5, 3, (0.0, 1.0))

    @given(n=st.integers(1, 10_000), data=st.data())
    def test_the_total_of_a_share_is_the_count(self, n, data):
        right = data.draw(st.integers(0, n))
        assert Score(right / n, n).total == right


class TestPooled:
    def test_items_weigh_the_same(self):
        scores = {"a": binary(9, 10), "b": binary(0, 90)}
        assert pooled(scores, ["a", "b"]) == 0.09
        assert pooled(scores, ["a", "b"], "tasks") == 0.45

    def test_one_undefined_task_makes_the_moment_undefined(self):
        scores = {"a": binary(9, 10), "b": Score(NAN, 10)}
        assert math.isnan(pooled(scores, ["a", "b"]))
        assert math.isnan(pooled(scores, ["a", "b"], "tasks"))
        assert pooled(scores, ["a"]) == 0.9
        assert math.isnan(pooled(scores, []))

    def test_equal_counts_compare_equal_however_they_split(self):
        one = {"a": Score(64 / 100, 100), "b": Score(31 / 100, 100), "c": Score(1 / 3, 300)}
        two = {"a": Score(63 / 100, 100), "b": Score(32 / 100, 100), "c": Score(1 / 3, 300)}
        assert pooled(one, "abc") == pooled(two, "abc")


class TestDifference:
    def test_standard_error_of_the_paired_difference(self):
        before, after = Score.of([1.0, 2.0, 3.0, 6.0]), Score.of([0.5, 2.0, 1.0, 2.0])
        moved = [0.5, 0.0, 2.0, 4.0]
        mean = sum(moved) / 4
        found = difference(before, after)
        assert found.mean == mean
        assert found.standard_error == pytest.approx(
            math.sqrt(sum((d - mean) ** 2 for d in moved) / 3 / 4), rel=1e-15
        )
        assert found.null_error == pytest.approx(math.sqrt(sum(d * d for d in moved)) / 4, rel=1e-15)
        assert found.correction == 0

    @pytest.mark.parametrize(
        ("lost", "gained", "significant"),
        [(4, 0, False), (5, 0, True), (8, 2, False), (9, 2, True), (2, 9, False)],
    )
    def test_zero_one_items_are_mcnemars_test_with_continuity(self, lost, gained, significant):
        """By hand: (|b − c| − 1) / sqrt(b + c) >= 1.645, e.g. (9 − 2 − 1)/sqrt(11) = 1.81 and (8 − 2 −
        1)/sqrt(10) = 1.58."""
        before = Score.of([1.0] * lost + [0.0] * gained + [1.0] * 20)
        after = Score.of([0.0] * lost + [1.0] * gained + [1.0] * 20)
        assert Bound(1.645, 0.0, 0.0).exceeded(before, after) is significant

    def test_one_item_can_never_be_significant(self):
        assert not NO_NOISE.exceeded(binary(1, 1), binary(0, 1))

    def test_equal_scores_do_not_exceed_even_at_z_0(self):
        assert not NO_NOISE.exceeded(binary(5, 10), binary(5, 10))

    def test_undefined(self):
        found = difference(binary(5, 10), Score(NAN, 10))
        assert math.isnan(found.mean)
        assert not NO_NOISE.exceeded(binary(5, 10), Score(NAN, 10))
        assert not NO_NOISE.exceeded(Score(NAN, 10), binary(5, 10))

    def test_other_items_are_refused(self):
        with pytest.raises(TrainingError, match="different items"):
            difference(binary(5, 10), binary(5, 11))

    def test_without_items_shares_have_binomial_errors(self):
        found = difference(Score(0.8, 100), Score(0.6, 100))
        assert found.standard_error == pytest.approx(math.sqrt(0.8 * 0.2 / 100 + 0.6 * 0.4 / 100), rel=1e-15)
        assert Bound(1.645, 0.0, 0.0).exceeded(Score(0.8, 100), Score(0.6, 100))
        assert not Bound(1.645, 0.0, 0.0).exceeded(Score(0.8, 100), Score(0.75, 100))

    def test_without_items_a_loss_cannot_be_tested(self):
        assert not NO_NOISE.exceeded(Score(-1.0, 100), Score(-3.0, 100))

    def test_the_null_is_rejected_about_as_often_as_it_says(self):
        """z = 1.645 is one-sided 5 %; the continuity correction makes it lower, never higher."""
        rng = random.Random(5)
        trials = 4000
        hits = 0
        for _ in range(trials):
            pairs = [(float(rng.random() < 0.7), float(rng.random() < 0.7)) for _ in range(150)]
            before, after = (Score.of(pair[k] for pair in pairs) for k in (0, 1))
            hits += Bound(1.645, 0.0, 0.0).exceeded(before, after)
        assert 0.025 < hits / trials < 0.055  # 5 % less the correction; four standard errors are 0.014


class TestReaches:
    @given(correct=st.integers(0, 10**18), total=st.integers(1, 10**18), percent=st.integers(1, 100))
    def test_as_fractions(self, correct, total, percent):
        assert reaches(correct, total, percent / 100) == (Fraction(correct, total) >= Fraction(percent, 100))

    def test_nothing_trained_reaches_nothing(self):
        assert not reaches(0, 0, 0.97)


def test_softmax():
    assert softmax([0.0, math.log(3)]) == pytest.approx([0.25, 0.75], rel=1e-15)
    assert softmax([1e4, 0.0]) == [1.0, 0.0]
    assert softmax([0.0, -math.inf]) == [1.0, 0.0]
    assert softmax([]) == []
