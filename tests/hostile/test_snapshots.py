"""Bad luck with snapshots: unknown names, damaged files, full and failing disks. The state is whole after
each."""

import os

import pytest
import torch

from repsft_fast.errors import SnapshotError
from repsft_fast.snapshot import SnapshotPool, slots, tiers

GIB = 1 << 30


@pytest.fixture
def weight():
    return torch.arange(4096.0)


def pool_of(weight, tmp_path, *, device=0, keep=2):
    size = weight.numel() * 4
    return SnapshotPool(
        {"w": weight},
        device_bytes=device * size,
        pinned_bytes=0,
        disk_bytes=GIB,
        disk_folder=tmp_path,
        keep=keep,
    )


def test_unknown_names_list_the_known(weight, tmp_path):
    pool = pool_of(weight, tmp_path)
    with pytest.raises(SnapshotError, match=r"snapshot best: does not exist, expected one of \[\]"):
        pool.restore("best")
    pool.take("a", {})
    for call in (
        pool.restore,
        pool.release,
        pool.hold,
        pool.values,
        pool.tier,
    ):
        with pytest.raises(SnapshotError, match=r"expected one of \['a'\]"):
            call("A")
    with pytest.raises(SnapshotError, match="exists already"):
        pool.take("a", {})


@pytest.mark.parametrize("byte", [0, 5, 8191, 16383])
def test_one_flipped_bit_on_disk_is_named_and_nothing_is_half_restored(weight, tmp_path, byte):
    pool = pool_of(weight, tmp_path)
    pool.take("a", {})
    fd = pool._tiers.stored[0].slot.fd
    old = os.pread(fd, 1, byte)
    os.pwrite(fd, bytes([old[0] ^ 16]), byte)
    weight.fill_(3)
    with pytest.raises(SnapshotError, match="snapshot a: is damaged on disk"):
        pool.restore("a")
    assert weight.unique().tolist() == [3]


def test_a_shortened_file_is_damage(weight, tmp_path):
    pool = pool_of(weight, tmp_path)
    pool.take("a", {})
    os.ftruncate(pool._tiers.stored[0].slot.fd, 100)
    with pytest.raises(SnapshotError, match="damaged"):
        pool.restore("a")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(5, "Input/output error")])
def test_a_failing_move_keeps_the_snapshot_where_it_was(weight, tmp_path, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(tiers, "write_file", fail)
    pool = pool_of(weight, tmp_path, device=2, keep=4)
    pool.take("a", {})
    weight.add_(1)
    pool.take("b", {})
    with pytest.raises(SnapshotError, match=rf"every one of 2 places.*tier disk is off.*{error.strerror}"):
        pool.take("c", {})
    pool.restore("a")
    assert weight[1].item() == 1
    pool.restore("b")
    assert weight[1].item() == 2
    pool.release("a")
    pool.take("c", {})


def test_a_disk_that_fails_under_a_direct_take(weight, tmp_path, monkeypatch):
    pool = pool_of(weight, tmp_path)
    monkeypatch.setattr(
        slots.os, "pwrite", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(SnapshotError, match=r"could not be written to disk.*No space left"):
        pool.take("a", {})
    assert pool.names() == []
    assert pool.free_slots == 2


def test_no_room_on_disk_is_known_at_the_start(weight, tmp_path, monkeypatch):
    def full(fd, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(slots.os, "posix_fallocate", full)
    with pytest.raises(
        SnapshotError, match=r"hold 0 of 2 snapshots of 16,384 bytes.*keeps 0 instead of 2.*No space left"
    ):
        pool_of(weight, tmp_path)
    file = tmp_path / "not a folder"
    file.write_text("")
    with pytest.raises(SnapshotError, match="keeps 0 instead of 2"):
        pool_of(weight, file)


def test_nothing_to_keep_and_values_that_are_not_json(weight, tmp_path):
    with pytest.raises(SnapshotError, match="nothing to keep"):
        SnapshotPool({}, device_bytes=GIB, pinned_bytes=0, keep=1)
    pool = pool_of(weight, tmp_path)
    with pytest.raises(SnapshotError, match=r"state value table\[0\]"):
        pool.take("a", {"table": {0: 1}})
    assert pool.names() == []


def test_device_memory_refused_gives_the_numbers(weight, monkeypatch):
    def refuse(self, level, *, pin=False):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16 KiB\nmore")

    monkeypatch.setattr(slots.Layout, "in_memory", refuse)
    with pytest.raises(
        SnapshotError,
        match=r"hold 0 of 2 snapshots of 16,384 bytes.*tier device keeps 0 instead of 2: CUDA out of",
    ):
        SnapshotPool({"w": weight}, device_bytes=GIB, pinned_bytes=0, keep=2)
