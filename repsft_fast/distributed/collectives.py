"""What ranks tell each other: sums, decisions every rank takes alike, and why there is no run.

Tensors of the model's kind are summed over the default group. Messages between hosts (numbers, digests,
barriers) go through gloo and CPU tensors, so they never wait for the device: these functions take the world,
whose control group it is.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from repsft_fast.distributed.lost import NEWS_S, error_naming, first_line, naming_the_lost
from repsft_fast.distributed.world import World
from repsft_fast.errors import ConfigError, DataError, ModelError, RepsftError, TrainingError, describe

DEFAULT_TIMEOUT_S = 600.0


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


def max_over_hosts(world: World, *values: int) -> tuple[int, ...]:
    """The largest of each value over the ranks, the same on every rank: how what one has seen becomes known
    to all.

    Host numbers over the control group: it waits for the ranks and not for the device. Values of 64 bits.
    """
    return _over_hosts(world, dist.ReduceOp.MAX, values)


def min_over_hosts(world: World, *values: int) -> tuple[int, ...]:
    """As `max_over_hosts`, the smallest: what every rank has room for."""
    return _over_hosts(world, dist.ReduceOp.MIN, values)


def _over_hosts(world: World, operation: Any, values: tuple[int, ...]) -> tuple[int, ...]:
    if world.size == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(tensor, op=operation, group=world.control)
    return tuple(tensor.tolist())


def broadcast_from_main(world: World, value: Any) -> Any:
    """Rank 0's value on every rank, once every rank has it; what the others pass is not looked at. All ranks
    call it.

    value: what JSON can say; a number comes back bit for bit, a tuple as a list, a key as text. A run alone
    gets it back the same way, so that it sees what ranks would see.
    """
    text = json.dumps(value).encode() if world.is_main else b""
    if world.size == 1:
        return json.loads(text)
    length = torch.tensor([len(text)])
    dist.broadcast(length, 0, group=world.control)
    message = torch.zeros(int(length), dtype=torch.uint8)
    if world.is_main:
        message = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    dist.broadcast(message, 0, group=world.control)
    dist.barrier(world.control)  # no rank leaves before all have read
    return json.loads(bytes(message.tolist()))


def gather_everywhere(world: World, value: Any) -> list[Any]:
    """Every rank's value, by rank, on every rank. All ranks call it. value: as in `broadcast_from_main`."""
    text = json.dumps(value).encode()
    if world.size == 1:
        return [json.loads(text)]
    lengths = [torch.empty(1, dtype=torch.int64) for _ in range(world.size)]
    longest = max_over_hosts(world, len(text))[0]
    mine = torch.zeros(longest, dtype=torch.uint8)
    mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    everyones = [torch.empty_like(mine) for _ in range(world.size)]
    with naming_the_lost(world):
        dist.all_gather(lengths, torch.tensor([len(text)]), group=world.control)
        dist.all_gather(everyones, mine, group=world.control)
    return [
        json.loads(one[: int(length)].numpy().tobytes())
        for one, length in zip(everyones, lengths, strict=True)
    ]


@contextmanager
def raise_together(world: World) -> Iterator[None]:
    """What fails inside on one rank fails on all, at once and with the reason; nobody waits for a rank that
    gave up.

    The rank that failed raises its own error, the others one of the same kind that names it. Nothing inside
    may be a message between ranks: one that fails would not take part in it. TrainingError when a rank is
    gone.
    """
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    try:
        with naming_the_lost(world):
            told = _first_told(world, mine) if world.size > 1 else None
    except RuntimeError:
        if mine is not None:
            raise mine from None
        raise
    if mine is not None:
        raise mine
    if told is not None:
        raise told


# the last: all else, which ends with exit code 1
_TOLD_AS = (ConfigError, DataError, ModelError, TrainingError)


def _kind(error: Exception) -> int:
    return next(
        (number for number, kind in enumerate(_TOLD_AS) if isinstance(error, kind)), len(_TOLD_AS) - 1
    )


def _first_told(world: World, mine: Exception | None) -> RepsftError | None:
    """The error of the lowest rank that has one, as another rank says it. Every rank must call it."""
    problems = [] if mine is None else [str(mine) or type(mine).__name__]
    if isinstance(mine, ConfigError):
        problems = list(mine.problems)
    text = b"" if mine is None else json.dumps([_kind(mine), problems]).encode()
    lengths = [torch.empty(1, dtype=torch.int64) for _ in range(world.size)]
    dist.all_gather(lengths, torch.tensor([len(text)]), group=world.control)
    failed = next((rank for rank, length in enumerate(lengths) if length), None)
    if failed is None:
        return None
    message = torch.zeros(int(lengths[failed]), dtype=torch.uint8)
    if world.rank == failed:
        message = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    dist.broadcast(message, failed, group=world.control)
    dist.barrier(world.control)  # no rank leaves before all have read
    kind, problems = json.loads(bytes(message.tolist()))
    told = [f"rank {failed}: {problem}" for problem in problems]
    return ConfigError(told) if _TOLD_AS[kind] is ConfigError else _TOLD_AS[kind]("\n".join(told))


def barrier(world: World, what: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
    """Wait until every rank is here; TrainingError naming `what` when one does not come in time, or the rank
    that is gone."""
    if world.size == 1:
        return
    began = time.monotonic()
    try:
        dist.monitored_barrier(world.control, timeout=timedelta(seconds=timeout_s), wait_all_ranks=True)
    except RuntimeError as error:
        if time.monotonic() - began < timeout_s:  # nobody is late: somebody is gone
            lost = None if world.watch is None else world.watch.wait_for_news(NEWS_S)
            raise error_naming(lost, world.rank, first_line(error)) from error
        wrong = f"not every rank arrived within {timeout_s:g} s ({first_line(error)})"
        raise TrainingError(
            describe(what, wrong, todo="read the other ranks' output, then resume")
        ) from error


def same_everywhere(world: World, name: str, digest: str) -> None:
    """ConfigError on every rank when `digest` (of configuration, data or code) is not the same on all of
    them."""
    if world.size == 1:
        return
    mine = torch.frombuffer(bytearray(hashlib.sha256(digest.encode()).digest()), dtype=torch.uint8)
    everyones = [torch.empty_like(mine) for _ in range(world.size)]
    with naming_the_lost(world):
        dist.all_gather(everyones, mine, group=world.control)
    different = [rank for rank, other in enumerate(everyones) if not torch.equal(other, everyones[0])]
    if different:
        wrong = f"ranks {', '.join(map(str, different))} differ from rank 0"
        raise ConfigError(
            describe(
                name, wrong, expected="the same on every rank", todo="start all ranks from the same files"
            )
        )


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
