"""The snapshots a run can go back to: the closed list of state, and the pools that keep copies of it.

Rolled back: weights, moments of the optimizer, random streams, cursor, schedule. Not rolled
back: the policy's table (it remembers what was tried), the work done, the best validation so far.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from repsft_fast.distributed import World, held_parameters
from repsft_fast.errors import SnapshotError, describe
from repsft_fast.optim import state_tensors
from repsft_fast.policies import policy_class
from repsft_fast.snapshot import SnapshotPool
from repsft_fast.state import RunState, local
from repsft_fast.training.parts import Parts
from repsft_fast.training.progress import load_values, values_of
from repsft_fast.training.refusals import reverts

BEST, WHOLE, LAST_GOOD, SNAPSHOT = "best", "whole", "safe", "moments/"


def closed_list(parts: Parts) -> RunState:
    """Everything mutable of the run. Frozen weights (LoRA) do not change and are not on it."""
    state = RunState()
    for name, parameter in held_parameters(parts.model):
        if parameter.requires_grad:
            state.add_tensor(f"model/{name}", parameter)
    state.add_follower(parts.optimizer.state_was_written)
    state.add_tensors("optimizer", lambda: state_tensors(parts.optimizer))
    state.add_tensors("ledger", parts.ledger.tensors)
    state.add_tensors("spikes", parts.spikes.tensors)
    if parts.sample_stats is not None:
        state.add_tensors("samples", parts.sample_stats.tensors)
    both = parts.progress, parts.lasting
    state.add_value("progress", lambda: values_of(*both), lambda values: load_values(values, *both))
    state.add_value("schedule", parts.schedule.values, parts.schedule.load)
    state.add_rng(parts.world.device)
    return state


class Reader(Protocol):
    """Reads frozen copies in another thread."""

    def wait(self) -> None:
        """Until it has read what it was given, and let go of it."""


@dataclass
class Held:
    """Frozen copies for a reader in another thread, until `release`.

    reader  who reads them, once somebody does: a snapshot that finds no free place waits for it
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)  # of every policy snapshot
    reader: Reader | None = None
    _pools: list[tuple[SnapshotPool, str]] = field(default_factory=list)

    def add(self, pool: SnapshotPool, name: str, prefix: str = "") -> None:
        self.tensors |= {prefix + key: tensor for key, tensor in pool.hold(name).items()}
        self._pools.append((pool, name))

    def release(self) -> None:
        """Nobody reads them any more. Copies that were read from disk for it go with this."""
        while self._pools:
            pool, name = self._pools.pop()
            pool.unhold(name)
        self.tensors, self.reader = {}, None


