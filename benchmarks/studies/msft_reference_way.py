"""The way mSFT's authors run it, beside ours: the same stages, tasks, start and evaluations, end to end in
seconds.

    python -m benchmarks.studies.msft_reference_way WORK [--stages 1] [--ways ours 512 512 ours]

WORK is the study's work folder (`msft_study.py` prepares it). The reference's way (PAPERS: a new process and
a full checkpoint on disk for every stage and evaluation, one sample per row, rows padded to 512, full logits,
greedy generation against the reply's text) is written here with transformers alone. The way `longest` pads a
batch to its longest row only: the same way without the part that short samples make absurd. Ours is
`mixture.policy: msft`, `rule: paper`, C = 1, started as a process too. Both sides do the same updates on the
same number of samples and look at every task at the same moments; the order of the samples differs, so the
scores agree only roughly and are recorded. One thread; the ways are run in the order given, one record each,
so that A B B A can also be four calls.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.checkout import ROOT
from benchmarks.studies import msft_study, msft_tasks

RECORDS = ROOT / "benchmarks" / "records" / "msft_reference_way.jsonl"
SEED, LOOKS, BATCH, GENERATION_BATCH, NEW_TOKENS = 1, 4, msft_study.BATCH, 64, 32


def rows_of(files: dict[str, str], tokenizer: Any) -> dict[str, list[tuple[list[int], list[int]]]]:
    """{task: [(prompt ids up to the reply, reply ids with the end token)]}"""
    found: dict[str, list[tuple[list[int], list[int]]]] = {}
    for task, path in files.items():
        for line in Path(path).read_text().splitlines():
            messages = json.loads(line)["messages"]
            asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template(messages, tokenize=False)
            prompt, full = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, whole))
            found.setdefault(task, []).append((prompt, full[len(prompt) :]))
    return found


def train_stage(start: str, out: str, active: str, stage: str, pad: str, work: str) -> None:
    """One stage in this process: one epoch of the active mixture, a checkpoint per look, the untrained one
    included."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(Path(work) / "tokenizer")
    files = msft_tasks.write(Path(work) / "data", SEED)["train"]
    rows = [
        row for task, found in rows_of(files, tokenizer).items() if task in active.split(",") for row in found
    ]
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=msft_study.LR)

    # An order of its own for every stage, the same in every repetition.
    order = torch.randperm(
        len(rows), generator=torch.Generator().manual_seed(1000 * SEED + int(stage))
    ).tolist()
    updates = -(-len(rows) // BATCH)
    moments = {-(-look * updates // LOOKS): look for look in range(LOOKS + 1)}
    model.save_pretrained(Path(out) / "0")
    for update in range(1, updates + 1):
        chosen = [rows[i] for i in order[(update - 1) * BATCH : update * BATCH]]
        # One sample per row, padded: the tokens of the padding are what this way pays for.
        width = max(len(prompt) + len(reply) for prompt, reply in chosen) if pad == "longest" else int(pad)
        ids, labels = (
            torch.zeros(len(chosen), width, dtype=torch.long),
            torch.full((len(chosen), width), -100),
        )
        mask = torch.zeros_like(ids)
        for line, (prompt, reply) in enumerate(chosen):
            n = len(prompt) + len(reply)
            ids[line, :n], mask[line, :n] = torch.tensor(prompt + reply), 1
            labels[line, len(prompt) : n] = torch.tensor(reply)
        logits = model(input_ids=ids, attention_mask=mask).logits.float()
        cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100).backward()
        optimizer.step()
        optimizer.zero_grad()
        if update in moments:
            model.save_pretrained(Path(out) / str(moments[update]))


def evaluate(checkpoint: str, work: str) -> None:
    """One evaluation in this process: load the checkpoint, answer every validation prompt greedily, compare
    the text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(Path(work) / "tokenizer", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    scores = {}
    for task, rows in rows_of(msft_tasks.write(Path(work) / "data", SEED)["validation"], tokenizer).items():
        right = 0
        for first in range(0, len(rows), GENERATION_BATCH):
            batch = rows[first : first + GENERATION_BATCH]
            inputs = tokenizer.pad({"input_ids": [prompt for prompt, _ in batch]}, return_tensors="pt")
            made = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
            answers = tokenizer.batch_decode(
                made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            wanted = tokenizer.batch_decode([reply for _, reply in batch], skip_special_tokens=True)
            right += sum(answer == reply for answer, reply in zip(answers, wanted, strict=True))
        scores[task] = right / len(rows)
    print("scores " + json.dumps(scores))


def reference(work: Path, stages: int, pad: str) -> dict[str, Any]:
    """The literal loop over processes and checkpoints."""
    folder = work / f"reference_{pad}"
    shutil.rmtree(folder, ignore_errors=True)
    start, active, excluded, seconds = (
        str(work / "warm"),
        list(msft_tasks.TASKS),
        [],
        {"train": 0.0, "evaluate": 0.0},
    )
    history: list[dict[str, float]] = []  # of every look, in order
    # of this stage; its look at 0.00 is the one the last stage went back to
    scores: list[dict[str, float]] = []
    for stage in range(stages):
        out = folder / str(stage)
        seconds["train"] += process(
            "train_stage", start, str(out), ",".join(active), str(stage), pad, str(work)
        )[1]
        for look in range(len(scores), LOOKS + 1):
            text, took = process("evaluate", str(out / str(look)), str(work))
            scores.append(json.loads(text.rsplit("scores ", 1)[1]))
            history.append(scores[-1])
            seconds["evaluate"] += took

        # The task that peaked first leaves, and the next stage starts where it peaked.
        peaks = {task: [s[task] for s in scores].index(max(s[task] for s in scores)) for task in active}
        earliest = min(peaks.values())
        if earliest < LOOKS:
            gone = min(task for task in active if peaks[task] == earliest)
            excluded.append(gone)
            active.remove(gone)
        start, scores = str(out / str(earliest)), [scores[earliest]]
    shutil.rmtree(folder)
    return {
        "parts_seconds": seconds,
        "excluded": excluded,
        "validation": [msft_study.mean(s.values()) for s in history],
    }


def ours(work: str, stages: str) -> None:
    """Our run of the same stages, in this process."""
    import torch

    torch.set_num_threads(1)
    msft_study.CELLS["reference"] = msft_study.msft("paper", 1.0) | {"max_stages": int(stages)}
    record = msft_study.run_cell(Path(work), "reference", SEED)
    values = {
        "parts_seconds": {"run": record["seconds"], "evaluate": record["evaluation_seconds"]},
        "excluded": [gone["task"] for gone in record["exclusions"]],
        "validation": [msft_study.mean(line[3:]) for line in record["curve"]],
        "updates": record["updates"],
    }
    print("result " + json.dumps(values))


def process(function: str, *arguments: str) -> tuple[str, float]:
    """Run one of this file's functions in a new process. Returns what it printed and the seconds from start
    to end."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.studies.msft_reference_way", "--call", function, *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout, time.perf_counter() - started


def measure(work: Path, way: str, stages: int) -> dict[str, Any]:
    started = time.perf_counter()
    if way == "ours":
        values = json.loads(process("ours", str(work), str(stages))[0].rsplit("result ", 1)[1])
    else:
        values = reference(work, stages, way)
    return {"way": way, "stages": stages, "end_to_end_seconds": time.perf_counter() - started, **values}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="mSFT the reference's way and ours, seconds end to end")
    parser.add_argument("work", nargs="?", type=Path)
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument(
        "--ways", nargs="+", default=["ours", "512", "512", "ours"], choices=["ours", "512", "longest"]
    )
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--call", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.call:
        {"train_stage": train_stage, "evaluate": evaluate, "ours": ours}[given.call[0]](*given.call[1:])
        return
    if given.work is None:
        parser.error("WORK, the study's work folder, is needed")
    import torch

    from benchmarks.harness.machine import environment

    torch.set_num_threads(1)
    work = given.work.resolve()
    msft_study.prepare(work)
    msft_tasks.write(work / "data", SEED)
    for way in given.ways:
        found = measure(work, way, given.stages)
        msft_study.append(given.records, environment() | {"op": "msft_reference_way", **found})
        print(f"{way} {found['end_to_end_seconds']:.1f} s, {found['parts_seconds']}", flush=True)


if __name__ == "__main__":
    main()
