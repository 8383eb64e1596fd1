"""What parts C and D share: whole updates of the trainer, as a user runs it, timed one by one in a process of
their own.

The loop is `training.trainer.run` itself, readings of the ledger included; it is left after the last update
that is wanted, so nothing is saved, evaluated or generated. Afterwards the same parts make a few updates
more: of very short rows for the host's own time, and one under the profiler.

The processes they run in are in `processes`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.timing import quantile
from benchmarks.suites.gpu import kernels, launches
from benchmarks.suites.gpu.session import Session
from repsft_fast.errors import RepsftError

VARIANTS = ("plain", "liger", "compiled")
KERNELS = "gpu_kernels.txt"
# of a point, and how many of them are left out: cuBLAS, Triton and the allocator come to rest
UPDATES, WARM = 12, 4
# of the samples for the host's own time: the device is done long before the host
SHORT_TOKENS, SHORT_ROUNDS = 32, 5
PRODUCTS_PER_S = 800e12  # where part A has measured none
TRUE = {  # what `known_models` leaves to defaults
    "llama": {"rope_theta": 1e5, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5},  # SmolLM2-135M
    "qwen3": {"rope_theta": 1e6, "max_position_embeddings": 40960},
}
TOY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 512,
}  # fmt: skip


class Measured(RepsftError):
    """Not an error: the updates that were wanted are done, and the loop is left."""


@dataclass(frozen=True)
class Point:
    """Updates of one model, `rows` rows each, full of samples of which the second half is trained."""

    name: str  # what records and goals call it
    config: Mapping[str, Any]  # architecture; random weights
    variant: str  # of VARIANTS
    row_tokens: int
    sample_tokens: int
    rows: int = 2
    updates: int = UPDATES
    warm: int = WARM
    predicted_bytes: int | None = None  # peak memory by our own sizing
    kernels: bool = True  # profile one update
    launches: bool = False  # compiled layers: their launches shared and apart, last

    @property
    def samples(self) -> int:
        """Of one update."""
        return self.rows * (self.row_tokens // self.sample_tokens)

    @property
    def shape(self) -> dict[str, int | float | str]:
        return {
            "model": self.name, "rows": self.rows, "row_tokens": self.row_tokens,
            "sample_tokens": self.sample_tokens,
        }  # fmt: skip


def point(
    name: str, model: str, variant: str, row_tokens: int, *, toy: bool, sample_tokens: int = 2048, **more: Any
) -> Point:
    """A point of a model of `known_models`; toy: its architecture with small numbers, its rows 1/64 as
    long."""
    from repsft_fast.sizing.known_models import MODELS

    config = {**MODELS[model], **TRUE[MODELS[model]["model_type"]]}
    if toy:
        config |= TOY
        row_tokens, sample_tokens = row_tokens // 64, sample_tokens // 64
        more = {"updates": 5, "warm": 2, **more}
    return Point(name, config, variant, row_tokens, sample_tokens, **more)


@dataclass
class Stamps:
    """When each update was done on the device, and when the host had queued it. Ends the loop after the last
    one."""

    device: str
    warm: int
    updates: int
    done: list[Any] = field(default_factory=list)  # events, or host seconds on a CPU
    queued: list[float] = field(default_factory=list)  # host seconds
    work: list[Any] = field(default_factory=list)  # `throughput.Work` done until then

    def mark(self) -> None:
        self.queued.append(time.perf_counter())
        if self.device != "cuda":
            self.done.append(self.queued[-1])
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.done.append(event)

    def __call__(self, work: Any) -> None:
        """The trainer's `on_update`. The first mark, before any update, is the caller's."""
        self.mark()
        self.work.append(work.copy())
        if len(self.work) == self.warm and self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if len(self.work) == self.updates:
            raise Measured(f"{self.updates} updates are measured; the run is left, nothing is saved")

    def update_ms(self) -> list[float]:
        """Milliseconds of every update, warm-up included. Waits for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in zip(self.done, self.done[1:])]
        return [1e3 * (b - a) for a, b in zip(self.done, self.done[1:])]

    def host_ms(self) -> list[float]:
        """What the host took for each: its own work, and waiting where the device's queue was full."""
        return [1e3 * (b - a) for a, b in zip(self.queued, self.queued[1:])]


