"""Part M: is the default rule of mSFT better than SFT where tasks overfit at different times?

SmolLM2-135M on the four tasks of `overfit_tasks`, arms at equal epochs, a record a run and one of paired
differences. The weights come as in part P. Seeds deal rows and order; within a seed the two arms follow each
other, and a pair that would not end in time is not begun. Decisions read validation rows; test rows are read
once, at a run's end.

Passed, as the positive control is judged (docs/positive_control.md): the 95 % interval (Student, paired by
seed) of msft tested − sft, test exact match, lies above 0, and its mean is a third or more of the lower bound
of head-room, which the pairs' sft runs say. A bound of 0 or less is a miss of its own: then there is nothing
to be held against. Test nll stands beside it. One pair has no interval: open.

Seconds predicted on an H100, counted: 22 updates an epoch of one row of 64 samples (45 tokens each, 4 of them
trained) at 48 ms, the host's work, 24 epochs: 25 s. A look is 1,200 rows or 54k tokens, 14 packed rows,
forward only, at 16 ms: 0.22 s, 97 looks: 22 s. Loading, tests and saving 11 s. Six runs: 348 s.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.studies import msft_study
from benchmarks.suites.gpu import overfit_tasks, pretrained, step, training
from benchmarks.suites.gpu.goals import Card, Found, Goal
from benchmarks.suites.gpu.session import RECORDS, Session, read_lines
from repsft_fast.report.compare import interval

OP, OP_PAIRED = "tasks that overfit", "tasks that overfit, msft - sft"
C, STAGES, LOOKS = 4.0, 6, 4  # epochs of a stage, stages, looks an epoch
BATCH, ROW_TOKENS, LR = 64, 4096, 2e-4
RUN_S = 58.0  # predicted on an H100, above
SEEDS = (0, 1, 2)
_MSFT = {"policy": "msft", "compute_budget": C, "max_stages": STAGES}
ARMS: dict[str, dict[str, Any]] = {
    "sft": {"policy": "sft", "compute_budget": C * STAGES},
    "msft tested": {**_MSFT, "rule": "tested"},
    "msft paper": {**_MSFT, "rule": "paper"},
    "sft_resets": {"policy": "sft_resets", "compute_budget": C, "max_stages": STAGES},
    "msft tested, rehearsal 0": {**_MSFT, "rule": "tested", "rehearsal": 0.0},
}
PAIR = ("sft", "msft tested")
# A record's fields of head-room, and where result.json → more.mixture.headroom has them.
ROOM = {"headroom": "value", "headroom_interval": "interval", "headroom_by_chance": "by_chance"}
TOY_SIZES = {"train": 12, "validation": 8, "test": 8}


def run(session: Session) -> None:
    if step.blocked(session, "auto", "tasks that overfit at different times"):
        return
    longest, begun = (RUN_S if session.device == "cuda" else 5.0), False
    for group, seed in groups(session.rehearsal):
        what = f"{' and '.join(group)}, seed {seed}"
        if session.late(what, longest * 1.1 * len(group)):
            continue
        for arm in group:
            with session.attempt(f"{arm}, seed {seed}"), tempfile.TemporaryDirectory() as folder:
                seconds = run_arm(session, arm, seed, Path(folder))
                longest = max(longest, seconds) if begun else seconds
                begun = True
        pair_up(session)


def groups(rehearsal: bool) -> list[tuple[tuple[str, ...], int]]:
    """Which arms are run one after another with which seed: the pairs of the verdict first."""
    others = [arm for arm in ARMS if arm not in PAIR]
    if rehearsal:
        return [(PAIR, 0), (PAIR, 1)]
    return [(PAIR, seed) for seed in SEEDS] + [((arm,), seed) for arm in others for seed in SEEDS]


def run_arm(session: Session, arm: str, seed: int, folder: Path) -> float:
    """One run and its record. Returns its seconds, loading and tests included."""
    from repsft_fast import distributed
    from repsft_fast.config import Config
    from repsft_fast.rundir.folder import RunFolder
    from repsft_fast.throughput import peak_memory_bytes
    from repsft_fast.training import trainer
    from repsft_fast.training.build import build

    began = time.perf_counter()
    config = Config.of("smollm2", settings(session, arm, seed, folder))
    trainer.quiet_libraries()
    stamps = training.Stamps(session.device, warm=0, updates=sys.maxsize)
    if session.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with distributed.lifecycle() as world, RunFolder(config, world=world):
        parts = build(config, world=world, on_update=stamps)
        stamps.mark()
        result = trainer.run(parts)
        peak, dtype = peak_memory_bytes(world.device), str(parts.model.compute_dtype).rsplit(".", 1)[-1]
        times = stamps.update_ms()
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        found = msft_study.summary(lines, result, parts)
    if not result.success:
        raise RuntimeError(f"the run did not end by its rule or budget: {result.reason}")
    seconds = time.perf_counter() - began
    session.record(
        OP, f"{arm}, {session.device} {dtype}", times, {"model": pretrained.MODEL, "seed": seed}, dtype=dtype,
        peak_bytes=peak, arm=arm, whole_s=seconds, code=result.code,
        **flat(found, result.more["test"]["tasks"]),
    )  # fmt: skip
    return seconds


def flat(found: Mapping[str, Any], tests: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A run's summary as a record's fields: numbers, strings and lists, by task in the order of `tasks`."""
    kept = {name: value for name, value in found.items() if isinstance(value, (int, float, str))}
    room = found["headroom"] or {}
    kept |= {name: room[key] for name, key in ROOM.items() if room.get(key) is not None}
    return kept | {
        "tasks": found["tasks"],
        "test_exact_match": [found["test"][task] for task in found["tasks"]],
        "test_nll": [tests[task]["loss"] for task in found["tasks"]],
        "curve": found["curve"],
        "left": [
            f"{each['task']} in stage {each['stage']}, epoch {each['epoch']}" for each in found["exclusions"]
        ],
    }


