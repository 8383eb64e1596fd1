"""The harness measures what it says: turns, memory, operations, records that cannot lie."""

import gc
import json
import time

import pytest
import torch

from benchmarks import harness, records


def test_rounds_run_forwards_then_backwards():
    seen = []
    calls = {name: (lambda name=name: seen.append(name)) for name in "ABC"}
    times = harness.interleave(calls, rounds=2, warmup=0, cold=False)
    assert "".join(seen) == "ABCCBA" + "CBAABC"
    assert {name: len(t) for name, t in times.items()} == {"A": 2, "B": 2, "C": 2}


def test_times_go_to_the_variant_that_took_them():
    calls = {"slow": lambda: time.sleep(0.02), "fast": lambda: time.sleep(0.002), "middle": lambda: time.sleep(0.01)}
    times = harness.interleave(calls, rounds=3, warmup=0, cold=False)
    medians = {name: harness.quantile(t, 0.5) for name, t in times.items()}
    assert medians["slow"] >= 20
    assert 10 <= medians["middle"] < medians["slow"]
    assert 2 <= medians["fast"] < medians["middle"]


def test_the_budget_ends_early_but_not_before_eight_rounds():
    calls = {"a": lambda: time.sleep(0.01)}
    assert len(harness.interleave(calls, rounds=50, warmup=0, cold=False, budget_s=0.0)["a"]) == 8


def test_the_noise_pair_is_the_first_variant_again():
    first, second = (lambda: 1), (lambda: 2)
    noisy = harness.with_noise({"ours": first, "peer": second})
    assert list(noisy) == ["ours", "peer", harness.NOISE_NAME]
    assert noisy[harness.NOISE_NAME] is first


def test_an_error_in_a_variant_is_not_swallowed():
    def broken():
        raise RuntimeError("red")

    with pytest.raises(RuntimeError, match="red"):
        harness.interleave({"a": broken}, rounds=1)


def test_peak_bytes_is_exact():
    x, y = torch.ones(1000, 1000), torch.ones(1000, 1000)
    assert harness.peak_bytes(lambda: x + y) == 4_000_000
    assert harness.peak_bytes(lambda: (x + y).mul_(y)) == 4_000_000
    assert harness.peak_bytes(lambda: (x + y) + (x * y)) == 12_000_000
    assert harness.peak_bytes(lambda: x.mul_(y)) == 0
    assert harness.peak_bytes(lambda: [(x + y).sum() for _ in range(5)]) == 4_000_000 + 5 * 4  # freed before the next


def test_operations_and_syncs_are_counted():
    x = torch.ones(10)
    assert harness.count(lambda: (x + 1).view(2, 5).t()).operations == 1
    assert harness.count(lambda: x.sum().item()).syncs == 1
    assert harness.count(lambda: x.nonzero()).syncs == 1
    assert harness.count(lambda: x[x > 0]).syncs == 1
    assert harness.count(lambda: torch.where(x > 0, x, 0)).syncs == 0
    assert harness.count(lambda: x.mul_(2).add_(1)).by_name == {"mul_": 1, "add_": 1}


def test_quantiles():
    assert harness.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert harness.quantile([1.0, 2.0], 0.2) == pytest.approx(1.2)
    assert harness.quantile([5.0], 0.8) == 5.0


def test_ceilings_are_rates_a_machine_can_have():
    rates = harness.ceilings("cpu", torch.float32, small=True)
    assert 1e7 < rates["bytes_per_s"] < 1e13
    assert 1e7 < rates["flops_per_s"] < 1e16


def record(**changes):
    settings = {
        "op": "copy", "implementation": "torch", "shape": {"N": 4}, "dtype": "float32",
        "times_ms": [1.0, 2.0, 3.0], "peak_bytes": 16, "moved_bytes": 2_000_000, "ceilings": {"bytes_per_s": 2e9},
    }  # fmt: skip
    return records.make(harness.environment("cpu"), **(settings | changes))


def test_a_record_holds_what_a_claim_needs(tmp_path):
    made = record()
    assert all(name in made for name in records.REQUIRED)
    assert (made["p20_ms"], made["p50_ms"], made["p80_ms"]) == pytest.approx((1.4, 2.0, 2.6))
    assert made["bytes_per_s"] == pytest.approx(1e9)
    assert made["share_of_bytes_per_s"] == pytest.approx(0.5)
    path = tmp_path / "copy.jsonl"
    records.append(path, [made])
    records.append(path, [made, made])
    assert records.read(path) == [made] * 3
    assert list(records.latest(records.read(path))) == ["copy/torch[N=4]float32"]


@pytest.mark.parametrize(
    "changes",
    [
        {"times_ms": []},
        {"times_ms": [0.0, 1.0]},
        {"times_ms": [float("nan")]},
        {"times_ms": [-1.0]},
        {"times_ms": [float("inf")]},
        {"peak_bytes": -1},
        {"peak_bytes": 1.5},
        {"ceilings": {"bytes_per_s": float("inf")}},
    ],
)
def test_impossible_records_are_refused(changes):
    with pytest.raises(records.BadRecord):
        record(**changes)


def test_nothing_is_written_when_one_record_is_bad(tmp_path):
    path = tmp_path / "copy.jsonl"
    with pytest.raises(records.BadRecord):
        records.append(path, [record(), record() | {"p50_ms": float("nan")}])
    assert not path.exists()


@pytest.mark.parametrize("line", ["{", "[]", "null", "{}", '{"op": "x"}'])
def test_torn_lines_are_named(tmp_path, line):
    path = tmp_path / "copy.jsonl"
    path.write_text(json.dumps(record()) + "\n" + line + "\n")
    with pytest.raises(records.BadRecord, match=r"copy\.jsonl:2"):
        records.read(path)


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "copy.jsonl"
    path.write_text("")
    with pytest.raises(records.BadRecord, match="no records"):
        records.read(path)


def test_garbage_of_others_is_no_room_that_the_call_gives_back():
    class Loop:
        pass

    def leave():
        loop = Loop()
        loop.self, loop.held = loop, torch.ones(1 << 18)

    gc.disable()
    harness.peak_bytes(leave)  # the profiler knows the size of what it saw being made

    def call():
        first = torch.ones(1 << 18)
        gc.collect()
        return first, torch.ones(1 << 18)

    try:
        assert harness.peak_bytes(call) >= 2 * 4 * (1 << 18)
    finally:
        gc.enable()
