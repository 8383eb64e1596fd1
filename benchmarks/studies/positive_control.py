"""A control that mSFT should pass: mixtures whose tasks truly overfit at different times, on a CPU.

    python -m benchmarks.studies.positive_control WORK --mixture A        12 seeds, the arms of the choice
    python -m benchmarks.studies.positive_control WORK --mixture B        the verdict, with what A chose
    python -m benchmarks.studies.positive_control --table                 docs/positive_control.md's tables

One record a run in benchmarks/records/positive_control.jsonl; what has one is not run again. WORK may be
deleted at any time. The protocol stands in docs/positive_control.md, committed before the runs it speaks of.
All arms of a seed train on the same rows from the same weights and end at the same number of tokens
(`budget.tokens`, discarded work included) or before, by their own end. Decisions read the validation rows by
exact match; the test rows are read once, at a run's end, by the weights that the run's settings name as its
result.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.checkout import ROOT
from benchmarks.studies import msft_study, positive_control_tasks
from benchmarks.studies.positive_control_table import (
    chosen_rehearsal,
    head_room_of,
    own_best_epochs,
    tables,
)

RECORDS = ROOT / "benchmarks" / "records" / "positive_control.jsonl"
STUDY = 2  # raise it when the same run would give other numbers
MODEL = msft_study.MODEL | {
    "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip
# 0.25M parameters
WARM_EPOCHS, WARM_LR, LR = 15, 1e-3, 5e-4
EPOCHS = 30  # of the whole mixture: every arm's tokens are those of so many
STAGE, STAGES, LOOKS = 3.0, 14, 4  # C; stages at most, more than the tokens allow; looks an epoch
LEAST = 0.25  # epochs that a task's static weight stands for at least, where its best is the start
SEEDS = {"A": range(12), "B": range(100, 112)}


def msft(rule: str, **more: Any) -> dict[str, Any]:
    return {"policy": "msft", "rule": rule, "compute_budget": STAGE, "max_stages": STAGES, **more}


ARMS: dict[str, dict[str, Any]] = {
    "sft": {"policy": "sft", "compute_budget": float(EPOCHS)},
    "tested": msft("tested"),
    "tested 0.1": msft("tested", rehearsal=0.1),
    "tested 0.2": msft("tested", rehearsal=0.2),
    "tested 0.05": msft("tested", rehearsal=0.05),
    "sft weights": {"policy": "sft", "compute_budget": float(EPOCHS)},
    "paper": msft("paper"),
    "sft resets": {"policy": "sft_resets", "compute_budget": STAGE, "max_stages": STAGES},
    "sro": {"policy": "sro", "compute_budget": float(EPOCHS) / 2},
}
REHEARSALS = {0.0: "tested", 0.05: "tested 0.05", 0.1: "tested 0.1", 0.2: "tested 0.2"}
FIRST = 4  # arms of the choice: in every seed before the others


def sections(mixture: str, arm: str, weights: dict[str, float] | None = None) -> dict[str, Any]:
    """What an arm's settings say beside those that all share. `weights`: of "sft weights", task → weight."""
    tasks = positive_control_tasks.MIXTURES[mixture]
    # Equal weights: what is few is seen often.
    even = dict.fromkeys(tasks, 1.0)
    shared = {"metric": "exact_match", "evaluations_per_epoch": LOOKS, "weights": weights or even}
    return {
        "optim": {"lr": LR, "max_norm": None, "warmup_updates": 20},
        "schedule": {"name": "constant"},
        "budget": {"tokens": tokens(mixture)},
        "mixture": shared | ARMS[arm],
    }


ROW = 9  # tokens of a row: every prompt and every reply is equally long


def tokens(mixture: str) -> int:
    """Tokens at which every arm ends: EPOCHS passes over the mixture's rows."""
    return EPOCHS * ROW * sum(task.train for task in positive_control_tasks.MIXTURES[mixture].values())


def prepare(work: Path, mixture: str) -> Path:
    """Tokenizer and the mixture's warm start under `work` (once). Returns the weights' folder."""
    from repsft_fast import train
    from repsft_fast.commands.demo import build_tokenizer

    if not (work / "tokenizer" / "tokenizer.json").exists():
        build_tokenizer(["no merges: bytes"], MODEL["vocab_size"], work / "tokenizer")
    warm = work / f"warm_{mixture}"
    if not (warm / "model.safetensors").exists():
        shutil.rmtree(warm, ignore_errors=True)
        files = positive_control_tasks.write(work / "data", mixture, 0)["pool"]
        train(
            msft_study.settings(
                warm, files, work, 0,
                model={"config": MODEL}, budget={"epochs": WARM_EPOCHS}, optim={"lr": WARM_LR},
                schedule={"name": "constant"}, batch={"samples": 32},
            )
        )  # fmt: skip
    return warm


