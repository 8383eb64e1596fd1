"""A launch from its beginning to its end: ranks meet, agree that nothing stands against a run, make their
group, and leave it, each telling the others why where it is by an error."""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from repsft_fast.distributed import launch
from repsft_fast.distributed.collectives import DEFAULT_TIMEOUT_S, raise_together
from repsft_fast.distributed.interfaces import talking
from repsft_fast.distributed.launch import LaunchError, rank_from_environment
from repsft_fast.distributed.lost import lost_rank
from repsft_fast.distributed.meeting import MEETING_TIMEOUT_S, meet
from repsft_fast.distributed.world import Links, World
from repsft_fast.errors import ConfigError, RepsftError, describe

# Of the launches this process is in: nobody hands a fork its world. Held weakly, and read nowhere else.
_live: weakref.WeakSet[Links] = weakref.WeakSet()


@contextmanager
def lifecycle(
    device: torch.device | str | None = None,
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    meeting_s: float | None = None,
) -> Iterator[World]:
    """Be one of the run's ranks as torchrun or srun describe them in the environment; alone, no group is
    made.

    device: None = this rank's GPU where there is one, else the CPU. A collective that waits longer than
    `timeout_s` fails on every rank. meeting_s: how long ranks wait for the last to come; None =
    MEETING_TIMEOUT_S. ConfigError on every rank when one has no GPU and another has, or an environment is
    half filled; TrainingError naming a rank that did not come, or came and is gone.

    An error that leaves the block is told to the others as why this rank leaves; where it is that of a
    message whose other end is gone, TrainingError naming that rank is raised in its place. A group that is
    there already is used, and left standing.
    """
    found = launch.read()
    if found.size == 1 and (text := launch.says_alone()) is not None:
        launch.say_once(text)
    device, refused = _device(found, device)
    grouped = dist.is_initialized()
    links = Links() if found.size > 1 and not grouped else None
    world = World(found.rank, found.size, found.local_rank or 0, device, links)
    try:
        # a group can be made only by ranks that have met: what one of them has found wrong, all hear before
        if links is not None:
            _meet(world, links, refused, timeout_s, MEETING_TIMEOUT_S if meeting_s is None else meeting_s)
        if device.type == "cuda" and refused is None:
            torch.cuda.set_device(device)
        # a rank without a GPU cannot know whether the others have theirs, nor they of it
        with raise_together(world):
            if refused is not None:
                raise refused
        yield world
    except BaseException as error:
        _leave(world, error, grouped=grouped)
        raise
    _leave(world, None, grouped=grouped)


def alone(device: torch.device | str | None = None) -> World:
    """The world of a process that trains by itself, without beginning or end. ConfigError where the launcher
    has started several."""
    found = launch.read()
    if found.size > 1:
        todo = "hand over the world of `lifecycle`"
        raise ConfigError(describe("the launcher", "has started several ranks", got=found.size, todo=todo))
    device, refused = _device(found, device)
    if refused is not None:
        raise refused
    return World(0, 1, found.local_rank or 0, device)


def abort_launch(error: RepsftError) -> None:
    """Tell the ranks of a run that has not begun why it will not: this one's settings cannot be used. Alone:
    nothing."""
    try:
        if rank_from_environment()[1] == 1:
            return
        # caught inside: all have heard it when it comes back, so that this rank leaves with a good-bye
        with lifecycle() as world, suppress(RepsftError), raise_together(world):
            raise error
    except LaunchError as unheard:  # nobody hears this rank: it tells both itself
        if unheard is not error:
            launch.say("\n  ".join(("error", *unheard.problems, str(error))))
    except RepsftError:
        pass


def start_alone(world: World) -> None:
    """A group of this one rank, for what asks for one. Does nothing where there is a group."""
    if not dist.is_initialized():
        _init_group(world.device, 0, 1, DEFAULT_TIMEOUT_S, store=dist.HashStore())