class Snapshots:
    """Named snapshots: the policy's come and go as it points to them; `best` is the best validation's
    weights; the whole state is kept for checkpoints and reverts.

    messages    what the user should know of the room for them
    """

    def __init__(self, parts: Parts, state: RunState, keep: int, *, weights_only: bool, whole: int = 0):
        """keep: policy snapshots held at once, decided at start; 0 makes no pool. weights_only: roll-backs
        reset the optimizer. whole: copies of the whole state beside them, for checkpoints and reverts.

        Raises SnapshotError with the numbers when that many do not fit into the budgets.
        """
        self.parts, self.state = parts, state
        self.messages: list[str] = []
        self._held: Held | None = None  # the last copy that was frozen
        self._names: list[str] = []  # ours; the pool may know more while a reader holds one that was released
        wanted = {n: t for n, t in state.tensors().items() if not weights_only or n.startswith("model/")}
        self._policy = self._pool(wanted, keep) if keep else None
        weights = {n: t for n, t in state.tensors().items() if n.startswith("model/")}
        policy = policy_class(parts.config.mixture.policy)  # one that names a result keeps its own best
        best_is_kept = parts.config.evaluate.keep == "best" and not policy.names_result
        self._best = self._pool(weights, 1) if best_is_kept else None
        self._copies = whole
        self._whole: SnapshotPool | None = None
        if reverts(parts.config):
            self._make_whole()

    def take(self, name: str) -> None:
        self._take(self._checked(self._policy), name, self.state.values())
        self._names.append(name)

    def _take(self, pool: SnapshotPool, name: str, values: dict[str, Any]) -> None:
        if not pool.free_slots and self._held is not None and self._held.reader is not None:
            self._held.reader.wait()
        pool.take(name, values)

    def freeze(self, *, copy: bool = True) -> Held:
        """The whole state as it is now, and every kept snapshot, for a writer in another thread. Releases
        nothing by itself.

        Without a place for a copy, and where none is asked for, the live tensors themselves: the writer must
        be waited for. Places are made when the first copy is asked for: a run that ends before its first
        checkpoint pays nothing.
        """
        held = Held()
        if copy:
            self._make_whole()
        if self._whole is None or not copy:
            held.tensors |= {name: tensor.detach() for name, tensor in self.state.tensors().items()}
        else:
            self._take(self._whole, WHOLE, {})
            held.add(self._whole, WHOLE)
            self._whole.release(WHOLE)  # the reader's reference keeps it
        for name in self.names():
            assert self._policy is not None
            held.add(self._policy, name, f"{SNAPSHOT}{name}/")
            held.values[name] = self._policy.values(name)
        if self._best is not None and BEST in self._best.names():
            held.add(self._best, BEST, f"{BEST}/")
        self._held = held
        return held

    @property
    def freezes(self) -> bool:
        """Whether training can go on while a checkpoint is written."""
        return self._whole is not None

    def adopt(
        self, name: str, values: dict[str, Any] | None, fill: Callable[[dict[str, Tensor]], object]
    ) -> None:
        """Keep a snapshot read from disk; `fill` writes it into the live tensors, inside `RunState.writing`,
        which are another state's afterwards.

        values: of a policy's snapshot; None for the best weights.
        """
        pool = self._checked(self._policy if values is not None else self._best)
        fill(pool.live)
        pool.take(name if values is not None else BEST, values or {})
        if values is not None:
            self._names.append(name)

    def snapshot_last_good(self) -> None:
        """Remember the whole state as the one to go back to when numbers go wrong; the one before it is
        forgotten."""
        pool = self._checked(self._whole)
        if LAST_GOOD in pool.names():
            pool.release(LAST_GOOD)
        self._take(pool, LAST_GOOD, self.state.values())

    def revert_to_last_good(self) -> None:
        self._put_back(self._checked(self._whole), LAST_GOOD)

    def restore(self, name: str) -> None:
        """Put the snapshot back. What lasts (`progress.Lasting`) stays as it is."""
        self._put_back(self._checked(self._policy), name)

    def _put_back(self, pool: SnapshotPool, name: str) -> None:
        lasting = values_of(self.parts.lasting)
        self.state.load_values(pool.restore(name))
        load_values(lasting, self.parts.lasting)

    def release(self, name: str) -> None:
        self._checked(self._policy).release(name)
        self._names.remove(name)

    def keep_only(self, names: Collection[str]) -> None:
        """Let go of every snapshot of the policy that nothing points to any more."""
        for name in set(self._names) - set(names):
            self.release(name)

    def keep_best(self) -> None:
        pool = self._checked(self._best)
        if BEST in pool.names():
            pool.release(BEST)
        self._take(pool, BEST, {})

    def restore_best(self) -> None:
        """The best validation's weights into the model, at the end, where some were kept."""
        if self._best is not None and BEST in self._best.names():
            self._best.restore(BEST)

    def names(self) -> list[str]:
        return list(self._names)

    def tier(self, name: str) -> str:
        return self._checked(self._policy).tier(name)

    def spent(self) -> dict[str, Any]:
        """Seconds, bytes and counts of snapshots and reverts so far."""
        pools = [pool for pool in (self._policy, self._best, self._whole) if pool is not None]
        return {
            "seconds": sum(pool.seconds for pool in pools),
            "bytes": sum(pool.bytes for pool in pools),
            "taken": sum(pool.takes for pool in pools),
            "restored": sum(pool.restores for pool in pools),
        }

    def close(self) -> None:
        for pool in (self._policy, self._best, self._whole):
            if pool is not None:
                pool.close()

    def _make_whole(self) -> None:
        if self._whole is None and self._copies:
            self._whole, self._copies = self._room_for_whole(self._copies), 0

    def _room_for_whole(self, copies: int) -> SnapshotPool | None:
        """Places for the whole state: in pinned host memory on a GPU, whose own memory the policy's snapshots
        need more."""
        on_gpu = self.parts.world.device.type == "cuda" and self.parts.config.snapshot.device_bytes is None
        try:
            return self._pool(self.state.tensors(), copies, device_bytes=0 if on_gpu else None)
        except SnapshotError as error:
            if reverts(self.parts.config):
                raise
            self.messages.append(
                f"no room for a copy of the state, so training waits while a checkpoint is written ({error})"
            )
            return None

    def _pool(
        self, tensors: dict[str, Tensor], keep: int, *, device_bytes: int | None = None
    ) -> SnapshotPool:
        settings, device = self.parts.config.snapshot, self.parts.world.device
        each = sum(local(t).numel() * t.element_size() for t in tensors.values())
        pool = SnapshotPool(
            tensors,
            device_bytes=(
                device_budget(settings.device_bytes, each * keep, device)
                if device_bytes is None
                else device_bytes
            ),
            pinned_bytes=pinned_budget(settings.pinned_bytes, self.parts.world),
            disk_bytes=int(settings.disk_bytes),
            disk_folder=self.parts.folder,
            keep=keep,
            writing=self.state.writing,
            graded=self.parts.optimizer.names.values(),
        )
        self.messages += [text for text in pool.messages if text not in self.messages]
        return pool

    @staticmethod
    def _checked(pool: SnapshotPool | None) -> SnapshotPool:
        if pool is None:
            raise SnapshotError(
                describe("snapshots", "none are kept in this run", todo="choose a policy that goes back")
            )
        return pool


