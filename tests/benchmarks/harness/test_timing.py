"""The harness measures what it says: turns, memory, operations, records that cannot lie."""

import time

import pytest

from benchmarks.harness import timing


def test_rounds_run_forwards_then_backwards():
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "ABC"}
    times = timing.interleave(calls, rounds=2, warmup=0, cold=False)
    assert "".join(seen) == "ABCCBA" + "CBAABC"
    assert {name: len(t) for name, t in times.items()} == {"A": 2, "B": 2, "C": 2}


def test_times_go_to_the_variant_that_took_them():
    calls = {
        "slow": lambda: time.sleep(0.02),
        "fast": lambda: time.sleep(0.002),
        "middle": lambda: time.sleep(0.01),
    }
    times = timing.interleave(calls, rounds=3, warmup=0, cold=False)
    medians = {name: timing.quantile(t, 0.5) for name, t in times.items()}
    assert medians["slow"] >= 20
    assert 10 <= medians["middle"] < medians["slow"]
    assert 2 <= medians["fast"] < medians["middle"]


def test_the_budget_ends_early_but_not_before_eight_rounds():
    calls = {"a": lambda: time.sleep(0.01)}
    assert len(timing.interleave(calls, rounds=50, warmup=0, cold=False, budget_s=0.0)["a"]) == 8


def test_the_noise_pair_is_the_first_variant_again():
    first, second = (lambda: 1), (lambda: 2)
    noisy = timing.with_noise({"ours": first, "peer": second})
    assert list(noisy) == ["ours", "peer", timing.NOISE_NAME]
    assert noisy[timing.NOISE_NAME] is first


def test_an_error_in_a_variant_is_not_swallowed():
    def broken():
        raise RuntimeError("red")

    with pytest.raises(RuntimeError, match="red"):
        timing.interleave({"a": broken}, rounds=1)


def test_quantiles():
    assert timing.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert timing.quantile([1.0, 2.0], 0.2) == pytest.approx(1.2)
    assert timing.quantile([5.0], 0.8) == 5.0
