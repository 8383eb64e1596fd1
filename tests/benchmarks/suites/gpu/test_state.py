"""Part I in rehearsal: the real closed list, one checkpoint, optimizers; goals read what their records
mean."""

import pytest
import torch

from benchmarks.suites.gpu import goals, state
from benchmarks.suites.gpu.session import LEFT_OUT, RECORDS, read_lines
from tests.benchmarks.suites.gpu.toys import fail_check, fed, session_at

ON_A_GPU_ONLY = {"snapshot to pinned memory, ms"}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    state.run(session_at(folder, "I"))
    return folder


def test_every_goal_is_fed(rehearsed):
    assert {name for name, value in fed(state.GOALS, rehearsed).items() if value is None} == ON_A_GPU_ONLY
    assert {line["what"] for line in read_lines(rehearsed / LEFT_OUT)} <= {
        "snapshot in pinned memory", "bnb_adamw8bit in bfloat16", "bnb_adamw8bit in float32",
    }  # fmt: skip


def test_the_list_is_the_real_one(rehearsed):
    """Weights, moments, counters: as many bytes as a run's own snapshot holds."""
    record = goals.Found(read_lines(rehearsed / RECORDS)).one(state.SNAPSHOT, "take")
    assert record["shape"]["tensors"] > 60
    assert record["shape"]["bytes"] > 3 * 4 * 25_000
    assert record["bytes_per_s"] == pytest.approx(2 * record["shape"]["bytes"] / (record["p50_ms"] / 1e3))


def test_a_checkpoint_is_one_save_whose_parts_are_told_apart(rehearsed):
    found = goals.Found(read_lines(rehearsed / RECORDS)).all(state.CHECKPOINT)
    assert {"stall", "whole save", "copy", "write", "hash", "fsync", state.BEFORE, state.DURING} <= set(found)
    assert found["whole save"]["p50_ms"] >= max(found[name]["p50_ms"] for name in ("write", "hash", "fsync"))
    assert len(found[state.BEFORE]["rounds_ms"]) >= 2


def test_red_checks_take_out_what_they_name(tmp_path):
    for operation in ("checkpoint", "snapshot"):
        fail_check(tmp_path, operation)
    state.run(session_at(tmp_path, "I"))
    kept = {record["op"] for record in read_lines(tmp_path / RECORDS)}
    assert kept == {state.HASH, state.OPTIMIZER, state.WITH_WEIGHTS}
    fail_check(tmp_path, "adamw", "float32")
    (tmp_path / RECORDS).unlink()
    state.run(session_at(tmp_path, "I"))
    kept = {record["op"] for record in read_lines(tmp_path / RECORDS)}
    assert kept == {state.HASH, state.OPTIMIZER}


def test_what_goes_through_files_is_the_same_state(tmp_path):
    tensors = {"a": torch.arange(8), "b": torch.ones(3, dtype=torch.bfloat16)}
    state.files(session_at(tmp_path, "I"), tensors, 70)
    assert torch.equal(tensors["a"], torch.arange(8))
    assert torch.equal(tensors["b"], torch.ones(3, dtype=torch.bfloat16))


def test_floors_are_the_counted_bytes():
    h200 = goals.Card(
        "NVIDIA H200", {"bytes_per_s": 4.3e12, "down_bytes_per_s": 50e9, "disk_bytes_per_s": 1e9}
    )
    named = {goal.name: goal for goal in state.GOALS}
    assert named["snapshot take, ms"].predicted(h200) == pytest.approx(2 * 7.15e9 / 4.3e9, rel=0.01)
    assert h200.bytes_ms(state.adamw8bit_bytes(state.PARAMETERS, 2)) == pytest.approx(2.33 * 1.0737, rel=0.01)
    assert named["adamw on masters, 2²⁹, ms"].predicted(h200) == pytest.approx(
        1.1 * 30 * 0.5369 / 4.3, rel=0.01
    )
    assert state._over_the_bus(h200) == pytest.approx(143, rel=0.01)
    assert state._to_disk(h200) == pytest.approx(9536, rel=0.01)
