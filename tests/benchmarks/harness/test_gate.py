"""The gate tests itself: planted slowdowns are caught, noise is not, and nothing passes silently."""

import hashlib
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.harness import gate, timing
from benchmarks.harness.gate import Verdict, judge_pairs

ROUNDS = 30


def noisy_rounds(generator, base_ms, *, drift=0.05, own=0.03, spikes=0.05, rounds=ROUNDS):
    """Two series as a shared 2-core machine gives them: a drift both share, noise of their own, rare
    interruptions.

    Each number is the better of two calls, as the harness takes it.
    """
    shared = np.exp(np.cumsum(generator.normal(0, drift, rounds)))
    series = []
    for base in base_ms:
        calls = base * shared * np.exp(generator.normal(0, own, (2, rounds)))
        calls *= np.where(
            generator.random((2, rounds)) < spikes, 1 + generator.exponential(1.0, (2, rounds)), 1.0
        )
        series.append(calls.min(axis=0).tolist())
    return series


def test_four_hundred_comparisons_of_equals_raise_no_alarm():
    """20 benchmarks in 20 runs."""
    generator = np.random.default_rng(1)
    verdicts = [
        judge_pairs(*noisy_rounds(generator, (1.0, 1.0)), gate.LEAST_EFFECT["cpu"]).verdict
        for _ in range(400)
    ]
    assert Verdict.SLOWER not in verdicts
    assert Verdict.FASTER not in verdicts
    assert verdicts.count(Verdict.SAME) > 200  # and it is not mute


def test_a_planted_ten_percent_on_a_cpu_is_caught():
    generator = np.random.default_rng(2)
    slower = [
        judge_pairs(*noisy_rounds(generator, (1.0, 1.1)), gate.LEAST_EFFECT["cpu"]).verdict
        for _ in range(100)
    ]
    faster = [
        judge_pairs(*noisy_rounds(generator, (1.1, 1.0)), gate.LEAST_EFFECT["cpu"]).verdict
        for _ in range(100)
    ]
    assert slower.count(Verdict.SLOWER) >= 99
    assert faster.count(Verdict.FASTER) >= 99


def test_a_planted_three_percent_on_a_gpu_is_caught():
    """Events on a GPU repeat to about 0.5 % between rounds; a true 3.5 % lies above the minimum effect of 3
    %."""
    generator = np.random.default_rng(3)
    quiet = {"drift": 0.01, "own": 0.005, "spikes": 0.0}
    slower = [
        judge_pairs(*noisy_rounds(generator, (1, 1.035), **quiet), gate.LEAST_EFFECT["cuda"])
        for _ in range(100)
    ]
    equal = [
        judge_pairs(*noisy_rounds(generator, (1, 1), **quiet), gate.LEAST_EFFECT["cuda"]) for _ in range(100)
    ]
    assert sum(j.verdict is Verdict.SLOWER for j in slower) >= 99
    assert all(j.verdict is Verdict.SAME for j in equal)


def hashing(blocks: int):
    """A counted amount of work, timed by the processor's clock of this thread: others' work delays it and is
    not counted."""
    data = bytes(1 << 16)

    def work() -> float:  # milliseconds
        started = time.thread_time_ns()
        for _ in range(blocks):
            hashlib.blake2b(data)
        return (time.thread_time_ns() - started) / 1e6

    return work


def real_session(a: int, b: int) -> gate.Judgement:
    times = timing.interleave_measured({"a": hashing(a), "b": hashing(b)}, rounds=ROUNDS)
    return judge_pairs(times["a"], times["b"], gate.LEAST_EFFECT["cpu"])


def test_a_real_ten_percent_is_caught_in_every_session():
    for _ in range(3):
        assert real_session(20, 22).verdict is Verdict.SLOWER
        assert real_session(22, 20).verdict is Verdict.FASTER


def test_twenty_real_sessions_of_equals_raise_no_alarm():
    verdicts = [real_session(10, 10).verdict for _ in range(20)]
    assert Verdict.SLOWER not in verdicts
    assert Verdict.FASTER not in verdicts


def test_too_few_rounds_are_unclear():
    assert judge_pairs([1.0] * 7, [2.0] * 7, 0.05).verdict is Verdict.UNCLEAR
    assert judge_pairs([1.0] * 8, [2.0] * 8, 0.05).verdict is Verdict.SLOWER


def test_a_wide_interval_is_unclear_not_same():
    generator = np.random.default_rng(4)
    a, b = (np.exp(generator.normal(0, 0.5, 20)).tolist() for _ in range(2))
    assert judge_pairs(a, b, 0.05).verdict is Verdict.UNCLEAR


