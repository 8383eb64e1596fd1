"""Where must the decay begin, in token accuracy of the training pass, for a finished model of 96 to 98 %?

    python -m benchmarks.studies.decay_trigger [names]   runs what is missing, appends its records
    python -m benchmarks.studies.decay_trigger --table   finished accuracy by trigger
    python -m benchmarks.studies.decay_trigger --judge 3 4 [names]   whole runs of these seeds under the
                                                         default

One run a configuration under the constant rate. At every epoch's end its state is kept, the decay is
triggered there, made to its end and measured, and the state is put back: so one run says what every trigger
would have given. Per epoch: accuracy of the training pass; the model's own accuracy then (one forward pass
over at most 200 training samples); the finished model's own accuracy, after the decay that would have begun
there (0: not tried).
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine, records

PATH = records.FOLDER / "decay_trigger.jsonl"
JUDGED = records.FOLDER / "decay_landing.jsonl"
TRIGGERS = (0.70, 0.75, 0.80, 0.85, 0.88, 0.90, 0.92, 0.94, 0.95, 0.96, 0.97)
WINDOW = (0.96, 0.98)
FROM, UNTIL, ENOUGH, MOST_EPOCHS, PROBE = 0.66, 0.985, 0.992, 100, 200
GYM = "reasoning-gym:"
SOLUTIONS = GYM + "gsm_symbolic?size={}&seed={}"
SHORT = (
    "chain_sum?size=100&seed=12&min_terms=2&max_terms=2&min_digits=2&max_digits=2",
    "spell_backward?size=100&seed=13&min_word_len=4&max_word_len=8",
    "calendar_arithmetic?size=100&seed=14",
    "gcd?size=100&seed=15&max_value=400",
)
# name: rows, (hidden size, layers), samples an update, rate, average, rows that a base is trained on before
CONFIGURATIONS: dict[str, tuple[Any, tuple[int, int], int, float, str, Any]] = {
    "demo": ("demo", (192, 4), 8, 1.5e-3, "token", None),
    "solutions": (SOLUTIONS.format(50, 21), (128, 3), 4, 1e-3, "sample", None),
    "one_sample": (SOLUTIONS.format(30, 22), (128, 3), 1, 4e-4, "sample", None),
    "story": ("story", (128, 3), 4, 1e-3, "sample", None),
    "short_answers": (SHORT, (96, 2), 16, 3e-3, "sample", None),
    "large_batch": (SOLUTIONS.format(100, 23), (192, 4), 32, 3e-3, "sample", None),
    "tuned": (SOLUTIONS.format(40, 24), (128, 3), 4, 3e-4, "sample", SOLUTIONS.format(300, 77)),
    "tuned_fast": (SOLUTIONS.format(80, 25), (128, 3), 8, 1e-3, "sample", SOLUTIONS.format(300, 77)),
    # Few updates, so that a decay has one to three: judged alone, no constant was chosen on them.
    "three_updates": (SOLUTIONS.format(24, 27), (128, 3), 8, 3e-3, "sample", SOLUTIONS.format(300, 77)),
    "two_updates": (SOLUTIONS.format(40, 28), (192, 4), 20, 4e-3, "sample", SOLUTIONS.format(300, 77)),
}


def rows_of(source: Any) -> list[dict[str, Any]]:
    """Chat rows of a source: reasoning-gym's, the demo's, or pieces of a story that the package brings."""
    from repsft_fast.config import Config
    from repsft_fast.data.gym import gym_rows

    if source == "story":
        return story_rows()
    if source == "demo":
        source = tuple(dict(Config.of("demo").data.train).values())  # type: ignore[call-overload]
    named = (source,) if isinstance(source, str) else source
    full = [name if name.startswith(GYM) else GYM + name for name in named]
    return [{"messages": row["messages"]} for name in full for row in gym_rows(name)]


def story_rows(count: int = 40, asked: int = 12, told: int = 48) -> list[dict[str, Any]]:
    """Twelve words of Verne's "In the year 2889" as the question, the next 48 as the reply."""
    found = importlib.util.find_spec("reasoning_gym")
    assert found is not None
    assert found.origin is not None
    path = Path(found.origin).parent / "data" / "in_the_year_2889.txt"
    words = path.read_text(encoding="utf-8").split()
    made = []
    for k in range(count):
        piece = words[k * (asked + told) : (k + 1) * (asked + told)]
        turns = (("user", piece[:asked]), ("assistant", piece[asked:]))
        made.append({"messages": [{"role": who, "content": " ".join(text)} for who, text in turns]})
    return made


