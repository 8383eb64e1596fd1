"""Exact statistics of trained tokens: per row as they leave the loss, and summed per task or per sample.

Sums are kept in fixed point (int64): integer addition is associative, so equal row statistics give bit-equal
sums in any order, on any number of ranks (law 11), and atomics cannot disturb them. They are read as float64.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Column → number of fractional bits. The largest value a token may add is clamped to 2**(CLAMP_BITS) before
# scaling. At 2**32 a row of 2**20 tokens with loss 2**10 each still fits (62 bits).
COLUMNS = (
    "total",
    "correct",
    "nonfinite",
    "loss",
    "loss_squared",
    "entropy",
    "top1_probability",
    "margin",
    "log10_miss",
)
FRACTION_BITS = {
    "loss": 32,
    "loss_squared": 24,
    "entropy": 32,
    "top1_probability": 32,
    "margin": 24,
    "log10_miss": 32,
}
CLAMP_BITS = {
    "loss": 12,
    "loss_squared": 20,
    "entropy": 8,
    "top1_probability": 1,
    "margin": 16,
    "log10_miss": 8,
}
K = len(COLUMNS)
_BOUNDS = [2.0 ** CLAMP_BITS[name] for name in FRACTION_BITS]
_SCALES = [2.0**bits for bits in FRACTION_BITS.values()]


@dataclass(frozen=True)
class PositionStats:
    """Statistics of the N' trained positions of one row. None of them requires grad."""

    loss: Tensor  # [N'] fp32, -log p(target), unweighted
    correct: Tensor  # [N'] bool, arg-max is the target (ties as torch.argmax: the first)
    entropy: Tensor  # [N'] fp32, nats
    top1_probability: Tensor  # [N'] fp32
    margin: Tensor  # [N'] fp32, top-1 minus top-2 logit
    # [N'] fp32, log10(1 - p(target)); -inf only when p is exactly 1 (then clamped in sums)
    log10_miss: Tensor

    def sum_by(self, segments: Tensor, num_segments: int) -> TokenStats:
        """Sum per segment. segments: [N'] int64 in 0 … num_segments-1. No host sync; order-independent, bit
        for bit."""
        sums = TokenStats.zeros(num_segments, self.loss.device)
        self.add_to(sums.table, segments)
        return sums

    def add_to(self, table: Tensor, segments: Tensor, owners: Tensor | None = None) -> None:
        """`sum_by`, added to a table [n, K] int64 that is there: on a GPU with Triton one launch, and nothing
        is allocated. owners: [S] int64, the table's line of each segment; None: segments are lines."""
        if kernel_sums(self.loss.device.type):
            from csrc_triton.token_sums import add_sums, takes

            values = (self.loss, self.entropy, self.top1_probability, self.margin, self.log10_miss)
            if takes(values):
                add_sums(table, values, self.correct, segments, owners)
                return
        self._add_plain(table, segments if owners is None else owners.index_select(0, segments))

    def _add_plain(self, table: Tensor, segments: Tensor) -> None:
        device, n = self.loss.device, self.loss.numel()
        finite = self.loss.abs() < math.inf
        # All columns at once, in the order of FRACTION_BITS: this runs for every row, and on a GPU of a small
        # model the host's launches are what a row takes.
        sums = torch.stack(
            (self.loss, self.loss, self.entropy, self.top1_probability, self.margin, self.log10_miss)
        ).double()
        lines = sums.unbind()
        lines[1].square_()  # of the loss, in fp64
        sums.nan_to_num_(nan=0.0)
        torch._foreach_clamp_min_(lines, [-bound for bound in _BOUNDS])
        torch._foreach_clamp_max_(lines, _BOUNDS)
        torch._foreach_mul_(lines, _SCALES)
        sums.round_().masked_fill_(~finite, 0.0)
        columns = torch.empty(n, K, dtype=torch.int64, device=device)
        columns[:, 0].fill_(1)
        columns[:, 1] = self.correct
        columns[:, 2] = ~finite
        columns[:, 3:] = sums.T
        table.index_add_(0, segments, columns)


@functools.cache
def kernel_sums(device_type: str) -> bool:
    """Whether sums on such a device are the kernel's (`csrc_triton/token_sums.py`)."""
    return device_type == "cuda" and importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class TokenStats:
    """Sums over trained tokens, one line per task or sample. Adding two is exact."""

    table: Tensor  # [n, K] int64: counts as they are, sums in fixed point (see FRACTION_BITS)

    @staticmethod
    def zeros(n: int, device: torch.device | str = "cpu") -> TokenStats:
        return TokenStats(torch.zeros(n, K, dtype=torch.int64, device=device))

    def __add__(self, other: TokenStats) -> TokenStats:
        return TokenStats(self.table + other.table)

    def column(self, name: str) -> Tensor:
        """[n] int64 for a count, fp64 for a sum. Stays on the device."""
        raw = self.table[:, COLUMNS.index(name)]
        return raw if name not in FRACTION_BITS else raw.double() / 2.0 ** FRACTION_BITS[name]

    @property
    def total(self) -> Tensor:
        return self.column("total")

    @property
    def correct(self) -> Tensor:
        return self.column("correct")

    @property
    def nonfinite(self) -> Tensor:
        return self.column("nonfinite")

    @property
    def loss(self) -> Tensor:
        """[n] fp64 sum of losses; meaningless where `nonfinite` is not 0: use `mean`, which says NaN
        there."""
        return self.column("loss")

    @property
    def all_correct(self) -> Tensor:
        """[n] bool, every trained token of the line right (and at least one trained)."""
        return (self.total > 0) & (self.correct == self.total)

    def mean(self, name: str) -> Tensor:
        """[n] fp64 mean per trained token; NaN where nothing was trained or anything was not finite."""
        value = self.column(name).double() / self.total.double()
        return value.masked_fill(self.nonfinite > 0, float("nan")) if name in FRACTION_BITS else value
