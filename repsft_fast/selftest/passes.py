"""What the laws compare: losses, statistics and gradients of chosen samples in chosen rows, and updates one
after the other, all on the parts of a real run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from repsft_fast.data.packing import pack
from repsft_fast.data.plan import PlannedRow, Update
from repsft_fast.row import Row
from repsft_fast.state import local
from repsft_fast.stats import PositionStats
from repsft_fast.training.parts import Parts
from repsft_fast.training.step import train_step

FLOAT64_PARAMETERS = 1 << 28  # held twice meanwhile: more find no room


def train(parts: Parts, count: int) -> list[tuple[float, float]]:
    """`count` updates from the cursor on; the loss and the gradient's norm of each."""
    for _ in range(count):
        (update,) = next_updates(parts, 1)
        train_step(parts, update)
        parts.step_done(update, len(parts.plan.epoch(0, update.cursor.epoch)))
        if parts.progress.update == parts.progress.updates_in_epoch:
            parts.progress.next_epoch()
    return [(record.loss, record.grad_norm) for record in parts.ledger.read()]


def next_updates(parts: Parts, count: int) -> list[Update]:
    """The next updates from the cursor on, into the next epoch where this one ends."""
    epoch, at = parts.progress.epoch, parts.progress.update
    found: list[Update] = []
    while len(found) < count:
        plan = parts.plan.epoch(parts.progress.stage, epoch)
        found += [plan[n] for n in range(at, len(plan))]
        epoch, at = epoch + 1, 0
    return found[:count]


def _row(parts: Parts, ids: Sequence[int], *, denominator: float = 1.0, pad: int = 1) -> Row:
    store = parts.data.train
    real = int(store.index.lengths[list(ids)].sum())
    planned = PlannedRow(np.array(ids, np.int64), real, -(-real // pad) * pad)
    return store.row(planned, denominator=denominator, average=parts.config.loss.average)


def _rows_of(parts: Parts, ids: Sequence[int]) -> list[np.ndarray]:
    """Places in `ids` for each row: one row, or as few as this model and batch.pack let them share."""
    lengths = parts.data.train.index.lengths[list(ids)]
    return pack(lengths, int(lengths.sum()), apart=parts.plan.apart)[0]


def statistics(parts: Parts, ids: Sequence[int]) -> tuple[Tensor, PositionStats]:
    """([N'] place in `ids` of every trained position's sample, their statistics)."""
    owners, found = [], []
    for places in _rows_of(parts, ids):
        row = _row(parts, [ids[n] for n in places])
        found.append(parts.model.loss(row)[1])
        owners.append(torch.from_numpy(places).to(row.position_segments.device)[row.position_segments])
    columns = {
        name: torch.cat([getattr(stats, name) for stats in found])
        for name in PositionStats.__dataclass_fields__
    }
    return torch.cat(owners), PositionStats(**columns)


def losses_of(parts: Parts, ids: Sequence[int]) -> list[Tensor]:
    """Of every sample its losses: [trained positions] fp64."""
    owner, stats = statistics(parts, ids)
    return [stats.loss[owner == n].double() for n in range(len(ids))]


def gradients_of(
    parts: Parts, update: Update, rows: Sequence[Sequence[int]], *, pad: int = 1
) -> dict[str, Tensor]:
    """The update's gradients by name, this rank's part of each, cut into these rows of samples.

    pad: rows are padded to a multiple of it.
    """
    parts.optimizer.zero_grad()
    for ids in rows:
        for places in _rows_of(parts, ids):
            row = _row(parts, [ids[n] for n in places], denominator=update.denominator, pad=pad)
            parts.model.loss(row)[0].backward()
    found = {n: local(p.grad) for n, p in parts.optimizer.names.items() if p.grad is not None}
    parts.optimizer.zero_grad()  # drops them, so that they are ours: a copy of 135M in float64 is a gigabyte
    return found


@contextmanager
def without_dropout(model: Any) -> Iterator[None]:
    """Dropout is one of law 2's named exceptions: two rows draw other masks than one."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def in_float64(parts: Parts) -> Iterator[bool]:
    """Weights and buffers in float64 meanwhile, then the very same storages again. False: sharded, or too
    large for it."""
    tensors = [t for t in (*parts.model.parameters(), *parts.model.buffers()) if t.is_floating_point()]
    if any(isinstance(t, DTensor) for t in tensors) or sum(t.numel() for t in tensors) > FLOAT64_PARAMETERS:
        yield False
        return
    held = [(t, t.data, t.grad_dtype) for t in tensors]
    of_modules = (getattr(module, "config", None) for module in parts.model.modules())
    configs: dict[int, Any] = {id(c): c for c in of_modules if hasattr(c, "_experts_implementation")}
    experts = [(c, c._experts_implementation) for c in configs.values()]
    try:
        for tensor, data, _ in held:
            tensor.data = data.double()
            tensor.grad_dtype = torch.float64  # beside masters it was fp32
        for config, _ in experts:
            config._experts_implementation = "eager"  # the grouped product takes no float64
        yield True
    finally:
        for config, implementation in experts:
            config._experts_implementation = implementation
        for tensor, data, grad_dtype in held:
            tensor.data, tensor.grad_dtype = data, grad_dtype
