"""What the trainer adds to an update: the whole loop against the same forward, backward and step with nothing
around it.

    python -m benchmarks.suites.overhead

`loop` is the body of `trainer.run_epoch`: plan, packing, row assembly, ledger, conductor, logging every 10
updates. `bare` computes the same rows, made beforehand, with the same model, loss, clipping and optimizer,
and keeps no statistics but those the loss returns. They take turns in one process; the median of paired
ratios minus one is the trainer's own share. Goal: at most 5 % of an update.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.harness import records
from benchmarks.harness.machine import environment
from benchmarks.suites.end_to_end import model_config, samples
from repsft_fast.config import Config
from repsft_fast.training.build import build
from repsft_fast.training.conductor import Conductor
from repsft_fast.training.parts import Parts
from repsft_fast.training.policy import build_policy, weights_are_enough
from repsft_fast.training.reporter import Reporter
from repsft_fast.training.snapshots import Snapshots, closed_list
from repsft_fast.training.step import train_step


def settings(folder: str, per_update: int) -> Config:
    data = Path(folder) / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in samples()))
    return Config.of(
        {
            "run": {"folder": f"{folder}/run"},
            "model": {"config": model_config()},
            "data": {"train": str(data), "cache_folder": f"{folder}/cache"},
            "batch": {"samples": per_update, "row_tokens": 1024},
            "optim": {"lr": 1e-4},
            "budget": {"updates": 100_000},
            "stop": {"token_accuracy": None},
        }
    )


def loop(parts: Parts, conductor: Conductor, start: int, count: int) -> float:
    """Seconds for `count` updates of the trainer's own loop body."""
    epoch = parts.plan.epoch(0, 0)
    begun = time.perf_counter()
    for n in range(start, start + count):
        update = epoch[n % len(epoch)]
        train_step(parts, update)
        parts.step_done(update, len(epoch))
        parts.progress.update = 1  # never at the epoch's end
        conductor.after_update(update, len(epoch))
    return time.perf_counter() - begun


def bare(parts: Parts, rows: list[list], lr: float = 1e-4) -> float:
    """Seconds for the same rows: loss, backward, norm, clip, step."""
    parameters = list(parts.optimizer.names.values())
    begun = time.perf_counter()
    for update in rows:
        for row in update:
            loss, _ = parts.model.loss(row)
            loss.backward()
        norm = torch.stack(torch._foreach_norm([p.grad for p in parameters])).square().sum().sqrt()
        parts.optimizer.step(lr, clip=(1.0 / (norm + 1e-6)).clamp(max=1.0))
        parts.optimizer.zero_grad()
    return time.perf_counter() - begun


def measure(per_update: int, count: int, pairs: int) -> tuple[list[float], list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        parts = build(settings(folder, per_update))
        Path(parts.folder).mkdir(parents=True, exist_ok=True)
        policy = build_policy(parts)
        moments = Snapshots(parts, closed_list(parts), 0, weights_only=weights_are_enough(parts.config))
        conductor = Conductor(parts, Reporter(parts), policy, moments)
        conductor.begin()
        epoch = parts.plan.epoch(0, 0)
        ours, theirs = [], []
        for pair in range(-1, pairs):
            start = (pair + 1) * count
            rows = [list(parts.rows(epoch[n % len(epoch)])) for n in range(start, start + count)]
            if pair % 2:
                second, first = bare(parts, rows), loop(parts, conductor, start, count)
            else:
                first, second = loop(parts, conductor, start, count), bare(parts, rows)
            if pair >= 0:
                ours.append(first / count * 1e3)
                theirs.append(second / count * 1e3)
        return ours, theirs


def main() -> None:
    for per_update, count in ((1, 32), (16, 4)):
        ours, theirs = measure(per_update, count, pairs=15)
        shape = {"samples_per_update": per_update, "row_tokens": 1024, "parameters": "10M"}
        made = [
            records.make(
                environment(),
                op="update",
                implementation=name,
                shape=shape,
                dtype="float32",
                times_ms=times,
                peak_bytes=0,
            )
            for name, times in (("loop", ours), ("bare", theirs))
        ]
        records.append(records.FOLDER / "overhead.jsonl", made)
        share = statistics.median(a / b for a, b in zip(ours, theirs, strict=True)) - 1
        medians = f"loop {statistics.median(ours):.1f} ms, bare {statistics.median(theirs):.1f} ms"
        print(f"{per_update:2} samples an update: {medians}, ours {share:+.1%}")


if __name__ == "__main__":
    main()
