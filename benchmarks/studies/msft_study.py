"""mSFT and its baselines on eight real tasks, on a CPU: one record per cell, resumable.

    python -m benchmarks.studies.msft_study WORK [--seeds 1 2 3] [--cells "sft C=8" …]
                                                       run what has no record yet
    python -m benchmarks.studies.msft_study --table    the table of docs/msft_study.md

WORK holds data, tokenizer, the warm start's weights and the runs' folders; it may be deleted at any time. A
cell is a policy with its settings and a seed. The seed decides both which rows are trained on, validated on
and tested on, and the order of the data. Decisions read the validation rows, the test rows are read once, at
a run's end. All cells start from the same weights: a plain run over each task's pool, whose rows no seed uses
(toys from random weights exclude tasks that have not started).

`sft weights` is an oracle: each task is sampled in proportion to the epoch of its own best, smoothed over
five looks, on the validation rows of the same seed's `sft C=6`, which is run first.

`extra_tokens` are those of `dynamix`'s probes (a loss, an update, a loss) and of the samples that `ies` skips
(a forward pass), from the run's own counters; their FLOPs count as training. FLOPs by
`repsft_fast.throughput`'s formula, a forward pass as a third of it.
"""

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.checkout import ROOT
from benchmarks.studies import msft_tasks
from repsft_fast.errors import describe
from repsft_fast.policies.headroom import of_records

RECORDS = ROOT / "benchmarks" / "records" / "msft_study.jsonl"
STUDY = 4  # raise it when the same cell would give other numbers
STAGES = {1.0: 6, 3.0: 3}  # of msft at most, by C
REHEARSAL = 0.1
MODEL = {
    "model_type": "llama", "vocab_size": 260, "hidden_size": 192, "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 1024,
    "tie_word_embeddings": True, "pad_token_id": 0, "eos_token_id": 3, "bos_token_id": None,
}  # fmt: skip
# 1.67M parameters; the vocabulary is bytes and four marks.
WARM_EPOCHS, WARM_LR, LR, BATCH, ROW_TOKENS = 4, 1e-3, 3e-4, 16, 512


def msft(rule: str, budget: float, **more: Any) -> dict[str, Any]:
    fixed = {"policy": "msft", "rule": rule, "compute_budget": budget, "max_stages": STAGES[budget]}
    return fixed | {"rehearsal": 0.0} | more


BASELINE, ORACLE = "sft C=6", "sft weights C=6"
FIRST = 5  # of these in every seed before the others
CELLS: dict[str, dict[str, Any]] = {
    BASELINE: {"policy": "sft", "compute_budget": 6.0},
    ORACLE: {"policy": "sft", "compute_budget": 6.0},  # and weights: own_best_weights
    "msft tested nll C=3": msft("tested", 3.0, metric="nll"),  # decides by the loss, which every item moves
    "msft paper C=1": msft("paper", 1.0),
    "msft tested C=1": msft("tested", 1.0),
    "sft_resets C=1": {"policy": "sft_resets", "compute_budget": 1.0, "max_stages": 6},
    "msft tested nll C=3 rehearsal": msft("tested", 3.0, metric="nll", rehearsal=REHEARSAL),
    "msft tested C=3": msft("tested", 3.0),
    "msft tested C=1 rehearsal": msft("tested", 1.0, rehearsal=REHEARSAL),
    "msft tested C=3 rehearsal": msft("tested", 3.0, rehearsal=REHEARSAL),
    "msft paper C=3": msft("paper", 3.0),
    "sro C=6": {"policy": "sro", "compute_budget": 6.0},
    "soft_sro C=6": {"policy": "soft_sro", "compute_budget": 6.0},
    "dynamix C=6": {"policy": "dynamix", "compute_budget": 6.0},
    "ies C=9": {"policy": "ies", "compute_budget": 9.0},  # it can act after six epochs at the earliest
}


def settings(folder: Path, train: dict[str, str], work: Path, seed: int, **sections: Any) -> dict[str, Any]:
    """A run's settings; `sections` are laid over them."""
    made: dict[str, Any] = {
        "run": {"folder": str(folder), "seed": seed},
        "tokenizer": {"path": str(work / "tokenizer")},
        "data": {"train": train, "cache_folder": str(work / "cache")},
        "batch": {"samples": BATCH, "row_tokens": ROW_TOKENS},
        "stop": {"token_accuracy": None},
        "evaluate": {"generate_samples": 0},
        "log": {"every_updates": 1000},
    }
    for name, values in sections.items():
        made[name] = made.get(name, {}) | values
    return made


