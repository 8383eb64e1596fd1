"""Part G: the row kernel alone, where the head's gradient is finished, and grouped heads as they are against
expanded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks.harness import cases, peers
from benchmarks.suites.gpu.goals import Card, Found, Goal
from benchmarks.suites.gpu.heads import INTERPRETED, POINTS, Point, name_of, one_chunk, training_dtype
from benchmarks.suites.gpu.session import Session

OP, STATISTICS, LOSS_ONLY, WHOLE = "row kernel", "all statistics", "loss only", "whole head"
CANDIDATES = ((2048, 8), (4096, 16), (4096, 8), (1024, 2))  # (block, warps) beside row_block's own 2,048 on 4
NATIVE, EXPANDED = "grouped heads as they are", "grouped heads expanded"


def run(session: Session) -> None:
    dtype = training_dtype(session)
    name, at = name_of(dtype), INTERPRETED if session.rehearsal else POINTS[0]
    points: tuple[tuple[str, str, float, Callable[[], None]], ...] = (
        ("statistics", "row kernel", 3.0, lambda: statistics(session, at, dtype)),
        ("head finished in backward", "head", 4.0, lambda: finished(session, at, dtype)),
        ("grouped heads", "attention", 2.0, lambda: grouped_heads(session, dtype)),
        ("block candidates", "row kernel", 3.0, lambda: candidates(session, at, dtype)),
    )
    for what, operation, needs_s, point in points:
        if session.blocked(what, (operation, name)) or session.late(
            what, 0.0 if session.rehearsal else needs_s
        ):
            continue
        with session.attempt(what):
            point()


def kernel_call(session: Session, point: Point, dtype: torch.dtype) -> Callable[[bool], Callable[[], Any]]:
    """`call(statistics)`: the row kernel in place over [N, V] logits. It overwrites them with their gradient,
    whose rows take the same reads, exponentials and writes the next time."""
    from csrc_triton.cross_entropy import cross_entropy_rows_fwd
    from repsft_fast.ops import row_pass

    hidden, weight, targets = cases.head_operands(point.n, point.h, point.v, 0.0, dtype, session.device)
    n, device = point.n, torch.device(session.device)
    logits = row_pass.padded_logits(n, point.v, dtype, device)
    with torch.no_grad():
        torch.mm(hidden, weight.T, out=logits)
    weights, table = torch.full((n,), 1 / n, device=device), torch.empty(5, n, device=device)
    flags = torch.empty(2, n, dtype=torch.uint8, device=device)

    def call(statistics: bool) -> Callable[[], Any]:
        return lambda: cross_entropy_rows_fwd(
            logits, targets, weights, table, flags, 0, gradient=True, statistics=statistics
        )

    return call


def statistics(session: Session, point: Point, dtype: torch.dtype) -> None:
    """The row kernel with all its statistics and with none but the loss, beside the whole head."""
    if session.device == "cpu" and not _interpreted():
        session.leave_out("statistics", "the row kernel runs on a GPU or in Triton's interpreter")
        return
    call = kernel_call(session, point, dtype)
    operands = cases.head_operands(point.n, point.h, point.v, 0.0, dtype, session.device)
    whole = peers.step(peers.ours(chunk_bytes=one_chunk(point, dtype)), *operands)
    calls = {STATISTICS: call(True), LOSS_ONLY: call(False), WHOLE: whole}
    moved = 3 * point.n * point.v * dtype.itemsize
    session.measure(OP, calls, point.shape, dtype=name_of(dtype), budget_s=3.0, moved_bytes=moved)


def candidates(session: Session, point: Point, dtype: torch.dtype) -> None:
    """The kernel as it is launched against other blocks, each compiled once. A winner would be a change of
    the launcher."""
    import csrc_triton.cross_entropy as module

    if session.device == "cpu" and not _interpreted():
        session.leave_out("block candidates", "the row kernel runs on a GPU or in Triton's interpreter")
        return
    call = kernel_call(session, point, dtype)(True)
    calls: dict[str, Callable[[], Any]] = {"as launched": call}
    for block, warps in CANDIDATES[:1] if session.rehearsal else CANDIDATES:

        def other(block: int = block, warps: int = warps) -> None:
            with mock.patch.object(module, "row_block", return_value=(block, warps)):
                call()

        try:
            other()
        # a candidate that does not compile or launch must not take the others with it
        except Exception as error:
            session.leave_out(
                f"block {block} on {warps} warps", f"{type(error).__name__}: {str(error)[:100]}"
            )
            continue
        calls[f"block {block} on {warps} warps"] = other
    moved = 3 * point.n * point.v * dtype.itemsize
    session.measure(
        "row kernel, blocks", calls, point.shape, dtype=name_of(dtype), budget_s=3.0, moved_bytes=moved
    )


def finished(session: Session, point: Point, dtype: torch.dtype) -> None:
    """One chunk's head gradient, made in backward from scaled hidden states, against made at once, scaled and
    cast."""
    from repsft_fast.ops import row_pass

    if not row_pass.kernel_runs(torch.device(session.device), dtype):
        session.leave_out(
            "head finished in backward", "the torch path finishes at once and reads the scale for free"
        )
        return
    calls, flops = finishing_calls(session.device, point, dtype), 6 * point.n * point.h * point.v
    session.measure("head, finished", calls, point.shape, dtype=name_of(dtype), budget_s=4.0, flops=flops)


def finishing_calls(device: str, point: Point, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    from repsft_fast.ops import products

    hidden, weight, targets = cases.head_operands(point.n, point.h, point.v, 0.0, dtype, device)
    loss = peers.ours(chunk_bytes=one_chunk(point, dtype))

    def step(waits: bool, scale: float) -> Callable[[], Any]:
        def call() -> None:
            hidden.grad = weight.grad = None
            with mock.patch.object(products, "may_wait", products.may_wait if waits else lambda *_: False):
                total = loss(hidden, weight, targets)
            (total if scale == 1.0 else total * scale).backward()

        return call

    return {
        f"finished {when}, scale {scale:.2f}": step(when == "in backward", scale)
        for scale in (1.0, 1 / 3)
        for when in ("in backward", "at once")
    }


def grouped_heads(session: Session, dtype: torch.dtype) -> None:
    """Attention of one Qwen3-0.6B layer over 4 × 2,048 tokens, forward and backward: 16 heads over 8, or over
    8 made 16; and by every flash-attn package that is here and is seen to compute the right thing."""
    tokens, heads, kv, dim, segments = (64, 4, 2, 16, 4) if session.rehearsal else (8192, 16, 8, 128, 4)
    generator = torch.Generator(session.device).manual_seed(0)

    def draw(count: int) -> torch.Tensor:
        values = torch.randn(tokens, count, dim, generator=generator, device=session.device)
        return values.to(dtype).requires_grad_()

    q, k, v = draw(heads), draw(kv), draw(kv)
    borders = torch.arange(0, tokens + 1, tokens // segments, dtype=torch.int32, device=session.device)
    attend = _varlen(borders, tokens // segments) if session.device == "cuda" else _plain(tokens // segments)
    upstream = torch.ones_like(q)

    def step(expand: bool) -> Callable[[], Any]:
        def call() -> None:
            q.grad = k.grad = v.grad = None
            key, value = (x.repeat_interleave(heads // kv, dim=1) for x in (k, v)) if expand else (k, v)
            attend(q, key, value).backward(upstream)

        return call

    calls = {NATIVE: step(False), EXPANDED: step(True)}
    calls |= packages(q, k, v, upstream, borders, tokens // segments)
    shape = {"tokens": tokens, "heads": heads, "kv_heads": kv, "head_dim": dim, "segments": segments}
    pairs = tokens * (tokens // segments + 1) // 2  # of positions and the keys before them
    session.measure(
        "attention, grouped",
        calls,
        shape,
        dtype=name_of(dtype),
        budget_s=2.0,
        flops=int(3.5 * 4 * heads * dim * pairs),
    )


def packages(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    upstream: torch.Tensor,
    borders: torch.Tensor,
    longest: int,
) -> dict[str, Callable[[], Any]]:
    """The same step by each; none where none can be had."""
    from repsft_fast.ops import flash
    from repsft_fast.ops.attention_choice import why_not
    from repsft_fast.ops.scores import Rule

    width = q.shape[-1]

    def step(has: flash.Kernels) -> Callable[[], Any]:
        def call() -> None:
            q.grad = k.grad = v.grad = None
            flash.run(has, q, k, v, borders, longest, Rule(width**-0.5)).backward(upstream)

        return call

    here = [name for name in flash.PACKAGES if why_not(name, q.device, width) is None]
    return {name: step(flash.kernels(name, flash.major_of(q.device))) for name in here}


def _varlen(borders: torch.Tensor, longest: int) -> Callable[..., torch.Tensor]:
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    # torch ≥ 2.12
    named = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    causal: dict[str, Any] = {"window_size": (-1, 0), **named}
    return lambda q, k, v: varlen_attn(q, k, v, borders, borders, longest, longest, **causal)  # type: ignore[return-value]


def _plain(length: int) -> Callable[..., torch.Tensor]:
    """The same on a CPU, segments as a batch."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        parts = [x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v)]
        output = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        return output.transpose(1, 2).flatten(0, 1)

    return attend