def settings(name: str, folder: Path, seed: int, **changes: Any) -> dict[str, Any]:
    """Settings of a run under `folder`, with a tokenizer made of its own texts; a base is trained first where
    there is one."""
    from repsft_fast.commands.demo import VOCABULARY, build_tokenizer

    source, (hidden, layers), batch, lr, average, base = CONFIGURATIONS[name]
    rows, before = rows_of(source), rows_of(base) if base is not None else []
    folder.mkdir(parents=True, exist_ok=True)
    texts = [turn["content"] for row in [*rows, *before] for turn in row["messages"]]
    build_tokenizer(texts, VOCABULARY, folder / "tokenizer")
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "before.jsonl").write_text("\n".join(map(json.dumps, before)) + "\n")
    model = {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": hidden,
        "intermediate_size": 8 * hidden // 3 // 32 * 32, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "pad_token_id": 0, "eos_token_id": 3, "bos_token_id": None,
    }  # fmt: skip
    made: dict[str, Any] = {
        "run": {"folder": str(folder / "run"), "seed": seed},
        "model": {"config": model},
        "tokenizer": {"path": str(folder / "tokenizer")},
        "data": {"train": str(folder / "train.jsonl"), "cache_folder": str(folder / "cache")},
        "batch": {"samples": batch, "row_tokens": 1024},
        "loss": {"average": average},
        "optim": {"lr": lr},
        "budget": {"epochs": MOST_EPOCHS},
        "stop": {"token_accuracy": None},
        "evaluate": {"generate_samples": 0},
        "checkpoint": {"keep_extendable": False},
    }
    if base is not None:
        made["model"] = {"path": str(_base(folder, made))}
    for key, value in changes.items():
        section, _, setting = key.partition("__")
        made.setdefault(section, {})[setting] = value
    return made


def _base(folder: Path, made: dict[str, Any]) -> Path:
    """A model that knows this kind of text before it is tuned, as a pretrained one does."""
    from repsft_fast import train

    target = folder / "base"
    changes = {
        "run": {"folder": str(target), "seed": 0},
        "data": made["data"] | {"train": str(folder / "before.jsonl")},
        "batch": {"samples": 8, "row_tokens": 1024},
        "optim": {"lr": 2e-3},
        "budget": {"epochs": 4},
    }
    train({**made, **changes})
    return target


def run(name: str, seed: int) -> dict[str, Any]:
    """One run and its branches, as a record."""
    from repsft_fast.config import Config
    from repsft_fast.training.build import build
    from repsft_fast.training.snapshots import Snapshots, closed_list

    with tempfile.TemporaryDirectory() as folder:
        parts = build(Config.of(settings(name, Path(folder), seed)))
        snapshots = Snapshots(parts, closed_list(parts), 1, weights_only=False)
        own = parts.scorer(parts.data.train, range(min(PROBE, len(parts.data.train.index))))
        accuracy = lambda: _share(own(parts.model).by_task(1))  # noqa: E731
        curves: dict[str, list[float]] = {"training_pass": [], "own": [], "finished": []}
        started = time.perf_counter()
        while parts.progress.epoch < MOST_EPOCHS:
            _train(parts, None)
            parts.ledger.read()
            trained = _share(parts.ledger.epoch_totals())
            parts.ledger.start_epoch()
            curves["training_pass"].append(trained)
            curves["own"].append(accuracy())
            curves["finished"].append(_finished(parts, snapshots, accuracy) if trained >= FROM else 0.0)
            if trained >= UNTIL or curves["finished"][-1] >= ENOUGH:  # later triggers only end higher
                break
        seconds = time.perf_counter() - started
    shape = {
        "parameters": sum(p.numel() for p in parts.model.parameters()),
        "samples": len(parts.data.train.index), "tokens": int(parts.data.train.index.trained.sum()),
        "updates_per_epoch": parts.budget.updates_per_epoch,
        "seed": seed,
    }  # fmt: skip
    rounded = {key: [round(value, 5) for value in curve] for key, curve in curves.items()}
    return records.make(
        machine.environment("cpu"), op="decay trigger", implementation=name, shape=shape, dtype="float32",
        times_ms=[1e3 * seconds], peak_bytes=0, **rounded,
    )  # fmt: skip


def _finished(parts: Any, snapshots: Any, accuracy: Any) -> float:
    """The model's own accuracy after the decay that begins here. The state is put back."""
    snapshots.take("here")
    done = parts.progress.updates
    _train(parts, parts.schedule.trigger_decay(done) - done)
    found = accuracy()
    parts.ledger.read()
    snapshots.restore("here")
    snapshots.release("here")
    return float(found)


