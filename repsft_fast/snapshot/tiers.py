"""The tiers: which slot a snapshot lies in, and how the coldest moves to a slower one off the critical path.

device → pinned host copies run on a side stream, copies to disk in one thread. A move only reads its source,
so a snapshot can be restored while it moves; it ends (slot swapped, old slot free) in the caller's thread at
the next call, so no locks.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repsft_fast.errors import SnapshotError, describe
from repsft_fast.snapshot.copies import copy
from repsft_fast.snapshot.slots import (
    DEVICE,
    DISK,
    PINNED,
    TIER_NAMES,
    Layout,
    Slot,
    plan_slots,
    read_file,
    write_file,
)


@dataclass
class Stored:
    """One copy of the state."""

    slot: Slot
    used: int = 0  # when last used, counted in calls; the smallest is the coldest
    holds: int = 0  # readers in other threads: while there are any it stays where it is
    move: tuple[Slot, Any] | None = None  # (target, CUDA event or future) of a move under way
    ready: Any = None  # CUDA event after which the slot's contents are whole


class Tiers:
    """Slots of every tier, allocated within the budgets. Raises SnapshotError when `keep` snapshots do not
    fit.

    messages   tiers that were turned off, and why
    """

    def __init__(
        self, layout: Layout, keep: int, budgets: tuple[int, int, int], disk_folder: str | os.PathLike | None
    ):
        self.layout = layout
        self.messages: list[str] = []
        self.stored: list[Stored] = []
        self.cuda = self._device()
        self._side = torch.cuda.Stream(self.cuda) if self.cuda else None
        self._thread: ThreadPoolExecutor | None = None
        self._clock = 0
        self._free: list[list[Slot]] = [[], [], []]
        self._allocate(keep, list(budgets), disk_folder)

    def _device(self) -> torch.device | None:
        return next((d for d in self.layout.devices if d.type == "cuda"), None)

    def _allocate(self, keep: int, budgets: list[int], folder: str | os.PathLike | None) -> None:
        if self.cuda is None and budgets[PINNED]:
            budgets[PINNED] = self._turn_off(
                PINNED, "the state is in host memory already; raise the device budget instead"
            )
        if folder is None and budgets[DISK]:
            budgets[DISK] = self._turn_off(DISK, "no folder was given")
        while True:
            try:
                device, pinned, disk = budgets
                self.plan = plan_slots(
                    self.layout.bytes_each,
                    keep,
                    device_bytes=device,
                    pinned_bytes=pinned,
                    disk_bytes=disk,
                    pinned_each=self.layout.pinned_each,
                )
            except SnapshotError as error:
                self.close()
                raise SnapshotError("; ".join([str(error), *self.messages])) from None
            counts = (self.plan.device, self.plan.pinned, self.plan.disk)
            if all(self._fill(level, count, budgets, folder) for level, count in enumerate(counts)):
                return

    def _fill(self, level: int, count: int, budgets: list[int], folder: str | os.PathLike | None) -> bool:
        """Brings a tier to `count` free slots. False when the machine refuses: its budget is cut to what it
        gave."""
        while len(self._free[level]) < count:
            try:
                if level == DISK:
                    assert folder is not None
                    slot = self.layout.on_disk(folder)
                else:
                    slot = self.layout.in_memory(level, pin=level == PINNED)
            # torch's out-of-memory error is a RuntimeError
            except (RuntimeError, MemoryError, OSError) as error:
                got = len(self._free[level])
                budgets[level] = got * (
                    self.layout.pinned_each if level == PINNED else self.layout.bytes_each
                )
                self.messages.append(
                    f"snapshot tier {TIER_NAMES[level]} keeps {got} instead of {count}:"
                    f" {str(error).splitlines()[0]}"
                )
                return False
            self._free[level].append(slot)
        return True

    def _turn_off(self, level: int, reason: str) -> int:
        self.messages.append(f"snapshot tier {TIER_NAMES[level]} is off: {reason}")
        for slot in self._free[level]:
            slot.close()
        self._free[level].clear()
        return 0

    @property
    def free(self) -> int:
        return sum(map(len, self._free))

    def touch(self, stored: Stored) -> None:
        self._clock += 1
        stored.used = self._clock

    def add(self) -> Stored | None:
        """A new snapshot's place, in the fastest tier that has or can make room; None when every place is
        taken."""
        slot = self._room(DEVICE)
        if slot is None:
            return None
        stored = Stored(slot)
        self.touch(stored)
        self.stored.append(stored)
        return stored

    def drop(self, stored: Stored) -> None:
        """Gives the slot back to its tier at once."""
        self.finish(stored)
        self.stored.remove(stored)
        self._free[stored.slot.level].append(stored.slot)

    def after(self, stored: Stored) -> None:
        """Orders the current stream after whatever wrote this snapshot's slot. No host sync."""
        if stored.ready is not None:
            torch.cuda.current_stream(self.cuda).wait_event(stored.ready)

    def write(self, stored: Stored, live: list[list[Tensor]]) -> None:
        """Copies the state into the snapshot's slot; straight to disk only where no memory tier exists.
        Raises OSError.

        live: the bits of the live tensors in the groups of the layout.
        """
        slot = stored.slot if stored.slot.level != DISK else self.layout.in_memory(PINNED)
        copy(slot.bits, live, non_blocking=slot is stored.slot)
        if slot is not stored.slot:
            write_file(stored.slot, slot.buffers)
        elif self.cuda:
            stored.ready = torch.cuda.current_stream(self.cuda).record_event()

    def in_memory(self, stored: Stored, name: str) -> Slot:
        """The snapshot's slot, or a host copy of its file, verified. Raises SnapshotError when the file is
        damaged."""
        if stored.slot.level != DISK:
            return stored.slot
        staging = self.layout.in_memory(PINNED)
        try:
            intact = read_file(stored.slot, staging.buffers)
        except OSError as error:
            raise SnapshotError(
                describe(f"snapshot {name}", "cannot be read back from disk", got=error)
            ) from error
        if not intact:
            raise SnapshotError(
                describe(f"snapshot {name}", "is damaged on disk", todo="go back to another one")
            )
        return staging

    def _room(self, level: int) -> Slot | None:
        """Takes a free slot of this tier, moving its coldest on if need be; else one of a slower tier."""
        if level > DISK:
            return None
        self.settle()
        for stored in self._at(level):
            if not self._free[level]:
                self.finish(stored)
        movable = [s for s in self._at(level) if not s.holds]
        if not self._free[level] and movable:
            target = self._room(level + 1)
            if target is None:
                return None
            coldest = min(movable, key=lambda s: s.used)
            self._start_move(coldest, target)
            self.finish(coldest)
        return self._free[level].pop() if self._free[level] else self._room(level + 1)

    def move_ahead(self) -> None:
        """Starts moving the coldest off each full tier now, so that the next snapshot finds a slot without
        waiting."""
        for level in (DEVICE, PINNED):
            here = self._at(level)
            movable = [s for s in here if not s.holds]
            slower = [free for free in self._free[level + 1 :] if free]
            if movable and slower and not self._free[level] and not any(s.move for s in here):
                self._start_move(min(movable, key=lambda s: s.used), slower[0].pop())

    def _at(self, level: int) -> list[Stored]:
        return [s for s in self.stored if s.slot.level == level]

    def _start_move(self, stored: Stored, target: Slot) -> None:
        if target.level == DISK:
            self._thread = self._thread or ThreadPoolExecutor(1, "snapshot")
            future = self._thread.submit(write_file, target, stored.slot.buffers, stored.ready, self._side)
            stored.move = (target, future)
            return
        assert self._side is not None
        self._side.wait_stream(torch.cuda.current_stream(self.cuda))
        with torch.cuda.stream(self._side):
            torch._foreach_copy_(target.buffers, stored.slot.buffers, non_blocking=True)
            stored.move = (target, self._side.record_event())

    def settle(self) -> None:
        """Ends the moves that are done."""
        for stored in self.stored:
            if stored.move is not None:
                what = stored.move[1]
                if what.done() if isinstance(what, Future) else what.query():
                    self.finish(stored)

    def finish(self, stored: Stored) -> None:
        """Waits for a move, if any, points the snapshot at its new slot and frees the old. A failed move
        changes nothing."""
        if stored.move is None:
            return
        (target, what), stored.move = stored.move, None
        if isinstance(what, Future):
            try:
                what.result()
            except OSError as error:
                target.close()
                self._turn_off(target.level, str(error))
                return
            stored.ready = None
        else:
            torch.cuda.current_stream(self.cuda).wait_event(what)
            stored.ready = what
        self._free[stored.slot.level].append(stored.slot)
        stored.slot = target

    def close(self) -> None:
        """Ends moves under way and closes files. Memory goes with the object."""
        for stored in self.stored:
            self.finish(stored)
            stored.slot.close()
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        for slot in [slot for free in self._free for slot in free]:
            slot.close()
