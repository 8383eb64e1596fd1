"""The pool: budgets, tiers, reference counts, what is kept and what it costs."""

import os
import threading

import pytest
import torch

from repsft_fast.errors import SnapshotError
from repsft_fast.snapshot import SnapshotPool, plan_slots, slots, tiers
from tests.helpers.toy_state import Toy

GIB = 1 << 30


def pool_of(tensors, keep=2, device=None, **more):
    each = SnapshotPool(tensors, device_bytes=GIB, pinned_bytes=0, keep=1).bytes_each
    return SnapshotPool(
        tensors, device_bytes=GIB if device is None else device * each, pinned_bytes=0, keep=keep, **more
    )


@pytest.fixture
def tensors():
    return {
        "w": torch.arange(10.0),
        "b": torch.ones(3, dtype=torch.bfloat16),
        "n": torch.tensor(5),
        "none": torch.zeros(0, 4),
    }


def poisoned(tensors):
    for t in tensors.values():
        t.fill_(77)
    return tensors


def test_slots_fill_the_fastest_tier_first():
    assert plan_slots(10, 5, device_bytes=29, pinned_bytes=10, disk_bytes=99) == slots.SlotPlan(10, 2, 1, 2)
    assert plan_slots(10, 2, device_bytes=99, pinned_bytes=99) == slots.SlotPlan(10, 2, 0, 0)


def test_a_budget_too_small_is_known_at_the_start_with_its_numbers(tensors):
    with pytest.raises(
        SnapshotError, match=r"hold 1 of 2 snapshots of 1,000 bytes.*2,000.*device 1,999, pinned 0, disk 0"
    ):
        plan_slots(1000, 2, device_bytes=1999, pinned_bytes=0)
    with pytest.raises(SnapshotError, match="hold 0 of 1"):
        SnapshotPool(tensors, device_bytes=10, pinned_bytes=0, keep=1)


def test_exact_after_overwriting_every_tensor_and_twice(tensors):
    pool = pool_of(tensors)
    before = {n: t.clone() for n, t in tensors.items()}
    pool.take("a", {"update": 7, "best": float("inf")})
    for _ in range(2):
        poisoned(tensors)
        assert pool.restore("a") == {"update": 7, "best": float("inf")}
        assert all(torch.equal(t, before[n]) and t.dtype == before[n].dtype for n, t in tensors.items())
    assert (pool.takes, pool.restores, pool.bytes) == (1, 2, 3 * pool.bytes_each)
    assert pool.seconds > 0


def test_values_are_frozen_when_taken(tensors):
    pool, values = pool_of(tensors), {"table": {"a": [1]}}
    pool.take("a", values)
    values["table"]["a"].append(2)
    pool.restore("a")["table"]["a"].append(3)
    assert pool.restore("a") == {"table": {"a": [1]}} == pool.values("a")


def test_references_keep_and_free():
    pool = pool_of({"w": torch.zeros(4)}, keep=1)
    pool.take("a", {})
    pool.hold("a")
    pool.release("a")
    assert pool.names() == ["a"]
    assert pool.free_slots == 0
    pool.unhold("a")
    assert pool.names() == []
    assert pool.free_slots == 1
    pool.take("a", {})  # the name and the place are free again


def test_a_full_pool_says_what_is_kept(tensors):
    pool = pool_of(tensors, keep=2)
    pool.take("a", {})
    pool.take("b", {})
    with pytest.raises(SnapshotError, match=r"every one of 2 places is taken, got \['a', 'b'\]"):
        pool.take("c", {})
    pool.release("a")
    pool.take("c", {})
    assert pool.names() == ["b", "c"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(6, 5).t(),
        lambda: torch.randn(4, 6)[:, ::2],
        lambda: torch.randn(3, 1, 5).permute(2, 1, 0),
        lambda: torch.randn(20)[3:17],
        lambda: torch.randn(()),
        lambda: torch.tensor([True, False]),
        lambda: torch.randint(0, 255, (7,), dtype=torch.uint8),
    ],
)
def test_any_stride(make):
    live = make()
    before = live.clone()
    pool = pool_of({"x": live, "y": torch.zeros(2)})
    pool.take("a", {})
    live.zero_()
    pool.restore("a")
    assert torch.equal(live, before)


def test_memory_is_not_allocated_again(tensors):
    pool = pool_of(tensors, keep=1)
    pool.take("a", {})
    first = pool.hold("a")["w"].data_ptr()
    pool.unhold("a")
    pool.release("a")
    pool.take("b", {})
    assert pool.hold("b")["w"].data_ptr() == first


