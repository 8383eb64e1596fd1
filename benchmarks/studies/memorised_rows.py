"""Do curves with memorised rows left out agree with the exact ones? A repetition run, several thresholds,
several seeds.

    python -m benchmarks.studies.memorised_rows [seeds] [epochs]
                                        runs what is missing, appends records/memorised_rows.jsonl
    python -m benchmarks.studies.memorised_rows --table
                                        the table of csrc_triton/README.md

A Llama of a million parameters repeats 64 samples from scratch, past saturation. Every other token of an
answer follows from the token before it (held-out samples have those too), the others are drawn at random and
can only be memorised. Seeds decide weights and order; the data is the same. Per epoch: training loss and
accuracy, held-out loss and accuracy, the share of rows left out, seconds of training. Seconds are of a shared
machine and indicative; shares and losses are exact.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import counting, machine, records

PATH = records.FOLDER / "memorised_rows.jsonl"
THRESHOLDS = {"0": 0.0, "2^-12": 2.0**-12, "2^-8": 2.0**-8}
SAMPLES, HELD_OUT, PROMPT, ANSWER, VOCABULARY, KINDS = 64, 64, 16, 48, 576, 128
MODEL = {
    "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 144, "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128,
    "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CURVES = ("loss", "accuracy", "held_out_loss", "held_out_accuracy")


def write_rows(path: Path, count: int, seed: int) -> Path:
    """Answers alternate between tokens drawn at random and a fixed function of the one drawn."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        prompt = [draw.randrange(100, 200) for _ in range(PROMPT)]
        drawn = [draw.randrange(KINDS) for _ in range(ANSWER // 2)]
        answer = [token for n in drawn for token in (300 + n, 300 + KINDS + 37 * n % KINDS)]
        lines.append(json.dumps({"input_ids": prompt + answer, "labels": [-100] * PROMPT + answer}))
    path.write_text("\n".join(lines) + "\n")
    return path


def _settings(folder: Path, skip_below: float, seed: int, epochs: int) -> dict[str, Any]:
    return {
        "run": {"folder": str(folder / "run"), "seed": seed},
        "model": {"config": MODEL},
        "data": {
            "train": str(write_rows(folder / "train.jsonl", SAMPLES, 0)),
            "cache_folder": str(folder / "cache"),
        },
        "batch": {"samples": 2, "row_tokens": 2 * (PROMPT + ANSWER), "bucket_tokens": 64},
        "optim": {"lr": 2e-3},
        "loss": {"skip_below": skip_below},
        "budget": {"epochs": epochs},
        "stop": {"token_accuracy": None},
    }


def run(threshold: str, seed: int, epochs: int) -> dict[str, Any]:
    """One run; its curves by epoch as a record."""
    from repsft_fast.config import Config
    from repsft_fast.training.build import build
    from repsft_fast.training.step import train_step

    tau = THRESHOLDS[threshold]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = build(Config.of(_settings(folder, tau, seed, epochs)))
        held_out = _rows(parts, write_rows(folder / "held_out.jsonl", HELD_OUT, 1))

    # The loss is watched from outside, so that the run computes what it would unwatched.
    miss, plain = [], parts.model.loss

    def noting(row):
        loss, stats = plain(row)
        miss.append((stats, int((stats.log10_miss < math.log10(tau)).sum()) if tau else 0))
        return loss, stats

    curves: dict[str, list[float]] = {name: [] for name in (*CURVES, "skipped")}
    times: list[float] = []
    for epoch in range(epochs):
        # Only updates are timed and watched: the held-out rows below must not count.
        miss.clear()
        planned = parts.plan.epoch(0, epoch)
        parts.model.loss = noting
        started = time.perf_counter()
        for number in range(len(planned)):
            train_step(parts, planned[number])
            parts.step_done(planned[number], len(planned))
        times.append(1e3 * (time.perf_counter() - started))
        parts.model.loss = plain
        total = sum(stats.loss.numel() for stats, _ in miss)
        curves["loss"].append(sum(float(stats.loss.double().sum()) for stats, _ in miss) / total)
        curves["accuracy"].append(sum(int(stats.correct.sum()) for stats, _ in miss) / total)
        curves["skipped"].append(sum(count for _, count in miss) / total)
        with torch.no_grad():
            found = [plain(row)[1] for row in held_out]
        held = sum(stats.loss.numel() for stats in found)
        curves["held_out_loss"].append(sum(float(stats.loss.double().sum()) for stats in found) / held)
        curves["held_out_accuracy"].append(sum(int(stats.correct.sum()) for stats in found) / held)
    row, parameters = held_out[0], sum(p.numel() for p in parts.model.parameters())
    return records.make(
        machine.environment("cpu"), op="memorised rows", implementation=f"skip_below={threshold}",
        shape={"parameters": parameters, "samples": SAMPLES, "epochs": epochs, "seed": seed},
        dtype="float32", times_ms=times, peak_bytes=counting.peak_bytes(lambda: plain(row)[0].backward()),
        **curves,
    )  # fmt: skip


def _rows(parts: Any, path: Path) -> list[Any]:
    """The rows of a file, four samples in each, as the trainer would see them."""
    from repsft_fast.data.plan import Plan
    from repsft_fast.data.sample import Sample
    from repsft_fast.data.store import TokenStore

    samples = []
    for line in path.read_text().splitlines():
        given = json.loads(line)
        samples.append(Sample(given["input_ids"], [label != -100 for label in given["labels"]]))
    store = TokenStore(samples, "cpu")
    plan = Plan(store.index, seed=0, row_tokens=4 * (PROMPT + ANSWER), bucket_tokens=64, batch_samples=4)
    return [
        store.row(row, denominator=u.denominator, average="sample")
        for u in plan.epoch(0, 0)
        for row in u.ranks[0]
    ]


def table(lines: list[dict[str, Any]]) -> str:
    """Mean ± standard deviation over seeds at the last epoch, and in how many epochs the mean agrees with
    that of τ = 0."""
    runs = {(r["implementation"].removeprefix("skip_below="), r["shape"]["seed"]): r for r in lines}
    titles = (
        "τ",
        "seeds",
        "skipped at 1/4, 1/2, 3/4, end",
        "training loss",
        "accuracy",
        "held-out loss",
        "held-out accuracy",
        "time",
    )
    text = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for name in THRESHOLDS:
        seeds = sorted(seed for threshold, seed in runs if threshold == name and ("0", seed) in runs)
        if len(seeds) < 2:  # no deviation to show
            continue
        mine, exact = ([runs[threshold, seed] for seed in seeds] for threshold in (name, "0"))
        epochs = len(mine[0]["loss"])
        moments = [round(share * epochs) - 1 for share in (0.25, 0.5, 0.75, 1.0)]
        cells = [
            name,
            str(len(seeds)),
            ", ".join(f"{statistics.fmean(r['skipped'][e] for r in mine):.2f}" for e in moments),
        ]
        for curve in CURVES:
            last = [r[curve][-1] for r in mine]
            cell = f"{statistics.fmean(last):.4g} ± {statistics.stdev(last):.2g}"
            if name != "0":
                inside = sum(
                    _agree([r[curve][e] for r in mine], [r[curve][e] for r in exact]) for e in range(epochs)
                )
                cell += f"; {inside}/{epochs}"
            cells.append(cell)
        cells.append(
            f"{statistics.median(sum(a['rounds_ms']) / sum(b['rounds_ms']) for a, b in zip(mine, exact)):.2f}"
        )
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def _agree(mine: list[float], exact: list[float]) -> bool:
    """Two sets of n seeds whose means a t-test at 95 % (2n − 2 degrees of freedom) does not tell apart."""
    quantile = {2: 4.30, 3: 2.78, 4: 2.45, 5: 2.31, 6: 2.23}.get(len(mine), 2.18)
    error = math.sqrt((statistics.variance(mine) + statistics.variance(exact)) / len(mine))
    return abs(statistics.fmean(mine) - statistics.fmean(exact)) <= quantile * error + 1e-12


def main(arguments: list[str]) -> int:
    known = records.read(PATH) if PATH.exists() else []
    if arguments != ["--table"]:
        seeds, epochs = (int(a) for a in (*arguments, *("4", "48")[len(arguments) :]))
        done = {(r["implementation"], r["shape"]["seed"], r["shape"]["epochs"]) for r in known}
        torch.set_num_threads(1)
        for seed in range(1, seeds + 1):
            for threshold in THRESHOLDS:
                if (f"skip_below={threshold}", seed, epochs) not in done:
                    made = run(threshold, seed, epochs)
                    records.append(PATH, [made])
                    last = {name: round(made[name][-1], 5) for name in (*CURVES, "skipped")}
                    print(threshold, seed, last, f"{sum(made['rounds_ms']) / 1e3:.1f} s", flush=True)
        known = records.read(PATH)
    print(table(known))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
