"""A run rehearsed without its hardware: fake tensors for memory, a fake process group for ranks.

The real modules run, sharded by the real `distributed.shard`; only bytes and messages are missing. What is
counted here is what a device would hold and what a network would carry.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from repsft_fast.config import Config
from repsft_fast.data.plan import Plan, Update
from repsft_fast.distributed import World, mesh_of, shard
from repsft_fast.errors import ConfigError, describe
from repsft_fast.memory.activations import materialise, rehearsed
from repsft_fast.optim import local, masters, state_bytes
from repsft_fast.row import Row
from repsft_fast.throughput import ModelShape
from repsft_fast.training.budget import budget_of
from repsft_fast.training.build import build_model, build_schedule, optimizer_of
from repsft_fast.training.parts import Data, Parts
from repsft_fast.training.step import train_step


@dataclass(frozen=True)
class Message:
    """One kind of collective."""

    operation: str  # all_gather, reduce_scatter or all_reduce
    payload_bytes: int  # the whole: what every rank ends with, or started from
    ranks: int  # of its group

    @property
    def wire_bytes(self) -> float:
        """What one rank sends (and receives) in a ring."""
        trips = 2 if self.operation == "all_reduce" else 1
        return trips * self.payload_bytes * (self.ranks - 1) / self.ranks


_OPERATIONS = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
}


class Messages(TorchDispatchMode):
    """Counts the collectives of what runs inside, on a fake process group or a real one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Message] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            tensors = [
                t for arg in args for t in (arg if isinstance(arg, list) else [arg]) if isinstance(t, Tensor)
            ]
            group = next(
                arg
                for arg in args
                if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())
            )
            payload = max((t.numel() * t.element_size() for t in tensors), default=0)
            ranks = dist.ProcessGroup.unbox(group).size()
            self.found[Message(_OPERATIONS.get(name, name.strip("_")), payload, ranks)] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Rehearsal:
    """One update of one rank."""

    weights: int  # bytes, masters among them
    gradients: int
    moments: int
    rows: int
    messages: Counter[Message]


def rehearse(
    config: Config, data: Data, plan: Plan, update: Update, *, rank: int = 0, tokenizer: Any = None
) -> Rehearsal:
    """`train_step` of one of `plan.ranks` ranks, model, mesh and optimizer built as for a run.

    Only the optimizer's arithmetic, which sends nothing, is left out, and the head sees a few trained tokens
    of each row. tokenizer: of the run, which may have grown its vocabulary. ConfigError for what would not
    run on that many ranks, and inside a run of several.
    """
    world = World(rank, plan.ranks, 0, torch.device("cpu"))
    plain = config.model.model_copy(update={"attention": "sdpa", "layer_kernels": "none", "compile": False})
    config = config.model_copy(update={"model": plain})
    rows = [
        data.train.row(planned, denominator=update.denominator, average=config.loss.average)
        for planned in update.ranks[rank]
    ]
    model = build_model(config, dataclasses.replace(world, device=torch.device("meta")), tokenizer)
    # one call, however many segments
    model.loss_settings = dataclasses.replace(model.loss_settings, attention="mask")
    with _fake_ranks(world):
        mesh = mesh_of(world, config.distributed.shard_ranks)
        return rehearsed(lambda: _one_update(config, data, plan, update, model, mesh, world, rows))


@contextmanager
def _fake_ranks(world: World) -> Iterator[None]:
    """A process group whose collectives return at once with whatever was there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ConfigError(
            describe(
                "--world", "rehearses ranks, and there are real ones here", todo="start it without a launcher"
            )
        )
    dist.init_process_group("fake", store=FakeStore(), rank=world.rank, world_size=world.size)
    try:
        yield
    finally:
        dist.destroy_process_group()


class _FakeParts(Parts):
    real_rows: list[Row]

    def rows(self, update: Update) -> Iterator[Row]:
        yield from map(_fake_twin, self.real_rows)


def _fake_twin(row: Row, trained: int = 64) -> Row:
    """A row of the same shapes, with a few trained positions: the head's work grows with them and its
    messages do not."""
    few = min(trained, row.trained_positions.numel())
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        if isinstance(value, Tensor):
            shape = (
                (few,)
                if field.name in ("trained_positions", "position_tasks", "position_segments")
                else value.shape
            )
            changes[field.name] = torch.empty(shape, dtype=value.dtype)
    return dataclasses.replace(row, **changes)


def _one_update(
    config: Config,
    data: Data,
    plan: Plan,
    update: Update,
    model: Any,
    mesh: Any,
    world: World,
    rows: list[Row],
) -> Rehearsal:
    # The shape is read before sharding cuts it.
    shape = ModelShape.of(model)
    materialise(model)
    if world.size == 1:
        masters.beside(model)
    else:
        shard(model, world, mesh=mesh)

    # Everything a step touches is the run's own; what only tells or loads is left out.
    optimizer = optimizer_of(config, model)
    budget = budget_of(config, plan)
    parts = _FakeParts(
        config=config,
        world=world,
        folder=Path(),
        tokenizer=None,
        model=model,
        shape=shape,
        peak_flops=None,
        data=data,
        plan=plan,
        budget=budget,
        optimizer=optimizer,
        schedule=build_schedule(config, budget),
    )
    parts.real_rows = rows

    # At the step all gradients are there; its arithmetic sends nothing.
    gradients = []

    def count(*_: Any, **__: Any) -> None:
        gradients.append(_bytes(p.grad for p in optimizer.names.values() if p.grad is not None))

    optimizer.step = count  # type: ignore[method-assign]
    with Messages() as messages:
        train_step(parts, update)
    beside = [] if getattr(model, "masters", None) is None else model.masters.held.values()
    return Rehearsal(
        _bytes([*model.parameters(), *beside]),
        gradients[0],
        state_bytes(optimizer),
        len(rows),
        messages.found,
    )


def _bytes(tensors: Any) -> int:
    return sum(local(t).numel() * t.element_size() for t in tensors)
