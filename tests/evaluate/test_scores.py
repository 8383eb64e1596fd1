"""What verdicts come to: hand-computed cases, Pass@k against exact fractions, intervals that hold what they say."""

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repsft_fast.evaluate import scores as scores_module
from repsft_fast.evaluate.scores import (
    Draw,
    Figure,
    Judged,
    Lengths,
    difference,
    mean_over_tasks,
    pass_at_k,
    pooled,
    score,
)
from repsft_fast.seeded import words


def judged(name, marks, group=""):
    """R right, w wrong, u undecided, - no answer; in small letters (r) cut. Tokens 1, 2 … in their order."""
    verdicts = {"R": "right", "W": "wrong", "U": "undecided", "-": "no answer"}
    draws = (Draw(verdicts[m.upper()], m.isupper() or m == "-", i + 1) for i, m in enumerate(marks))
    return Judged(name, tuple(draws), group)


def values(figures):
    return {k: figure.value for k, figure in figures.items()}


def test_a_case_by_hand():
    scores = score([judged("a", "RWrR"), judged("b", "W-uW"), judged("c", "wwrR")])
    assert (scores.problems, scores.n) == (3, 4)
    assert scores.acc.value == pytest.approx((3 / 4 + 0 + 2 / 4) / 3)
    assert scores.acc_ended.value == pytest.approx((2 / 4 + 0 + 1 / 4) / 3)
    assert scores.ended.value == pytest.approx((3 / 4 + 3 / 4 + 1 / 4) / 3)
    assert scores.acc_given_end.value == pytest.approx(3 / 7)
    assert scores.right_without_end == 2
    assert scores.right_without_end_share.value == pytest.approx(2 / 12)
    assert (scores.no_answer, scores.undecided) == (1, 1)
    assert values(scores.pass_at) == pytest.approx({1: 5 / 12, 2: (1 + 0 + 5 / 6) / 3, 4: 2 / 3})
    assert values(scores.first) == pytest.approx({1: 1 / 3, 2: 1 / 3, 4: 2 / 3})
    assert scores.lengths == Lengths(12, 2.5, 2.5, 4.0, 4)
    assert scores.lengths_ended == Lengths(7, 18 / 7, 2.0, 4.0, 4)
    assert scores.lengths_cut == Lengths(5, 12 / 5, 3.0, 3.0, 3)
    assert scores.entropy == Figure(None)


@pytest.mark.parametrize(
    ("n", "ks"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (10, [1, 2, 4, 8, 10]), (16, [1, 2, 4, 8, 16])],
)
def test_which_k(n, ks):
    scores = score([judged("a", "R" * n)])
    assert list(scores.pass_at) == list(scores.first) == ks
    assert list(score([judged("a", "R" * n)], [n, 1, 1]).pass_at) == sorted({1, n})


def test_lengths_and_entropy():
    draws = tuple(
        Draw("wrong", i < 3, tokens, entropy)
        for i, (tokens, entropy) in enumerate([(10, 0.5), (20, None), (40, 1.0), (90, math.nan)])
    )
    scores = score([Judged("a", draws), Judged("b", draws[::-1])])
    assert scores.lengths == Lengths(8, 40.0, 30.0, 90.0, 90)
    assert scores.lengths_ended == Lengths(6, pytest.approx(70 / 3), 20.0, 40.0, 40)
    assert scores.lengths_cut == Lengths(2, 90.0, 90.0, 90.0, 90)
    assert scores.entropy == Figure(0.75)  # no spread to tell an interval by, and no largest value
    assert score([judged("a", "R" * 11)]).lengths == Lengths(11, 6.0, 6.0, 10.0, 11)
    none = score([judged("a", "r"), judged("b", "w")])
    assert none.lengths_ended == Lengths(0, None, None, None, None)
    assert none.acc_given_end == Figure(None)


@pytest.mark.parametrize("n", range(1, 13))
def test_pass_at_k_is_the_closed_formula(n):
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        exact = 1 - Fraction(math.comb(n - right, k), math.comb(n, k))
        assert pass_at_k(n, right, k) == pytest.approx(float(exact), abs=1e-14)
        subsets = list(itertools.combinations(range(n), k)) if n <= 6 else []
        if subsets:  # drawn without putting back, counted
            assert Fraction(sum(min(subset) < right for subset in subsets), len(subsets)) == exact


def test_pass_at_k_of_many_draws_is_stable():
    exact = 1 - Fraction(math.comb(9_990, 1_000), math.comb(10_000, 1_000))
    assert pass_at_k(10_000, 10, 1_000) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize(("n", "k"), [(4, 1), (4, 2), (5, 3), (6, 6)])