def run_arm(
    work: Path, mixture: str, arm: str, seed: int, weights: dict[str, float] | None
) -> dict[str, Any]:
    """Train one arm on one seed and return its record. The run's folder is made anew: only finished runs
    count."""
    from repsft_fast.config import Config
    from repsft_fast.rundir.folder import RunFolder
    from repsft_fast.training.build import build
    from repsft_fast.training.trainer import quiet_libraries, run

    warm, files = prepare(work, mixture), positive_control_tasks.write(work / "data", mixture, seed)
    folder = work / "runs" / f"{mixture}_{arm.replace(' ', '_')}_{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    own = sections(mixture, arm, weights)
    config = Config.of(
        msft_study.settings(
            folder, files["train"], work, seed,
            model={"path": str(warm)}, data={"validation": files["validation"], "test": files["test"]}, **own,
        )
    )  # fmt: skip
    quiet_libraries()
    with RunFolder(config):
        parts = build(config)
        result = run(parts)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(folder, ignore_errors=True)
    start = hashlib.sha256((warm / "model.safetensors").read_bytes()).hexdigest()[:16]
    return msft_study.summary(lines, result, parts) | {
        "study": STUDY, "mixture": mixture, "arm": arm, "seed": seed, "settings": own["mixture"],
        "start": start, "token_budget": tokens(mixture), "ended": result.code,
    }  # fmt: skip


def read(path: Path = RECORDS) -> list[dict[str, Any]]:
    """Records of this study's version, the last one of every run."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return list({(r["mixture"], r["arm"], r["seed"]): r for r in lines if r["study"] == STUDY}.values())


def static_weights(records: Sequence[dict[str, Any]], mixture: str, seed: int) -> dict[str, float]:
    """An oracle's: weights in proportion to the epochs after which plain SFT *on the same seed's rows* was
    best at each task, the mean weight 1."""
    (plain,) = [r for r in records if (r["mixture"], r["arm"], r["seed"]) == (mixture, "sft", seed)]
    epochs = {task: max(epoch, LEAST) for task, epoch in own_best_epochs(plain).items()}
    scale = len(epochs) / sum(epochs.values())
    return {task: epoch * scale for task, epoch in epochs.items()}


def arms_of(mixture: str, records: Sequence[dict[str, Any]]) -> list[str]:
    """Which arms a mixture is trained with: A all, B the rehearsal that A chose and none."""
    if mixture == "A":
        return list(ARMS)
    chosen = REHEARSALS[chosen_rehearsal(records, REHEARSALS)]
    return ["sft", *dict.fromkeys([chosen, "tested"]), "sft weights", "sft resets", "paper", "sro"]


def order(arms: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    """The first arms in every seed before the others; then seed by seed."""
    groups = [arms[:FIRST], arms[FIRST:]]
    return [(arm, seed) for group in groups for seed in seeds for arm in group]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="a control that mSFT should pass")
    parser.add_argument("work", nargs="?", type=Path, help="work folder: data, warm start, runs")
    parser.add_argument("--mixture", choices=["A", "B"], default="A")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS))
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--table", action="store_true", help="print the tables of what is recorded")
    given = parser.parse_args(arguments)
    if given.table:
        print(tables(read(given.records), REHEARSALS))
        return
    if given.work is None:
        parser.error("WORK, a folder for data and runs, is needed")
    import torch

    from benchmarks.harness.machine import environment

    torch.set_num_threads(1)
    mixture = given.mixture
    arms = given.arms or arms_of(mixture, read(given.records))
    for arm, seed in order(arms, given.seeds or SEEDS[mixture]):
        done = read(given.records)
        if (mixture, arm, seed) in {(r["mixture"], r["arm"], r["seed"]) for r in done}:
            continue
        weights = static_weights(done, mixture, seed) if arm == "sft weights" else None
        record = run_arm(given.work.resolve(), mixture, arm, seed, weights)
        msft_study.append(given.records, environment() | record)
        room = f", head-room {head_room_of(record):.3f}" if arm == "sft" else ""
        left = ", ".join(f"{e['task']} back to {e['epoch']:g}" for e in record["exclusions"])
        print(
            f"{mixture} {arm}, seed {seed}: test {record['test_macro']:.3f}{room}, "
            f"{record['tokens']:,} tokens, {record['seconds']:.0f} s; left: {left or 'nobody'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
