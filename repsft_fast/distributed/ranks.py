"""Ranks: who we are, and what ranks tell each other: sums, decisions every rank takes alike, and why there is no run.

Messages between hosts (flags, digests, barriers) go through gloo and CPU tensors, so they never wait for the device.
"""

import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from repsft_fast.distributed import launch
from repsft_fast.distributed.interfaces import of_the_wire, talking
from repsft_fast.distributed.launch import LaunchError, place
from repsft_fast.distributed.meeting import MEETING_TIMEOUT_S, meet
from repsft_fast.distributed.watch import Loss, Watch
from repsft_fast.errors import ConfigError, DataError, ModelError, RepsftError, TrainingError, describe

DEFAULT_TIMEOUT_S = 600.0
NEWS_S = 5.0  # a message fails; the name of the rank that is gone comes this much later at most
_control_group: "dist.ProcessGroup | None" = None  # gloo, for messages between hosts; None = the default group
_watch: Watch | None = None  # over the ranks of this run; None alone, or in a group that somebody else has made
_handled: BaseException | None = None  # what was being handled when the run began: not its own error


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


def start(
    device: torch.device | str | None = None, *, timeout_s: float = DEFAULT_TIMEOUT_S, meeting_s: float | None = None
) -> World:
    """Join the run's ranks as torchrun or srun describe them in the environment; alone, no group is made.

    device: None = this rank's GPU where there is one, else the CPU. A collective that waits longer than `timeout_s`
    fails on every rank. meeting_s: how long ranks wait for the last to come; None = MEETING_TIMEOUT_S.
    ConfigError on every rank when one has no GPU and another has, or an environment is half filled; TrainingError naming
    a rank that did not come, or came and is gone.
    """
    global _handled
    found = launch.read()
    rank, size, local_rank = found.rank, found.size, found.local_rank or 0
    if size == 1 and (text := launch.says_alone()) is not None:
        launch.say_once(text)
    refused = None
    try:
        if device is None:
            own = found.local_rank if size > 1 else local_rank
            device = torch.device("cuda", _gpu(own)) if torch.cuda.is_available() else torch.device("cpu")
    except ConfigError as error:  # the others wait for this rank: it joins them and tells
        device, refused = torch.device("cuda", 0), error
    device = torch.device(device)
    if size > 1 and not dist.is_initialized():
        _handled = sys.exc_info()[1]
        _join(device, rank, size, timeout_s, MEETING_TIMEOUT_S if meeting_s is None else meeting_s, refused)
    if device.type == "cuda" and refused is None:
        torch.cuda.set_device(device)
    try:
        with together():
            if refused is not None:
                raise refused
    except BaseException:
        stop()
        raise
    return World(rank, size, local_rank, device)


def _join(device: torch.device, rank: int, size: int, timeout_s: float, meeting_s: float, refused: ConfigError | None) -> None:
    """Meet the others, agree that nothing stands against a run, make the group."""
    global _watch
    problems = [] if refused is None else refused.problems
    facts = {"host": socket.gethostname(), "process": os.getpid(), "device": device.type, "problems": problems}
    store, everyones, _watch = meet(rank, size, facts, timeout_s=meeting_s, store_timeout_s=timeout_s)
    try:
        if refused is not None:
            raise refused
        if told := [f"rank {other}: {text}" for other, found in sorted(everyones.items()) for text in found["problems"]]:
            raise ConfigError(told)
        _same_devices(everyones)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        _init_group(device, rank, size, timeout_s, store=store)
    except BaseException:
        stop()
        raise
    _watch.formed()


