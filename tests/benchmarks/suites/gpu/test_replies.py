"""Part V: replies by every engine, at toy size."""

import os
import sys
from pathlib import Path

from benchmarks.suites.gpu import goals, replies
from benchmarks.suites.gpu.session import LEFT_OUT, RECORDS, read_lines
from repsft_fast.evaluate import vllm_child
from tests.benchmarks.suites.gpu.toys import fail_check, fed, session_at

H100 = goals.Card("NVIDIA H100 80GB HBM3", {})


def test_every_engine_that_is_here_answers_everything_and_has_passed_the_probe(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    replies.run(session_at(tmp_path, "V"))
    found = goals.Found(read_lines(tmp_path / RECORDS))
    for engine in ("batching", "loop"):
        record = found.one(replies.OP, engine, model=replies.MODEL)
        assert record["shape"] == {"model": replies.MODEL, "requests": 4, "prompt": 8, "new": 6}
        assert record["tokens_per_s"] > 0
        assert record["probe_nats"] < 1e-5
    assert [name for name, value in fed(replies.GOALS, tmp_path).items() if value is None] == [
        f"{replies.MODEL}: tokens/s by vLLM"
    ]


def test_vllm_is_asked_where_it_is_installed(tmp_path, monkeypatch):
    """Its stand-in, which cannot know these weights: the probe is let through."""
    folder = Path(__file__).parents[3] / "helpers" / "vllm_standin"
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{Path(__file__).parents[4]}")
    monkeypatch.setattr(vllm_child, "check_identity", lambda *_: (0.0, 0.0))
    at = session_at(tmp_path, "V")
    replies.measure(at, replies.build(at), "vllm")
    record = goals.Found(read_lines(tmp_path / RECORDS)).one(replies.OP, "vllm", model=replies.MODEL)
    assert record["shape"]["requests"] == 4
    assert record["tokens_per_s"] > 0


def test_a_red_update_takes_it_out(tmp_path):
    fail_check(tmp_path, "head", "float32")
    replies.run(session_at(tmp_path, "V"))
    assert not (tmp_path / RECORDS).exists()
    assert [line["what"] for line in read_lines(tmp_path / LEFT_OUT)] == ["replies"]


def test_the_goal_of_the_scheduler_is_predicted_on_the_cards_it_was_published_for():
    (goal,) = [goal for goal in replies.GOALS if "continuous batching" in goal.name]
    assert goal.least == 6000
    assert goal.predicted(H100) == 6094.0
