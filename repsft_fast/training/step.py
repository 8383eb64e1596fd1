"""One update, and the only place where gradients are made.

    for row in rows(update):  loss, stats = model.loss(row);  loss.backward();  ledger.add
    norm, veto = check(gradients);  optimizer.step(lr, clip, veto)

Nothing here asks the device for a number, and nothing is allocated there but what autograd makes: gradients
and what layers and head leave for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from repsft_fast.data.plan import Update
from repsft_fast.distributed import abort_pass, begin_row
from repsft_fast.models.compiled_stack import running
from repsft_fast.ops.products import needed_share
from repsft_fast.row import Row
from repsft_fast.stats import PositionStats
from repsft_fast.training.parts import Parts
from repsft_fast.training.refusals import check_gradients
from repsft_fast.training.spikes import Judgement


class OutOfMemory(Exception):
    """The device's memory ran out in an update.

    torn: the run cannot go on from where it is: the optimizer had begun, so the state may be half changed; or
    (stuck) it had not, but FSDP2 is in the middle of a pass that this torch offers no way out of.
    """

    def __init__(self, error: torch.OutOfMemoryError, *, torn: bool, stuck: bool = False):
        super().__init__(str(error).split(". ")[0].strip() or "no words")
        self.torn, self.stuck = torn or stuck, stuck and not torn


def train_step(parts: Parts, update: Update) -> None:
    """Forward, backward and optimizer step over the samples of one update. OutOfMemory that is not torn
    leaves the state as it was. TrainingError when gradients are missing."""
    streams, problem = _rng_states(parts), None
    try:
        forward_backward(parts, update)
        check_gradients(parts, update)
        judged = clip_and_veto(parts)  # device scalars, the same on every rank
    except torch.OutOfMemoryError as error:
        whole = abandon_update(parts, streams)
        if parts.graphs is not None:
            parts.graphs.drop("memory ran out, and their share of it is given back")
        problem = OutOfMemory(error, torn=False, stuck=not whole)
    # Not above, `from None` neither: it would keep the error as its context, whose frames hold activations.
    if problem is not None:
        raise problem
    lr = parts.schedule.lr(parts.progress.updates)
    try:
        parts.optimizer.step(lr, found_inf=judged.veto, clip=judged.clip)
    except torch.OutOfMemoryError as error:
        abandon_update(parts, streams)
        raise OutOfMemory(error, torn=True) from None
    parts.optimizer.zero_grad()
    parts.ledger.close(parts.progress.updates, lr, judged.numbers, judged.applied)
    parts.spikes.enter()


def forward_backward(parts: Parts, update: Update) -> None:
    """Gradients of the update, and what its rows counted."""
    seen = []
    skip_below = parts.config.loss.skip_below
    last = len(update.ranks[parts.world.rank])  # every rank has as many rows
    if parts.graphs is not None:
        parts.graphs.begin_update()
    # weights already hold 1 / the update's one denominator
    for number, row in enumerate(parts.rows(update), 1):
        if number in (1, 2, last):
            begin_row(parts.model, first=number == 1, last=number == last)
        loss, stats = row_pass(parts, row)
        kept = needed_share(stats.log10_miss, skip_below) if skip_below > 0.0 else None
        parts.ledger.add(loss, kept)  # stays on the device
        if parts.sample_stats is not None:
            seen.append((row, stats))
    if parts.sample_stats is not None:
        for row, stats in seen:
            parts.sample_stats.add(row, stats)


def row_pass(parts: Parts, row: Row) -> tuple[Tensor, PositionStats]:
    """Gradients and sums of one row, added; its [] loss and [N'] statistics."""
    table = parts.ledger.open_table()
    if parts.graphs is not None:
        replayed = parts.graphs(row, keep=parts.sample_stats is not None)
        if replayed is not None:
            loss, stats, sums = replayed
            table.add_(sums.table)
            return loss, stats
    with running(parts.model, row):
        loss, stats = parts.model.loss(row)  # backbone and fused head in one FSDP-visible method
    loss.backward(parts.one_like(loss))
    stats.add_to(table, row.position_tasks)
    return loss, stats


def abandon_update(parts: Parts, streams: tuple[Tensor, Tensor | None]) -> bool:
    """Undo a half made update: gradients, counts, gathered weights, random streams. Returns whether that was
    possible."""
    parts.optimizer.zero_grad()
    parts.ledger.drop_open()
    whole = abort_pass(parts.model)
    torch.set_rng_state(streams[0])
    if streams[1] is not None:
        torch.cuda.set_rng_state(streams[1], parts.world.device)
    return whole


def _rng_states(parts: Parts) -> tuple[Tensor, Tensor | None]:
    """Where the random streams stand; of a GPU's the host knows, so nothing waits."""
    device = parts.world.device
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def clip_and_veto(parts: Parts) -> Judgement:
    """Norm, clip factor and veto of the gradients that are there; the next call overwrites them.

    The veto rises when the joint norm or any rank's loss is not finite, and on a spike unless spikes are only
    logged; the factor goes to the optimizer, so that clipping costs no pass over the gradients of its own.
    """
    return parts.spikes.judge_gradients(parts.ledger.open_loss(), parts.optimizer.names.values())
