"""One pass over a chunk of logits, in the implementation that fits the device: chosen once, here.

A row pass turns logits into row statistics and, where a gradient is wanted, overwrites the logits with it.
`TorchRows` is the torch path: every pass over [rows, V] costs on a CPU, so it makes five vectorised ones on
blocks that stay in cache, and leaves the gradient as `scale · buffer` so that the scale is paid on [rows, H]
instead. The mathematics is in reference.py.
"""

import functools
import importlib.util
import math
import os
import threading
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from repsft_fast.stats import PositionStats

MAXIMA_BLOCK = 128  # columns per block maximum: the arg-max and runner-up are then searched in V/128 numbers
SMALL_CHUNK_BYTES = 8 << 20  # logits of a chunk where a quarter of all of them would be less
ONE_CHUNK_SHARE = 16  # on a GPU all logits are one chunk where they take at most this part of the memory,
CHUNK_SHARE = 64  # else a chunk takes this part
# logits handled at once on the torch path, so that they and their softmax stay in cache
CACHE_BLOCK_BYTES = 1 << 21


class RowPass(Protocol):
    """The statistics of N' rows, filled chunk by chunk."""

    def buffer(self, rows: int, dtype: torch.dtype) -> Tensor:
        """[rows, V] of undefined content, for the next chunk's logits."""
        ...

    def chunk(
        self,
        start: int,
        logits: Tensor,  # [c, V], in `buffer`; destroyed
        *,
        gradient: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """[c, V] gradient when wanted; [c] scale still to be multiplied into it, or None."""
        ...

    def kept(self, start: int, stop: int) -> Tensor | None:
        """[stop - start] bool rows with a gradient; None = all of them."""
        ...

    def order(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """[stop - start] int64 rows, those with a gradient first, and [1] int64 how many those are. Asked
        only where `chunk` returns no scale."""
        ...

    def stats(self) -> PositionStats: ...


def default_chunk_bytes(rows: int, vocabulary: int, itemsize: int, device: torch.device) -> int:
    """Bytes of logits held at once, the row pass's own block included. A function of the shapes and the
    device's size alone: what happens to be free at a call must not decide how sums are rounded, and asking
    costs more than the answer is worth.

    CUDA: `gpu_chunk_bytes` of the whole memory. CPU: a quarter of the full logits up to 64 MiB, but at least
    128 rows; where the full logits stay below 32 MiB, 8 MiB beside the block: smaller chunks cost the GEMMs 5
    to 10 % and save next to nothing.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return gpu_chunk_bytes(rows, vocabulary, itemsize, total_bytes=total, room_bytes=total)
    row_bytes = vocabulary * itemsize
    full = rows * row_bytes
    least = SMALL_CHUNK_BYTES + CACHE_BLOCK_BYTES if full < 4 * SMALL_CHUNK_BYTES else 0
    return max(min(full // 4, 64 << 20), 128 * row_bytes, least)


def gpu_chunk_bytes(rows: int, vocabulary: int, itemsize: int, *, total_bytes: int, room_bytes: int) -> int:
    """What one chunk of all rows takes, where that is at most 1/16 of the room; else 1/64 of the total: few
    and large chunks.

    One chunk depends on the shapes alone, so that two rooms which both allow it give the same value and the
    same rounding.
    """
    one = one_chunk_bytes(rows, vocabulary, itemsize)
    return one if one <= room_bytes // ONE_CHUNK_SHARE else max(1, total_bytes // CHUNK_SHARE)


def one_chunk_bytes(rows: int, vocabulary: int, itemsize: int) -> int:
    """Bytes that let `chunk_ranges` put all of up to so many rows into one chunk."""
    row_bytes = vocabulary * itemsize
    return (rows + max(1, CACHE_BLOCK_BYTES // row_bytes)) * row_bytes


def logits_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Of the logits that hidden states of this dtype give: theirs before the kernel, fp32 or fp64 on the
    torch path."""
    if kernel_runs(device, dtype):
        return dtype
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_ranges(rows: int, vocabulary: int, itemsize: int, budget_bytes: int) -> list[tuple[int, int]]:
    """Row ranges of nearly equal size whose logits, with the row pass's own block, fit the budget; one when
    all fit."""
    budget_rows = max(1, budget_bytes // (vocabulary * itemsize))
    per_chunk = budget_rows - block_rows(vocabulary, itemsize, budget_bytes)
    count = -(-rows // per_chunk)
    size = max(1, -(-rows // max(1, count)))
    return [(low, min(low + size, rows)) for low in range(0, rows, size)]


def block_rows(vocabulary: int, itemsize: int, budget_bytes: int) -> int:
    """Rows the torch path handles at once beside a chunk: what stays in cache, and at most a fifth of the
    budget; may be 0."""
    row_bytes = vocabulary * itemsize
    return min(max(1, CACHE_BLOCK_BYTES // row_bytes), budget_bytes // row_bytes // 5)


_local = threading.local()


def drop_workspace() -> None:
    """Give back this thread's buffers."""
    _local.__dict__.clear()


def workspace(name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, columns] of undefined content, valid until the same name is asked for again by this thread.

    Fresh memory costs a CPU a page fault per 4 KiB, about as much as a pass over it, so one buffer is kept
    per name. CUDA's caching allocator does this by itself.
    """
    if device.type != "cpu":
        return torch.empty(rows, columns, dtype=dtype, device=device)
    pool = _local.__dict__
    key = f"{name} {dtype}"
    flat = pool.get(key)
    if flat is None or flat.numel() < rows * columns:
        # a buffer born in inference mode could not be written to in training
        with torch.inference_mode(False):
            flat = pool[key] = torch.empty(rows * columns, dtype=dtype, device=device)
    return flat[: rows * columns].view(rows, columns)


class TorchRows:
    """The row pass in plain torch, fp32 or fp64 logits."""

    def __init__(
        self,
        targets: Tensor,  # [N'] int64
        weights: Tensor,  # [N'] dtype of the logits
        vocabulary: int,
        *,
        softcap: float | None,
        skip_below: float,
        block_rows: int,
    ):
        n = targets.numel()
        self.vocabulary, self.softcap = vocabulary, softcap
        self.skip_below, self.weights = skip_below, weights
        self.outside = (targets < 0) | (targets >= vocabulary)
        self.at = targets.clamp(0, vocabulary - 1)[:, None]
        self.block_rows = max(1, block_rows)
        lines = weights.new_empty(7, n)
        self.target, self.best, self.second, self.peak, self.dot, self.distance, self.miss = lines
        self.first = torch.empty_like(targets)  # where the best of the others is first met

    def buffer(self, rows: int, dtype: torch.dtype) -> Tensor:
        self.whole = workspace(
            "logits", rows + min(self.block_rows, rows), self.vocabulary, dtype, self.weights.device
        )
        return self.whole[self.whole.shape[0] - rows :]

    def chunk(self, start: int, logits: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
        rows = logits.shape[0]
        span = slice(start, start + rows)
        maxima = logits.new_empty(rows, -(-self.vocabulary // MAXIMA_BLOCK))
        candidates = logits.new_empty(rows, MAXIMA_BLOCK)
        block, inside = self.at.new_empty(2, rows, 1).unbind()
        # The softmax of a block of rows is written where the block before it stood, and so ends in the front
        # of the buffer.
        views = (
            logits, self.whole[:rows], self.at[span], self.target[span, None],
            maxima, block, candidates, inside,
            self.best[span, None], self.first[span, None], self.peak[span, None], self.dot[span],
        )  # fmt: skip
        for parts in zip(*(view.split(self.whole.shape[0] - rows) for view in views)):
            self._block(parts, gradient)

        self.target[span].masked_fill_(self.outside[span], math.nan)
        self.second[span] = second_largest(maxima, block, candidates, inside)
        d = self._distance(span)
        self.distance[span] = d
        torch.sigmoid(d, out=self.miss[span])
        return self.whole[:rows], self.weights[span] * self.miss[span] if gradient else None

    def _block(self, views: tuple[Tensor, ...], gradient: bool) -> None:
        """The passes over [b, V]. Of `views` the logits are destroyed, and all but the targets filled:
        [b, V] softmax of the others (the gradient, when wanted), [b, 1] target logit, [b, V / 128] maxima of
        128 columns of the others, [b, 1] the first block with the largest, [b, 128] its columns, [b, 1] the
        place of the largest in it, the largest M', its column, 1 / S', [b] Σ q·(x − M')."""
        x, q, at, target, maxima, block, candidates, inside, best, first, peak, dot = views
        lowest = torch.finfo(x.dtype).min
        if self.softcap is not None:
            x.div_(self.softcap).tanh_().mul_(self.softcap)
        torch.gather(x, 1, at, out=target)
        x.clamp_(min=lowest)  # −inf has no mass either way, but 0 · −inf would be NaN in the dot product
        x.scatter_(1, at, lowest)  # from here on: the others alone
        block_maxima(x, out=maxima)
        torch.argmax(maxima, dim=1, keepdim=True, out=block)
        take_block(x, block, out=candidates)
        torch.max(candidates, dim=1, keepdim=True, out=(best, inside))
        torch.add(inside, block, alpha=MAXIMA_BLOCK, out=first)
        x.sub_(best)  # without it Σ q·x loses what M' − Σ q·x cancels: three times torch's error in entropy
        torch.softmax(x, dim=1, out=q)
        torch.gather(q, 1, first, out=peak)
        torch.sum(x.mul_(q) if self.softcap is None else x * q, dim=1, out=dot)
        if not gradient:
            return
        if self.softcap is None:
            q.scatter_(1, at, -1.0)
        else:
            q.mul_(x.add_(best).div_(self.softcap).square_().neg_().add_(1.0))
            q.scatter_(1, at, (target / self.softcap).square_().sub_(1.0))

    def _distance(self, span: slice) -> Tensor:
        """log of the others' mass minus the target's logit: everything else is a function of it."""
        target = self.target[span]
        return (self.best[span] - target - torch.log(self.peak[span])).masked_fill_(
            target == math.inf, math.nan
        )

    def kept(self, start: int, stop: int) -> Tensor | None:
        return None if self.skip_below <= 0.0 else ~(self.miss[start:stop] < self.skip_below)

    def order(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("rows of the torch path are chosen by `kept`, where counting them is free")

    def stats(self) -> PositionStats:
        d = self.distance
        loss, log_miss = -F.logsigmoid(-d), F.logsigmoid(d)
        others_lead = self.best > self.target
        runner_up = torch.where(others_lead, torch.maximum(self.target, self.second), self.best)
        entropy_of_others = -torch.log(self.peak) - self.dot
        hit = torch.sigmoid(-d)
        entropy = hit * loss.masked_fill(loss == math.inf, 0.0)
        entropy += torch.where(self.miss > 0, self.miss * (entropy_of_others - log_miss), self.miss)
        return PositionStats(
            loss=loss,
            correct=((self.target > self.best) | ((self.target == self.best) & (self.at[:, 0] < self.first)))
            & ~loss.isnan(),
            entropy=entropy,
            top1_probability=torch.where(others_lead, self.miss * self.peak, hit),
            margin=torch.maximum(self.target, self.best) - runner_up,
            log10_miss=log_miss / math.log(10),
        )


def block_maxima(x: Tensor, out: Tensor) -> None:
    """[c, V] → [c, ceil(V / 128)]. One vectorised pass; torch's own arg-max costs twelve of them on a CPU."""
    whole = x.shape[1] // MAXIMA_BLOCK
    if whole:
        torch.amax(
            x[:, : whole * MAXIMA_BLOCK].unflatten(1, (whole, MAXIMA_BLOCK)), dim=2, out=out[:, :whole]
        )
    if whole < out.shape[1]:
        torch.amax(x[:, whole * MAXIMA_BLOCK :], dim=1, out=out[:, whole])


def take_block(x: Tensor, block: Tensor, out: Tensor) -> None:
    """Columns 128·block … 128·block + 127 of every row of x; the lowest number where V ends before."""
    columns = block * MAXIMA_BLOCK + torch.arange(MAXIMA_BLOCK, device=x.device)
    if x.shape[1] % MAXIMA_BLOCK == 0:
        torch.gather(x, 1, columns, out=out)
    else:
        torch.gather(x, 1, columns.clamp_max(x.shape[1] - 1), out=out)
        out.masked_fill_(columns >= x.shape[1], torch.finfo(x.dtype).min)


def second_largest(maxima: Tensor, block: Tensor, candidates: Tensor, inside: Tensor) -> Tensor:
    """[c]: what is largest without the first arg-max, which is in `block` [c, 1] at `inside` [c, 1].

    Overwrites maxima and candidates.
    """
    lowest = torch.finfo(maxima.dtype).min
    other_blocks = maxima.scatter_(1, block, lowest).amax(dim=1)
    return torch.maximum(other_blocks, candidates.scatter_(1, inside, lowest).amax(dim=1))


class KernelRows:
    """The row pass by the Triton kernel: logits in the dtype of hidden, the weight inside the gradient."""

    def __init__(
        self,
        targets: Tensor,  # [N'] int64
        weights: Tensor,  # [N'] fp32
        vocabulary: int,
        *,
        softcap: float | None,
        skip_below: float,
    ):
        n = targets.numel()
        self.targets, self.weights, self.softcap, self.skip_below = targets, weights, softcap, skip_below
        self.vocabulary = vocabulary
        self.table = torch.empty(5, n, dtype=torch.float32, device=targets.device)
        self.flags = torch.empty(2, n, dtype=torch.uint8, device=targets.device)
        self.whole: Tensor | None = None

    def buffer(self, rows: int, dtype: torch.dtype) -> Tensor:
        """One for all chunks of this call (the first is the largest), and its own: it may be read again in
        backward."""
        if self.whole is None:
            self.whole = padded_logits(rows, self.vocabulary, dtype, self.targets.device)
        return self.whole[:rows]

    def chunk(self, start: int, logits: Tensor, *, gradient: bool) -> tuple[Tensor, None]:
        from csrc_triton.cross_entropy import cross_entropy_rows_fwd

        span = slice(start, start + logits.shape[0])
        cross_entropy_rows_fwd(
            logits,
            self.targets[span],
            self.weights[span],
            self.table,
            self.flags,
            start,
            gradient=gradient,
            softcap=self.softcap,
            skip_below=self.skip_below,
        )
        return logits, None

    def kept(self, start: int, stop: int) -> None:
        """The host may not ask how many there are: their gradient rows are zeros, in or out of the GEMMs (see
        `gradients`)."""

    def order(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """As promised by `RowPass`, without a sync."""
        memorised = self.flags[1, start:stop]
        return torch.argsort(memorised, stable=True), (memorised == 0).sum(dtype=torch.int64).reshape(1)

    def stats(self) -> PositionStats:
        loss, entropy, top1_probability, margin, log10_miss = self.table.unbind()
        return PositionStats(loss, self.flags[0] != 0, entropy, top1_probability, margin, log10_miss)


def row_pass(
    targets: Tensor,  # [N'] int64
    weights: Tensor,  # [N'] fp32, or fp64 for fp64 hidden states
    vocabulary: int,
    *,
    softcap: float | None,
    skip_below: float,
    block_rows: int,  # of the torch path, see `block_rows`
) -> RowPass:
    """The implementation for this device and dtype."""
    if kernel_runs(targets.device, weights.dtype):
        return KernelRows(targets, weights, vocabulary, softcap=softcap, skip_below=skip_below)
    return TorchRows(
        targets, weights, vocabulary, softcap=softcap, skip_below=skip_below, block_rows=block_rows
    )


def kernel_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether logits of this device and dtype go through the Triton kernel (fp64 never does)."""
    return dtype != torch.float64 and kernel_available(device.type, os.environ.get("TRITON_INTERPRET") == "1")


@functools.cache
def kernel_available(device_type: str, interpreted: bool) -> bool:
    """On CUDA with triton installed, or anywhere when Triton interprets its kernels (tests)."""
    if device_type != "cuda" and not interpreted:
        return False
    return importlib.util.find_spec("triton") is not None


def padded_logits(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, V] of undefined content for the Triton kernel: its rows begin at 16-byte borders."""
    from csrc_triton.launch import padded_columns

    return torch.empty(rows, padded_columns(vocabulary), dtype=dtype, device=device)[:, :vocabulary]
