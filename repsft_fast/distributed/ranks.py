"""Ranks: who we are, and what ranks tell each other: sums, decisions every rank takes alike, and why there is no run.

Messages between hosts (flags, digests, barriers) go through gloo and CPU tensors, so they never wait for the device.
"""

import hashlib
import json
import os
import socket
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from repsft_fast.errors import ConfigError, DataError, ModelError, RepsftError, TrainingError, describe

DEFAULT_TIMEOUT_S = 600.0
_control_group: "dist.ProcessGroup | None" = None  # gloo, for messages between hosts; None = the default group
_processes: list[tuple[int, int]] = []  # (host, process id) of every rank


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """The one rank that prints and writes."""
        return self.rank == 0


def start(device: torch.device | str | None = None, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> World:
    """Join the run's ranks as torchrun or srun describe them in the environment; alone, no group is made.

    device: None = this rank's GPU where there is one, else the CPU. A collective that waits longer than `timeout_s`
    fails on every rank. ConfigError when the environment is half filled.
    """
    rank, size, local_rank = place()
    refused = None
    try:
        if device is None:
            device = torch.device("cuda", _gpu(local_rank)) if torch.cuda.is_available() else torch.device("cpu")
    except ConfigError as error:  # the others wait for this rank: it joins them and tells
        device, refused = torch.device("cuda", 0), error
    device = torch.device(device)
    if device.type == "cuda" and refused is None:
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                todo = "launch with torchrun, or export it"
                raise ConfigError(describe(name, "is not set", expected="the address of rank 0", todo=todo))
        _init_group(device, rank, size, timeout_s)
    with together():
        if refused is not None:
            raise refused
    return World(rank, size, local_rank, device)


def start_alone(world: World) -> None:
    """A group of this one rank, for what asks for one. Does nothing where there is a group."""
    if not dist.is_initialized():
        _init_group(world.device, 0, 1, DEFAULT_TIMEOUT_S, store=dist.HashStore())


def stop() -> None:
    """Leave the group. Safe to call twice, and without a group."""
    global _control_group
    _control_group = None
    _processes.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def place(environment: Mapping[str, str] = os.environ) -> tuple[int, int, int]:
    """(rank, size, local rank) from torchrun's variables, else from those of a Slurm step, else alone."""
    if "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif int(environment.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    else:
        return 0, 1, 0
    try:
        rank, size = int(environment[names[0]]), int(environment[names[1]])
        local_rank = int(environment.get(names[2], "0"))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            describe("the launcher's environment", f"{error} cannot be read", expected=", ".join(names))
        ) from error
    if not 0 <= rank < size:
        raise ConfigError(describe(names[0], "is not one of the ranks", expected=f"0 to {size - 1}", got=rank))
    return rank, size, local_rank


def _gpu(local_rank: int) -> int:
    """This rank's GPU among those it sees: its own place, or the only one where the launcher shows every task one."""
    seen = torch.cuda.device_count()
    if seen == 1:
        return 0
    if local_rank >= seen:
        wrong = f"rank {local_rank} of this node has no GPU"
        raise ConfigError(describe("the launcher", wrong, expected=f"at most {seen} ranks on it", todo="start one per GPU"))
    return local_rank


def _init_group(device: torch.device, rank: int, size: int, timeout_s: float, store: "dist.Store | None" = None) -> None:
    global _control_group
    timeout = timedelta(seconds=timeout_s)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout, store=store)
    _control_group = dist.new_group(backend="gloo", timeout=timeout) if device.type == "cuda" else None
    mine = torch.tensor([_host(), os.getpid()], dtype=torch.int64)
    everyones = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(everyones, mine, group=_control_group)
    _processes[:] = [(int(host), int(process)) for host, process in everyones]


def lost_rank(error: BaseException, world: World) -> TrainingError | None:
    """The error in words when it came from a rank that is gone or silent, named where it ran on this host; else None."""
    text = str(error).splitlines()[0] if str(error) else ""
    of_the_wire = isinstance(error, dist.DistBackendError | dist.DistNetworkError) or (
        isinstance(error, RuntimeError) and any(word in text.lower() for word in ("gloo", "connection", "nccl", "timed out"))
    )
    if world.size == 1 or isinstance(error, RepsftError) or not of_the_wire:
        return None
    deadline = time.monotonic() + 2.0  # the news may come before the process has ended
    while not (gone := _gone()) and time.monotonic() < deadline:
        time.sleep(0.05)
    who = f"rank {', '.join(map(str, gone))}" if gone else "another rank"
    todo = "read the other ranks' output, then go on with --resume"
    return TrainingError(describe(f"rank {world.rank}", f"{who} is gone", got=text, todo=todo))


def _gone() -> list[int]:
    """Ranks of this host whose process has ended."""
    host = _host()
    return [rank for rank, (there, process) in enumerate(_processes) if there == host and not _lives(process)]


