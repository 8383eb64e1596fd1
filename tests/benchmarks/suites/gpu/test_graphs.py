"""Part J: one-sample updates, rows passed and captured."""

import pytest

from benchmarks.suites.gpu import goals, graphs, training
from benchmarks.suites.gpu.session import LEFT_OUT, RECORDS, read_lines
from tests.benchmarks.suites.gpu.toys import fail_check, fed, session_at
from tests.benchmarks.suites.gpu.workers import Here, without_processes

H100 = goals.Card("NVIDIA H100 80GB HBM3", {})


def rehearse(folder):
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_processes(monkeypatch, Here)
        graphs.run(session_at(folder, "J"))


def test_every_goal_is_fed_and_the_trial_is_told(tmp_path):
    rehearse(tmp_path)
    assert [name for name, value in fed(graphs.GOALS, tmp_path).items() if value is None] == []
    found = goals.Found(read_lines(tmp_path / RECORDS))
    plain, captured = (found.one("update", variant, model=graphs.NAME) for variant in graphs.VARIANTS)
    assert captured["decided"] == "off"
    assert captured["replayed"] == 0
    assert "decided" not in plain
    shape = {"model": graphs.NAME, "rows": 1, "row_tokens": 8, "sample_tokens": 8}
    assert plain["shape"] == captured["shape"] == shape


def test_the_settings_differ_in_one(tmp_path):
    points = [
        training.point("a", graphs.MODEL, variant, 512, toy=True, sample_tokens=512, rows=1)
        for variant in graphs.VARIANTS
    ]
    plain, captured = (training.settings_of(session_at(tmp_path, "J"), p, tmp_path)["model"] for p in points)
    assert plain | {"cuda_graphs": "auto"} == captured
    assert plain["cuda_graphs"] == "off"


def test_a_red_check_of_graphs_takes_out_the_captured_ones(tmp_path):
    fail_check(tmp_path, "graphs", "float32")
    session = session_at(tmp_path, "J")
    assert graphs.blocked(session, "captured", "these")
    assert not graphs.blocked(session, "plain", "those")
    assert [line["what"] for line in read_lines(tmp_path / LEFT_OUT)] == ["these"]


def test_predictions_are_there():
    by_name = {goal.name: goal.predicted(H100) for goal in graphs.GOALS}
    assert by_name[f"{graphs.NAME}: plain / captured"] == pytest.approx(50 / 11)
    assert None not in by_name.values()
