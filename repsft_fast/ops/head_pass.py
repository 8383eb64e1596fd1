"""The fused head without autograd: loss, statistics and both gradients of a call, chunk by chunk.

Logits (GEMM) → one row pass (loss, statistics, gradient in place) → the two gradient GEMMs. Which rows go
into those, and when the head's is made, is decided here; how is in products.py.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from repsft_fast.ops import products, row_pass
from repsft_fast.ops.head_arguments import check_inside, without_autocast
from repsft_fast.stats import PositionStats

HeadGradient = Tensor | products.Unfinished


@without_autocast
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
    may_wait: bool = False,
) -> tuple[Tensor, Tensor, HeadGradient, PositionStats]:
    """[] loss, [N, H] and [V, H] gradients (empty where not needed), statistics of the rows.

    may_wait: the caller can make an unfinished head gradient in backward.
    """
    vocabulary, total = lm_head.shape[0], rows.numel()
    sums = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    dtype = row_pass.logits_dtype(hidden.device, hidden.dtype)  # of the GEMMs too
    check_inside(rows, len(hidden))

    # Rows that are not trained on never enter a product. A head held in fp32 is rounded to hidden's type
    # first, as autocast would.
    chosen = hidden.detach().index_select(0, rows).to(dtype)
    head = lm_head.detach().to(hidden.dtype).to(dtype)
    if weights is None:
        row_weights = chosen.new_ones(total, dtype=sums)
    else:
        row_weights = weights.index_select(0, rows).to(sums)

    # Shapes and the device's size alone decide the chunks: they decide how sums are rounded.
    itemsize = chosen.element_size()
    budget = chunk_bytes or row_pass.default_chunk_bytes(total, vocabulary, itemsize, hidden.device)
    block = row_pass.block_rows(vocabulary, itemsize, budget)
    how: dict[str, Any] = {"softcap": softcap, "skip_below": skip_below, "block_rows": block}
    passes = row_pass.row_pass(targets.index_select(0, rows), row_weights, vocabulary, **how)
    chunks = row_pass.chunk_ranges(total, vocabulary, itemsize, budget)
    share = kept_share if skip_below > 0.0 else 1.0
    gradients = _Gradients(chosen, head, passes, need_hidden=need_hidden, share=share)
    if need_head:
        everything_at_once = len(chunks) == 1 and products.capacity(total, share) == total
        if may_wait and everything_at_once and products.may_wait(passes, dtype):
            gradients.leave_head_to_backward(products.arriving_dtype(lm_head))
        else:
            gradients.of_head = torch.empty_like(head, dtype=sums)

    for start, stop in chunks:
        logits = passes.buffer(stop - start, dtype)
        torch.mm(chosen[start:stop], head.T, out=logits)
        gradient, scale = passes.chunk(start, logits, gradient=need_hidden or need_head)
        if need_hidden or need_head:
            gradients.add(start, stop, gradient, scale)

    stats = passes.stats()
    loss = (stats.loss * row_weights).sum()
    return loss, gradients.hidden_gradient(rows, hidden), gradients.head_gradient(sums), stats


class _Gradients:
    """Both gradients of one call, in the products' type, added up over its chunks."""

    def __init__(
        self,
        chosen: Tensor,  # [N', H]
        head: Tensor,  # [V, H] same dtype
        passes: row_pass.RowPass,
        *,
        need_hidden: bool,
        share: float,  # of a chunk's rows that the products are sized for
    ):
        self.chosen, self.head, self.passes, self.share = chosen, head, passes, share
        self.of_hidden = torch.empty_like(chosen) if need_hidden else None  # [N', H]
        self.of_head: Tensor | None = None  # [V, H] fp32 or fp64, undefined while `_first`
        self._first = True
        self._arriving: torch.dtype | None = None
        self._unfinished: products.Unfinished | None = None

    def leave_head_to_backward(self, dtype: torch.dtype) -> None:
        """Keep the one chunk's factors; backward makes the head gradient of them, in `dtype`."""
        self._arriving = dtype

    def add(
        self,
        start: int,
        stop: int,
        gradient: Tensor,  # [c, V]
        scale: Tensor | None,  # [c] still to be multiplied into it
    ) -> None:
        hidden = self.chosen[start:stop]
        out = None if self.of_hidden is None else self.of_hidden[start:stop]

        # On a device whose host may not ask how many rows are memorised, a guess sizes the products.
        room = products.capacity(stop - start, self.share)
        if scale is None and room < stop - start:
            order = self.passes.order(start, stop)
            products.kept_gradients(
                order, room, gradient, hidden, self.head, out, self.of_head, first=self._first
            )
            self._first = False
            return

        # Where the host may ask, memorised rows leave the products.
        kept = None
        if scale is not None:
            memorised_out = _leave_out(self.passes.kept(start, stop), gradient, hidden, scale)
            gradient, hidden, scale, kept = memorised_out
        if out is not None:
            _hidden_gradient(out, gradient, self.head, scale, kept)
        if self.of_head is not None:
            scaled = hidden if scale is None else hidden * scale[:, None]
            products.add_head_gradient(self.of_head, gradient, scaled, first=self._first)
            self._first = False
        elif self._arriving is not None:
            self._unfinished = products.Unfinished(gradient, hidden, self._arriving)

    def hidden_gradient(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """[N, H] in hidden's dtype; empty where none is needed."""
        return hidden.new_empty(0) if self.of_hidden is None else _put_back(self.of_hidden, rows, hidden)

    def head_gradient(self, dtype: torch.dtype) -> HeadGradient:
        """[V, H]; zero where there was no chunk, empty of `dtype` where none is needed."""
        if self._unfinished is not None:
            return self._unfinished
        if self.of_head is None:
            return self.chosen.new_empty(0, dtype=dtype)
        return self.of_head.zero_() if self._first else self.of_head


def _put_back(gradients: Tensor, rows: Tensor, hidden: Tensor) -> Tensor:
    """[N', H] of `rows` → [N, H] in hidden's dtype. Gradients of a row named twice are added.

    Adding to zero changes no bit where every row is named once. On a CPU, where counting is free, the faster
    copy does it then, and sums are made before they are rounded. On a GPU they are rounded first, and the
    order of three or more is the device's.
    """
    if gradients.device.type != "cpu":
        return torch.zeros_like(hidden).index_add_(0, rows, gradients.to(hidden.dtype))
    if type(rows) is not Tensor or np.bincount(rows.numpy(), minlength=1).max() <= 1:
        return torch.zeros_like(hidden).index_copy_(0, rows, gradients.to(hidden.dtype))
    return torch.zeros_like(hidden, dtype=gradients.dtype).index_add_(0, rows, gradients).to(hidden.dtype)


def _leave_out(
    keep: Tensor | None, gradient: Tensor, hidden: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The rows of a chunk that go on, and their places [k] where some do not.

    On a device where the host may not ask how many are memorised, those are scaled to zero instead.
    """
    if keep is None:
        return gradient, hidden, scale, None
    if keep.device.type != "cpu":
        return gradient, hidden, torch.where(keep, scale, 0.0), None
    kept = torch.nonzero(keep)[:, 0]
    if kept.numel() == keep.numel():
        return gradient, hidden, scale, None
    return gradient[kept], hidden[kept], scale[kept], kept


def _hidden_gradient(
    out: Tensor, gradient: Tensor, head: Tensor, scale: Tensor | None, kept: Tensor | None
) -> None:
    """out [c, H] = scale · gradient @ head in the kept rows, zero in the others."""
    if kept is not None:
        assert scale is not None
        out.zero_().index_copy_(0, kept, torch.mm(gradient, head).mul_(scale[:, None]))
        return
    torch.mm(gradient, head, out=out)
    if scale is not None:
        out.mul_(scale[:, None])