def _device(
    found: launch.Place, device: torch.device | str | None
) -> tuple[torch.device, ConfigError | None]:
    """(where this rank computes, why it cannot): others wait for a rank that is refused, so it joins them
    first and tells."""
    if device is not None:
        return torch.device(device), None
    if not torch.cuda.is_available():
        return torch.device("cpu"), None
    try:
        return torch.device("cuda", _gpu(found.local_rank if found.size > 1 else found.local_rank or 0)), None
    except ConfigError as error:
        return torch.device("cuda", 0), error


def _gpu(local_rank: int | None) -> int:
    """This rank's GPU among those it sees: its own place, or the only one where the launcher shows every task
    one."""
    seen = torch.cuda.device_count()
    if seen == 1:
        return 0
    if local_rank is None:
        todo = (
            "launch with torchrun or srun, export it, or show every rank its own GPU (CUDA_VISIBLE_DEVICES)"
        )
        wrong = f"is not set, and this rank sees {seen} GPUs"
        raise LaunchError(
            describe("LOCAL_RANK", wrong, expected="its place among the ranks of its node", todo=todo)
        )
    if local_rank >= seen:
        wrong = f"rank {local_rank} of this node has no GPU"
        raise ConfigError(
            describe("the launcher", wrong, expected=f"at most {seen} ranks on it", todo="start one per GPU")
        )
    return local_rank


def _meet(
    world: World, links: Links, refused: ConfigError | None, timeout_s: float, meeting_s: float
) -> None:
    """Meet the others, agree that nothing stands against a run, make the group; `links` is filled."""
    facts = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "device": world.device.type,
        "problems": [] if refused is None else refused.problems,
    }
    store, everyones, watch = meet(
        world.rank, world.size, facts, timeout_s=meeting_s, store_timeout_s=timeout_s
    )
    links.watch = watch
    _live.add(links)
    # the same on every rank but the refused one, which has its own error: nobody waits in a group half made
    if refused is not None:
        raise refused
    if told := [
        f"rank {other}: {text}" for other, fact in sorted(everyones.items()) for text in fact["problems"]
    ]:
        raise ConfigError(told)
    _same_devices(everyones)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    _init_group(world.device, world.rank, world.size, timeout_s, store=store)
    if world.device.type == "cuda":
        with talking():
            links.control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    watch.formed()


def _same_devices(everyones: Mapping[int, Mapping[str, Any]]) -> None:
    """ConfigError, the same on every rank, where some have a GPU and others have none: their group could
    never be made."""
    blind = {rank: found["host"] for rank, found in sorted(everyones.items()) if found["device"] == "cpu"}
    if not blind or len(blind) == len(everyones):
        return
    who = ", ".join(f"{rank} ({host})" for rank, host in list(blind.items())[:8]) + (
        " …" if len(blind) > 8 else ""
    )
    seeing = len(everyones) - len(blind)
    todo = "look at the driver there (nvidia-smi), or hide the GPUs from all ranks with CUDA_VISIBLE_DEVICES="
    wrong = f"torch.cuda.is_available() is false on rank {who} and true on {seeing} of {len(everyones)} ranks"
    raise ConfigError(describe("devices", wrong, expected="the same on every rank", todo=todo))


def _init_group(device: torch.device, rank: int, size: int, timeout_s: float, store: dist.Store) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    with talking():
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout, store=store)


def _leave(world: World, error: BaseException | None, *, grouped: bool) -> None:
    """Leave what was joined or made since `grouped` was asked. Where `error` came from a lost rank, the
    TrainingError that names it is raised from it."""
    links, watch, lost = world.links, world.watch, None
    if watch is not None and error is not None:
        lost = lost_rank(error, world)
        watch.arm()  # NCCL may wait for the dead when its group is taken down
    if links is not None:
        links.watch = links.control = None
        _live.discard(links)
    # the group first: a rank that says good-bye has nothing left that another could wait for
    if not grouped and dist.is_initialized():
        dist.destroy_process_group()
    if watch is not None:
        watch.leave()
    if lost is not None:
        raise lost from error


def _forget_in_a_fork() -> None:
    """A child of this process is not this rank, and must not keep its connection open when it has died."""
    for links in list(_live):
        if links.watch is not None:
            links.watch.abandon()
        links.watch = None


os.register_at_fork(after_in_child=_forget_in_a_fork)
