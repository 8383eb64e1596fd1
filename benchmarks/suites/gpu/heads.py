"""Part F: the fused head against its peers and against the three products that any dense head must
compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness import cases, counting, peers, timing
from benchmarks.suites.gpu.goals import Card, Found, Goal, Read
from benchmarks.suites.gpu.session import Session

OP, BARE, EAGER, LIGER = "head", "three bare GEMMs", "torch eager, full logits", "Liger, default chunks"
WITH_METRICS, METRICS = "head, with the paper's metrics", "paper A's metrics"
RIVALS = (
    EAGER, LIGER, "Liger, default chunks, fp32 sum", "Liger, chunk_mem_const=16", "cut-cross-entropy",
    "TRL fused head", "F.linear_cross_entropy", "QuACK", "Unsloth-zoo",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """Operands of one head. seconds: at most, on an H100, compiling and checking the peers included."""

    name: str
    n: int
    h: int
    v: int
    seconds: float = 0.0

    @property
    def shape(self) -> dict[str, int | float | str]:
        return {"head": self.name, "N": self.n, "H": self.h, "V": self.v}


LLAMA, QWEN, QWEN_1K = "Llama-3-8B 8k", "Qwen3-0.6B 8k", "Qwen3-0.6B 1k"
LLAMA_32K = "Llama-3-8B 32k"  # last: its slowest peer takes most of a second a call
POINTS = (
    Point(LLAMA, 8192, 4096, 128256, 20.0),
    Point(QWEN, 8192, 1024, 151936, 10.0),
    Point(QWEN_1K, 1024, 1024, 151936, 6.0),
    Point(LLAMA_32K, 32768, 4096, 128256, 25.0),
)
INTERPRETED = Point(LLAMA, 16, 16, 300)  # of rehearsals whose kernels Triton interprets
TOYS = (
    Point(LLAMA, 64, 32, 999),
    Point(QWEN, 64, 16, 1500),
    Point(QWEN_1K, 8, 16, 1500),
    Point(LLAMA_32K, 128, 32, 999),
)


def run(session: Session) -> None:
    dtype, points = (
        training_dtype(session),
        {point.name: point for point in (TOYS if session.rehearsal else POINTS)},
    )
    if session.blocked("the fused head", ("head", name_of(dtype)), ("row kernel", name_of(dtype))):
        return
    for name in (LLAMA, QWEN, QWEN_1K):
        _try(session, points[name], lambda point: measure(session, point, dtype, RIVALS))
    _try(session, points[LLAMA], lambda point: peak(session, point, dtype), "peak", 2.0)
    metrics = lambda point: measure(session, point, dtype, (EAGER, METRICS), op=WITH_METRICS)  # noqa: E731
    _try(session, points[QWEN], metrics, METRICS, 6.0)
    _try(
        session, points[LLAMA_32K], lambda point: measure(session, point, dtype, ("cut-cross-entropy", LIGER))
    )


def _try(
    session: Session,
    point: Point,
    what: Callable[[Point], Any],
    name: str = "head",
    needs_s: float | None = None,
) -> None:
    needs_s = point.seconds if needs_s is None else needs_s
    if not session.late(f"{name} {point.name}", 0.0 if session.rehearsal else needs_s):
        with session.attempt(f"{name} {point.name}"):
            what(point)


def training_dtype(session: Session) -> torch.dtype:
    return torch.float32 if session.device == "cpu" else torch.bfloat16


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).split(".")[-1]


def one_chunk(point: Point, dtype: torch.dtype) -> int:
    """Bytes that hold all logits at once, with room for the row pass's own block."""
    return 2 * point.n * point.v * dtype.itemsize


def measure(
    session: Session,
    point: Point,
    dtype: torch.dtype,
    rivals: tuple[str, ...],
    *,
    op: str = OP,
    masked: float = 0.0,
    budget_s: float | None = None,
) -> dict[str, list[float]]:
    """Ours in one chunk, the bare products and these peers on the same operands; forward and backward."""
    operands = cases.head_operands(point.n, point.h, point.v, masked, dtype, session.device)
    calls: dict[str, Callable[[], Any]] = {
        "ours": peers.step(peers.ours(chunk_bytes=one_chunk(point, dtype)), *operands),
        BARE: bare_gemms(*operands),
    }
    found, reasons = peers.usable(*operands, compiling=False, names=rivals)
    for rival, reason in reasons.items():
        session.leave_out(f"{rival} at {point.name}", reason)
    trained = int((operands[2] != peers.IGNORE).sum())
    return session.measure(
        op, calls | found, {**point.shape, "masked": masked}, dtype=name_of(dtype),
        budget_s=point.seconds / 2 if budget_s is None else budget_s, flops=6 * trained * point.h * point.v,
    )  # fmt: skip


