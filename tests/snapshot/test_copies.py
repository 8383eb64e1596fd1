"""Copies in as few kernels as torch allows, bit for bit."""

import pytest
import torch
from torch import nn

from repsft_fast.snapshot import SnapshotPool, copies
from repsft_fast.snapshot.slots import Layout

MIB = 1 << 20


def a_real_list():
    """Weights, moments, block scales, codes and counters, with the odd ones a list may have."""
    tensors = {}
    for i in range(6):
        tensors[f"{i}/weight"] = nn.Parameter(torch.randn(24, 16))
        tensors[f"{i}/norm"] = nn.Parameter(torch.randn(16))
        tensors[f"{i}/half"] = torch.randn(24, 16).bfloat16()
        tensors[f"{i}/codes"] = torch.randint(0, 256, (24, 16), dtype=torch.uint8)
        tensors[f"{i}/step"] = torch.tensor(float(i))
        tensors[f"{i}/turned"] = torch.randn(16, 24).t()
    tensors["counts"] = torch.randint(-(2**60), 2**60, (5, 7))
    tensors["flags"] = torch.tensor([True, False, True])
    tensors["int32"] = torch.arange(9, dtype=torch.int32)
    tensors["fp16"] = torch.randn(5).half()
    tensors["fp8"] = torch.randn(8).to(torch.float8_e4m3fn)
    tensors["fp64"] = torch.randn(3, dtype=torch.float64)
    tensors["complex64"] = torch.randn(3, dtype=torch.complex64)
    tensors["empty"] = torch.zeros(0, 4)
    tensors["holes"] = torch.randn(4, 6)[:, ::2]
    tensors["complex128"] = torch.randn(3, dtype=torch.complex128)
    return tensors


def one_kernel(targets, sources):
    """What torch 2.11 asks of a list before it copies by one kernel (ForeachUtils.h), in its own words."""

    def spread_alike(a, b):
        return a.shape == b.shape and all(
            x == y for x, y, n in zip(a.stride(), b.stride(), a.shape, strict=True) if n != 1
        )

    both = [*targets, *sources]
    return (
        len({t.device for t in both}) == 1
        and all(copies.dense(t) and t.layout == torch.strided for t in both)
        and len({t.dtype for t in sources}) == len({t.dtype for t in targets}) == 1
        and all(map(spread_alike, targets, sources))
        and sources[0].dtype in (torch.uint8, torch.int16, torch.int32, torch.int64)
    )


@pytest.fixture
def calls(monkeypatch):
    seen, real = [], torch._foreach_copy_

    def record(targets, sources, non_blocking=False):
        seen.append((targets, sources))
        return real(targets, sources, non_blocking)

    monkeypatch.setattr(torch, "_foreach_copy_", record)
    return seen


def test_a_take_and_a_revert_are_a_kernel_for_every_width_and_one_list_of_odd_ones(calls):
    tensors = a_real_list()
    pool = SnapshotPool(tensors, device_bytes=MIB, pinned_bytes=0, keep=1)
    pool.take("a", {})
    taken = list(calls)
    pool.restore("a")
    for made in (taken, calls[len(taken) :]):
        odd = [pairs for pairs in made if not one_kernel(*pairs)]
        assert len(made) == 5, "widths 1, 2, 4, 8 and the odd ones"
        assert [len(targets) for targets, _ in odd] == [2], "tensors with holes, and complex128"
        assert sum(len(targets) for targets, _ in made) == len(tensors)


def test_one_odd_tensor_spoils_no_group(calls):
    tensors = {f"w{i}": torch.randn(4, 4) for i in range(9)}
    whole = Layout(list(tensors.values())).groups
    odd = Layout([*tensors.values(), torch.randn(4, 6)[:, ::2]]).groups
    assert (whole, odd) == ([list(range(9))], [list(range(9)), [9]])


def test_devices_are_apart():
    tensors = [torch.zeros(3), torch.empty(3, device="meta"), torch.zeros(2)]
    assert copies.alike(tensors) == [[0, 2], [1]]


def test_every_bit_comes_back_those_of_a_nan_too():
    """Half precision through fp32 and back would make every NaN the same one."""
    tensors = a_real_list()
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)  # every number of 16 bits
    tensors |= {
        "every fp16": patterns.clone().view(torch.float16),
        "every bf16": patterns.clone().view(torch.bfloat16),
    }
    tensors["fp32 nan"] = torch.tensor([0x7F800001, 0x7FC12345], dtype=torch.int32).view(torch.float32)
    before = {name: bytes_of(t) for name, t in tensors.items()}
    pool = SnapshotPool(tensors, device_bytes=4 * MIB, pinned_bytes=0, keep=1)
    pool.take("a", {})
    with torch.no_grad():
        for t in tensors.values():
            t.zero_()
    pool.restore("a")
    assert {name: bytes_of(t) for name, t in tensors.items()} == before
    for name, frozen in pool.hold("a").items():
        assert (frozen.dtype, frozen.shape, bytes_of(frozen)) == (
            tensors[name].dtype,
            tensors[name].shape,
            before[name],
        )


def test_a_snapshot_is_no_alias():
    live = {"w": torch.zeros(8), "b": torch.zeros(3, dtype=torch.bfloat16)}
    pool = SnapshotPool(live, device_bytes=MIB, pinned_bytes=0, keep=1)
    pool.take("a", {})
    for t in live.values():
        t.add_(1)
    assert all(not frozen.any() for frozen in pool.hold("a").values())


def test_it_follows_a_tensor_that_was_given_other_memory():
    """`state.check` refuses that; until somebody asks, a copy must not go to memory nobody reads."""
    weight, other = nn.Parameter(torch.zeros(6)), torch.zeros(6)
    pool = SnapshotPool({"w": weight, "x": other}, device_bytes=MIB, pinned_bytes=0, keep=2)
    pool.take("a", {})
    weight.data = torch.full((6,), 5.0)
    pool.take("b", {})
    pool.restore("a")
    assert not weight.any()
    pool.restore("b")
    assert weight.tolist() == [5.0] * 6


def test_views_of_live_tensors_are_made_once(monkeypatch):
    made, real = [], copies.in_groups

    def count(tensors, groups):
        made.append(1)
        return real(tensors, groups)

    from repsft_fast.snapshot import pool as pools

    pool = SnapshotPool(a_real_list(), device_bytes=MIB, pinned_bytes=0, keep=1)
    monkeypatch.setattr(pools, "in_groups", count)
    for _ in range(3):
        pool.take("a", {})
        pool.restore("a")
        pool.release("a")
    assert len(made) == 1


@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (3, 1, 5), (2, 3)])
def test_bits_are_the_same_memory(shape):
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.float64, torch.uint8, torch.complex64):
        tensor = torch.zeros(shape, dtype=dtype)
        bits = copies.as_bits(tensor)
        assert (bits.data_ptr(), bits.shape, bits.stride()) == (
            tensor.data_ptr(),
            tensor.shape,
            tensor.stride(),
        )
        assert not bits.is_floating_point()


def bytes_of(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