class TestTiers:
    def pool(self, tensors, tmp_path, keep=3, device=1):
        return pool_of(tensors, keep=keep, device=device, disk_bytes=GIB, disk_folder=tmp_path)

    def test_the_coldest_moves_to_disk_ahead_of_need_and_comes_back_exact(self, tensors, tmp_path):
        pool = self.pool(tensors, tmp_path, keep=4, device=3)
        for i, name in enumerate("abcd"):
            tensors["w"].fill_(i)
            pool.take(name, {"i": i})
            if name == "b":
                pool.restore("a")  # now b is the coldest
            if name == "c":
                assert [s.move is not None for s in pool._tiers.stored] == [False, True, False] or pool.tier(
                    "b"
                ) == "disk"
        assert [pool.tier(n) for n in "abcd"] == ["device", "disk", "device", "device"]
        for i, name in enumerate("abcd"):
            poisoned(tensors)
            assert pool.restore(name) == {"i": i}
            assert tensors["w"].tolist() == [i] * 10
            assert tensors["b"].tolist() == [1, 1, 1]
        with pytest.raises(SnapshotError, match="every one of 4 places"):
            pool.take("e", {})
        pool.close()

    def test_the_coldest_moves_when_room_is_made_on_demand(self, tensors, tmp_path):
        pool = self.pool(tensors, tmp_path, keep=3, device=2)
        for name in "abc":
            pool.take(name, {})
        assert [pool.tier(n) for n in "abc"] == ["disk", "device", "device"]
        pool.release("a")  # room on disk, but every fast slot is full
        pool.restore("b")
        pool.take("d", {})
        assert [pool.tier(n) for n in "bcd"] == ["device", "disk", "device"]

    def test_disk_only(self, tensors, tmp_path):
        pool = self.pool(tensors, tmp_path, keep=2, device=0)
        pool.take("a", {})
        poisoned(tensors)
        pool.restore("a")
        assert tensors["w"].tolist() == list(range(10))
        assert pool.tier("a") == "disk"

    def test_files_have_no_name_and_their_space_is_reserved(self, tensors, tmp_path):
        pool = self.pool(tensors, tmp_path)
        assert list(tmp_path.iterdir()) == []
        assert os.fstat(pool._tiers._free[slots.DISK][0].fd).st_size == pool.bytes_each

    def test_a_held_snapshot_stays_in_place(self, tensors, tmp_path):
        pool = self.pool(tensors, tmp_path, keep=3, device=1)
        pool.take("a", {})
        frozen = pool.hold("a")
        pool._tiers.settle()
        tier = pool.tier("a")
        expected = {n: t.clone() for n, t in tensors.items()}
        poisoned(tensors)
        pool.take("b", {})
        pool.take("c", {})
        assert all(torch.equal(frozen[n], expected[n]) for n in expected)
        assert pool.tier("a") == tier
        pool.release("a")
        assert "a" in pool.names()
        pool.unhold("a")
        assert "a" not in pool.names()

    def test_release_while_it_moves_loses_no_slot(self, tensors, tmp_path, monkeypatch):
        started, go = threading.Event(), threading.Event()
        real = tiers.write_file

        def slow(*args):
            started.set()
            go.wait(10)
            real(*args)

        monkeypatch.setattr(tiers, "write_file", slow)
        pool = self.pool(tensors, tmp_path, keep=2, device=1)
        pool.take("a", {})  # fills the one fast slot: the move begins at once
        started.wait(10)
        poisoned(tensors)
        pool.restore("a")  # from the source of the move
        assert tensors["w"].tolist() == list(range(10))
        go.set()
        pool.release("a")
        assert pool.free_slots == 2


def test_on_the_cpu_the_pinned_tier_is_off_with_a_message(tensors):
    pool = SnapshotPool(tensors, device_bytes=GIB, pinned_bytes=GIB, keep=1)
    assert pool.messages == [
        "snapshot tier pinned is off: the state is in host memory already; raise the device budget instead"
    ]
    with pytest.raises(SnapshotError, match=r"hold 0 of 1.*pinned 0.*tier pinned is off"):
        SnapshotPool(tensors, device_bytes=0, pinned_bytes=GIB, keep=1)


def test_pinned_memory_refused_goes_on_with_the_others(tensors, tmp_path, monkeypatch):
    """As on a GPU machine whose kernel refuses page-locked memory after the first slot."""
    layout = slots.Layout(list(tensors.values()))
    on_cpu, given = layout.in_memory, []

    def refuse(level, *, pin=False):
        if level == slots.PINNED:
            if given:
                raise RuntimeError("CUDA error: out of memory\nCompile with ...")
            given.append(pin)
        return on_cpu(level)

    monkeypatch.setattr(layout, "in_memory", refuse)
    each = 64 * 3
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(tiers.Tiers, "_device", lambda self: torch.device("cuda"))
    kept = tiers.Tiers(layout, 4, (each, 3 * each, 10 * each), tmp_path)
    assert (kept.plan.device, kept.plan.pinned, kept.plan.disk) == (1, 1, 2)
    assert given == [True]
    assert kept.messages == ["snapshot tier pinned keeps 1 instead of 3: CUDA error: out of memory"]


def test_toy_state_is_one_pool():
    toy = Toy()
    assert len(toy.state.tensors()) == 16
    assert pool_of(toy.state.tensors()).bytes_each >= sum(t.numel() * 4 for t in toy.state.tensors().values())