def _same_devices(everyones: Mapping[int, Mapping[str, Any]]) -> None:
    """ConfigError, the same on every rank, where some have a GPU and others have none: their group could never be made."""
    blind = {rank: found["host"] for rank, found in sorted(everyones.items()) if found["device"] == "cpu"}
    if not blind or len(blind) == len(everyones):
        return
    who = ", ".join(f"{rank} ({host})" for rank, host in list(blind.items())[:8]) + (" …" if len(blind) > 8 else "")
    seeing = len(everyones) - len(blind)
    todo = "look at the driver there (nvidia-smi), or hide the GPUs from all ranks with CUDA_VISIBLE_DEVICES="
    wrong = f"torch.cuda.is_available() is false on rank {who} and true on {seeing} of {len(everyones)} ranks"
    raise ConfigError(describe("devices", wrong, expected="the same on every rank", todo=todo))


def start_alone(world: World) -> None:
    """A group of this one rank, for what asks for one. Does nothing where there is a group."""
    if not dist.is_initialized():
        _init_group(world.device, 0, 1, DEFAULT_TIMEOUT_S, store=dist.HashStore())


def stop() -> None:
    """Leave the group. Safe to call twice, and without a group.

    Called while an error is on its way out (in a finally), it tells the others why this rank leaves; where the error is that
    of a message whose other end is gone, TrainingError naming that rank is raised in its place.
    """
    global _control_group, _watch
    error, lost = sys.exc_info()[1], None
    if _watch is not None and error is not None and error is not _handled:
        lost = lost_rank(error, _here())
        _watch.hurry()  # NCCL may wait for the dead when its group is taken down
    watch, _watch, _control_group = _watch, None, None
    if dist.is_initialized():
        dist.destroy_process_group()
    if watch is not None:
        watch.leave()
    if lost is not None:
        raise lost from error


def _gpu(local_rank: int | None) -> int:
    """This rank's GPU among those it sees: its own place, or the only one where the launcher shows every task one."""
    seen = torch.cuda.device_count()
    if seen == 1:
        return 0
    if local_rank is None:
        todo = "launch with torchrun or srun, export it, or show every rank its own GPU (CUDA_VISIBLE_DEVICES)"
        wrong = f"is not set, and this rank sees {seen} GPUs"
        raise LaunchError(describe("LOCAL_RANK", wrong, expected="its place among the ranks of its node", todo=todo))
    if local_rank >= seen:
        wrong = f"rank {local_rank} of this node has no GPU"
        raise ConfigError(describe("the launcher", wrong, expected=f"at most {seen} ranks on it", todo="start one per GPU"))
    return local_rank


def _init_group(device: torch.device, rank: int, size: int, timeout_s: float, store: "dist.Store | None" = None) -> None:
    global _control_group
    timeout = timedelta(seconds=timeout_s)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with talking():
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout, store=store)
        _control_group = dist.new_group(backend="gloo", timeout=timeout) if device.type == "cuda" else None


def lost_rank(error: BaseException, world: World) -> TrainingError | None:
    """What an error of this rank means among ranks. It came from a rank that is gone or silent: the error that names it, in
    its own words where it left some. It is this rank's own: None, and the others are told at once."""
    text = _first_line(error)
    if world.size == 1:
        return None
    own = isinstance(error, RepsftError) or not of_the_wire(error)
    if _watch is None:
        return None if own else lost_error(None, world.rank, text)
    loss = _watch.loss if own else _watch.wait_for_news(NEWS_S)  # it may come a little later than the error
    if loss is None:
        _watch.tell(_words(error), getattr(error, "code", None))
    if own:
        _watch.at_ease()  # it may finish what it writes; `stop` makes it hurry
        return None
    _watch.hurry()
    return lost_error(loss, world.rank, text)


def lost_error(loss: Loss | None, rank: int, got: str | None = None) -> TrainingError:
    """The error of `rank` when another is lost: in that one's own words and with its code, where it left some."""
    if loss is not None and loss.words:
        error = TrainingError(str(loss))
        error.code = loss.code  # type: ignore[attr-defined]
        return error
    who = "another rank is gone" if loss is None else str(loss)
    todo = "read the other ranks' output, then go on with --resume"
    return TrainingError(describe(f"rank {rank}", who, got=got, todo=todo))


