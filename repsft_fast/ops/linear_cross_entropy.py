"""The fused head: cross entropy of hidden @ lm_head.T with its statistics and gradients, never keeping [N, V] logits.

Trained rows are selected first, then chunk by chunk: logits (GEMM) → one row pass (loss, statistics, gradient in place) →
the two gradient GEMMs, 6·N'·H·V FLOPs and not the 8 of a recomputing head. The gradients exist when the forward pass ends
and backward multiplies them by the incoming scale; where the kernel holds all rows in one chunk, it is backward that makes
the head's, from hidden states it has scaled.
Source: Wijmans et al. 2024, arXiv:2411.09009; Hsu et al. 2024, arXiv:2410.10989.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial

from repsft_fast.errors import describe
from repsft_fast.ops import functional, products
from repsft_fast.row import IGNORE_INDEX
from repsft_fast.stats import RowStats

P = ParamSpec("P")
R = TypeVar("R")
_AUTOCAST = (
    "cpu",
    "cuda",
    "mps",
    "xpu",
)  # other kinds have none, and asking fails; torch's own question is not traceable in 2.11


def linear_cross_entropy(
    hidden: Tensor,  # [N, H] bf16 | fp16 | fp32 | fp64
    lm_head: Tensor,  # [V, H] same dtype, or fp32 beside half precision; a DTensor over one mesh dimension is gathered once
    targets: Tensor,  # [N] int64, already shifted; IGNORE_INDEX = not trained on
    weights: Tensor | None = None,  # [N] fp32; None = every trained token counts 1
    rows: Tensor
    | None = None,  # [N'] int64 trained rows, from the plan, those named twice count twice; None = found on the device
    *,
    skip_below: float = 0.0,  # τ: rows with 1 − p(target) < τ send no gradient
    softcap: float | None = None,  # final-logit soft-cap (Gemma): logits become softcap · tanh(logits / softcap)
    chunk_bytes: int | None = None,  # of logits held at once; None = by shape and device (functional.default_chunk_bytes)
    kept_share: float = 1.0,  # on a GPU: guessed share of rows that skip_below keeps, from an earlier update; any is exact
) -> tuple[Tensor, RowStats]:  # [] weighted SUM (never a mean), fp32 (fp64 for fp64 inputs); statistics of the N' rows
    """Cross entropy of hidden @ lm_head.T and the statistics of its rows, without keeping [N, V] logits.

    How many chunks the logits come in decides the last bits of the head's gradient. None gives the same number wherever shapes
    and device are the same, on CUDA one where all logits take at most 1/16 of the device's memory, and never asks what is free.

    Peak extra memory: chunk_bytes + one [V, H] fp32 head gradient + [N', H]; on a GPU a call of one chunk keeps it until its
    backward, which makes the head gradient then. Work: 6·N'·H·V FLOPs for N' trained rows,
    2·N'·H·V + 4·N''·H·V with N'' rows above skip_below, 2·N'·H·V under torch.no_grad. No host sync when `rows` is given
    (on a CPU, where reading a number is free, skip_below selects rows by their values). On a GPU the rows that skip_below
    drops leave the products only with kept_share < 1, which sizes them without asking the device; rows beyond it are
    computed by a slower kernel, and kept_share · chunk_bytes more are held. Unmeasured; 1 keeps zeros in the products.

    skip_below = τ drops a row's logit gradient, whose L1 norm is 2·w·(1 − p) < 2·w·τ; loss and statistics stay exact.
    Under autocast both are cast as F.linear casts them (fp64 is not). An fp32 head beside bf16 or fp16 hidden states, which is
    what autocast's casts look like from here, is rounded to their dtype for the products; its gradient stays fp32 and is never
    rounded. Inside, autocast is off. A row named twice has its gradients added and two lines in the statistics.

    No rows: exactly zero loss and zero gradients. A target in `rows` outside 0 … V-1 gives NaN loss and NaN gradients, and
    RowStats counts it; nothing is read out of bounds. `rows` outside 0 … N-1: IndexError, on a GPU the device's own assertion.
    Gradients are handed over once: a second backward through the same call raises. The head gradient is fp32 and autograd casts
    it to the parameter's `grad_dtype`.

    A sharded head (DTensor over a mesh of one dimension, its ranks holding rows of their own) is gathered here once, and its
    gradient, summed over the ranks, comes back sharded: all ranks must call and go backward together. Inside a method that
    FSDP2 unshards (register_fsdp_forward_method), as the trainer does it, the head is plain already and this costs nothing.

    Raises ValueError naming the argument, what was expected and what came.  Source: Wijmans et al. 2024, arXiv:2411.09009.
    """
    if isinstance(lm_head, DTensor):
        lm_head = _gathered(lm_head)
    hidden, lm_head = _as_autocast(hidden, lm_head)
    _check(hidden, lm_head, targets, weights, rows, skip_below, softcap, chunk_bytes, kept_share)
    if rows is None:
        rows = torch.nonzero(targets != IGNORE_INDEX)[:, 0]
    grad = torch.is_grad_enabled()
    arguments = (
        hidden, lm_head, targets, weights, rows, grad and hidden.requires_grad, grad and lm_head.requires_grad,
        softcap, skip_below, chunk_bytes, kept_share,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        loss, _, _, table, correct = torch.ops.repsft.linear_cross_entropy(*arguments)
        row_loss, *others = table.unbind()
        return loss, RowStats(row_loss, correct, *others)
    loss, *columns = _LinearCrossEntropy.apply(*arguments)
    return loss, RowStats(*columns)


def _as_autocast(hidden: Tensor, lm_head: Tensor) -> tuple[Tensor, Tensor]:
    """Cast as F.linear would under the autocast in force: to its type, but fp64, and nothing where none is in force.

    An fp32 `lm_head` stays: `head_pass` rounds it, so that its gradient need not be rounded. ValueError for half precision of
    the other kind, here or in `_check`: fp16 does not hold what bf16 holds, nor the reverse.
    """
    kind = hidden.device.type
    if not (kind in _AUTOCAST and torch.is_autocast_enabled(kind)):
        return hidden, lm_head
    dtype = torch.get_autocast_dtype(kind)
    if hidden.dtype not in (torch.float64, torch.float32, dtype):
        where, wrong = "linear_cross_entropy: hidden", "has another half precision than the autocast in force"
        raise ValueError(describe(where, wrong, expected=dtype, got=hidden.dtype))
    return hidden.to(dtype) if hidden.dtype == torch.float32 else hidden, lm_head


def _without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Its products choose their types themselves: under autocast some would be rounded once more."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        kind = args[0].device.type  # type: ignore[attr-defined]
        if not (kind in _AUTOCAST and torch.is_autocast_enabled(kind)):
            return function(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return run


@_without_autocast
def head_pass(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    rows: Tensor,
    need_hidden: bool,
    need_head: bool,
    softcap: float | None,
    skip_below: float,
    chunk_bytes: int | None,
    kept_share: float = 1.0,
    *,
    may_wait: bool = False,  # whether the caller can make an unfinished head gradient in backward
) -> tuple[Tensor, Tensor, Tensor | products.Unfinished, RowStats]:
    """Everything at once, without autograd: [] loss, [N, H] and [V, H] gradients (empty where not needed), statistics."""
    vocabulary, device = lm_head.shape[0], hidden.device
    sums = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    dtype = functional.logits_dtype(device, hidden.dtype)  # of the GEMMs too
    _check_inside(rows, len(hidden))
    chosen = hidden.detach().index_select(0, rows).to(dtype)
    head = lm_head.detach().to(hidden.dtype).to(dtype)
    total = rows.numel()
    row_weights = chosen.new_ones(total, dtype=sums) if weights is None else weights.index_select(0, rows).to(sums)
    chosen_targets = targets.index_select(0, rows)
    itemsize = chosen.element_size()
    budget = chunk_bytes or functional.default_chunk_bytes(total, vocabulary, itemsize, device)
    block = functional.block_rows(vocabulary, itemsize, budget)
    passes = functional.row_pass(
        chosen_targets, row_weights, vocabulary, softcap=softcap, skip_below=skip_below, block_rows=block
    )
    grad_chosen = torch.empty_like(chosen) if need_hidden else None
    chunks = functional.chunk_ranges(total, vocabulary, itemsize, budget)
    share = kept_share if skip_below > 0.0 else 1.0
    waits = (
        may_wait
        and need_head
        and len(chunks) == 1
        and products.may_wait(passes, dtype)
        and products.capacity(total, share) == total
    )
    unfinished: products.Unfinished | None = None
    grad_head = torch.empty_like(head, dtype=sums) if need_head and not waits else None
    first = True
    for start, stop in chunks:
        h = chosen[start:stop]
        logits = passes.buffer(stop - start, dtype)
        torch.mm(h, head.T, out=logits)
        gradient, scale = passes.chunk(start, logits, gradient=need_hidden or need_head)
        if not (need_hidden or need_head):
            continue
        out = None if grad_chosen is None else grad_chosen[start:stop]
        room = products.capacity(stop - start, share)
        if scale is None and room < stop - start:
            products.kept_gradients(passes.order(start, stop), room, gradient, h, head, out, grad_head, first=first)
            first = False
            continue
        kept = None
        if scale is not None:
            gradient, h, scale, kept = _leave_out(passes.kept(start, stop), gradient, h, scale)
        if out is not None:
            _hidden_gradient(out, gradient, head, scale, kept)
        if grad_head is not None:
            products.add_head_gradient(grad_head, gradient, h if scale is None else h * scale[:, None], first=first)
            first = False
        elif waits:
            unfinished = products.Unfinished(gradient, h, products.arriving_dtype(lm_head))

    if grad_head is not None and first:
        grad_head.zero_()
    stats = passes.stats()
    loss = (stats.loss * row_weights).sum()
    grad_hidden = hidden.new_empty(0)
    if grad_chosen is not None:
        grad_hidden = _put_back(grad_chosen, rows, hidden)
    if unfinished is not None:
        return loss, grad_hidden, unfinished, stats
    return loss, grad_hidden, chosen.new_empty(0, dtype=sums) if grad_head is None else grad_head, stats


def _check_inside(rows: Tensor, n: int) -> None:
    """Where looking costs nothing: rows are places in hidden, not counted from its end."""
    if rows.device.type != "cpu" or type(rows) is not Tensor or not rows.numel():
        return
    low, high = int(rows.numpy().min()), int(rows.numpy().max())
    if low < 0 or high >= n:
        wrong = "has an index that hidden has no row for"
        got = low if low < 0 else high
        raise IndexError(describe("linear_cross_entropy: rows", wrong, expected=f"0 … {n - 1}", got=got))


def _put_back(gradients: Tensor, rows: Tensor, hidden: Tensor) -> Tensor:  # [N', H] of `rows` → [N, H] in hidden's dtype
    """Gradients of a row named twice are added. Adding to zero changes no bit where every row is named once.

    On a CPU, where counting is free, the faster copy does it then, and sums are made before they are rounded. On a GPU they
    are rounded first, and the order of three or more is the device's.
    """
    if gradients.device.type != "cpu":
        return torch.zeros_like(hidden).index_add_(0, rows, gradients.to(hidden.dtype))
    if type(rows) is not Tensor or np.bincount(rows.numpy(), minlength=1).max() <= 1:
        return torch.zeros_like(hidden).index_copy_(0, rows, gradients.to(hidden.dtype))
    return torch.zeros_like(hidden, dtype=gradients.dtype).index_add_(0, rows, gradients).to(hidden.dtype)


def _leave_out(
    keep: Tensor | None, gradient: Tensor, hidden: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # the rows that go on, and their places [k] where some do not
    """Drop the memorised rows of a chunk; on a device where the host may not ask how many there are, scale them to zero."""
    if keep is None:
        return gradient, hidden, scale, None
    if keep.device.type != "cpu":
        return gradient, hidden, torch.where(keep, scale, 0.0), None
    kept = torch.nonzero(keep)[:, 0]
    if kept.numel() == keep.numel():
        return gradient, hidden, scale, None
    return gradient[kept], hidden[kept], scale[kept], kept


def _hidden_gradient(out: Tensor, gradient: Tensor, head: Tensor, scale: Tensor | None, kept: Tensor | None) -> None:
    """out [c, H] = scale · gradient @ head in the kept rows, zero in the others."""
    if kept is not None:
        assert scale is not None
        out.zero_().index_copy_(0, kept, torch.mm(gradient, head).mul_(scale[:, None]))
        return
    torch.mm(gradient, head, out=out)
    if scale is not None:
        out.mul_(scale[:, None])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        loss, grad_hidden, grad_head, stats = head_pass(*arguments, may_wait=True)
        ctx.gradients = (grad_hidden if arguments[5] else None, grad_head if arguments[6] else None)
        columns = _columns(stats)
        ctx.mark_non_differentiable(*columns)
        return loss, *columns

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor, *_):
        if ctx.gradients is None:
            raise RuntimeError(
                describe(
                    "linear_cross_entropy",
                    "backward ran twice through one call, whose gradients were handed over the first time",
                    todo="call it again, or sum the losses before one backward",
                )
            )
        (grad_hidden, grad_head), ctx.gradients = ctx.gradients, None
        # On a CPU reading a number is no sync, and a scale of 1 (the loop's own case) saves a pass over [V, H].
        # A fake tensor (a rehearsal without hardware) holds no number.
        plain = scale.device.type == "cpu" and type(scale) is Tensor and float(scale.numpy()) == 1.0
        if grad_hidden is not None and not plain:
            grad_hidden.mul_(scale)
        if isinstance(grad_head, products.Unfinished):
            grad_head = grad_head.finish(None if plain else scale)
        elif grad_head is not None and not plain:
            grad_head.mul_(scale)
        return grad_hidden, grad_head, *(None,) * 9


def _gathered(lm_head: DTensor) -> Tensor:  # [V, H] whole
    """All-gather forward, reduce-scatter (a sum) backward: every rank's gradient is of its own rows."""
    if lm_head.device_mesh.ndim != 1:
        raise ValueError(
            describe(
                "linear_cross_entropy: lm_head",
                "is sharded over a mesh of several dimensions, of which some may see the same rows",
                expected="one dimension, or a plain tensor",
                got=f"{lm_head.placements}",
                todo="gather it as the mesh demands, or call this inside a method that FSDP2 unshards",
            )
        )
    return lm_head.full_tensor(grad_placements=[Partial()])


def _columns(stats: RowStats) -> tuple[Tensor, ...]:
    return stats.loss, stats.correct, stats.entropy, stats.top1_probability, stats.margin, stats.log10_miss


def _check(hidden, lm_head, targets, weights, rows, skip_below, softcap, chunk_bytes, kept_share) -> None:
    def refuse(name: str, wrong: str, expected: object, got: object, todo: str | None = None) -> None:
        raise ValueError(describe(f"linear_cross_entropy: {name}", wrong, expected=expected, got=got, todo=todo))

    if isinstance(hidden, DTensor):
        refuse("hidden", "is a sharded DTensor", "this rank's rows as a plain tensor", f"{hidden.placements}")
    for name, value in (("hidden", hidden), ("lm_head", lm_head)):
        if value.ndim != 2:
            todo = "flatten it: hidden.flatten(0, -2), and targets and weights alike" if name == "hidden" else None
            refuse(name, "has the wrong shape", "two dimensions", tuple(value.shape), todo)
    if hidden.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        refuse("hidden", "has an unusable dtype", "bf16, fp16, fp32 or fp64", hidden.dtype)
    half = hidden.dtype in (torch.float16, torch.bfloat16)
    if lm_head.dtype != hidden.dtype and not (half and lm_head.dtype == torch.float32):
        refuse("lm_head", "has another dtype than hidden", hidden.dtype, lm_head.dtype)
    n, width = hidden.shape
    if lm_head.shape[1] != width or lm_head.shape[0] < 2:
        refuse("lm_head", "has the wrong shape", f"(V >= 2, {width})", tuple(lm_head.shape))
    if tuple(targets.shape) != (n,) or targets.dtype != torch.int64:
        refuse("targets", "has the wrong shape or dtype", f"({n},) int64", f"{tuple(targets.shape)} {targets.dtype}")
    if weights is not None:
        if tuple(weights.shape) != (n,) or not weights.dtype.is_floating_point:
            refuse("weights", "has the wrong shape or dtype", f"({n},) fp32", f"{tuple(weights.shape)} {weights.dtype}")
        if weights.requires_grad:
            refuse("weights", "requires grad, which this head does not give", "requires_grad=False", True)
    if rows is not None and (rows.ndim != 1 or rows.dtype != torch.int64):
        refuse("rows", "has the wrong shape or dtype", "(N',) int64", f"{tuple(rows.shape)} {rows.dtype}")
    for name, value in (("lm_head", lm_head), ("targets", targets), ("weights", weights), ("rows", rows)):
        if value is not None and value.device != hidden.device:
            refuse(name, "is on another device than hidden", hidden.device, value.device)
    if not 0.0 <= skip_below < 1.0:
        refuse("skip_below", "is out of range", "0 <= τ < 1", skip_below)
    if not 0.0 <= kept_share <= 1.0:
        refuse("kept_share", "is out of range", "0 <= share <= 1", kept_share)
    if softcap is not None and not 0.0 < softcap < float("inf"):
        refuse("softcap", "is out of range", "a positive number, or None", softcap)
    if chunk_bytes is not None and chunk_bytes < 1:
        refuse("chunk_bytes", "is out of range", "at least 1", chunk_bytes)


@torch.library.custom_op("repsft::linear_cross_entropy", mutates_args=())
def _operator(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    rows: Tensor,
    need_hidden: bool,
    need_head: bool,
    softcap: float | None,
    skip_below: float,
    chunk_bytes: int | None,
    kept_share: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # [] loss, [N, H], [V, H], [5, N'] statistics, [N'] bool correct
    loss, grad_hidden, grad_head, stats = head_pass(
        hidden, lm_head, targets, weights, rows, need_hidden, need_head, softcap, skip_below, chunk_bytes, kept_share
    )
    assert isinstance(grad_head, Tensor)
    # Outputs of an operator may not share memory, and the kernel's five statistics are lines of one table.
    row_loss, correct, *others = _columns(stats)
    return loss, grad_hidden, grad_head, torch.stack([row_loss, *others]), correct


@_operator.register_fake
def _(hidden, lm_head, targets, weights, rows, need_hidden, need_head, softcap, skip_below, chunk_bytes, kept_share):
    dtype = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
    table, correct = hidden.new_empty(5, rows.shape[0], dtype=dtype), rows.new_empty(rows.shape[0], dtype=torch.bool)
    grad_hidden = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    grad_head = lm_head.new_empty(lm_head.shape if need_head else (0,), dtype=dtype)
    return hidden.new_empty((), dtype=dtype), grad_hidden, grad_head, table, correct


def _save_gradients(ctx, inputs, output) -> None:
    ctx.needed = inputs[5:7]
    ctx.save_for_backward(*(gradient for gradient, needed in zip(output[1:3], ctx.needed) if needed))
    ctx.mark_non_differentiable(*output[1:])


def _scale_gradients(ctx, scale: Tensor, *_):
    scaled = iter([(gradient * scale).to(gradient.dtype) for gradient in ctx.saved_tensors])
    return *(next(scaled) if needed else None for needed in ctx.needed), *(None,) * 9


_operator.register_autograd(_scale_gradients, setup_context=_save_gradients)
