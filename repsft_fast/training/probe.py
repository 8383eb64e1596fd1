"""One update ahead: what a single step on each task alone would do to that task's loss (DynamixSFT's
reward)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from repsft_fast import seeded
from repsft_fast.data.plan import Cursor, Update, denominator
from repsft_fast.distributed import all_sum
from repsft_fast.errors import TrainingError, describe
from repsft_fast.training.parts import Parts
from repsft_fast.training.snapshots import Snapshots
from repsft_fast.training.step import OutOfMemory, train_step

NAME = "probe"


def look_ahead(parts: Parts, snapshots: Snapshots, tasks: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Mean loss of each task's probe batch before and after one update on it. The state is put back, bit for
    bit."""
    snapshots.take(NAME)
    found: dict[str, tuple[float, float]] = {}
    try:
        for task in tasks:
            update = _batch(parts, parts.data.task_names.index(task))
            before = _loss(parts, update)
            # one task's batch is no spike of the mixture; the window comes back with the snapshot
            parts.spikes.begin_anew()
            train_step(parts, update)
            parts.ledger.read()  # the probe's own update is not part of the run's record
            found[task] = (before, _loss(parts, update))
            parts.lasting.probed.add(parts.work_of(update))
            snapshots.restore(NAME)
    except OutOfMemory as problem:
        snapshots.restore(NAME)
        packed = parts.config.batch.pack
        todo = "lower batch.row_tokens" if packed else "lower data.max_tokens, in another folder"
        raise TrainingError(describe("probe", f"out of memory ({problem})", todo=todo)) from problem
    finally:
        snapshots.release(NAME)
    return found


def _batch(parts: Parts, task: int) -> Update:
    """As many samples of the task as an update has, drawn by (seed, update, task)."""
    index, progress = parts.data.train.index, parts.progress
    mine = np.flatnonzero(index.tasks == task)
    count = parts.config.batch.samples or max(1, int((parts.config.batch.tokens or 0) / index.lengths.mean()))
    key = parts.config.run.seed | (progress.updates * 65_536 + task) << 64
    chosen = mine[seeded.choice(key, len(mine), min(max(count, parts.world.size), len(mine)))]
    ranks = parts.plan.rows(chosen, index.lengths[chosen])
    average = parts.config.loss.average
    return Update(
        Cursor(progress.stage, progress.epoch, progress.update),
        chosen,
        denominator(index, chosen, average),
        ranks,
    )


@torch.no_grad()
def _loss(parts: Parts, update: Update) -> float:
    """The update's objective under today's weights, over all ranks."""
    total = torch.zeros((), dtype=torch.float64, device=parts.world.device)
    for row in parts.rows(update):
        loss, _ = parts.model.loss(row)
        total += loss.double()
    return float(all_sum(total))
