"""What is gated without a GPU: small, fast, the same work on every machine.

`CASES` name a call and what is counted of it; `RATIOS` name a call and its yardstick, timed side by side in
one run. The pytest-benchmark suites time the same cases.
"""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import counting, peers
from benchmarks.harness.timing import Call

METRICS = ("operations", "syncs", "peak_bytes")


@dataclass(frozen=True)
class Case:
    build: Callable[[], Call]
    metrics: tuple[str, ...] = METRICS


def head_operands(
    n: int = 256, h: int = 64, v: int = 4096, masked: float = 0.0, dtype=torch.float32, device="cpu"
) -> tuple:
    """(hidden [n, h], head [v, h], targets [n]) with exactly round(masked · n) untrained rows, seeded."""
    # drawn where it is used: half a billion normals take a CPU seconds
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(n, h, generator=generator, device=device).to(dtype).requires_grad_()
    head = (torch.randn(v, h, generator=generator, device=device) / h**0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, v, (n,), generator=generator, device=device)
    targets[torch.randperm(n, generator=generator, device=device)[: round(masked * n)]] = peers.IGNORE
    return hidden, head, targets


def _head(masked: float = 0.0) -> Call:
    return peers.step(peers.ours(), *head_operands(masked=masked))


def _head_evaluation() -> Call:
    hidden, head, targets = head_operands()
    loss = peers.ours()

    @torch.no_grad()
    def call() -> Any:
        return loss(hidden, head, targets)

    return call


def _full_logits(masked: float = 0.0) -> Call:
    return peers.step(peers.eager, *head_operands(masked=masked))


def _statistics() -> Call:
    from repsft_fast.ops.linear_cross_entropy import linear_cross_entropy

    hidden, head, targets = head_operands()
    rows = torch.arange(targets.numel())
    with torch.no_grad():
        _, stats = linear_cross_entropy(hidden, head, targets, None, rows)
    segments = rows % 7
    return lambda: stats.sum_by(segments, 7)


def optimizer_step(
    name: str, dtype: torch.dtype = torch.float32, tensors: int = 4, side: int = 256, device="cpu"
) -> Call:
    """One update of `tensors` square matrices and as many vectors, a veto and a clip factor given."""
    from repsft_fast.optim import build_optimizer

    generator = torch.Generator(device).manual_seed(0)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    shapes: list[tuple[int, ...]] = [(side, side)] * tensors + [(side,)] * tensors
    named = [(f"p{i}", torch.nn.Parameter(draw(shape))) for i, shape in enumerate(shapes)]
    for _, parameter in named:
        parameter.grad = draw(tuple(parameter.shape))
    optimizer = build_optimizer(named, name, lr=1e-4)
    veto, clip = torch.zeros((), device=device), torch.ones((), device=device)
    return lambda: optimizer.step(1e-4, veto, clip)


def adamw_step(*, ours: bool, copies: bool, tensors: int = 4, side: int = 256, device="cpu") -> Call:
    """One update of AdamW over fp32 matrices and vectors, a veto and a clip factor given. ours: the kernel,
    on a GPU, else torch's fused. copies: they are masters, and their bf16 weights are written too."""
    from repsft_fast.optim import adamw, build_optimizer
    from repsft_fast.optim.masters import Masters

    generator = torch.Generator(device).manual_seed(0)
    shapes: list[tuple[int, ...]] = [(side, side)] * tensors + [(side,)] * tensors
    held = {
        f"p{i}": torch.nn.Parameter(torch.randn(shape, generator=generator, device=device))
        for i, shape in enumerate(shapes)
    }
    weights = (
        {name: torch.nn.Parameter(p.detach().bfloat16()) for name, p in held.items()} if copies else held
    )
    masters = Masters(weights, held, None) if copies else None
    for weight in weights.values():
        weight.grad = torch.randn(weight.shape, generator=generator, device=device)
    with contextlib.nullcontext() if ours else adamw.torchs_own():
        optimizer = build_optimizer(weights.items(), "adamw", lr=1e-4, masters=masters)
    veto, clip = torch.zeros((), device=device), torch.ones((), device=device)
    return lambda: optimizer.step(1e-4, veto, clip)


def _plan_index(samples: int):
    import numpy as np

    from repsft_fast.data.plan import SampleIndex

    lengths = np.random.default_rng(0).integers(32, 129, samples).astype(np.int64)
    zeros, ones = np.zeros(samples, dtype=np.int32), np.ones(samples, dtype=np.float64)
    return SampleIndex(
        lengths=lengths, trained=lengths // 2, tasks=zeros, weights=ones, task_names=("default",)
    )


def packing() -> Call:
    """4,096 samples of 32–128 tokens into rows of 1,024."""
    from repsft_fast.data.packing import pack

    lengths = _plan_index(4096).lengths
    return lambda: pack(lengths, 1024, bucket=128)


def plan() -> Call:
    """All updates of an epoch of 1,024 samples, 16 in each."""
    from repsft_fast.data.plan import Plan

    index = _plan_index(1024)
    made = Plan(index, seed=0, row_tokens=1024, bucket_tokens=128, batch_samples=16)
    return lambda: [len(update.samples) for update in made.epoch(0, 1)]


