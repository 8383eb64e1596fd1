"""Snapshots on the device: put back bit for bit from every tier, and never the live tensors themselves."""

import pytest
import torch

from repsft_fast.snapshot import SnapshotPool
from repsft_fast.training.snapshots import closed_list
from tests.gpu import small_runs
from tests.gpu.places import anywhere, same_bits

MIB = 1 << 20


def live_tensors(device):
    """What a state holds: fp32 and bf16 weights, 8-bit moments and scales, counts; odd sizes, a transposed
    and an empty one."""
    draw = torch.Generator().manual_seed(0)
    return {
        "fp32": torch.randn(513, 65, generator=draw).to(device),
        "bf16": torch.randn(1000, 33, generator=draw).bfloat16().to(device),
        "codes": torch.randint(0, 256, (3, 777), dtype=torch.uint8, generator=draw).to(device),
        "count": torch.tensor(5, device=device),
        "turned": torch.randn(40, 30, generator=draw).to(device).t(),
        "nan": torch.full((99,), float("nan"), device=device),
        "empty": torch.zeros(0, device=device),
    }


def change(live, by):
    for tensor in live.values():
        tensor.add_(by) if tensor.dtype != torch.uint8 else tensor.add_(by % 7)


def pool_of(place, live, folder):
    """Room for one on the state's own device; two more in pinned memory on a GPU, whose allocator rounds up;
    on disk here."""
    one = SnapshotPool(live, device_bytes=64 * MIB, pinned_bytes=0, keep=1).bytes_each
    slower = (
        {"pinned_bytes": 4 * one}
        if place.on_gpu
        else {"pinned_bytes": 0, "disk_bytes": 2 * one, "disk_folder": folder}
    )
    return SnapshotPool(live, device_bytes=one, keep=3, **slower)


@anywhere("snapshot")
def test_from_every_tier_bit_for_bit(place, tmp_path):
    live = live_tensors(place.device)
    pool = pool_of(place, live, tmp_path)
    assert pool.messages == []
    kept = {}
    for number, name in enumerate(("a", "b", "c")):
        kept[name] = {key: tensor.clone() for key, tensor in live.items()}
        pool.take(name, {"number": number})
        change(live, number + 1)  # at once: nothing has waited for the copy
    for stored in pool._tiers.stored:
        pool._tiers.finish(stored)
    slower = place.pick("disk", "pinned")
    assert [pool.tier(name) for name in kept] == [slower, slower, "device"]
    for number, name in ((0, "a"), (2, "c"), (1, "b"), (0, "a")):
        assert pool.restore(name) == {"number": number}
        assert all(same_bits(live[key], tensor) for key, tensor in kept[name].items()), name
        change(live, 3)
    pool.close()


@anywhere("snapshot")
def test_no_snapshot_is_the_live_memory(place, tmp_path):
    """Taken, written over in place, compared; and the other way: what is put back is no view of what is
    kept."""
    live = live_tensors(place.device)
    pool = pool_of(place, live, tmp_path)
    pool.take("here", {})
    kept = {key: tensor.clone() for key, tensor in live.items()}
    places = {tensor.untyped_storage().data_ptr() for tensor in live.values() if tensor.numel()}
    held = pool.hold("here")
    assert not places & {tensor.untyped_storage().data_ptr() for tensor in held.values() if tensor.numel()}
    change(live, 1)
    assert all(same_bits(held[key], tensor) for key, tensor in kept.items())
    pool.unhold("here")
    pool.restore("here")
    change(live, 2)
    pool.restore("here")
    assert all(same_bits(live[key], tensor) for key, tensor in kept.items())
    pool.close()


@anywhere("snapshot")
def test_a_copy_under_way_can_be_put_back(place, tmp_path):
    """The second snapshot pushes the first off the device; it is asked for before anybody has waited."""
    live = live_tensors(place.device)
    pool = pool_of(place, live, tmp_path)
    kept = {key: tensor.clone() for key, tensor in live.items()}
    pool.take("first", {})
    change(live, 1)
    pool.take("second", {})
    change(live, 1)
    pool.restore("first")
    assert all(same_bits(live[key], tensor) for key, tensor in kept.items())
    pool.close()


@anywhere("snapshot", dtype="bfloat16")
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_revert_is_as_if_one_had_never_left(place, optimizer, tmp_path):
    """Law 5: snapshot, run on, revert, run again: the same losses and the same state, bit for bit."""
    parts = small_runs.parts_of(tmp_path, optim__name=optimizer)
    small_runs.steps(parts, 2)
    small_runs.losses(parts)
    state = closed_list(parts)
    pool = SnapshotPool(state.tensors(), device_bytes=64 * MIB, pinned_bytes=0, keep=1, writing=state.writing)
    start = state.hash()
    pool.take("here", state.values())
    small_runs.steps(parts, 3)
    first, end = small_runs.losses(parts), state.hash()
    assert end != start
    state.load_values(pool.restore("here"))
    assert state.hash() == start
    small_runs.steps(parts, 3)
    assert small_runs.losses(parts) == first
    assert state.hash() == end
    pool.close()
