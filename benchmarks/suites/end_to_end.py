"""Whole trainers against each other on CPU: ours, TRL's SFTTrainer (packing on), and a loop in the style of
paper A's code.

Same tiny Llama, same samples, one process each, taken in turns (A B C A B C …); the medians of tokens/s and
their ratios are printed and appended to records/end_to_end.jsonl. TRL's rows are first checked for leaks,
with the collator and the `use_cache=False` that its trainer uses. The trainers are those of
`suites/gpu/loops.py`; on a GPU part E of the session runs them.

    python -m benchmarks.suites.end_to_end                 all of them, 5 rounds
    python -m benchmarks.suites.end_to_end --threads 1     beside other work, for the ratios by processor time
    python -m benchmarks.suites.end_to_end --only ours_batched trl     two of them
    python -m benchmarks.suites.end_to_end --worker trl    one process's work (what the first form starts)

Settings: 10M-parameter Llama (H 288, 6 layers, V 8192), samples of 32–128 tokens of which the last half is
trained, rows of 1,024, fp32, AdamW, clipping at 1.0. `ours` computes every statistic of the ledger; `trl` its
own token accuracy and entropy; `paper` loss, accuracy, entropy, top-1 probability and margin on full logits,
`.item()` every update. Two comparisons: `batched` (16 samples an update for ours, one packed row of 1,024 for
TRL, one sample for the paper's loop) and `single` (one sample an update for ours and the paper's loop:
identical updates).
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable

from benchmarks.harness.checkout import ROOT
from benchmarks.suites.gpu.loops import (
    SEED,
    Given,
    Window,
    build_model,
    memory,
    run_ours,
    run_paper_style,
    run_trl,
)

SAMPLES, VOCABULARY, ROW = 512, 8192, 1024


def samples() -> list[dict]:
    import numpy as np

    rng = np.random.default_rng(SEED)
    rows = []
    for _ in range(SAMPLES):
        n = int(rng.integers(32, 129))
        ids = rng.integers(4, VOCABULARY, n).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (n // 2) + ids[n // 2 :]})
    return rows


def model_config() -> dict:
    return {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 288, "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip


def given() -> Given:
    return Given(model_config(), samples(), ROW)


PAIRS = {
    "batched / TRL": ("ours_batched", "trl"),
    "batched / paper": ("ours_batched", "paper"),
    "single / paper": ("ours_single", "paper"),
}
# warm-up and measured updates, and the work
WORKERS: dict[str, tuple[int, int, Callable[[Given, Window], object]]] = {
    "ours_batched": (4, 24, lambda given, window: run_ours(given, window, {"samples": 16})),
    "trl": (4, 24, run_trl),
    "paper": (20, 200, run_paper_style),
    "ours_single": (20, 200, lambda given, window: run_ours(given, window, {"samples": 1})),
}


def leak_of_trl() -> float:
    """Largest change of the second document's logits when the first document of a TRL-collated row
    changes."""
    import torch
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    model = build_model(given()).eval()
    rows = samples()[:2]
    lengths = [len(r["input_ids"]) for r in rows]
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)

    def logits(first: list[int]):
        packed = {"input_ids": first + rows[1]["input_ids"], "seq_lengths": lengths}
        batch = collator([packed])
        batch.pop("labels", None)
        with torch.no_grad():
            return model(**batch, use_cache=False).logits[0, lengths[0] :]

    return float((logits(rows[0]["input_ids"]) - logits(rows[0]["input_ids"][::-1])).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", choices=[*WORKERS, "leak"])
    parser.add_argument("--only", nargs="+", choices=list(WORKERS), default=list(WORKERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.worker == "leak":
        print(json.dumps({"leak": leak_of_trl()}))
        return
    if arguments.worker:
        import torch

        torch.set_num_threads(arguments.threads)
        warmup, updates, work = WORKERS[arguments.worker]
        window = Window("cpu", warmup, updates)
        work(given(), window)
        print(json.dumps(window.figures() | memory("cpu")))
        return
    lines: dict[str, list[dict]] = {name: [] for name in arguments.only}
    for round_ in range(arguments.rounds):
        order = list(lines) if round_ % 2 == 0 else list(lines)[::-1]
        for name in order:
            line = _worker(name, arguments.threads)
            lines[name].append(line)
            print(
                f"round {round_ + 1} {name:13} {line['tokens'] / line['seconds']:8,.0f} tokens/s", flush=True
            )
    _report(lines, _worker("leak", arguments.threads)["leak"], arguments.threads)


def _worker(name: str, threads: int) -> dict:
    command = [
        sys.executable,
        "-m",
        "benchmarks.suites.end_to_end",
        "--worker",
        name,
        "--threads",
        str(threads),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _report(lines: dict[str, list[dict]], leak: float, threads: int) -> None:
    from benchmarks.harness import records
    from benchmarks.harness.machine import environment

    # The records first: what is printed below can be read from them again.
    speeds = {name: [line["tokens"] / line["seconds"] for line in found] for name, found in lines.items()}
    costs = {
        name: [1e6 * line["processor_seconds"] / line["tokens"] for line in found]
        for name, found in lines.items()
    }  # milliseconds of processor time per 1,000 tokens
    shape = {
        "parameters": "10M",
        "lengths": "32-128",
        "row_tokens": ROW,
        "vocabulary": VOCABULARY,
        "samples": SAMPLES,
    }
    made = [
        records.make(
            {**environment(), "threads": threads},  # of a worker
            op="end_to_end_1000_tokens",
            implementation=name,
            shape=shape,
            dtype="float32",
            times_ms=[1e6 / speed for speed in speeds[name]],  # milliseconds per 1,000 tokens
            peak_bytes=max(line["peak_bytes"] for line in found),
            tokens_per_second=statistics.median(speeds[name]),
            processor_rounds_ms=[float(f"{cost:.6g}") for cost in costs[name]],
            samples_per_update=found[0]["samples_per_update"],
            trl_leak=leak,
        )
        for name, found in lines.items()
    ]
    records.append(records.FOLDER / "end_to_end.jsonl", made)
    print()
    for name, found in lines.items():
        peak = max(line["peak_bytes"] for line in found) / 2**20
        print(f"{name:13} {statistics.median(speeds[name]):8,.0f} tokens/s, peak {peak:,.0f} MiB")

    # Round by round, since a slow round of the machine slows both; by processor time too, which what else
    # runs there takes nothing of.
    for label, (ours, peer) in PAIRS.items():
        if ours not in lines or peer not in lines:
            continue
        by_time = sorted(a / b for a, b in zip(speeds[ours], speeds[peer], strict=True))
        by_cost = sorted(b / a for a, b in zip(costs[ours], costs[peer], strict=True))
        for name, ratios in (("", by_time), (" by processor time", by_cost)):
            print(
                f"{label:16} {statistics.median(ratios):.2f} × (from {ratios[0]:.2f} to {ratios[-1]:.2f}),"
                f" pair by pair{name}"
            )
    print(f"TRL rows: perturbing the first document moves the second one's logits by at most {leak:.1e}")


if __name__ == "__main__":
    main()
