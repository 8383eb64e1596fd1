"""Part H: rows that need not be computed. Masked ones leave before the first product, memorised ones before
the other two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import cases, peers
from benchmarks.suites.gpu.goals import Card, Found, Goal
from benchmarks.suites.gpu.heads import (
    BARE,
    INTERPRETED,
    POINTS,
    Point,
    measure,
    name_of,
    one_chunk,
    training_dtype,
)
from benchmarks.suites.gpu.session import Session

SKIP_BELOW = 2.0**-12
DENSE, ZEROS, SKIPPING = "ours", "ours, skip_below=2^-12", "ours, skip_below=2^-12, kept_share"
MASKED, MEMORISED = "head, masked", "head, memorised"


def run(session: Session) -> None:
    dtype = training_dtype(session)
    name, at = name_of(dtype), INTERPRETED if session.rehearsal else POINTS[0]
    needs_s = 0.0 if session.rehearsal else 4.0
    for share in (0.5, 0.0) if session.rehearsal else (0.5, 0.0, 0.9):
        what = f"masked {share:.0%}"
        if session.blocked(what, ("head", name), ("row kernel", name)) or session.late(what, needs_s):
            continue
        with session.attempt(what):
            measure(session, at, dtype, (), op=MASKED, masked=share, budget_s=2.0)
    for share in (0.8, 0.0) if session.rehearsal else (0.8, 0.0, 0.5, 0.95):
        what = f"memorised {share:.0%}"
        if session.blocked(what, ("head", name), ("kept rows", name)) or session.late(what, needs_s):
            continue
        with session.attempt(what):
            memorised(session, at, dtype, share)


def memorised(session: Session, point: Point, dtype: torch.dtype, share: float) -> None:
    """Dense, with zeros in the products, and with the products sized for the rows that were guessed to be
    kept."""
    hidden, weight, targets = cases.head_operands(point.n, point.h, point.v, 0.0, dtype, session.device)
    hidden = memorise(hidden, weight, targets, share)
    guess, chunk = guessed(share), one_chunk(point, dtype)

    def call(skip_below: float = 0.0, kept_share: float = 1.0) -> Callable[[], Any]:
        return peers.step(peers.ours(skip_below, kept_share, chunk), hidden, weight, targets)

    calls = {SKIPPING: call(SKIP_BELOW, guess), ZEROS: call(SKIP_BELOW), DENSE: call()}
    session.measure(
        MEMORISED,
        calls,
        {**point.shape, "memorised": share, "kept_share": guess},
        dtype=name_of(dtype),
        budget_s=2.5,
    )


def guessed(share: float) -> float:
    """The kept share as a run guesses it from an earlier update, with room."""
    return round(min(1.0, 1.1 * (1 - share) + 0.02), 4)


def memorise(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, share: float) -> torch.Tensor:
    """Rows whose target the head is sure of: the hidden state points along the target's own row, far out."""
    with torch.no_grad():
        count = round(share * targets.numel())
        rows = torch.randperm(targets.numel(), generator=torch.Generator().manual_seed(1))[:count].to(
            hidden.device
        )
        direction = torch.nn.functional.normalize(head[targets[rows]].float(), dim=1)
        peaked = hidden.detach().clone()
        peaked[rows] = (40.0 * direction).to(hidden.dtype)
    return peaked.requires_grad_()


def _half(found: Found) -> float | None:
    whole, half = (found.p50(MASKED, DENSE, masked=share) for share in (0.0, 0.5))
    return None if whole is None or half is None else whole / half


def _skipped(found: Found) -> float | None:
    return found.ratio(MEMORISED, DENSE, SKIPPING, memorised=0.8)


def _skipped_floor(card: Card) -> float | None:
    """With 80 % memorised: products of all rows once and of the guessed ones twice, the logits read and in
    part written, and one copy of the kept rows."""
    point, kept = POINTS[0], guessed(0.8)
    n, h, v = point.n, point.h, point.v
    dense_products, products = card.flops_ms(6 * n * h * v), card.flops_ms(2 * n * h * v * (1 + 2 * kept))
    dense_bytes, some_bytes = (
        card.bytes_ms(6 * n * v),
        card.bytes_ms(2 * n * v * (2 + kept) + 4 * n * kept * v),
    )
    if dense_products is None or products is None or dense_bytes is None or some_bytes is None:
        return None
    return (dense_products + dense_bytes) / (products + some_bytes)


GOALS = (
    Goal("half the rows masked: all / half", _half, least=1.9, predicted=lambda c: 2.0),
    Goal("90 % masked: ours / bare GEMMs", lambda f: f.ratio(MASKED, DENSE, BARE, masked=0.9)),
    Goal("80 % memorised: dense / skipping", _skipped, least=1.9, predicted=_skipped_floor),
    Goal(
        "nothing memorised: skipping / dense",
        lambda f: f.ratio(MEMORISED, SKIPPING, DENSE, memorised=0.0),
        most=1.05,
    ),
)