@contextmanager
def naming_the_lost() -> Iterator[None]:
    """Messages between ranks inside: where one fails because a rank is gone, the error names it."""
    try:
        yield
    except RuntimeError as error:
        lost = None if isinstance(error, RepsftError) else lost_rank(error, _here())
        if lost is None:
            raise
        raise lost from error


def when_dead(callback: Callable[[Loss], None]) -> None:
    """Called, from another thread, when a lost rank's process has ended: what has not come from it will not."""
    if _watch is not None:
        _watch.when_dead(callback)


def last_words(callback: Callable[[Loss], None]) -> None:
    """Called, from another thread, before a rank that waits for a lost one in vain is ended (`watch`)."""
    if _watch is not None:
        _watch.last_words(callback)


def at_ease() -> None:
    """From here on this rank needs no other, or what it asks of them fails by itself: a later loss does not end it."""
    if _watch is not None and _watch.loss is None:
        _watch.at_ease()


def _here() -> World:
    rank, size = (_watch.rank, _watch.size) if _watch is not None else (dist.get_rank() if _ranks() > 1 else 0, _ranks())
    return World(rank, size, 0, torch.device("cpu"))


def _words(error: BaseException) -> str:
    return str(error) if isinstance(error, RepsftError) else f"{type(error).__name__}: {_first_line(error)}".removesuffix(": ")


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else ""


def _forget_in_a_fork() -> None:
    """A child of this process is not this rank, and must not keep its connection open when it has died."""
    global _watch
    if _watch is not None:
        _watch.abandon()
        _watch = None


os.register_at_fork(after_in_child=_forget_in_a_fork)


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
        with naming_the_lost():
            told = _first_told(mine) if _ranks() > 1 else None
    except RuntimeError:
        if mine is not None:
            raise mine from None
        raise
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
    try:
        if place()[1] == 1:
            return
        start()
        with together():
            raise error
    except LaunchError as alone:  # nobody hears this rank: it tells both itself
        if alone is not error:
            launch.say("\n  ".join(("error", *alone.problems, str(error))))
    except RepsftError:
        pass
    stop()


def from_main(tensor: Tensor) -> Tensor:
    """Rank 0's values of a CPU tensor of the same shape and type on every rank, in place."""
    if _ranks() > 1:
        dist.broadcast(tensor, 0, group=_control_group)
    return tensor


def barrier(what: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
    """Wait until every rank is here; TrainingError naming `what` when one does not come in time, or the rank that is gone."""
    if _ranks() == 1:
        return
    began = time.monotonic()
    try:
        dist.monitored_barrier(_control_group, timeout=timedelta(seconds=timeout_s), wait_all_ranks=True)
    except RuntimeError as error:
        if time.monotonic() - began < timeout_s:  # nobody is late: somebody is gone
            loss = None if _watch is None else _watch.wait_for_news(NEWS_S)
            raise lost_error(loss, dist.get_rank(), _first_line(error)) from error
        wrong = f"not every rank arrived within {timeout_s:g} s ({_first_line(error)})"
        raise TrainingError(describe(what, wrong, todo="read the other ranks' output, then resume")) from error


def same_everywhere(name: str, digest: str) -> None:
    """ConfigError on every rank when `digest` (of configuration, data or code) is not the same on all of them."""
    if _ranks() == 1:
        return
    mine = torch.frombuffer(bytearray(hashlib.sha256(digest.encode()).digest()), dtype=torch.uint8)
    everyones = [torch.empty_like(mine) for _ in range(_ranks())]
    with naming_the_lost():
        dist.all_gather(everyones, mine, group=_control_group)
    different = [rank for rank, other in enumerate(everyones) if not torch.equal(other, everyones[0])]
    if different:
        wrong = f"ranks {', '.join(map(str, different))} differ from rank 0"
        raise ConfigError(describe(name, wrong, expected="the same on every rank", todo="start all ranks from the same files"))


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
