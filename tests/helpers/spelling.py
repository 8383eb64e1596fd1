"""A tiny model that learns to spell words backwards, and tasks that ask it to: runs with text in a second."""

import json
from pathlib import Path
from typing import Any

from repsft_fast.commands.demo import build_tokenizer
from tests.helpers import runs

WORDS = ["sun", "map", "top", "net", "rat", "pin", "dog", "tub"]
TRAINED = 6  # of them


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run under `folder`, and beside its rows validation.jsonl and the tasks
    words.jsonl and choice.jsonl."""
    rows = [{"prompt": f"Reverse {word}", "completion": word[::-1]} for word in WORDS]
    asked = [{"prompt": r["prompt"], "answer": r["completion"], "group": r["prompt"][8]} for r in rows]
    choices = [
        {"question": f"What is {word} in reverse?", "choices": [word[::-1], word], "answer": 0}
        for word in WORDS[:3]
    ]
    files = {"train": rows[:TRAINED], "validation": rows[TRAINED:], "words": asked, "choice": choices}
    for name, part in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    build_tokenizer([" ".join(row.values()) for row in rows], 300, folder / "tokenizer")
    return runs.settings(
        folder,
        model__config=runs.MODEL | {"vocab_size": 320, "eos_token_id": 3},
        tokenizer__path=str(folder / "tokenizer"),
        **{"budget__epochs": 60, "stop__token_accuracy": 1.0, **changes},
    )


def tasks(made: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """`evaluate.tasks` for a run with these settings. changes: of the generated one."""
    folder = Path(made["data"]["train"]).parent
    asked = {"source": str(folder / "words.jsonl"), "max_tokens": 8, "extractor": "whole", "chat": False}
    return {
        "words": asked | changes,
        "choice": {"source": str(folder / "choice.jsonl"), "by": "likelihood"},
    }