@given(st.lists(st.floats(0.1, 10), min_size=8, max_size=30), st.floats(0.5, 2.0))
def test_a_constant_factor_is_found_exactly(times, factor):
    judgement = judge_pairs(times, [t * factor for t in times], 0.05)
    assert math.isclose(judgement.ratio, factor, rel_tol=1e-9)
    assert math.isclose(judgement.low, judgement.high, rel_tol=1e-9)


@pytest.mark.parametrize("bad", [[0.0] * 8, [float("nan")] * 8, [1.0] * 7 + [float("inf")], [-1.0] * 8, []])
def test_times_that_are_none_are_refused(bad):
    with pytest.raises(gate.Refused):
        judge_pairs(bad, [1.0] * len(bad), 0.05)
    with pytest.raises(gate.Refused):
        judge_pairs([1.0] * len(bad), bad, 0.05)


def test_pairs_of_unequal_length_are_refused():
    with pytest.raises(gate.Refused):
        judge_pairs([1.0] * 8, [1.0] * 9, 0.05)


# Records --------------------------------------------------------------------------------------------------


def session(scale=1.0, **changes):
    generator = np.random.default_rng(5)
    rounds = (scale * np.exp(generator.normal(0, 0.01, 20))).tolist()
    return {"device": "X", "device_class": "cpu", "threads": 2, "rounds_ms": rounds} | changes


def test_equal_sessions_pass():
    report = gate.compare_records({"a": session()}, {"a": session()})
    assert report.passed
    assert report.judged == 1


def test_a_slower_session_fails_and_a_faster_one_passes():
    assert not gate.compare_records({"a": session()}, {"a": session(1.2)}).passed
    assert gate.compare_records({"a": session()}, {"a": session(0.8)}).passed


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ({"a": session()}, {"a": session(device="Y")}, "another device"),
        ({"a": session()}, {"a": session(device_class="cuda")}, "another device_class"),
        ({"a": session()}, {"a": session(threads=1)}, "another threads"),
        ({"a": session(), "b": session()}, {"a": session()}, "b: vanished"),
        ({"a": session()}, {"a": session(), "b": session()}, "b: is new"),
        ({"a": session(rounds_ms=[0.0] * 20)}, {"a": session()}, "not measurements"),
        ({"a": session(rounds_ms=[float("nan")] * 20)}, {"a": session()}, "not measurements"),
        ({"a": session(rounds_ms=[])}, {"a": session()}, "not measurements"),
        ({}, {}, "nothing was judged"),
    ],
)
def test_nothing_passes_silently(before, now, words):
    report = gate.compare_records(before, now)
    assert not report.passed
    assert words in str(report)


# Counted figures ------------------------------------------------------------------------------------------


def test_counted_figures_are_exact():
    table = {"head": {"operations": 100, "peak_bytes": 1000}}
    assert gate.compare_exact(table, table).passed
    assert gate.compare_exact(table, table).judged == 2
    for worse in ({"operations": 101, "peak_bytes": 1000}, {"operations": 103, "peak_bytes": 1000}):
        assert "SLOWER" in str(gate.compare_exact(table, {"head": worse}))
        assert not gate.compare_exact(table, {"head": worse}).passed
    better = gate.compare_exact(table, {"head": {"operations": 99, "peak_bytes": 1000}})
    assert not better.passed
    assert "update the table" in str(better)


def test_counted_figures_that_come_and_go_are_named():
    table = {"head": {"operations": 100}}
    assert not gate.compare_exact(table, {}).passed
    assert not gate.compare_exact({}, table).passed
    assert not gate.compare_exact(table, {"head": {}}).passed
    assert not gate.compare_exact(table, {"head": {"operations": 100, "syncs": 0}}).passed
    assert not gate.compare_exact({}, {}).passed


# Ratios within one run ------------------------------------------------------------------------------------


def test_ratios_hold_on_a_machine_of_any_speed():
    generator = np.random.default_rng(6)
    for speed in (0.1, 1.0, 10.0):
        yardstick, ours = noisy_rounds(generator, (speed * 2.0, speed * 1.0))
        assert gate.compare_ratios({"head": 0.5}, {"head": (yardstick, ours)}).passed
        assert not gate.compare_ratios({"head": 0.45}, {"head": (yardstick, ours)}).passed


@pytest.mark.parametrize("limit", [0.0, float("nan"), -1.0, float("inf")])
def test_a_committed_ratio_that_is_none_is_refused(limit):
    report = gate.compare_ratios({"head": limit}, {"head": ([1.0] * 20, [1.0] * 20)})
    assert not report.passed
    assert report.judged == 0


# The commands ---------------------------------------------------------------------------------------------
