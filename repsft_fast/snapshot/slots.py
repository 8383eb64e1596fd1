"""One slot: room for one snapshot, as a few flat buffers with a view per tensor, or as a file.

Every tier lays a slot out alike, so that a move between tiers is one copy per buffer (`buffers`). Slots are
allocated and their pages touched at the start: a copy into fresh memory costs many times a copy into memory
that was written before.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csrc_triton.state_hash import checksums
from repsft_fast.errors import SnapshotError, describe
from repsft_fast.snapshot.buffers import rounded, share_out
from repsft_fast.snapshot.copies import alike, dense, in_groups

ALIGN_BYTES = 64  # of every tensor in a slot: whole cache lines
DISK_CHUNK_BYTES = 1 << 25  # a multiple of 8; one checksum each
DEVICE, PINNED, DISK = range(3)
TIER_NAMES = ("device", "pinned", "disk")


@dataclass(frozen=True)
class SlotPlan:
    """How many snapshots each tier keeps within its budget; together as many as are wanted."""

    bytes_each: int
    device: int
    pinned: int
    disk: int


def plan_slots(
    bytes_each: int,
    keep: int,
    *,
    device_bytes: int,
    pinned_bytes: int,
    disk_bytes: int = 0,
    pinned_each: int | None = None,
) -> SlotPlan:
    """Fills the fastest tier first. pinned_each: what one takes of pinned memory, where that is more than
    bytes_each.

    Raises SnapshotError with the numbers when `keep` snapshots do not fit.
    """
    # Greedy is right: every slot is worth the same, and a faster tier is never worse.
    pinned_each = bytes_each if pinned_each is None else pinned_each
    counts, left = [], keep
    for budget, each in ((device_bytes, bytes_each), (pinned_bytes, pinned_each), (disk_bytes, bytes_each)):
        counts.append(min(left, budget // each))
        left -= counts[-1]

    # Known at the start, before an hour of training asks for the one that does not fit.
    if left:
        more = f" ({pinned_each:,} of pinned memory)" if pinned_each != bytes_each else ""
        raise SnapshotError(
            describe(
                "snapshot budgets",
                f"hold {sum(counts)} of {keep} snapshots of {bytes_each:,} bytes{more}",
                expected=f"{keep * bytes_each:,} bytes over the tiers",
                got=f"device {device_bytes:,}, pinned {pinned_bytes:,}, disk {disk_bytes:,} bytes",
                todo="raise a budget, keep fewer, or keep weights only",
            )
        )
    return SlotPlan(bytes_each, *counts)


@dataclass(frozen=True)
class _Part:
    """Where one tensor lies in a slot, with the strides of the live tensor where those are dense."""

    buffer: int  # index
    start: int  # byte offset in that buffer
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, buffers: Sequence[Tensor]) -> Tensor:
        flat = buffers[self.buffer][self.start : self.stop].view(self.dtype)
        return flat.as_strided(self.shape, self.stride, flat.storage_offset())


def _part(tensor: Tensor, buffer: int, start: int) -> _Part:
    stride = tensor.stride() if dense(tensor) else torch.empty(tensor.shape, device="meta").stride()
    stop = start + tensor.numel() * tensor.element_size()
    return _Part(buffer, start, stop, tensor.dtype, tuple(tensor.shape), tuple(stride))


class Slot:
    """Buffers in memory with their views; or an unlinked file with its checksums.

    bits    the views in the groups they are copied in
    """

    def __init__(
        self,
        level: int,
        buffers: Sequence[Tensor] = (),
        views: Sequence[Tensor] = (),
        bits: Sequence[list[Tensor]] = (),
        fd: int = -1,
    ):
        self.level, self.buffers, self.views, self.bits, self.fd = (
            level,
            list(buffers),
            list(views),
            list(bits),
            fd,
        )
        self.sums: list[int] = []  # of a file: the checksum of every chunk

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Layout:
    """The common layout of all slots, and how to make one.

    bytes_each     of a slot, its tensors aligned to ALIGN_BYTES
    pinned_each    what a slot in pinned memory takes, as its allocator rounds
    groups         of the tensors, as `copies.alike` found them
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self.devices: list[torch.device] = list(dict.fromkeys(t.device for t in tensors))
        self.groups = alike(tensors)
        self._buffers: list[tuple[torch.device, int]] = []
        placed: dict[int, tuple[int, int]] = {}  # tensor -> (buffer, start)
        taken = [-(-t.numel() * t.element_size() // ALIGN_BYTES) * ALIGN_BYTES for t in tensors]
        for device in self.devices:
            mine = [i for i, t in enumerate(tensors) if t.device == device]
            for inside in share_out([taken[i] for i in mine]):
                size = 0
                for i in (mine[n] for n in inside):
                    placed[i] = (len(self._buffers), size)
                    size += taken[i]
                self._buffers.append((device, size))
        self._parts = [_part(t, *placed[i]) for i, t in enumerate(tensors)]
        self.bytes_each = sum(taken)
        self.pinned_each = sum(rounded(n) if device.type == "cuda" else n for device, n in self._buffers)

    def in_memory(self, level: int, *, pin: bool = False) -> Slot:
        """A slot on the state's own devices (DEVICE) or on the host. Zeroed, which touches its pages."""
        buffers = [
            torch.zeros(
                n,
                dtype=torch.uint8,
                device=d if level == DEVICE else "cpu",
                pin_memory=pin and d.type == "cuda",
            )
            for d, n in self._buffers
        ]
        views = [part.view(buffers) for part in self._parts]
        return Slot(level, buffers, views, in_groups(views, self.groups))

    def on_disk(self, folder: str | os.PathLike) -> Slot:
        """A file with its space reserved, without a name: it is gone with the process, however that ends.
        Raises OSError."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < self.bytes_each:
            raise OSError(f"{folder} has less than {self.bytes_each:,} bytes free")
        fd, path = tempfile.mkstemp(prefix="snapshot-", dir=folder)
        os.unlink(path)
        slot = Slot(DISK, fd=fd)
        try:
            os.posix_fallocate(fd, 0, self.bytes_each)
        except OSError:
            slot.close()
            raise
        return slot


def write_file(slot: Slot, buffers: Sequence[Tensor], ready: Any = None, side: Any = None) -> None:
    """Writes the buffers one after another once `ready` (a CUDA event) has passed, copying on the stream
    `side`.

    Runs in a thread; host buffers are written from where they are. Raises OSError.
    """
    if ready is not None:
        ready.synchronize()
    sums = []
    with torch.cuda.stream(side):  # of None: nothing
        for offset, chunk in _chunks(buffers):
            host = chunk.cpu()
            sums += checksums([host])
            data, at = host.numpy().data, 0
            while at < len(data):
                at += os.pwrite(slot.fd, data[at:], offset + at)
    slot.sums = sums


def read_file(slot: Slot, buffers: Sequence[Tensor]) -> bool:
    """Fills host buffers from the file; False when it is not what was written. Raises OSError."""
    sums = []
    for offset, chunk in _chunks(buffers):
        data, at = chunk.numpy().data, 0
        while at < len(data):
            got = os.preadv(slot.fd, [data[at:]], offset + at)
            if not got:
                return False
            at += got
        sums += checksums([chunk])
    return sums == slot.sums


def _chunks(buffers: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    offset = 0
    for buffer in buffers:
        for start in range(0, buffer.numel(), DISK_CHUNK_BYTES):
            chunk = buffer[start : start + DISK_CHUNK_BYTES]
            yield offset, chunk
            offset += chunk.numel()