def device_budget(given: int | None, wanted: int, device: torch.device) -> int:
    """Bytes of device memory for snapshots: as set, else what is wanted up to half of what is free now."""
    if given is not None:
        return int(given)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_bytes()
    return min(wanted + wanted // 64 + 2**20, free // 2)


def pinned_budget(given: int | None, world: World) -> int:
    """Bytes of pinned host memory that snapshots may take on this rank: as set, else the rank's share of half
    of what is free.

    A pool takes of it what its snapshots need, and the next pool finds less free. Without a GPU host memory
    is the device's.
    """
    if given is not None:
        return int(given)
    if world.device.type != "cuda":
        return 0
    return free_host_bytes() // 2 // min(world.size, torch.cuda.device_count())


def free_host_bytes(root: Path = Path("/")) -> int:
    """Memory that this process can still be given, in bytes: of the machine, or of the control group a
    container or job is in.

    Pinned memory cannot be swapped, so who takes more than the group's limit is killed. root: of the files
    that are asked.
    """
    free = [4 * 2**30]
    with suppress(OSError):
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")] or free
    return max(0, min(free + list(_left_in_groups(root))))


def _left_in_groups(root: Path) -> Iterator[int]:
    """Bytes left of every limit there is on this process: its group's and those around it. Unused file pages
    count as free."""
    places = []
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                places.append(("sys/fs/cgroup", path, "memory.max", "memory.current", "inactive_file"))
            elif controllers == "memory":
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                places.append(("sys/fs/cgroup/memory", path, *names))
    for top, path, limit, used, unused in places:
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            # "max", or seen from inside a container, whose group is the top
            with suppress(OSError, ValueError):
                most, taken = (int((root / top / folder / name).read_text()) for name in (limit, used))
                stat = dict(
                    line.split() for line in (root / top / folder / "memory.stat").read_text().splitlines()
                )
                yield most - taken + int(stat.get(unused, 0))
