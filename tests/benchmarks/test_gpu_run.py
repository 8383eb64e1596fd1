"""The suite's real run and its checksum: records that can be true, goals that are read off them."""

import dataclasses

import pytest
import torch
from interpreter import interpret
from test_gpu_suite import tiny_session

from benchmarks import gpu_run
from repsft_fast.ops import products


def test_a_whole_run_leaves_its_times_and_stalls():
    session = tiny_session()
    gpu_run.whole_run(session)
    made = {record["implementation"]: record for record in session.made}
    readings = gpu_run.UPDATES // gpu_run.LOG_EVERY
    assert len(made["whole update"]["rounds_ms"]) in (readings - 1, readings), "without the first; a decay that begins reads"
    assert len(made["checkpoint stall"]["rounds_ms"]) == 2, "after 8 and 16 updates; the run's end is none"
    (name, share, _), *more = session.table
    assert (name, more) == ("checkpoint stall / ten minutes", [])
    assert share == pytest.approx(made["checkpoint stall"]["p50_ms"] / 600e3)
    assert session.named == ["MFU of a whole update: this device's peak is not known"]


def test_the_checksum_is_held_against_one_read_of_the_state():
    session = tiny_session()
    gpu_run.state_hash(session)
    (record,) = session.made
    assert record["bytes_per_s"] == pytest.approx((1 << 16) / (record["p50_ms"] / 1e3))
    ((name, over, _),) = session.table
    assert name == "state hash / its floor"
    assert over == pytest.approx(record["p50_ms"] / (1e3 * (1 << 16) / 1e9))


def test_through_files_is_the_same_state(tmp_path):
    live = {"a": torch.arange(8), "b": torch.ones(3)}
    assert gpu_run.through_files(live, tmp_path) > 0
    assert torch.equal(live["a"], torch.arange(8))
    assert torch.equal(torch.load(tmp_path / "state.pt", weights_only=True)["b"], torch.ones(3))


def test_the_head_gradient_is_timed_finished_in_backward_and_at_once(monkeypatch):
    session = tiny_session()
    session.sizes = dataclasses.replace(session.sizes, heads={"tiny": (8, 20)}, probe=4, rounds=2, point_s=0.02)
    gpu_run.finished_in_backward(session)
    assert (session.made, session.table) == ([], [])
    assert "finished in backward" in session.named[0]
    interpret(monkeypatch, "csrc_triton.cross_entropy")
    finish, finished = products.Unfinished.finish, []
    monkeypatch.setattr(
        products.Unfinished, "finish", lambda self, scale: (finished.append(scale is None), finish(self, scale))[1]
    )
    gpu_run.finished_in_backward(session)
    p50 = {record["implementation"]: record["p50_ms"] for record in session.made}
    assert list(p50) == [f"finished {when}, scale {scale}" for scale in ("1.00", "0.33") for when in ("in backward", "at once")]
    assert {True, False} == set(finished)
    ((name, ratio, _),) = session.table
    assert name == "head gradient finished in backward / at once"
    assert ratio == pytest.approx(p50["finished in backward, scale 1.00"] / p50["finished at once, scale 1.00"])
    finished.clear()
    calls = {name: call for name, call in gpu_run.finishing_calls(session).items() if "at once" in name}
    for call in calls.values():
        call()
    assert (len(calls), finished) == (2, [])
