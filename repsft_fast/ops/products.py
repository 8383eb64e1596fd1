"""The gradient products of the fused head: logit gradients in, hidden and head gradients out.

The head gradient is accumulated in fp32 without a zero-fill; it may wait for backward (`Unfinished`), and
memorised rows may be left out of both products without asking the device how many there are
(`kept_gradients`).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from repsft_fast.ops import row_pass

CAPACITY_STEP = 256  # rows


def add_head_gradient(
    accumulator: Tensor,  # [V, H] fp32 or fp64, undefined before the first chunk
    gradient: Tensor,  # [c, V]
    hidden: Tensor,  # [c, H] same dtype as gradient
    *,
    first: bool,
) -> None:
    """accumulator = [accumulator +] gradient.T @ hidden, in the accumulator's dtype and without a
    zero-fill."""
    dtype = accumulator.dtype
    if gradient.dtype != dtype and gradient.device.type != "cuda":
        gradient, hidden = gradient.to(dtype), hidden.to(dtype)
    if gradient.dtype == dtype:
        if first:
            torch.mm(gradient.T, hidden, out=accumulator)
        else:
            accumulator.addmm_(gradient.T, hidden)
    elif first:
        torch.mm(gradient.T, hidden, out_dtype=dtype, out=accumulator)
    else:
        torch.addmm(accumulator, gradient.T, hidden, out_dtype=dtype, out=accumulator)


class Unfinished(NamedTuple):
    """A head gradient of which backward makes the product, so that its scale is paid on [N', H] and not on
    [V, H]."""

    gradient: Tensor  # [N', V] bf16 | fp32
    hidden: Tensor  # [N', H] same dtype; overwritten
    # what autograd would cast an fp32 gradient to: here no other chunk is to be added in fp32
    dtype: torch.dtype

    def finish(self, scale: Tensor | None) -> Tensor:  # [] or None for 1 → [V, H] `dtype`
        hidden = self.hidden if scale is None else self.hidden.mul_(scale)
        finished = hidden.new_empty(self.gradient.shape[1], hidden.shape[1], dtype=self.dtype)
        add_head_gradient(finished, self.gradient, hidden, first=True)
        return finished


def may_wait(passes: row_pass.RowPass, dtype: torch.dtype) -> bool:
    """Whether a head gradient of one chunk waits for backward: where the chunk outlives the call (the torch
    path's buffer is the next call's). Not in fp16, in which hidden · scale overflows at the scales that fp16
    is trained with."""
    return isinstance(passes, row_pass.KernelRows) and dtype in (torch.bfloat16, torch.float32)


def arriving_dtype(parameter: Tensor) -> torch.dtype:
    """Of this tensor's gradient behind autograd's cast, where it is the parameter's own; else fp32, which
    autograd casts."""
    wanted = parameter.grad_dtype if parameter.is_leaf else parameter.dtype
    return parameter.dtype if wanted == parameter.dtype else torch.float32


def capacity(rows: int, kept_share: float) -> int:
    """Rows the gradient products are sized for: the share in steps, so that sizes are few; never more than
    all."""
    return min(rows, -(-math.ceil(rows * kept_share) // CAPACITY_STEP) * CAPACITY_STEP)


def needed_share(log10_miss: Tensor, skip_below: float) -> Tensor:  # [N'] fp32 of one call → [] fp64
    """The `kept_share` that would have just sufficed for these rows; where a step of capacity holds them all,
    less than their share. Stays on the device."""
    kept = (~(log10_miss < math.log10(skip_below))).sum()
    return kept.double() / max(log10_miss.numel(), CAPACITY_STEP)


def kept_gradients(
    # [c] int64 rows, those with a gradient first; [1] int64 how many have one
    ordered: tuple[Tensor, Tensor],
    room: int,  # the products are sized for this many
    gradient: Tensor,  # [c, V], zero in the memorised rows
    hidden: Tensor,  # [c, H]
    head: Tensor,  # [V, H]
    grad_hidden: Tensor | None,  # [c, H], filled
    grad_head: Tensor | None,  # [V, H] fp32, added to; written when `first`
    *,
    first: bool,
) -> None:
    """Both gradient products over the rows that have a gradient, without asking how many: `room` of them by
    cuBLAS, which finds zeros where fewer are there; the others, if any, by a kernel that reads the count on
    the device."""
    from csrc_triton.kept_rows import kept_head, kept_hidden

    order, count = ordered
    front = order[:room]
    rows = row_pass.workspace("kept logits", room, gradient.stride(0), gradient.dtype, gradient.device)[
        :, : gradient.shape[1]
    ]
    torch.index_select(gradient, 0, front, out=rows)
    if grad_hidden is not None:
        grad_hidden.zero_().index_copy_(0, front, torch.mm(rows, head))
        kept_hidden(gradient, head, order, count, room, grad_hidden)
    if grad_head is not None:
        add_head_gradient(grad_head, rows, hidden.index_select(0, front), first=first)
        kept_head(gradient, hidden, order, count, room, grad_head)
