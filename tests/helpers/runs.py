"""Whole runs in a second: a tiny Llama, pre-tokenised samples, settings as a dict that tests change."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VOCABULARY = 61
MODEL = {
    "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def write_samples(path: Path, count: int, *, seed: int = 0, tasks: int = 1, longest: int = 20) -> Path:
    """`count` rows of input_ids and labels whose second half is trained; tasks in turn, each with tokens of
    its own."""
    draw = random.Random(seed)
    lines = []
    for number in range(count):
        task = number % tasks
        n = draw.randint(6, longest)
        ids = [3 + (draw.randrange(18) + 7 * task) % (VOCABULARY - 3) for _ in range(n)]
        labels = [-100] * (n // 2) + ids[n // 2 :]
        lines.append(json.dumps({"input_ids": ids, "labels": labels, "task": f"task{task}"}))
    path.write_text("\n".join(lines) + "\n")
    return path


def settings(folder: Path, *, samples: int = 24, tasks: int = 1, **changes: Any) -> dict[str, Any]:
    """Settings of a run under `folder`; `changes` are dotted names with __ for the dot (optim__lr=1e-3)."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "train.jsonl"
    if not data.exists():
        write_samples(data, samples, tasks=tasks)
    made: dict[str, Any] = {
        "run": {"folder": str(folder / "run"), "seed": 1, "deterministic": True},
        "model": {"config": MODEL},
        "data": {
            "train": str(data),
            "cache_folder": str(folder / "cache"),
            **({"task_column": "task"} if tasks > 1 else {}),
        },
        "batch": {"samples": 4, "row_tokens": 64},
        "optim": {"lr": 1e-2},
        "budget": {"epochs": 3},
        "stop": {"token_accuracy": 0.97},
        "log": {"every_updates": 5},
        "evaluate": {"generate_samples": 0},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        made.setdefault(section, {})[key] = value
    return made


def metrics(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind is None or line["kind"] == kind]


@contextmanager
def losses_not_finite(model: Any) -> Iterator[None]:
    """Inside, every loss of the model is NaN; its statistics are what they are."""
    loss = model.loss
    model.loss = lambda row: [part * float("nan") if n == 0 else part for n, part in enumerate(loss(row))]
    try:
        yield
    finally:
        model.loss = loss