def _host() -> int:
    return zlib.crc32(socket.gethostname().encode())


def _lives(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place. int64 sums are exact and equal on every rank. No host sync on CUDA."""
    if _ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_max(tensor: Tensor) -> Tensor:
    """Largest over ranks, element by element, in place: a veto of one rank is a veto of all."""
    if _ranks() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def any_rank(flag: bool) -> bool:
    """True on every rank when it is true on one. Waits for all ranks."""
    return bool(largest(int(flag))[0])


def largest(*values: int) -> tuple[int, ...]:
    """The largest of each value over the ranks, the same on every rank: how decisions of one become those of all.

    Host numbers over the control group: it waits for the ranks and not for the device. Values 0 … 2**62.
    """
    if _ranks() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=_control_group)
    return tuple(tensor.tolist())


@contextmanager
def together() -> Iterator[None]:
    """What fails inside on one rank fails on all, at once and with the reason; nobody waits for a rank that gave up.

    The rank that failed raises its own error, the others one of the same kind that names it. Nothing inside may be a message
    between ranks: one that fails would not take part in it. TrainingError when a rank is gone.
    """
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    try:
        told = _first_told(mine) if _ranks() > 1 else None
    except RuntimeError as error:
        if mine is not None:
            raise mine from None
        lost = lost_rank(error, World(dist.get_rank(), _ranks(), 0, torch.device("cpu")))
        if lost is None:
            raise
        raise lost from error
    if mine is not None:
        raise mine
    if told is not None:
        raise told


_TOLD_AS = (ConfigError, DataError, ModelError, TrainingError)  # the last: all else, which ends with exit code 1


def _kind(error: Exception) -> int:
    return next((number for number, kind in enumerate(_TOLD_AS) if isinstance(error, kind)), len(_TOLD_AS) - 1)


def _first_told(mine: Exception | None) -> RepsftError | None:
    """The error of the lowest rank that has one, as another rank says it. Every rank must call it."""
    problems = [] if mine is None else getattr(mine, "problems", None) or [str(mine) or type(mine).__name__]
    text = b"" if mine is None else json.dumps([_kind(mine), problems]).encode()
    lengths = [torch.empty(1, dtype=torch.int64) for _ in range(_ranks())]
    dist.all_gather(lengths, torch.tensor([len(text)]), group=_control_group)
    failed = next((rank for rank, length in enumerate(lengths) if length), None)
    if failed is None:
        return None
    message = torch.zeros(int(lengths[failed]), dtype=torch.uint8)
    if dist.get_rank() == failed:
        message = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    dist.broadcast(message, failed, group=_control_group)
    dist.barrier(_control_group)  # no rank leaves before all have read
    kind, problems = json.loads(bytes(message.tolist()))
    told = [f"rank {failed}: {problem}" for problem in problems]
    return ConfigError(told) if _TOLD_AS[kind] is ConfigError else _TOLD_AS[kind]("\n".join(told))


def refuse(error: RepsftError) -> None:
    """Tell the ranks of a run that has not begun why it will not: this one's settings cannot be used. Alone: nothing."""
    with suppress(RepsftError):
        if place()[1] == 1:
            return
        start()
        with together():
            raise error
    stop()


def from_main(tensor: Tensor) -> Tensor:
    """Rank 0's values of a CPU tensor of the same shape and type on every rank, in place."""
    if _ranks() > 1:
        dist.broadcast(tensor, 0, group=_control_group)
    return tensor


def barrier(what: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
    """Wait until every rank is here; TrainingError naming `what` when one does not come in time."""
    if _ranks() == 1:
        return
    try:
        dist.monitored_barrier(_control_group, timeout=timedelta(seconds=timeout_s), wait_all_ranks=True)
    except RuntimeError as error:
        wrong = f"not every rank arrived within {timeout_s:g} s ({str(error).splitlines()[0]})"
        raise TrainingError(describe(what, wrong, todo="read the other ranks' output, then resume")) from error


def same_everywhere(name: str, digest: str) -> None:
    """ConfigError on every rank when `digest` (of configuration, data or code) is not the same on all of them."""
    if _ranks() == 1:
        return
    mine = torch.frombuffer(bytearray(hashlib.sha256(digest.encode()).digest()), dtype=torch.uint8)
    everyones = [torch.empty_like(mine) for _ in range(_ranks())]
    dist.all_gather(everyones, mine, group=_control_group)
    different = [rank for rank, other in enumerate(everyones) if not torch.equal(other, everyones[0])]
    if different:
        wrong = f"ranks {', '.join(map(str, different))} differ from rank 0"
        raise ConfigError(describe(name, wrong, expected="the same on every rank", todo="start all ranks from the same files"))


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