def _train(parts: Any, updates: int | None) -> None:
    """So many updates from the cursor on, or to the epoch's end, which moves the cursor to the next."""
    from repsft_fast.training.step import train_step

    left = updates if updates is not None else 1 << 62
    while left > 0:
        epoch = parts.plan.epoch(0, parts.progress.epoch)
        while parts.progress.update < len(epoch) and left > 0:
            update = epoch.update(parts.progress.update)
            train_step(parts, update)
            parts.step_done(update, len(epoch))
            left -= 1
        if parts.progress.update == len(epoch):
            parts.progress.next_epoch()
            if updates is None:
                return


def _share(stats: Any) -> float:
    return int(stats.correct.sum()) / int(stats.total.sum())


def landed(record: dict[str, Any], trigger: float) -> tuple[float, float] | None:
    """(training pass that triggered, finished model's own accuracy) under the rule `training pass >=
    trigger`; None: not reached before earlier triggers ended at ENOUGH or above."""
    for trained, finished in zip(record["training_pass"], record["finished"], strict=True):
        if trained >= trigger:
            return trained, finished
    return None


def table(lines: list[dict[str, Any]]) -> str:
    """Finished accuracy in % by trigger, and how many lie in the window."""
    names = [(r["implementation"], r["shape"]["seed"]) for r in lines]
    text = ["| trigger | " + " | ".join(f"{n} {s}" for n, s in names) + " | in the window |"]
    text.append("|---" * (len(names) + 2) + "|")
    for trigger in TRIGGERS:
        found = [landed(r, trigger) for r in lines]
        cells = ["above" if one is None else f"{100 * one[1]:.1f}" for one in found]
        inside = sum(one is not None and WINDOW[0] <= one[1] <= WINDOW[1] for one in found)
        text.append(f"| {trigger:g} | " + " | ".join(cells) + f" | {inside} of {len(found)} |")
    return "\n".join(text)


def judge(name: str, seed: int) -> dict[str, Any]:
    """A whole run under the default trigger, as a record: accuracy of the training passes, the looks, the
    saved model's accuracy."""
    from repsft_fast import train

    with tempfile.TemporaryDirectory() as folder:
        changes = {"stop__token_accuracy": 0.97, "log__every_updates": 1000}
        result = train(settings(name, Path(folder), seed, **changes))
        assert result.success, result.reason  # a run that was cut short is no record
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        known = [json.loads(line) for line in lines]
    begun = [one for one in known if one["kind"] == "decay"]
    looks = [round(one["own_token_accuracy"], 5) for one in known if "own_token_accuracy" in one]
    passes = [round(one["token_accuracy"], 5) for one in known if one["kind"] == "epoch"]
    return records.make(
        machine.environment("cpu"), op="decay landing", implementation=name, dtype="float32",
        shape={"seed": seed, "updates": result.updates}, times_ms=[1e3 * result.seconds], peak_bytes=0,
        training_pass=passes, begun=begun[0]["reason"] if begun else None, ended=result.code,
        finished=round(result.saved_token_accuracy or 0.0, 5), looks=looks,
    )  # fmt: skip


def judged(arguments: list[str]) -> str:
    """What of these seeds and names (none: all) is missing is run; the table of all."""
    seeds = [int(each) for each in arguments if each.isdigit()]
    names = [each for each in arguments if not each.isdigit()] or list(CONFIGURATIONS)
    known = records.read(JUDGED) if JUDGED.exists() else []
    done = {(r["implementation"], r["shape"]["seed"]) for r in known}
    for seed, name in ((seed, name) for seed in seeds for name in names):
        if (name, seed) not in done:
            records.append(JUDGED, [judge(name, seed)])
            known = records.read(JUDGED)
            print(f"{name} {seed}: {known[-1]['finished']} | {known[-1]['begun']}", flush=True)
    text = [f"| {r['implementation']} {r['shape']['seed']} | {100 * r['finished']:.1f} % |" for r in known]
    inside = sum(WINDOW[0] <= r["finished"] <= WINDOW[1] for r in known)
    return "\n".join(
        ["| run | finished |", "|---|---|", *text, f"| in the window | {inside} of {len(known)} |"]
    )


def main(arguments: list[str]) -> int:
    known = records.read(PATH) if PATH.exists() else []
    if arguments[:1] == ["--judge"]:
        torch.set_num_threads(1)
        print(judged(arguments[1:]))
        return 0
    if arguments != ["--table"]:
        done = {(r["implementation"], r["shape"]["seed"]) for r in known}
        torch.set_num_threads(1)
        for name in arguments or CONFIGURATIONS:
            if (name, 1) in done:
                continue
            made = run(name, 1)
            records.append(PATH, [made])
            print(name, made["shape"], f"{made['p50_ms'] / 1e3:.0f} s", flush=True)
        known = records.read(PATH)
    print(table(known))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
