"""Records that cannot lie: whole, possible, all or none."""

import json

import pytest

from benchmarks.harness import machine, records


def record(**changes):
    settings = {
        "op": "copy", "implementation": "torch", "shape": {"N": 4}, "dtype": "float32",
        "times_ms": [1.0, 2.0, 3.0], "peak_bytes": 16, "moved_bytes": 2_000_000, "ceilings": {"bytes_per_s": 2e9},
    }  # fmt: skip
    return records.make(machine.environment("cpu"), **(settings | changes))


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
