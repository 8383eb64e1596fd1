"""Where a run's tokens, FLOPs and seconds went: trained, thrown away by roll-backs, spent on looking.

Evaluated: validation rows at every evaluation, and training samples whose loss alone is wanted (`ies` skips
their backward pass; `stop.probe_samples`). Probed (`dynamix`): batches of updates that are made, measured and
put back. The test split's one reading, after the run, is in neither.

Seconds are the host's, each counted once: a span inside another is not part of it. Whatever no span covers is
training, waiting for the device's training included.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from repsft_fast.config import Config
from repsft_fast.throughput import ModelShape, Work
from repsft_fast.training.parts import Parts

# what a mixture needs beside training; everything else that has a span is overhead
LOOKING = ("evaluation", "probes")


class Spans:
    """Seconds by name. A span inside another pauses it, so that the sum is never more than the wall's."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[float] = []  # seconds of inner spans, one entry per open span

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        self._open.append(0.0)
        try:
            yield
        finally:
            whole = time.perf_counter() - began
            inner = self._open.pop()
            self.add(name, whole - inner)
            if self._open:
                self._open[-1] += whole

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def flops(shape: ModelShape, work: Work, *, forward_only: bool = False) -> float:
    """Model FLOPs by throughput's formula; a forward pass is a third of forward and backward."""
    whole = shape.flops(work.tokens, work.trained, work.sum_squared_lengths)
    return whole / 3 if forward_only else whole


def plain_sft(config: Config, index: Any) -> tuple[float, Work]:
    """(C, the work of C epochs over every task): what plain SFT with the same compute budget would have
    trained."""
    budget = float(config.mixture.compute_budget)
    lengths = index.lengths
    return budget, Work(
        samples=round(budget * len(index)),
        tokens=round(budget * int(lengths.sum())),
        trained=round(budget * int(index.trained.sum())),
        sum_squared_lengths=round(budget * int((lengths * lengths).sum())),
    )


def account(parts: Parts, spans: Spans, seconds: float, kept: Work) -> dict[str, Any]:
    """JSON for result.json. kept: work of the branch the run ended on, before the result was put back."""
    lasting, shape = parts.lasting, parts.shape
    trained, evaluated, probed = lasting.all_work, lasting.evaluated, lasting.probed
    discarded, result = trained.minus(kept), parts.progress.work
    budget, plain = plain_sft(parts.config, parts.data.train.index)
    costs = {
        "trained": flops(shape, trained),
        "discarded": flops(shape, discarded),
        "result": flops(shape, result),
        "evaluated": flops(shape, evaluated, forward_only=True),
        "probed": flops(shape, probed) * 5 / 3,  # a loss, an update, a loss
    }
    told = ("evaluation", "probes", "snapshots", "reverts", "decisions", "records", "planning")
    took = dict(spans.seconds)
    looking = sum(took.get(name, 0.0) for name in LOOKING)
    outside = sum(took.values()) - looking
    plain_flops = flops(shape, plain)
    whole_flops = costs["trained"] + costs["evaluated"] + costs["probed"]
    return {
        "tokens": {
            "trained": trained.tokens, "discarded": discarded.tokens, "result": result.tokens,
            "evaluated": evaluated.tokens, "probed": probed.tokens,
        },
        "updates": {"trained": trained.updates, "discarded": discarded.updates, "result": result.updates},
        "flops": costs,
        "plain_sft": {
            "epochs": budget,
            "tokens": plain.tokens,
            "flops": plain_flops,
            "training_ratio": costs["trained"] / plain_flops if plain_flops else None,
            "whole_ratio": whole_flops / plain_flops if plain_flops else None,
        },
        "seconds": {
            "loop": seconds,
            "training": max(seconds - looking - outside, 0.0),
            **{name: took.get(name, 0.0) for name in told},
            "outside": outside,
            "outside_fraction": outside / seconds if seconds > 0 else None,
        },
    }  # fmt: skip


def in_words(found: dict[str, Any]) -> list[str]:
    """The account as lines for the end of a run."""
    from repsft_fast.report.format import count, percent

    tokens, plain, seconds = found["tokens"], found["plain_sft"], found["seconds"]
    trained = max(tokens["trained"], 1)
    probes = f"; probes tried {count(tokens['probed'])}" if tokens["probed"] else ""
    looking = "the evaluations and probes" if probes else "the evaluations"
    lines = [
        (
            f"trained {count(tokens['trained'])} tokens, {percent(tokens['discarded'] / trained)} of them"
            f" gone with roll-backs; the result has seen {count(tokens['result'])}; evaluations read"
            f" {count(tokens['evaluated'])}{probes}"
        ),
    ]
    if plain["training_ratio"] is not None:
        lines.append(
            f"training FLOPs {plain['training_ratio']:.2f} × plain SFT of {plain['epochs']:g}"
            f" epoch{'' if plain['epochs'] == 1 else 's'} over every task, {plain['whole_ratio']:.2f} × with"
            f" {looking}"
        )
    parts = ", ".join(
        f"{name} {seconds[name]:.2f} s" for name in ("training", "evaluation", "snapshots", "reverts")
    )
    lines.append(f"{parts}; outside training and evaluation {percent(seconds['outside_fraction'], 2)}")
    return lines
