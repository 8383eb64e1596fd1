"""Snapshots and checkpoints of 10M parameters in fp32 with AdamW's moments, against copies of the same bytes
and against the ways through files. `pytest benchmarks --benchmark-enable`."""

import shutil

import pytest
import torch

from repsft_fast import checkpoint
from repsft_fast.snapshot import SnapshotPool
from repsft_fast.state import state_hash

ROUNDS = {"rounds": 10, "iterations": 1, "warmup_rounds": 2}


def state(layers: int = 8, hidden: int = 320, vocabulary: int = 8192) -> dict[str, torch.Tensor]:
    """{name: tensor} with the shapes of a small Llama: weights and two moments each, about 10M parameters."""
    shapes = {"embed": (vocabulary, hidden)}
    for i in range(layers):
        shapes |= {f"{i}.{n}": (hidden, hidden) for n in "qkvo"} | {
            f"{i}.{n}": (hidden * 5 // 2, hidden) for n in ("gate", "up")
        }
        shapes |= {f"{i}.down": (hidden, hidden * 5 // 2), f"{i}.norm": (hidden,)}
    return {
        f"{part}/{n}": torch.randn(shape)
        for part in ("weight", "exp_avg", "exp_avg_sq")
        for n, shape in shapes.items()
    }


def snapshot_calls() -> dict:
    """{name: call} over one state: a plain copy of its bytes, a take, a restore. Compared side by side for
    the goal of 1.3."""
    tensors = state()
    pool = SnapshotPool(tensors, device_bytes=1 << 31, pinned_bytes=0, keep=2)
    pool.take("kept", {})
    source, target = torch.randn(pool.bytes_each // 4), torch.zeros(pool.bytes_each // 4)

    def take() -> None:
        pool.take("x", {})
        pool.release("x")

    return {"copy": lambda: target.copy_(source), "take": take, "restore": lambda: pool.restore("kept")}


@pytest.mark.parametrize("what", ["copy", "take", "restore"])
def test_snapshot(benchmark, what):
    benchmark.pedantic(snapshot_calls()[what], **ROUNDS)


def test_state_hash(benchmark):
    tensors = state()
    benchmark.pedantic(lambda: state_hash(tensors, {}), **ROUNDS)


@pytest.mark.parametrize("way", ["ours", "torch.save", "dcp async"])
def test_save(benchmark, way, tmp_path):
    tensors, numbers = state(), iter(range(1000))

    def call() -> None:
        target = tmp_path / str(next(numbers))
        if way == "ours":
            checkpoint.save(target, 0, tensors, {})
        elif way == "torch.save":
            torch.save(tensors, target)
        else:
            import torch.distributed.checkpoint as dcp

            dcp.async_save(tensors, checkpoint_id=target, no_dist=True).result()

    benchmark.pedantic(call, teardown=lambda: shutil.rmtree(tmp_path / "0", ignore_errors=True), **ROUNDS)


@pytest.mark.parametrize("way", ["ours", "torch.load"])
def test_load(benchmark, way, tmp_path):
    """Into live tensors; ours verifies every byte before it changes one."""
    tensors = state()
    if way == "ours":
        checkpoint.save(tmp_path, 0, tensors, {})
        benchmark.pedantic(lambda: checkpoint.resume(tmp_path, tensors), **ROUNDS)
    else:
        torch.save(tensors, tmp_path / "x")

        def load() -> None:
            for name, tensor in torch.load(tmp_path / "x", weights_only=True).items():
                tensors[name].copy_(tensor)

        benchmark.pedantic(load, **ROUNDS)


def test_the_stall_of_a_background_save(benchmark, tmp_path):
    """What training waits for: the copy into the pool and the hand-over, not the writing."""
    pool = SnapshotPool(state(), device_bytes=1 << 31, pinned_bytes=0, keep=1)
    writer = checkpoint.BackgroundWriter(tmp_path)
    numbers = iter(range(1000))

    def stall() -> None:
        pool.take("x", {})
        writer.submit(next(numbers), pool.hold("x"), {}, done=lambda: (pool.unhold("x"), pool.release("x")))

    benchmark.pedantic(stall, setup=writer.wait, **ROUNDS)
    writer.close()
