"""What a moment costs a run: taken and put back, against a copy of the same bytes and against the way through
files.

    python -m benchmarks.suites.snapshot_cost [rounds] [--large] [--record]
                                        --record appends records/snapshot_cost.jsonl

The state is a real run's: parts as the trainer builds them (a Llama of 12M parameters, --large 43M, fp32,
AdamW), moments as mixtures use them (tensors and the closed list's values), in both sizes: the weights alone,
which is what `mixture.optimizer: reset` goes back to, and the whole state. Through files: `save_pretrained`
and, for the whole state, the optimizer's by torch.save, then loaded back into the same live tensors; written
over the last ones, in the page cache, no fsync. Goals (issue 4): take and revert at most 1.3 of the copy on a
CPU and 1.15 on a GPU; the pair at least 8 (CPU) or 100 (GPU) times faster than files. The pair moves the
state twice, so files / (2 copies), printed as *bound*, is all that any way of copying could reach.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine, records, timing

PATH = records.FOLDER / "snapshot_cost.jsonl"
VOCABULARY = 8192
COLD = 256 * 2**20  # bytes of operands that a plain copy walks through before it meets the first again
MODEL = {
    "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 320, "intermediate_size": 800,
    "num_hidden_layers": 8,
    "num_attention_heads": 5, "num_key_value_heads": 5, "max_position_embeddings": 256,
    "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


LARGE = MODEL | {
    "hidden_size": 640,
    "intermediate_size": 1600,
    "num_attention_heads": 10,
    "num_key_value_heads": 10,
}


def made_parts(folder: Path, model: dict[str, Any]) -> Any:
    """The parts of a run that has made two updates, so that the moments are not zeros."""
    from repsft_fast.config import Config
    from repsft_fast.training.build import build
    from repsft_fast.training.step import train_step

    draw = random.Random(0)
    rows = [[draw.randrange(3, VOCABULARY) for _ in range(32)] for _ in range(16)]
    lines = [json.dumps({"input_ids": ids, "labels": [-100] * 16 + ids[16:]}) for ids in rows]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    parts = build(
        Config.of(
            {
                "run": {"folder": str(folder / "run")},
                "model": {"config": model},
                "data": {"train": str(folder / "train.jsonl"), "cache_folder": str(folder / "cache")},
                "batch": {"samples": 8, "row_tokens": 256},
                "budget": {"updates": 2},
            }
        ),
    )
    for update in parts.plan.epoch(0, 0):
        train_step(parts, update)
    parts.ledger.read()
    return parts


def calls(parts: Any, folder: Path, *, weights_only: bool) -> tuple[dict[str, timing.Call], int, Any]:
    """({name: call}, bytes of one moment, what must be closed)."""
    from transformers import AutoModelForCausalLM

    from repsft_fast.optim import state_tensors
    from repsft_fast.training.snapshots import Snapshots, closed_list

    state = closed_list(parts)
    moments = Snapshots(parts, state, 2, weights_only=weights_only)
    kept = [t for name, t in state.tensors().items() if not weights_only or name.startswith("model/")]
    held = sum(t.numel() * t.element_size() for t in kept)
    device = parts.world.device
    # As many pairs in turn as no cache holds: the state's own copies come after a training step, which has
    # filled the cache.
    pairs = [
        (torch.randn(held // 4, device=device), torch.zeros(held // 4, device=device))
        for _ in range(1 + COLD // held)
    ]
    turns = itertools.cycle(pairs)
    moments.take("kept")
    files = folder / "files"

    def copy() -> None:
        source, target = next(turns)
        target.copy_(source)

    def take() -> None:
        moments.take("taken")
        moments.release("taken")

    def revert() -> None:
        moments.restore("kept")

    def save() -> None:
        parts.model.save_pretrained(files)
        if not weights_only:
            torch.save(state_tensors(parts.optimizer), files / "optimizer.pt")

    def load() -> None:
        loaded = AutoModelForCausalLM.from_pretrained(files, dtype=torch.float32)
        parts.model.load_state_dict(loaded.state_dict())
        if not weights_only:
            saved = torch.load(files / "optimizer.pt", weights_only=True, map_location=device)
            for name, tensor in state_tensors(parts.optimizer).items():
                tensor.copy_(saved[name])

    def both(first: timing.Call, second: timing.Call) -> timing.Call:
        def call() -> None:
            first()
            second()

        return call

    save()
    single = {"copy": copy, "take": take, "revert": revert, "save": save, "load": load}
    return {**single, "take and revert": both(take, revert), "through files": both(save, load)}, held, moments


def measure(
    parts: Any, folder: Path, rounds: int, *, weights_only: bool
) -> tuple[dict[str, list[float]], int]:
    """({name: milliseconds}, bytes of one moment); prints medians and verdicts."""
    device = parts.world.device.type
    variants, held, moments = calls(parts, folder, weights_only=weights_only)
    times = timing.interleave(timing.with_noise(variants), device=device, rounds=rounds, cold=False)
    moments.close()
    p50 = {what: timing.quantile(each, 0.5) for what, each in times.items()}
    kind = "weights alone" if weights_only else "whole state"
    print(
        f"{kind}: {held / 1e6:.1f} MB on {device}, {torch.get_num_threads()} threads, medians of {rounds}"
        " rounds"
    )
    for what, median in p50.items():
        print(f"  {what:16s} {median:10.3f} ms  {median / p50['copy']:9.2f} × the copy")
    goal_copy, goal_files = (1.15, 100) if device == "cuda" else (1.3, 8)
    for what in ("take", "revert"):
        ratio = p50[what] / p50["copy"]
        print(
            f"  {what} / copy {ratio:.2f} (goal: at most {goal_copy}):"
            f" {'met' if ratio <= goal_copy else 'MISSED'}"
        )
    ratio, bound = p50["through files"] / p50["take and revert"], p50["through files"] / p50["copy"] / 2
    verdict = "met" if ratio >= goal_files else "MISSED"
    print(
        f"  through files / in memory {ratio:.1f} (bound {bound:.1f}, goal: at least {goal_files}): {verdict}"
    )
    return times, held


def main(arguments: list[str]) -> None:
    numbers = [int(a) for a in arguments if a.isdigit()]
    rounds = numbers[0] if numbers else 12
    made = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = made_parts(folder, LARGE if "--large" in arguments else MODEL)
        for weights_only in (True, False):
            made.append((weights_only, *measure(parts, folder, rounds, weights_only=weights_only)))
    if "--record" in arguments:
        environment = machine.environment(parts.world.device.type)
        moved = {"copy": 2, "take": 2, "revert": 2, "take and revert": 4}
        records.append(
            PATH,
            [
                records.make(
                    environment, op="moment", implementation=what, dtype="float32", times_ms=each,
                    peak_bytes=held, moved_bytes=moved[what] * held if what in moved else None,
                    shape={"bytes": held, "weights_only": weights_only, "threads": torch.get_num_threads()},
                )
                for weights_only, times, held in made
                for what, each in times.items()
            ],
        )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
