"""The arithmetic of the study's tables."""

import pytest

from benchmarks.studies import msft_table
from tests.benchmarks.studies.study_records import record


def test_a_peak_is_the_first_maximum():
    assert msft_table.peaks(record()) == {"a": 0.25, "b": 0.5}


def test_forgetting_looks_at_tasks_that_left_before_the_result():
    gone = {"task": "a", "epoch": 0.25, "score": 0.6, "score_in_result": 0.5, "stage": 1}
    run = record(result_moment="0.1", exclusions=[gone | {"moment": "0.0"}, gone | {"moment": "0.2"}])
    assert msft_table.forgetting([run]) == [pytest.approx(-0.1)]


def test_the_table_has_a_line_per_cell_and_says_what_was_measured():
    gone = {"task": "a", "moment": "0.0", "epoch": 0.25, "score": 0.6, "score_in_result": 0.5, "stage": 1}
    runs = [record(), record(seed=2, test_macro=0.8), record("msft", 1, test_macro=0.5, exclusions=[gone]),
            record("msft", 2, test_macro=0.8)]  # fmt: skip
    text = msft_table.table(runs)
    lines = text.splitlines()
    assert "| sft C=6 | 2 | 0.700 ± 1.271 |  | 0.600 | 0.200 |" in lines
    assert any(line.startswith("| msft | 2 | 0.650 ± 1.906 | -0.050 ± 0.635 |") for line in lines)
    assert any("seed 1: a 0.25" in line and "-0.100 (1 tasks)" in line for line in lines)
    assert "| seed 1 | 0.25 | 0.50 |" in lines
    with pytest.raises(ValueError, match="no records"):
        msft_table.table([])


def test_stages_are_counted_by_the_curve():
    assert (
        msft_table.stages(record(curve=[["0.0", 0, 0.0, 0.1, 0.3], ["2.1", 2, 0.25, 0.6, 0.2]], stages=4))
        == 3
    )


def test_head_room_stands_where_the_runs_told_it():
    bare = msft_table.table([record(), record(seed=2, headroom=None)])
    assert "head-room" not in bare
    assert "who left" not in bare, "nobody did"
    room = {"value": 0.02, "interval": 0.01, "by_chance": 0.004, "unit": "share", "common": {"moment": "0.1"}}
    none = {"value": None, "reason": "no unbroken stretch", "unit": "share"}
    rooms = [room, room | {"value": 0.04, "interval": None, "by_chance": 0.006}, none]
    made = msft_table.table([record(seed=seed, headroom=found) for seed, found in enumerate(rooms, 1)])
    assert made.endswith("| sft C=6 | share | 0.030 ± 0.127 | 0.005 | seed 1: 0.020 ± 0.010; seed 2: 0.040 |")