def prepare(work: Path) -> Path:
    """Tokenizer and warm start under `work` (once). Returns the weights' folder."""
    from repsft_fast import train
    from repsft_fast.commands.demo import build_tokenizer

    if not (work / "tokenizer" / "tokenizer.json").exists():
        build_tokenizer(["no merges: bytes"], MODEL["vocab_size"], work / "tokenizer")
    warm = work / "warm"
    if not (warm / "result.json").exists():
        shutil.rmtree(warm, ignore_errors=True)
        # No decay: a start that is not yet settled, as a model in the middle of its training.
        sections = {
            "model": {"config": MODEL}, "budget": {"epochs": WARM_EPOCHS},
            "optim": {"lr": WARM_LR}, "schedule": {"name": "constant"},
        }  # fmt: skip
        train(settings(warm, msft_tasks.write_pool(work / "data"), work, 0, **sections))
    return warm


def own_best_weights(record: Mapping[str, Any]) -> dict[str, float]:
    """Sampling weights by which every task's training ends at its own best, if its epochs alone decide:
    proportional to the epoch of its smoothed maximum in this record, largest 1."""
    room = of_records(looks(record))
    if isinstance(room, str):
        raise ValueError(describe("benchmarks/studies/msft_study.py", f"no weights: {room}"))
    epochs = {task: found.at.epochs for task, found in room.tasks.items()}
    return {task: epoch / (max(epochs.values()) or 1.0) for task, epoch in epochs.items()}


def looks(record: Mapping[str, Any]) -> list[tuple[str, int, float, dict[str, float]]]:
    """A record's curve as `repsft_fast.policies.headroom` takes it."""
    return [
        (moment, stage, epoch, dict(zip(record["tasks"], scores, strict=True)))
        for moment, stage, epoch, *scores in record["curve"]
    ]