def _interpreted() -> bool:
    from repsft_fast.ops import row_pass

    return row_pass.kernel_runs(torch.device("cpu"), torch.float32)


def _cost(found: Found) -> float | None:
    everything, loss, whole = (found.p50(OP, name) for name in (STATISTICS, LOSS_ONLY, WHOLE))
    return None if everything is None or loss is None or whole is None else (everything - loss) / whole


def _best_candidate(found: Found) -> float | None:
    made = found.all("row kernel, blocks")
    own = made.pop("as launched", None)
    return None if own is None or not made else min(r["p50_ms"] for r in made.values()) / own["p50_ms"]


def _kernel_ms(card: Card) -> float | None:
    """By its instruction count 2.6 to 3.0 ms on both cards: it is bound by issue, not by its 2.1 ms (H100) of
    traffic."""
    return card.of_kind(H100=2.8, H200=2.8)


def _fa3(card: Card) -> float | None:
    """Published speeds on Hopper, forward and backward: 1.9 × FA2's kernels, which varlen has inside."""
    return card.of_kind(H100=0.53, H200=0.53)


def _finished(found: Found) -> float | None:
    return found.ratio("head, finished", "finished in backward, scale 1.00", "finished at once, scale 1.00")


GOALS = (
    Goal("row kernel 8,192 × 128,256, ms", lambda found: found.p50(OP, STATISTICS), predicted=_kernel_ms),
    Goal("statistics: their cost / our whole head", _cost, most=0.02),
    # 4.2 GB of scaling and 3.2 GB of casting beside 33 ms of products
    Goal("head finished in backward / at once", _finished, most=0.97, predicted=lambda card: 0.95),
    Goal(
        "grouped heads as they are / expanded",
        lambda f: f.ratio("attention, grouped", NATIVE, EXPANDED),
        most=0.97,
    ),
    Goal(
        "attention, flash3 / varlen",
        lambda f: f.ratio("attention, grouped", "flash3", NATIVE),
        predicted=_fa3,
    ),
    Goal(
        "attention, flash4 / varlen",
        lambda f: f.ratio("attention, grouped", "flash4", NATIVE),
        predicted=_fa3,
    ),
    Goal("best other block / as launched", _best_candidate),
)