def settings(session: Session, arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """What differs from the recipe `smollm2`."""
    toy = session.rehearsal
    files = overfit_tasks.write(folder / "data", seed, TOY_SIZES if toy else overfit_tasks.SIZES)
    made: dict[str, Any] = {
        "run.folder": str(folder / "run"), "run.seed": seed, "data.train": files["train"],
        "data.validation": files["validation"], "data.test": files["test"],
        "data.cache_folder": str(folder / "cache"), "batch.samples": BATCH, "batch.row_tokens": ROW_TOKENS,
        "optim.lr": LR, "optim.warmup_updates": 0, "schedule.name": "constant", "budget.epochs": 1000,
        "evaluate.generate_samples": 0, "stop.token_accuracy": None, "log.every_updates": 1000,
        "mixture": {**ARMS[arm], "evaluations_per_epoch": LOOKS},
    }  # fmt: skip
    if not toy:
        return made | ({"model.path": file} if (file := os.environ.get(pretrained.VARIABLE)) else {})
    from repsft_fast.commands.demo import build_tokenizer

    texts = [
        text
        for task in overfit_tasks.TASKS
        for row in overfit_tasks.deal(task, 0, TOY_SIZES)["train"]
        for text in row
    ]
    build_tokenizer(texts, pretrained.TOY["vocab_size"], folder / "tokenizer")
    # Two epochs: the stages of each arm are as long in all.
    budget = 1.0 if "max_stages" in ARMS[arm] else 2.0
    stages = {"max_stages": 2} if "max_stages" in ARMS[arm] else {}
    return made | {
        "model.path": None, "model.config": pretrained.TOY, "tokenizer.path": str(folder / "tokenizer"),
        "batch.samples": 16, "mixture": {**made["mixture"], "compute_budget": budget, **stages},
    }  # fmt: skip


# What is compared -----------------------------------------------------------------------------------------


def pairs(records: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """(sft, msft tested) of every seed that has both, the newest of each."""
    runs = {(r["shape"]["seed"], r["arm"]): r for r in records if r["op"] == OP}
    seeds = sorted({seed for seed, _ in runs})
    return [(runs[s, PAIR[0]], runs[s, PAIR[1]]) for s in seeds if all((s, arm) in runs for arm in PAIR)]


def differences(found: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], name: str) -> list[float]:
    """Of each pair: mean over tasks of msft's figure less that of sft's."""
    return [mean(ours[name]) - mean(plain[name]) for plain, ours in found]


def pair_up(session: Session) -> None:
    """A record of the pairs that this session has so far."""
    made = read_lines(session.out / RECORDS, session.environment["run"])
    found = pairs(made)
    if not found:
        return
    values = {
        "exact_match": differences(found, "test_exact_match"),
        "nll": differences(found, "test_nll"),
        **{name: [plain[name] for plain, _ in found if name in plain] for name in ROOM},
    }
    bounds = {f"{name}_bounds": ends(listed) for name, listed in values.items() if len(listed) > 1}
    session.record(
        OP_PAIRED, session.device, [1e3 * plain["whole_s"] for plain, _ in found],
        {"model": pretrained.MODEL}, dtype=found[0][0]["dtype"], pairs=len(found), **values, **bounds,
    )  # fmt: skip


def ends(values: Sequence[float]) -> list[float]:
    """Of the 95 % interval of the mean, two values or more."""
    middle, half = interval(values)
    return [middle - half, middle + half]


def _paired(name: str, end: int | None = None) -> Callable[[Found], float | None]:
    """The mean of a field of the pairs; end: this end of an interval in its place."""

    def read(found: Found) -> float | None:
        record = next(reversed(found.all(OP_PAIRED).values()), None)
        value = None if record is None else record.get(name)
        if not isinstance(value, list):
            return value
        return (mean(value) if value else None) if end is None else value[end]

    return read


_LOWEST = _paired("headroom_bounds", 0)


def share_of_room(found: Found) -> float | None:
    """The gain over a third of head-room's lower bound; None where that is not above 0."""
    gain, least = _paired("exact_match")(found), _LOWEST(found)
    return None if gain is None or least is None or least <= 0 else gain / (least / 3)


def _of_arm(arm: str, value: Callable[[Mapping[str, Any]], float]) -> Callable[[Found], float | None]:
    def read(found: Found) -> float | None:
        here = [value(record) for record in found.records if record["op"] == OP and record["arm"] == arm]
        return mean(here) if here else None

    return read


def _on_gpu(value: float) -> Callable[[Card], float | None]:
    return lambda card: card.of_kind(H100=value, H200=value)


GOALS = (
    Goal("pairs of runs", _paired("pairs"), least=len(SEEDS)),
    Goal("head-room of sft, validation exact match", _paired("headroom")),
    Goal("  of it by chance", _paired("headroom_by_chance")),
    Goal("  lower bound over seeds", _LOWEST, least=0.0, strict=True),
    Goal("msft tested − sft, test exact match", _paired("exact_match")),
    Goal("  lower end of its interval", _paired("exact_match_bounds", 0), least=0.0, strict=True),
    Goal("  mean / a third of head-room's lower bound", share_of_room, least=1.0),
    Goal("msft tested − sft, test nll", _paired("nll")),
    Goal("  upper end of its interval", _paired("nll_bounds", 1), most=0.0, strict=True),
    *(Goal(f"{arm}: test exact match", _of_arm(arm, lambda r: mean(r["test_exact_match"]))) for arm in PAIR),
    Goal("msft tested: tasks that left", _of_arm(PAIR[1], lambda r: len(r["left"]))),
    *(
        Goal(f"{arm}: s a run", _of_arm(arm, lambda r: r["whole_s"]), predicted=_on_gpu(RUN_S))
        for arm in PAIR
    ),
)
