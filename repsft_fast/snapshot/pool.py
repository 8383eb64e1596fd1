"""The pool: named snapshots of the live state, counted by reference, their cost counted."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repsft_fast.errors import SnapshotError, describe
from repsft_fast.snapshot.copies import copy, in_groups
from repsft_fast.snapshot.slots import TIER_NAMES, Layout, SlotPlan
from repsft_fast.snapshot.tiers import Stored, Tiers
from repsft_fast.state import JSON, decode_values, encode_values, local


@dataclass
class _Entry:
    stored: Stored
    values: str  # JSON text: frozen at the time of the snapshot
    references: int = 1


class SnapshotPool:
    """Named snapshots of fixed live tensors. Sharded ones are kept as this rank's shards; nothing here
    communicates.

    tensors     live storages under constant names (`RunState.tensors`)
    *_bytes     budget of each tier on this rank. `keep` snapshots must fit at once, or SnapshotError is
                raised here, at start
    writing     what a restore writes the tensors inside (`RunState.writing`)
    graded      whose gradients tell of an update under way; None: the tensors' own
    messages    what the user should know: a tier that is off or smaller than asked, and why
    takes, restores, bytes, seconds   work done on the critical path since the start
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        device_bytes: int,
        pinned_bytes: int,
        disk_bytes: int = 0,
        disk_folder: str | os.PathLike | None = None,
        keep: int,
        writing: Callable[[], AbstractContextManager[object]] = nullcontext,
        graded: Iterable[Tensor] | None = None,
    ):
        self._live = dict(tensors)
        self._writing = writing
        self._graded = list(self._live.values() if graded is None else graded)
        layout = Layout([local(t) for t in self._live.values()])
        if not layout.bytes_each or keep < 1:
            raise SnapshotError(
                describe("snapshot", "has nothing to keep", got=f"{len(self._live)} tensors, keep {keep}")
            )
        self._tiers = Tiers(layout, keep, (device_bytes, pinned_bytes, disk_bytes), disk_folder)
        self._addresses: list[int] = []
        self._bits: list[list[Tensor]] = []
        self._entries: dict[str, _Entry] = {}
        self._seconds = 0.0
        self._timers: list[tuple[Any, Any]] = []
        self.takes = self.restores = self.bytes = 0

    @property
    def bytes_each(self) -> int:
        return self._tiers.layout.bytes_each

    @property
    def plan(self) -> SlotPlan:
        return self._tiers.plan

    @property
    def messages(self) -> list[str]:
        return self._tiers.messages

    @property
    def free_slots(self) -> int:
        """Places for new snapshots; a move under way occupies two."""
        return self._tiers.free

    def names(self) -> list[str]:
        return list(self._entries)

    @property
    def live(self) -> dict[str, Any]:
        """The live tensors this pool copies, by name."""
        return dict(self._live)

    def tier(self, name: str) -> str:
        """The tier a snapshot is in now: device, pinned or disk."""
        stored = self._find(name).stored
        self._tiers.settle()
        return TIER_NAMES[stored.slot.level]

    def values(self, name: str) -> dict[str, JSON]:
        return decode_values(self._find(name).values)

    @property
    def seconds(self) -> float:
        """Seconds spent in takes and restores; on a GPU by its own events, which reading this waits for."""
        for start, stop in self._timers:
            stop.synchronize()
            self._seconds += start.elapsed_time(stop) / 1000
        self._timers.clear()
        return self._seconds

    @torch.no_grad()
    def take(self, name: str, values: Mapping[str, JSON]) -> None:
        """Keeps the state under `name`, with one reference. On a GPU a copy on the current stream, without a
        host sync.

        Raises SnapshotError in the middle of an update (a tensor here holds a gradient), for a name in use,
        and when every place is taken.
        """
        if name in self._entries:
            raise SnapshotError(
                describe(f"snapshot {name}", "exists already", todo="release it first or use another name")
            )
        if any(t.is_leaf and t.grad is not None for t in self._graded):
            raise SnapshotError(
                describe(
                    f"snapshot {name}",
                    "asked for in the middle of an update",
                    todo="finish the update and clear gradients",
                )
            )
        text = encode_values(values)
        with self._timed():
            self._entries[name] = _Entry(self._copy(name), text)
            self.takes += 1
        self._tiers.move_ahead()

    @torch.no_grad()
    def restore(self, name: str) -> dict[str, JSON]:
        """Puts the tensors back in place, drops their gradients and returns the values. The snapshot stays
        kept.

        Raises SnapshotError listing the names there are when `name` is unknown, and when its file is damaged;
        both leave the state untouched.
        """
        entry = self._find(name)
        self._tiers.settle()
        self._tiers.touch(entry.stored)
        with self._timed(), self._writing():
            self._tiers.after(entry.stored)
            copy(self._live_bits(), self._tiers.in_memory(entry.stored, name).bits, non_blocking=True)
            for tensor in self._live.values():
                tensor.grad = None
            self.bytes += self.bytes_each
            self.restores += 1
        return decode_values(entry.values)

    def release(self, name: str) -> None:
        """One reference less; with the last the snapshot is gone and its slot free at once."""
        entry = self._find(name)
        entry.references -= 1
        if entry.references:
            return
        del self._entries[name]
        self._tiers.drop(entry.stored)

    def hold(self, name: str) -> dict[str, Tensor]:
        """Frozen tensors of a snapshot for a reader in another thread; referenced and kept in place until
        `unhold`.

        Waits until the copy is whole. DTensors come back as DTensors over the frozen shard; from disk they
        are read anew.
        """
        entry = self._find(name)
        self._tiers.finish(entry.stored)
        if entry.stored.ready is not None:
            entry.stored.ready.synchronize()
        views = self._tiers.in_memory(entry.stored, name).views
        entry.stored.holds += 1
        entry.references += 1
        return {n: _like(live, view) for (n, live), view in zip(self._live.items(), views)}

    def unhold(self, name: str) -> None:
        self._find(name).stored.holds -= 1
        self.release(name)

    def close(self) -> None:
        self._tiers.close()

    def _live_bits(self) -> list[list[Tensor]]:
        """Where the live tensors lie now. They do not move, and looking costs a third, at most, of making
        these views anew."""
        addresses = [_address(t) for t in self._live.values()]
        if addresses != self._addresses:
            shards = [local(t) for t in self._live.values()]
            self._addresses, self._bits = addresses, in_groups(shards, self._tiers.layout.groups)
        return self._bits

    def _find(self, name: str) -> _Entry:
        if name not in self._entries:
            raise SnapshotError(
                describe(f"snapshot {name}", "does not exist", expected=f"one of {sorted(self._entries)}")
            )
        return self._entries[name]

    def _copy(self, name: str) -> Stored:
        stored = self._tiers.add()
        if stored is None:
            raise SnapshotError(
                describe(
                    f"snapshot {name}",
                    f"every one of {len(self._tiers.stored)} places is taken",
                    got=self.names(),
                    todo="; ".join(["release one, or raise the number kept and its budgets", *self.messages]),
                )
            )
        try:
            self._tiers.write(stored, self._live_bits())
        except OSError as error:
            self._tiers.drop(stored)
            raise SnapshotError(
                describe(f"snapshot {name}", "could not be written to disk", got=error)
            ) from error
        self.bytes += self.bytes_each
        return stored

    @contextmanager
    def _timed(self) -> Iterator[None]:
        if self._tiers.cuda is None:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
        else:
            stream = torch.cuda.current_stream(self._tiers.cuda)
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            yield
            stop.record(stream)
            self._timers.append((start, stop))


def _address(tensor: Any) -> int:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).data_ptr()


def _like(live: Any, shard: Tensor) -> Tensor:
    """The frozen shard in the clothes of the live tensor."""
    if not hasattr(live, "to_local"):
        return shard
    shape, stride = live.shape, live.stride()
    return type(live).from_local(
        shard, live.device_mesh, live.placements, run_check=False, shape=shape, stride=stride
    )