def bare_gemms(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> Callable[[], Any]:
    """What any dense head must compute: this machine's own floor, on the trained rows."""
    x, w = hidden.detach()[targets != peers.IGNORE], head.detach()
    logits = torch.empty(len(x), len(w), dtype=x.dtype, device=x.device)
    grad_x, grad_w = torch.empty_like(x), torch.empty_like(w)

    def call() -> None:
        torch.mm(x, w.T, out=logits)
        torch.mm(logits, w, out=grad_x)
        torch.mm(logits.T, x, out=grad_w)

    return call


def peak(session: Session, point: Point, dtype: torch.dtype) -> None:
    """Peak bytes of ours over what it may take: one chunk of logits and the head gradient, here in fp32."""
    operands = _, weight, _ = cases.head_operands(point.n, point.h, point.v, 0.0, dtype, session.device)
    weight.grad_dtype = torch.float32
    call = peers.step(peers.ours(chunk_bytes=one_chunk(point, dtype)), *operands)
    call()
    taken, allowed = (
        counting.peak_bytes(call, session.device),
        point.v * (dtype.itemsize * point.n + 4 * point.h),
    )
    times = timing.interleave({"ours": call}, device=session.device, rounds=2, warmup=0)["ours"]
    session.record(
        "head, peak", "ours", times, point.shape, dtype=name_of(dtype), peak_bytes=taken,
        allowed_bytes=allowed, share_of_allowed=taken / allowed,
    )  # fmt: skip


def fastest_peer(found: Found, **shape: Any) -> float | None:
    """Milliseconds of the fastest implementation that is neither ours nor the bare products."""
    times = [r["p50_ms"] for name, r in found.all(OP, **shape).items() if name not in ("ours", BARE, METRICS)]
    return min(times, default=None)


def _against_peers(head: str) -> Read:
    def read(found: Found) -> float | None:
        own, best = found.p50(OP, "ours", head=head), fastest_peer(found, head=head)
        return None if own is None or best is None else own / best

    return read


def floor_ms(card: Card, name: str) -> float | None:
    """Three products, one read and one read-write of the logits: 34.8 ms for LLAMA at 790 TFLOP/s and 3.0
    TB/s."""
    point = next(point for point in POINTS if point.name == name)
    products, traffic = (
        card.flops_ms(6 * point.n * point.h * point.v),
        card.bytes_ms(3 * 2 * point.n * point.v),
    )
    return None if products is None or traffic is None else products + traffic


def _ratio(over: str, under: str, head: str) -> Read:
    return lambda found: found.ratio(OP, over, under, head=head)


def _metrics_cost(found: Found) -> float | None:
    """What the paper's metrics add to full logits, over our whole head."""
    with_them, without, own = (found.p50(WITH_METRICS, name) for name in (METRICS, EAGER, "ours"))
    return None if with_them is None or without is None or own is None else (with_them - without) / own


def _goals_of(head: str, bare_most: float, bare_predicted: float) -> tuple[Goal, ...]:
    return (
        Goal(
            f"{head}: ours, ms",
            lambda f: f.p50(OP, "ours", head=head),
            predicted=lambda card: floor_ms(card, head),
        ),
        Goal(
            f"{head}: ours / bare GEMMs",
            _ratio("ours", BARE, head),
            most=bare_most,
            predicted=lambda card: bare_predicted,
        ),
        Goal(f"{head}: ours / fastest peer", _against_peers(head), most=1.05),
    )


# The ratios to bare products follow from a row kernel of 2.6 to 3.0 ms at 8,192 × 128,256, by its instruction
# count.
GOALS = (
    *_goals_of(LLAMA, 1.11, 1.09),
    Goal(f"{LLAMA}: Liger default / ours", _ratio(LIGER, "ours", LLAMA), least=1.5),
    *_goals_of(QWEN, 1.3, 1.27),
    Goal(f"{QWEN_1K}: ours / fastest peer", _against_peers(QWEN_1K), most=1.05),
    Goal(f"{QWEN_1K}: Liger default / ours", _ratio(LIGER, "ours", QWEN_1K), least=5.0),
    Goal(
        "head peak / (one chunk + fp32 gradient)",
        lambda found: found.value("head, peak", "ours", "share_of_allowed"), most=1.1,
        predicted=lambda card: 1.03,
    ),
    Goal("paper A's metrics: their cost / our head", _metrics_cost, least=1.0),
    Goal(f"{LLAMA_32K}: ours / fastest peer", _against_peers(LLAMA_32K), most=1.05),
)  # fmt: skip
