"""The fused head: cross entropy of hidden @ lm_head.T with its statistics and gradients, never keeping [N, V]
logits.

Trained rows are selected first, then chunk by chunk: logits (GEMM) → one row pass (loss, statistics, gradient
in place) → the two gradient GEMMs, 6·N'·H·V FLOPs and not the 8 of a recomputing head. The gradients exist
when the forward pass ends and backward multiplies them by the incoming scale; where the kernel holds all rows
in one chunk, it is backward that makes the head's, from hidden states it has scaled. Source: Wijmans et al.
2024, arXiv:2411.09009; Hsu et al. 2024, arXiv:2410.10989.

How many chunks the logits come in decides the last bits of the head's gradient. Left alone, the number is the
same wherever shapes and device are the same, on CUDA one where all logits take at most 1/16 of the device's
memory, and never asks what is free.

Peak extra memory: chunk_bytes + one [V, H] fp32 head gradient + [N', H]; on a GPU a call of one chunk keeps
it until its backward, which makes the head gradient then. Work: 6·N'·H·V FLOPs for N' trained rows,
2·N'·H·V + 4·N''·H·V with N'' rows above skip_below, 2·N'·H·V under torch.no_grad. No host sync when `rows` is
given (on a CPU, where reading a number is free, skip_below selects rows by their values). On a GPU the rows
that skip_below drops leave the products only with kept_share < 1, which sizes them without asking the device;
rows beyond it are computed by a slower kernel, and kept_share · chunk_bytes more are held. Unmeasured; 1
keeps zeros in the products.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from repsft_fast.errors import describe
from repsft_fast.ops import products
from repsft_fast.ops.head_arguments import as_autocast, check, gathered
from repsft_fast.ops.head_pass import head_pass
from repsft_fast.row import IGNORE_INDEX
from repsft_fast.stats import PositionStats

_NEEDED = slice(5, 7)  # of head_pass's arguments: need_hidden, need_head
_NO_GRADIENTS = (None,) * 9  # of its arguments behind hidden and lm_head


def linear_cross_entropy(
    hidden: Tensor,  # [N, H] bf16 | fp16 | fp32 | fp64
    lm_head: Tensor,  # [V, H] same dtype, or fp32 beside half precision; a DTensor is gathered once
    targets: Tensor,  # [N] int64, already shifted; IGNORE_INDEX = not trained on
    weights: Tensor | None = None,  # [N] fp32; None = every trained token counts 1
    rows: Tensor | None = None,  # [N'] int64 trained rows, from the plan; None = found on the device
    *,
    skip_below: float = 0.0,  # τ: rows with 1 − p(target) < τ send no gradient
    softcap: float | None = None,  # Gemma's: logits become softcap · tanh(logits / softcap)
    chunk_bytes: int | None = None,  # of logits held at once; None = row_pass.default_chunk_bytes
    kept_share: float = 1.0,  # on a GPU: guessed share of rows that skip_below keeps; any is exact
) -> tuple[Tensor, PositionStats]:
    """The weighted SUM (never a mean), [] fp32 (fp64 for fp64 inputs), and the statistics of the N' rows.

    skip_below = τ drops a row's logit gradient, whose L1 norm is 2·w·(1 − p) < 2·w·τ; loss and statistics
    stay exact. Under autocast both are cast as F.linear casts them (fp64 is not). An fp32 head beside bf16 or
    fp16 hidden states, which is what autocast's casts look like from here, is rounded to their dtype for the
    products; its gradient stays fp32 and is never rounded. Inside, autocast is off. A row named twice counts
    twice: its gradients are added and it has two lines in the statistics.

    No rows: exactly zero loss and zero gradients. A target in `rows` outside 0 … V-1 gives NaN loss and NaN
    gradients, and PositionStats counts it; nothing is read out of bounds. `rows` outside 0 … N-1: IndexError,
    on a GPU the device's own assertion. Gradients are handed over once: a second backward through the same
    call raises. The head gradient is fp32 and autograd casts it to the parameter's `grad_dtype`.

    A sharded head (DTensor over a mesh of one dimension, its ranks holding rows of their own) is gathered
    here once, and its gradient, summed over the ranks, comes back sharded: all ranks must call and go
    backward together. Inside a method that FSDP2 unshards (register_fsdp_forward_method), as the trainer does
    it, the head is plain already and this costs nothing.

    Raises ValueError naming the argument, what was expected and what came.
    """
    # What is refused is refused in the types that would be multiplied.
    if isinstance(lm_head, DTensor):
        lm_head = gathered(lm_head)
    hidden, lm_head = as_autocast(hidden, lm_head)
    check(
        hidden, lm_head, targets, weights, rows,
        skip_below=skip_below, softcap=softcap, chunk_bytes=chunk_bytes, kept_share=kept_share,
    )  # fmt: skip
    if rows is None:
        rows = torch.nonzero(targets != IGNORE_INDEX)[:, 0]

    # Inside an autograd function gradients are off: what is needed must be asked out here.
    grad = torch.is_grad_enabled()
    arguments = (
        hidden, lm_head, targets, weights, rows,
        grad and hidden.requires_grad, grad and lm_head.requires_grad,
        softcap, skip_below, chunk_bytes, kept_share,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        loss, _, _, table, correct = torch.ops.repsft.linear_cross_entropy(*arguments)
        row_loss, *others = table.unbind()
        return loss, PositionStats(row_loss, correct, *others)
    loss, *columns = _LinearCrossEntropy.apply(*arguments)
    return loss, PositionStats(*columns)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        loss, grad_hidden, grad_head, stats = head_pass(*arguments, may_wait=True)
        need_hidden, need_head = arguments[_NEEDED]
        ctx.gradients = (grad_hidden if need_hidden else None, grad_head if need_head else None)
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
        # On a CPU reading a number is no sync, and a scale of 1 (the loop's own case) saves a pass over [V,
        # H]. A fake tensor (a rehearsal without hardware) holds no number.
        plain = scale.device.type == "cpu" and type(scale) is Tensor and float(scale.numpy()) == 1.0
        if grad_hidden is not None and not plain:
            grad_hidden.mul_(scale)
        if isinstance(grad_head, products.Unfinished):
            grad_head = grad_head.finish(None if plain else scale)
        elif grad_head is not None and not plain:
            grad_head.mul_(scale)
        return grad_hidden, grad_head, *_NO_GRADIENTS


def _columns(stats: PositionStats) -> tuple[Tensor, ...]:
    return stats.loss, stats.correct, stats.entropy, stats.top1_probability, stats.margin, stats.log10_miss


# Of head_pass's arguments, in its order: they are passed on as they come.
_SCHEMA = (
    "(Tensor hidden, Tensor lm_head, Tensor targets, Tensor? weights, Tensor rows, bool need_hidden,"
    " bool need_head, float? softcap, float skip_below, SymInt? chunk_bytes, float kept_share)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("repsft::linear_cross_entropy", mutates_args=(), schema=_SCHEMA)
def _operator(*arguments):
    """[] loss, [N, H] and [V, H] gradients, [5, N'] statistics, [N'] bool correct: the head under
    torch.compile."""
    loss, grad_hidden, grad_head, stats = head_pass(*arguments)
    assert isinstance(grad_head, Tensor)
    # Outputs of an operator may not share memory, and the kernel's five statistics are lines of one table.
    row_loss, correct, *others = _columns(stats)
    return loss, grad_hidden, grad_head, torch.stack([row_loss, *others]), correct


@_operator.register_fake
def _(
    hidden, lm_head, targets, weights, rows, need_hidden, need_head,
    softcap, skip_below, chunk_bytes, kept_share,
):  # fmt: skip
    dtype = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
    table = hidden.new_empty(5, rows.shape[0], dtype=dtype)
    correct = rows.new_empty(rows.shape[0], dtype=torch.bool)
    grad_hidden = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    grad_head = lm_head.new_empty(lm_head.shape if need_head else (0,), dtype=dtype)
    return hidden.new_empty((), dtype=dtype), grad_hidden, grad_head, table, correct


def _save_gradients(ctx, inputs, output) -> None:
    ctx.needed = inputs[_NEEDED]
    ctx.save_for_backward(*(gradient for gradient, needed in zip(output[1:3], ctx.needed) if needed))
    ctx.mark_non_differentiable(*output[1:])


def _scale_gradients(ctx, scale: Tensor, *_):
    scaled = iter([(gradient * scale).to(gradient.dtype) for gradient in ctx.saved_tensors])
    return *(next(scaled) if needed else None for needed in ctx.needed), *_NO_GRADIENTS


_operator.register_autograd(_scale_gradients, setup_context=_save_gradients)