def run_cell(work: Path, cell: str, seed: int, records: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Train one cell and return its record. The run's folder is made anew: only finished cells count.

    records: where the oracle finds its seed's baseline.
    """
    from repsft_fast.config import Config

    mixture = CELLS[cell]
    if cell == ORACLE:
        own = [r for r in records if (r["cell"], r["seed"]) == (BASELINE, seed)]
        if not own:
            raise ValueError(
                describe("benchmarks/studies/msft_study.py", f"{cell} needs {BASELINE} of seed {seed}")
            )
        mixture = mixture | {"weights": own_best_weights(own[0])}
    warm, files = prepare(work), msft_tasks.write(work / "data", seed)
    folder = work / "runs" / f"{cell.replace(' ', '_')}_seed{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    config = Config.of(
        settings(
            folder, files["train"], work, seed,
            model={"path": str(warm)}, data={"validation": files["validation"], "test": files["test"]},
            optim={"lr": LR, "max_norm": None, "warmup_updates": 0}, schedule={"name": "constant"},
            budget={"epochs": 1000}, mixture=mixture,
        )
    )  # fmt: skip
    made = train_and_sum_up(config)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    start = hashlib.sha256((warm / "model.safetensors").read_bytes()).hexdigest()[:16]
    return made | {
        "cell": cell, "seed": seed, "study": STUDY, "mixture": mixture, "start": start,
    }  # fmt: skip


def train_and_sum_up(config: Any) -> dict[str, Any]:
    """A run of this `Config`, and its `summary`, with how it ended as `ended`."""
    from repsft_fast.rundir.folder import RunFolder
    from repsft_fast.training.build import build
    from repsft_fast.training.trainer import quiet_libraries, run

    quiet_libraries()
    with RunFolder(config):
        parts = build(config)
        result = run(parts)
    text = (Path(config.run.folder) / "metrics.jsonl").read_text()
    return summary([json.loads(line) for line in text.splitlines()], result, parts) | {"ended": result.code}


def summary(lines: list[dict[str, Any]], result: Any, parts: Any) -> dict[str, Any]:
    """What a record says of a run, from its metrics, its result and its counters."""
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    by_moment = {line["moment"]: line for line in evaluations}
    final = by_moment.get(result.more["moment"]) or evaluations[-1]
    names, test = sorted(parts.data.task_names), result.more["test"]

    # Discarded branches were paid for, too; an evaluation reads every validation row, the end every test row.
    done, kept = parts.lasting.all_work, parts.progress.work
    looked = tokens_of(parts.data.validation, len(evaluations)) + tokens_of(parts.data.test, 1)
    extra, extra_flops = extra_work(parts, len(evaluations))
    flops = parts.shape.flops(done.tokens, done.trained, done.sum_squared_lengths)
    return {
        "tasks": names,
        "test": {task: test["tasks"][task]["exact_match"] for task in names},
        "test_macro": sum(test["tasks"][task]["exact_match"] for task in names) / len(names),
        "validation_start": mean(evaluations[0]["scores"].values()),
        "validation": mean(final["scores"].values()),
        "result_moment": final["moment"],
        "updates": done.updates,
        "kept_updates": kept.updates,
        "tokens": done.tokens,
        "discarded_tokens": done.tokens - kept.tokens,
        "evaluated_tokens": looked,
        "extra_tokens": extra,
        "train_flops": flops + extra_flops,
        "evaluation_flops": sum(
            forward_flops(parts, store) * times
            for store, times in ((parts.data.validation, len(evaluations)), (parts.data.test, 1))
        ),
        "seconds": result.seconds,
        "evaluation_seconds": sum(line["seconds"] for line in evaluations),
        "snapshots": result.more["snapshots"],
        "roll_back_seconds": sum(line["seconds"] for line in lines if line["kind"] == "roll_back"),
        "stages": 1 + max(line["stage"] for line in evaluations),
        "exclusions": exclusions(lines, names, final),
        "curve": [
            [
                line["moment"],
                line["stage"],
                line["epoch"],
                *(round(line["scores"][task] or 0, 4) for task in names),
            ]
            for line in evaluations
        ],
        "item_errors": [
            [round((line["errors"] or {}).get(task) or 0, 4) for task in names] for line in evaluations
        ],
        "headroom": (result.more.get("mixture") or {}).get("headroom"),
    }


def tokens_of(store: Any, times: int) -> int:
    return int(store.index.lengths.sum()) * times


def forward_flops(parts: Any, store: Any) -> float:
    lengths, trained = store.index.lengths.astype(int), store.index.trained
    return parts.shape.flops(int(lengths.sum()), int(trained.sum()), int((lengths**2).sum())) / 3


def extra_work(parts: Any, evaluations: int) -> tuple[int, float]:
    """Tokens and FLOPs beside training and evaluation: probes, and losses of samples that skipped their
    backward pass."""
    from repsft_fast.training.account import flops

    probed, looked = parts.lasting.probed, parts.lasting.evaluated
    tokens = looked.tokens - tokens_of(parts.data.validation, evaluations)
    forward = (
        flops(parts.shape, looked, forward_only=True)
        - forward_flops(parts, parts.data.validation) * evaluations
    )
    return tokens + probed.tokens, forward + flops(parts.shape, probed) * 5 / 3


def exclusions(
    lines: Sequence[dict[str, Any]], names: Sequence[str], final: dict[str, Any]
) -> list[dict[str, Any]]:
    """Who left, at which moment, and each one's validation score there and in the result."""
    found, active, here, seen = [], set(names), None, {}
    for line in lines:
        if line["kind"] == "evaluation":
            seen[line["moment"]] = here = line
        elif line["kind"] == "stage":
            at = seen.get(line["start"]) or here
            # Whom weight 0 keeps from the first stage has left nothing.
            for task in [] if at is None else sorted(active - set(line["active"])):
                found.append(
                    {
                        "task": task, "stage": line["stage"], "moment": at["moment"], "epoch": at["epoch"],
                        "score": at["scores"][task], "score_in_result": final["scores"][task],
                    }
                )  # fmt: skip
            active = set(line["active"])
    return found


def mean(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def read(path: Path = RECORDS, study: int = STUDY) -> list[dict[str, Any]]:
    """Records of a version of the study, the last one of every cell and seed."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return list({(r["cell"], r["seed"]): r for r in lines if r["study"] == study}.values())


def append(path: Path, record: dict[str, Any]) -> None:
    """One whole line at the end of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), "w") as file:
        file.write(json.dumps(record, sort_keys=True, allow_nan=False) + "\n")


def order(cells: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    """What a policy is compared with comes first, in every seed; then seed by seed."""
    first = list(CELLS)[:FIRST]
    groups = [[cell for cell in cells if (cell in first) is wanted] for wanted in (True, False)]
    return [(cell, seed) for group in groups for seed in seeds for cell in group]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="mSFT and its baselines on eight real tasks")
    parser.add_argument("work", nargs="?", type=Path, help="work folder: data, warm start, runs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--table", action="store_true", help="print the table of what is recorded")
    parser.add_argument("--study", type=int, default=STUDY, help="--table of an earlier version's records")
    given = parser.parse_args(arguments)
    if given.table:
        from benchmarks.studies.msft_table import table

        print(table(read(given.records, given.study)))
        return
    if given.work is None:
        parser.error("WORK, a folder for data and runs, is needed")
    import torch

    from benchmarks.harness.machine import environment

    torch.set_num_threads(1)
    finished = {(record["cell"], record["seed"]) for record in read(given.records)}
    for cell, seed in order(given.cells, given.seeds):
        if (cell, seed) not in finished:
            record = run_cell(given.work.resolve(), cell, seed, read(given.records))
            append(given.records, environment() | record)
            took = f"{record['seconds']:.0f} s ({record['evaluation_seconds']:.0f} s evaluating)"
            found = f"test {record['test_macro']:.3f}, {record['updates']} updates"
            print(f"{cell}, seed {seed}: {found}, {took}", flush=True)


if __name__ == "__main__":
    main()