def test_pass_at_k_is_unbiased(n, k):
    """Over every outcome of n draws, each right with chance 1/3: on average the chance that k draws hold one."""
    p = Fraction(1, 3)
    mean = sum(
        math.comb(n, c) * p**c * (1 - p) ** (n - c) * (1 - Fraction(math.comb(n - c, k), math.comb(n, k)))
        for c in range(n + 1)
    )
    assert mean == 1 - (1 - p) ** k
    ours = sum(float(math.comb(n, c) * p**c * (1 - p) ** (n - c)) * pass_at_k(n, c, k) for c in range(n + 1))
    assert ours == pytest.approx(float(mean))


MARKS = st.lists(st.text("RrWwUu-", min_size=5, max_size=5), min_size=1, max_size=6)


@settings(max_examples=30, deadline=None)
@given(MARKS)
def test_what_holds_of_all_scores(rows):
    scores = score([judged(str(i), row) for i, row in enumerate(rows)], range(1, 6))
    passes, first = values(scores.pass_at), values(scores.first)
    assert passes[1] == pytest.approx(scores.acc.value)
    assert passes[5] == first[5]
    assert sorted(passes.values()) == pytest.approx(list(passes.values()))
    assert sorted(first.values()) == list(first.values())
    assert scores.acc_ended.value <= scores.acc.value
    assert scores.acc.value == pytest.approx(scores.acc_ended.value + scores.right_without_end_share.value)
    for figure in (
        scores.acc,
        scores.acc_ended,
        scores.ended,
        *scores.pass_at.values(),
        *scores.first.values(),
    ):
        assert (figure.low is None) == (len(rows) == 1)
        assert figure.low is None or 0 <= figure.low <= figure.value + 1e-9 <= figure.high + 2e-9 <= 1 + 2e-9
    given = scores.acc_given_end
    assert (given.value is None) == (not any(mark.isupper() or mark == "-" for row in rows for mark in row))
    shuffled = score([judged(str(i), row[::-1]) for i, row in enumerate(rows)], range(1, 6))
    assert shuffled.pass_at == scores.pass_at


def test_the_interval_is_of_the_bootstrap():
    rows = ["R"] * 30 + ["W"] * 70
    acc = score([judged(str(i), row) for i, row in enumerate(rows)]).acc
    assert acc.value == 0.3
    half = 1.96 * math.sqrt(0.3 * 0.7 / 100)
    assert acc.low == pytest.approx(0.3 - half, abs=0.011)
    assert acc.high == pytest.approx(0.3 + half, abs=0.011)
    assert acc == score([judged(str(i), row) for i, row in enumerate(rows)]).acc  # the same draws again


def test_every_resample_is_another(monkeypatch):
    keys = []
    monkeypatch.setattr(scores_module, "words", lambda key, count: (keys.append(key), words(key, count))[1])
    score([judged(str(i), "RW"[i % 2]) for i in range(400)])
    assert len(set(keys)) == len(keys) > 1


def test_it_holds_the_truth_as_often_as_it_says():
    """200 evaluations of 60 problems: one in twenty may miss; figures of few problems miss a little more."""
    random = np.random.default_rng(7)
    hit = 0
    for _ in range(200):
        chances = random.beta(1, 2, size=60)
        rows = ["".join("RW"[int(random.random() > chance)] for _ in range(4)) for chance in chances]
        acc = score([judged(str(i), row) for i, row in enumerate(rows)], [1]).acc
        hit += acc.low <= 1 / 3 <= acc.high
    assert 0.90 <= hit / 200 <= 0.985


@pytest.mark.parametrize("n", [2, 10, 100])
def test_all_alike_is_no_certainty(n):
    """0 of n: the chance of that is 2.5 % at the bound."""
    none = score([judged(str(i), "WW") for i in range(n)])
    assert none.acc.value == none.acc.low == 0
    assert (1 - none.acc.high) ** n == pytest.approx(0.025)
    every = score([judged(str(i), "RR") for i in range(n)])
    assert every.acc.value == every.acc.high == 1
    assert every.acc.low**n == pytest.approx(0.025)
    half = score([judged(str(i), "RW") for i in range(n)]).acc
    assert half.low == pytest.approx(0.5 - 0.5 * none.acc.high)
    assert half.high == pytest.approx(0.5 + 0.5 * none.acc.high)


def test_one_problem_has_no_interval():
    scores = score([judged("a", "RWWW")])
    assert scores.acc == Figure(0.25)
    assert scores.pass_at[2] == Figure(0.5)
    # of two problems one alone ever ended
    assert score([judged("a", "RW"), judged("b", "ww")]).acc_given_end == Figure(0.5)


