"""What the children of the crash tests do. Every state is a function of its number, so any checkpoint has a
known content."""

import json
import os
import signal

import torch

from repsft_fast import checkpoint
from repsft_fast.errors import CheckpointError
from tests.helpers import unsynced


def state(n, numel=3000):
    g = torch.Generator().manual_seed(n)
    return {
        "w": torch.randn(numel, generator=g),
        "m": torch.randn(3, 7, generator=g).bfloat16(),
        "step": torch.tensor(float(n)),
    }


def write_model(folder, tensors):
    (folder / "config.json").write_text(json.dumps({"sum": float(tensors["w"].sum())}))


def save_next(folder, numel=3000):
    """Resumes, saves the state that follows, deletes what is old: the life of a run in one call. Returns the
    number saved."""
    checkpoint.clean(folder)
    parent = None
    n = 0
    try:
        live = {name: torch.zeros_like(t) for name, t in state(0, numel).items()}
        resumed = checkpoint.resume(folder, live)
        parent, n = resumed.generation.number, resumed.values["n"] + 1
    except CheckpointError as error:
        if checkpoint.generations(folder):
            raise AssertionError("generations, but none whole") from error
    number = checkpoint.next_generation(folder)
    checkpoint.save(folder, number, state(n, numel), {"n": n}, parent=parent, write_model=write_model)
    checkpoint.prune(folder, keep_last=1)
    return n


def note_points(kill_at):
    """The names of the crash points passed from now on, in a list that grows; the kill_at-th kills the
    process."""
    passed = []

    def hook(name):
        passed.append(name)
        if len(passed) - 1 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.set_crash_hook(hook)
    return passed


def save_some(folder, saves, kill_at=None):
    """Saves a few times, killing itself at the kill_at-th crash point; returns the names of the points it
    passed."""
    passed = note_points(kill_at)
    for _ in range(saves):
        save_next(folder)
    return passed


def save_forever(folder, numel):
    unsynced.install(real=True)  # so that a save takes its time, and a kill finds one amid it
    while True:
        save_next(folder, numel)


def save_as_rank(folder, rank, world_size, kill_at=None):
    """One rank of a sharded save of state 1, killing itself at a crash point."""
    passed = note_points(kill_at)
    whole = state(1)
    rows = len(whole["w"]) // world_size
    piece = checkpoint.Piece(
        whole["w"][rank * rows : (rank + 1) * rows].clone(), (rows * world_size,), rank * rows
    )
    checkpoint.save(
        folder,
        1,
        {"w": piece},
        {"n": 1},
        parent=0,
        rank=rank,
        world_size=world_size,
        attempt="one",
        timeout_s=1.0,
    )
    return passed


def dtensor_rank(folder, rank, world_size, port):
    """Shards a model by FSDP2 over gloo ranks, saves a frozen snapshot, loads and reverts."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from repsft_fast.snapshot import SnapshotPool

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    tensors = dict(model.named_parameters())
    pool = SnapshotPool(tensors, device_bytes=1 << 20, pinned_bytes=0, keep=1)
    pool.take("a", {})
    with torch.no_grad():
        for t in tensors.values():
            t.mul_(0)
    ranks = {"rank": rank, "world_size": world_size, "timeout_s": 20.0}
    checkpoint.save(folder, 0, pool.hold("a"), {"rank": rank}, attempt="frozen", **ranks)
    dist.barrier()
    got = checkpoint.load(checkpoint.newest(folder), tensors, rank=rank, world_size=world_size)
    restored = all(torch.equal(t.full_tensor(), whole[name]) for name, t in tensors.items())
    with torch.no_grad():
        for t in tensors.values():
            t.mul_(0)
    pool.restore("a")
    reverted = all(torch.equal(t.full_tensor(), whole[name]) for name, t in tensors.items())
    dist.barrier()
    dist.destroy_process_group()
    return {"restored": restored, "reverted": reverted, "values": got.values, "resharded": got.resharded}
