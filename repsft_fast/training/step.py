"""One update, and the only place where gradients are made.

    for row in rows(update):  loss, stats = model.loss(row);  loss.backward();  ledger.add
    norm, veto = check(gradients);  optimizer.step(lr, clip, veto)

Nothing here asks the device for a number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from repsft_fast.data.plan import Update
from repsft_fast.distributed import abort_pass, begin_row, grad_norm
from repsft_fast.ops.products import needed_share
from repsft_fast.row import Row
from repsft_fast.stats import PositionStats, TokenStats
from repsft_fast.training.parts import Parts
from repsft_fast.training.refusals import check_gradients


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
    streams = _rng_states(parts)
    try:
        forward_backward(parts, update)
        check_gradients(parts, update)
        norm, clip, veto = clip_and_veto(parts)  # device scalars, the same on every rank
    except torch.OutOfMemoryError as error:
        whole = abandon_update(parts, streams)
        if parts.graphs is not None:
            parts.graphs.drop("memory ran out, and their share of it is given back")
        raise OutOfMemory(error, torn=False, stuck=not whole) from None  # its traceback holds the activations
    lr = parts.schedule.lr(parts.progress.updates)
    try:
        parts.optimizer.step(lr, found_inf=veto, clip=clip)
    except torch.OutOfMemoryError as error:
        abandon_update(parts, streams)
        raise OutOfMemory(error, torn=True) from None
    parts.optimizer.zero_grad()
    parts.ledger.close(parts.progress.updates, lr, norm, veto)
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
        loss, stats, sums = row_pass(parts, row)
        kept = needed_share(stats.log10_miss, skip_below) if skip_below > 0.0 else None
        parts.ledger.add(loss, sums, kept)  # stays on the device
        if parts.sample_stats is not None:
            seen.append((row, stats))
    if parts.sample_stats is not None:
        for row, stats in seen:
            parts.sample_stats.add(row, stats)


def row_pass(parts: Parts, row: Row) -> tuple[Tensor, PositionStats, TokenStats]:
    """Gradients of one row, added; its [] loss, [N'] statistics and [tasks, K] sums."""
    if parts.graphs is not None:
        replayed = parts.graphs(row, keep=parts.sample_stats is not None)
        if replayed is not None:
            return replayed
    loss, stats = parts.model.loss(row)  # backbone and fused head in one FSDP-visible method
    loss.backward()
    return loss, stats, stats.sum_by(row.position_tasks, parts.num_tasks)


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


def clip_and_veto(parts: Parts) -> tuple[Tensor, Tensor | None, Tensor]:
    """([] norm before clipping, [] factor for every gradient or None, [] fp32 1.0 where the step must not be
    taken).

    The veto rises when the joint norm or any rank's loss is not finite, and on a spike unless spikes are only
    logged; the factor goes to the optimizer, so that clipping costs no pass over the gradients of its own.
    """
    finite, judged, norm = parts.spikes.judge(
        parts.ledger.open_loss(), grad_norm(parts.optimizer.names.values())
    )
    parts.ledger.judged(judged)
    refused = ~finite if parts.config.numbers.on_spike == "log" else ~finite | (judged[0] > 0.0)
    veto = refused.float()
    limit = parts.config.optim.max_norm
    clip = None if limit is None else (limit / (norm + 1e-6)).clamp(max=1.0).float()
    return norm, clip, veto