def test_groups():
    scores = score(
        [judged("a", "RR", "x"), judged("b", "RW", "x"), judged("c", "WW", "y"), judged("d", "WW")]
    )
    assert {group: s.problems for group, s in scores.groups.items()} == {"x": 2, "y": 1}
    assert scores.groups["x"].acc.value == 0.75
    assert scores.groups["y"].acc == Figure(0.0)
    assert scores.acc.value == 3 / 8
    assert score([judged("a", "R")]).groups == {}


def test_json():
    scores = score([judged("a", "RR", "x"), judged("b", "Rw", "x")])
    read = json.loads(json.dumps(scores.to_json(), allow_nan=False))
    assert read["acc"]["value"] == 0.75
    assert list(read["pass_at"]) == list(read["groups"]["x"]["first"]) == ["1", "2"]
    assert read["lengths_cut"] == {"replies": 1, "mean": 2.0, "median": 2.0, "p90": 2.0, "longest": 2}
    assert read["entropy"] == {"value": None, "low": None, "high": None}


@pytest.mark.parametrize(
    ("problems", "ks", "said"),
    [
        ([], None, "no problems"),
        ([judged("a", "")], None, "as many draws of each, got [0]"),
        ([judged("a", "R"), judged("b", "RR")], None, "problems differ in their draws"),
        ([judged("a", "R"), judged("a", "R")], None, "a problem is there twice"),
        ([judged("a", "RRR")], [4], "got k 4, n 3, right 3; draw more replies"),
        ([judged("a", "RRR")], [0], "got k 0, n 3, right 3"),
    ],
)
def test_what_cannot_be_scored(problems, ks, said):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        score(problems, ks)
    assert said in str(caught.value)


def test_means_over_tasks():
    figures = [Figure(0.2, 0.1, 0.4), Figure(0.6, 0.3, 0.7)]
    mean = mean_over_tasks(figures)
    assert mean.value == pytest.approx(0.4)
    assert mean.low == pytest.approx(0.4 - math.hypot(0.1, 0.3) / 2)
    assert mean.high == pytest.approx(0.4 + math.hypot(0.2, 0.1) / 2)
    assert mean_over_tasks(figures[:1]) == Figure(0.2, pytest.approx(0.1), pytest.approx(0.4))
    assert mean_over_tasks([*figures, Figure(0.4)]) == Figure(pytest.approx(0.4))
    assert mean_over_tasks([*figures, Figure(None)]) == mean_over_tasks([]) == Figure(None)


def test_pooled():
    tasks = {
        "a": score([judged("a", "RR"), judged("b", "WW")]),
        "b": score([judged("a", "RRRR"), judged("b", "RWWW"), judged("c", "RRWW")]),
    }
    found = pooled(tasks)
    assert list(found) == [
        "acc",
        "acc_ended",
        "acc_given_end",
        "ended",
        "pass@1",
        "pass@2",
        "first@1",
        "first@2",
    ]
    assert found["acc"].value == pytest.approx((1 / 2 + 7 / 12) / 2)  # not 9 of 16
    assert found["first@1"].value == pytest.approx((1 / 2 + 1) / 2)
    assert found["acc"].low < found["acc"].value < found["acc"].high
    assert pooled({})["acc"] == Figure(None)


def test_a_paired_difference_sees_what_is_the_same():
    random = np.random.default_rng(3)
    hard = random.random(80) < 0.5
    base = [judged(str(i), "W" if h else "R") for i, h in enumerate(hard)]
    other = [judged(str(i), "R" if not h or i < 16 else "W") for i, h in enumerate(hard)]
    gained = sum(hard[:16]) / 80
    found = difference(base, other[::-1])
    assert found.value == pytest.approx(gained)
    assert 0 < found.low < found.value < found.high < gained + 0.1
    back = difference(other, base)
    assert (back.value, back.low, back.high) == pytest.approx(
        (-found.value, -found.high, -found.low), abs=0.013
    )
    ending = difference(base, other, lambda problem: float(problem.draws[0].finished))
    assert ending.value == 0
    moved = 1 - 0.025 ** (1 / 80)
    assert (ending.low, ending.high) == pytest.approx((-moved, moved))


@pytest.mark.parametrize("other", [[], ["a"], ["a", "c"], ["a", "b", "c"], ["a", "b", "b"]])
def test_other_problems_are_not_compared(other):
    base = [judged("a", "R"), judged("b", "R")]
    with pytest.raises(ValueError, match="not the same problems, got 2 and"):
        difference(base, [judged(name, "R") for name in other])
