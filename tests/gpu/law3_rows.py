"""Row statistics and gradient as plain torch makes them, and pieces of rows for the row kernel."""

import math

import torch
import torch.nn.functional as F

from csrc_triton.cross_entropy import cross_entropy_rows_fwd
from csrc_triton.launch import padded_columns
from repsft_fast.ops.reference import cross_entropy_rows
from tests.gpu.places import Law3, Place, same_bits
from tests.helpers.plain_rows import OUTPUTS, capped, plain_rows


class Piece:
    """[rows, V] logits, half of whose targets are the arg-max, in memory whose padding and outputs start as
    NaN."""

    def __init__(
        self,
        place: Place,
        dtype: torch.dtype,
        rows: int,
        vocabulary: int,
        *,
        spread: float = 3.0,
        seed: int = 0,
    ):
        draw = torch.Generator(place.device).manual_seed(seed)
        self.device, self.dtype, self.vocabulary = place.device, dtype, vocabulary
        self.logits = (spread * torch.randn(rows, vocabulary, generator=draw, device=place.device)).to(dtype)
        drawn = torch.randint(vocabulary, (rows,), generator=draw, device=place.device)
        learned = torch.rand(rows, generator=draw, device=place.device) < 0.5
        self.targets = torch.where(learned, self.logits.argmax(1), drawn)
        self.weights = torch.rand(rows, generator=draw, device=place.device) + 0.5

    def kernel(self, *, gradient: bool = True, **options) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(table [5, rows], flags [2, rows] bool, logits or gradient [rows, V]); the padding is looked at."""
        rows, vocabulary = self.logits.shape
        buffer = torch.full(
            (rows, padded_columns(vocabulary)), math.nan, dtype=self.dtype, device=self.device
        )
        inner = buffer[:, :vocabulary]
        inner.copy_(self.logits)
        table = torch.full((5, rows + 2), math.nan, device=self.device)
        flags = torch.full((2, rows + 2), 7, dtype=torch.uint8, device=self.device)
        cross_entropy_rows_fwd(
            inner, self.targets, self.weights, table, flags, 1, gradient=gradient, **options
        )
        assert table[:, [0, -1]].isnan().all(), "columns beside the chunk were written"
        assert (flags[:, [0, -1]] == 7).all(), "columns beside the chunk were written"
        if gradient:
            assert not buffer[:, vocabulary:].any(), "the padding of a gradient is not zero"
        return table[:, 1:-1], flags[:, 1:-1].bool(), inner

    def truth(self, softcap: float | None):
        """Statistics and gradient in float64."""
        return cross_entropy_rows(self.logits.double(), self.targets, self.weights.double(), softcap=softcap)[
            1:
        ]

    def plain_gradient(self, softcap: float | None) -> torch.Tensor:  # in the dtype of the logits
        leaf = self.logits.clone().requires_grad_()
        (
            F.cross_entropy(capped(leaf.float(), softcap), self.targets, reduction="none") * self.weights
        ).sum().backward()
        return leaf.grad


def judge(law: Law3, piece: Piece, softcap: float | None, tau: float) -> None:
    """One piece: every output into `law`, counts exact, memorised rows flagged and zero, all else as without
    a threshold."""
    stats, gradient = piece.truth(softcap)
    plain = plain_rows(capped(piece.logits.float(), softcap), piece.targets)
    table, flags, ours = piece.kernel(softcap=softcap)
    law.add("gradient", ours, piece.plain_gradient(softcap), gradient)
    # The statistics are fp32 whatever the logits are. Plain torch in bf16 would err by 2⁻⁹: beside fp32 there
    # is room.
    factor = 1.5 if piece.dtype == torch.float32 else 4.0
    for index, name in enumerate(OUTPUTS):
        assert table[index].isfinite().all(), name
        law.add(name, table[index], plain[name], getattr(stats, name), factor)
    # a cap's own rounding may make one
    ties = torch.zeros_like(stats.correct) if softcap is None else stats.margin < 1e-5
    assert torch.equal(flags[0] | ties, stats.correct | ties), "counts are not exact"
    assert not flags[1].any(), "rows are memorised at a threshold of 0"

    log_tau = math.log10(tau)
    near = (stats.log10_miss - log_tau).abs() < 1e-4
    again, marked, left = piece.kernel(softcap=softcap, skip_below=tau)
    memorised = marked[1]
    assert torch.equal(memorised | near, (stats.log10_miss < log_tau) | near), "rows memorised"
    assert same_bits(again, table)
    assert torch.equal(marked[0], flags[0])
    assert not left[memorised].any()
    assert same_bits(left[~memorised], ours[~memorised])