def measure(session: Session, wanted: Point) -> None:
    """All figures of a point, each recorded when it is made."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        stamps = Stamps(session.device, wanted.warm, wanted.updates)
        with trained(session, wanted, Path(name), stamps) as parts:
            _record_updates(session, wanted, parts, stamps, began)
            if wanted.variant in ("compiled", "captured") and session.device == "cuda":
                session.leave_out(f"host time of {what_of(wanted)}", "a shorter row takes another way")
            else:
                with session.attempt(f"host time of {what_of(wanted)}"):
                    _record_host(session, wanted, parts)
            if wanted.kernels and not session.late(
                f"kernels of {what_of(wanted)}", 5 if session.device == "cuda" else 1
            ):
                with session.attempt(f"kernels of {what_of(wanted)}"):
                    _record_kernels(session, wanted, parts)
            if wanted.launches:
                with session.attempt(launches.WHAT):
                    _record_launches(session, wanted, parts)


@contextmanager
def trained(session: Session, wanted: Point, folder: Path, stamps: Stamps) -> Iterator[Any]:
    """The parts of a run whose updates have been made and stamped, as `trainer.train` would have built
    them."""
    from repsft_fast import distributed
    from repsft_fast.config import Config
    from repsft_fast.rundir.folder import RunFolder
    from repsft_fast.training import trainer
    from repsft_fast.training.build import build

    config = Config.of(settings_of(session, wanted, folder))
    trainer.quiet_libraries()
    with distributed.lifecycle() as world, RunFolder(config, world=world):
        parts = build(config, world=world, on_update=stamps)
        stamps.mark()
        try:
            trainer.run(parts)
        except Measured:
            yield parts
        else:
            raise RuntimeError(f"{what_of(wanted)}: the run ended by itself, before {wanted.updates} updates")


def settings_of(session: Session, wanted: Point, folder: Path) -> dict[str, Any]:
    """A user's settings, with one epoch as long as the point: no evaluation, no generation, no checkpoint."""
    cuda = session.device == "cuda"
    data = folder / "train.jsonl"
    write_samples(
        data, int(wanted.config["vocab_size"]), wanted.updates * wanted.samples, wanted.sample_tokens
    )
    return {
        "run": {"folder": str(folder / "run")},
        "model": {
            "config": {**wanted.config, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
            # Neither runs on a CPU: liger refuses it, and a compiler would take a rehearsal's whole time.
            "layer_kernels": "liger" if wanted.variant == "liger" and cuda else "none",
            "compile": wanted.variant == "compiled" and cuda,
            "cuda_graphs": "auto" if wanted.variant == "captured" else "off",
        },
        "data": {"train": str(data), "cache_folder": str(folder / "cache")},
        "batch": {"samples": wanted.samples, "row_tokens": wanted.row_tokens},
        "budget": {"updates": 1000},
        "stop": {"token_accuracy": None},
        "evaluate": {"generate_samples": 0},
        "log": {"peak_flops": 1e12} if session.rehearsal else {},
    }


def write_samples(path: Path, vocabulary: int, samples: int, tokens: int) -> None:
    """Samples of `tokens` positions (so one id more), drawn at random, the second half of each trained."""
    draw = random.Random(0)
    with path.open("w") as lines:
        for _ in range(samples):
            ids = [draw.randrange(3, vocabulary) for _ in range(tokens + 1)]
            trained = tokens // 2
            labels = [-100] * (len(ids) - trained) + ids[len(ids) - trained :]
            lines.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")


def _record_updates(session: Session, wanted: Point, parts: Any, stamps: Stamps, began: float) -> None:
    from repsft_fast.throughput import peak_memory_bytes
    from repsft_fast.training import graph_choice

    implementation = wanted.variant
    times, host = stamps.update_ms(), stamps.host_ms()
    peak = peak_memory_bytes(parts.world.device)
    kept = times[wanted.warm :]
    work = stamps.work[-1].minus(stamps.work[wanted.warm - 1])
    seconds = sum(kept) / 1e3
    flops = parts.shape.flops(work.tokens, work.trained, work.sum_squared_lengths)
    more: dict[str, Any] = {"predicted_peak_bytes": wanted.predicted_bytes} if wanted.predicted_bytes else {}
    if wanted.variant == "captured":
        more |= graph_choice.result(parts)["cuda_graphs"]
    if wanted.variant == "compiled" and session.device == "cuda":
        more |= _compiled(session, wanted, parts)
        implementation = more["layers"]
    if parts.peak_flops:
        more["mfu"] = flops / seconds / parts.peak_flops
    if session.device == "cuda":
        more["reserved_bytes"] = torch.cuda.max_memory_reserved()
    session.record(
        "update", implementation, kept, wanted.shape, dtype=_dtype(parts), peak_bytes=peak,
        flops=int(flops / len(kept)),
        row_ms=1e3 * seconds / (len(kept) * wanted.rows), tokens_per_s=work.tokens / seconds,
        trained_tokens_per_s=work.trained / seconds, updates=len(kept), first_update_ms=times[0],
        warm_up_ms=[round(t, 3) for t in times[: wanted.warm]],
        host_loop_ms=[round(t, 3) for t in host[wanted.warm :]],
        build_s=stamps.queued[0] - began, until_s=time.perf_counter() - began, **more,
    )  # fmt: skip


def _compiled(session: Session, wanted: Point, parts: Any) -> dict[str, Any]:
    """What became of layers that were to be compiled: `layers`, by which goals and part D know them, and how
    many rows passed them under one function."""
    from repsft_fast.models.compiled import compiled_layers
    from repsft_fast.training import compiled

    now, layers = compiled.now(parts), compiled_layers(parts.model)
    name = wanted.variant if now is True else f"{wanted.variant}, but {now or 'plain'}"
    if now is not True:
        session.leave_out(what_of(wanted), f"what was measured in their place is {compiled.words(now)}")
    if layers is None:
        return {"layers": name}
    counts = layers.stack.counts
    why = sorted(set(layers.stack.why.values()))
    return {"layers": name, "rows_stacked": counts.stacked, "rows_apart": counts.apart, "why_apart": why}


def _record_host(session: Session, wanted: Point, parts: Any) -> None:
    """`train_step` over as many rows with as many segments, all of them short: what the host takes with
    nothing to wait for."""
    from repsft_fast.data.plan import Cursor, PlannedRow, Update
    from repsft_fast.data.sample import Sample
    from repsft_fast.data.store import TokenStore
    from repsft_fast.training.step import train_step

    each, tokens = wanted.samples // wanted.rows, min(SHORT_TOKENS, wanted.sample_tokens)
    ids = [3 + n % 100 for n in range(tokens + 1)]
    trained = [n > tokens // 2 for n in range(tokens + 1)]
    device = parts.world.device
    store = TokenStore([Sample(ids=ids, trained=trained) for _ in range(wanted.samples)], device)
    rows = tuple(
        PlannedRow(np.arange(r * each, (r + 1) * each), each * tokens, each * tokens)
        for r in range(wanted.rows)
    )
    update = Update(Cursor(0, 0, 0), np.arange(wanted.samples), float(wanted.samples), (rows,))
    short = dataclasses.replace(parts, data=dataclasses.replace(parts.data, train=store))

    # The first round meets new shapes and is left out of both.
    host, whole = [], []
    for _ in range(1 + (2 if session.rehearsal else SHORT_ROUNDS)):
        _wait(session)
        began = time.perf_counter()
        train_step(short, update)
        queued = time.perf_counter()
        _wait(session)
        host.append(1e3 * (queued - began))
        whole.append(1e3 * (time.perf_counter() - began))
    session.record(
        "host of an update", wanted.variant, host[1:], {**wanted.shape, "sample_tokens": tokens},
        dtype=_dtype(parts),
        row_ms=quantile(host[1:], 0.5) / wanted.rows, until_done_ms=quantile(whole[1:], 0.5),
    )  # fmt: skip


def _record_launches(session: Session, wanted: Point, parts: Any) -> None:
    apart = launches.measure(session, wanted.shape, parts)
    if apart and not session.late(f"kernels of {launches.WHAT}", 5 if session.device == "cuda" else 1):
        _record_kernels(session, dataclasses.replace(wanted, variant=launches.SEPARATE), parts)


def _record_kernels(session: Session, wanted: Point, parts: Any) -> None:
    """One update like the others under the profiler: classes as a record, the longest kernels as a table in
    KERNELS."""
    from repsft_fast.training.step import train_step

    update = parts.plan.epoch(0, 0)[0]
    limit = _long_product_ms(wanted, parts, session.ceilings.get("flops_per_s", PRODUCTS_PER_S))
    trace = kernels.traced(lambda: train_step(parts, update), session.device, long_product_ms=limit)
    by_class = trace.by_class()
    lost = max(0, trace.launches - trace.calls)
    session.record(
        "kernels of an update", wanted.variant, [trace.busy_ms], wanted.shape, dtype=_dtype(parts),
        kernels=trace.calls,
        launches=trace.launches, launches_without_kernel=lost, kernels_ms=trace.ms, span_ms=trace.span_ms,
        **{f"{kind}_ms": ms for kind, ms in by_class.items()},
        **{f"{kind}_share": ms / trace.ms for kind, ms in by_class.items()},
    )  # fmt: skip
    with (session.out / KERNELS).open("a") as file:
        file.write(
            trace.table(
                f"{what_of(wanted)}, {wanted.rows} rows of {wanted.row_tokens:,} tokens, on {session.device}"
            )
        )


def _long_product_ms(wanted: Point, parts: Any, rate: float) -> float:
    """Geometric mean of the longest product of a layer and one of the head's, which differ by more than ten
    times."""
    layers = max(
        p.numel()
        for name, p in parts.model.named_parameters()
        if p.ndim == 2 and "embed" not in name and "head" not in name
    )
    of_layer = 2.0 * wanted.row_tokens * layers
    # half of the positions are trained
    of_head = wanted.row_tokens * float(parts.shape.hidden) * parts.shape.vocabulary
    return 1e3 * math.sqrt(of_layer * of_head) / rate


def _dtype(parts: Any) -> str:
    return str(parts.model.compute_dtype).rsplit(".", 1)[-1]


def _wait(session: Session) -> None:
    if session.device == "cuda":
        torch.cuda.synchronize()


def what_of(wanted: Point) -> str:
    return f"an update of {wanted.name}, layers {wanted.variant}"