def batch_assembly(device: str = "cpu") -> Call:
    """The rows of one update of 16 samples from the resident store."""
    import numpy as np

    from repsft_fast.data.plan import Plan
    from repsft_fast.data.sample import Sample
    from repsft_fast.data.store import TokenStore

    generator = np.random.default_rng(0)
    samples = []
    for _ in range(256):
        n = int(generator.integers(32, 129))
        trained = [False] * (n // 2) + [True] * (n - n // 2)
        samples.append(Sample(ids=generator.integers(0, 1000, n).tolist(), trained=trained))
    store = TokenStore(samples, device)
    update = Plan(store.index, seed=0, row_tokens=1024, bucket_tokens=128, batch_samples=16).epoch(0, 0)[0]

    def call() -> Any:
        return [store.row(row, denominator=update.denominator, average="sample") for row in update.ranks[0]]

    return call


def row_pass() -> Call:
    """Loss, statistics and gradient of 256 rows of logits, where the head's two other products are left
    out."""
    from repsft_fast.ops import row_pass

    rows, vocabulary = 256, 4096
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(rows, vocabulary, generator=generator)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    weights = torch.full((rows,), 1.0 / rows)
    budget = row_pass.default_chunk_bytes(rows, vocabulary, 4, given.device)
    block = row_pass.block_rows(vocabulary, 4, budget)

    def call() -> Any:
        passes = row_pass.row_pass(
            targets, weights, vocabulary, softcap=None, skip_below=0.0, block_rows=block
        )
        logits = passes.buffer(rows, torch.float32).copy_(given)  # the pass destroys them
        return passes.chunk(0, logits, gradient=True), passes.stats()

    return call


def small_run(per_update: int) -> Any:
    """The parts of a run of a Llama of 40,000 parameters: samples of 32–128 tokens, packed, AdamW."""
    from repsft_fast.config import Config
    from repsft_fast.training.build import build

    model = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True,
        "max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "train.jsonl"
        with data.open("w") as lines:
            for _ in range(64):
                ids = [draw.randrange(3, 512) for _ in range(draw.randint(32, 128))]
                lines.write(
                    json.dumps({"input_ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]})
                    + "\n"
                )
        settings = {
            "run": {"folder": f"{folder}/run"},
            "model": {"config": model},
            "data": {"train": str(data), "cache_folder": f"{folder}/cache"},
            "batch": {"samples": per_update, "row_tokens": 1024},
            "budget": {"updates": 1000},
        }
        return build(Config.of(settings))


def whole_update() -> Call:
    """`train_step` of `small_run`, 16 samples."""
    from repsft_fast.training.step import train_step

    parts = small_run(16)
    update = parts.plan.epoch(0, 0)[0]
    return lambda: train_step(parts, update)


def around_the_model() -> Call:
    """`train_step` of one sample, whose model and optimizer answer what was made before: what is left is the
    trainer's own."""
    from repsft_fast.training.step import train_step

    parts = small_run(1)
    update = parts.plan.epoch(0, 0)[0]
    model, inner = parts.model, parts.optimizer.inner
    (row,) = parts.rows(update)
    _, stats = model.loss(row)
    one = torch.ones((), requires_grad=True)
    gradients = [(p, torch.full_like(p, 1e-3)) for p in parts.optimizer.names.values()]

    def loss(row: Any) -> Any:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        return one.view(()), stats

    model.loss, inner.step = loss, lambda *_: None
    return lambda: train_step(parts, update)


CASES: dict[str, Case] = {
    "head": Case(_head),
    "head, half masked": Case(lambda: _head(0.5)),
    "head, all masked": Case(lambda: _head(1.0)),
    "head, evaluation": Case(_head_evaluation),
    "statistics per task": Case(_statistics),
    "adamw, one update": Case(lambda: optimizer_step("adamw")),
    "adamw8bit, one update": Case(lambda: optimizer_step("adamw8bit"), ("operations", "syncs")),
    "batch assembly": Case(batch_assembly, ("operations", "syncs", "allocations")),
    "row pass": Case(row_pass),
    "whole update": Case(whole_update, ("operations", "syncs")),
    "around the model": Case(around_the_model, ("operations", "syncs", "allocations")),
}

RATIOS: dict[str, tuple[Callable[[], Call], Callable[[], Call]]] = {  # name → (yardstick, ours)
    "head / full logits": (_full_logits, _head),
    "head, half masked / full logits": (lambda: _full_logits(0.5), lambda: _head(0.5)),
}


def counted(case: Case) -> dict[str, int]:
    """The exact figures of a case. Early calls may build what later ones reuse (workspaces): the fourth is
    counted."""
    call = case.build()
    for _ in range(3):
        call()
    figures: dict[str, int] = {}
    if {"operations", "syncs", "allocations"} & set(case.metrics):
        counts = counting.count(call)
        figures |= {name: getattr(counts, name) for name in ("operations", "syncs", "allocations")}
    if "peak_bytes" in case.metrics:
        figures["peak_bytes"] = counting.peak_bytes(call)
    return {name: figures[name] for name in case.metrics}
