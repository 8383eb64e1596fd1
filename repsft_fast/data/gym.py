"""Procedurally generated reasoning tasks as a data source: `reasoning-gym:gsm_symbolic?size=24&seed=7`.

The package `reasoning-gym` generates question, answer and, for some tasks, a worked solution. A source named
this way is written once as an ordinary jsonl file of `messages`, so that everything behind it is the path
real data takes.
"""

import json
import sys
import types
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from repsft_fast.errors import DataError, describe, did_you_mean
from repsft_fast.files import replace_file

SCHEME = "reasoning-gym:"


def is_gym_source(source: str) -> bool:
    return source.startswith(SCHEME)


def gym_rows(source: str) -> list[dict[str, Any]]:
    """Rows of one source: `reasoning-gym:TASK?size=N&seed=S&KEY=VALUE…`; further keys are the task's own
    settings.

    Each row: {"messages": [user question, assistant solution], "task": TASK, "answer": str}. A task with a
    worked solution gives it as the reply, its last line `#### answer` turned into `The answer is
    \\boxed{answer}.`.
    """
    task, settings = _parse(source)
    size, seed = int(settings.pop("size", 100)), int(settings.pop("seed", 42))
    gym = _import()
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        near = did_you_mean(task, DATASETS)
        hint = f"did you mean {near}?" if near else "see reasoning_gym.factory.DATASETS for the names"
        raise DataError(describe(source, f"reasoning-gym has no task {task!r}", todo=hint))
    # Whatever a task makes of settings it does not know is the name's fault, not the package's.
    try:
        items = list(gym.create_dataset(task, size=size, seed=seed, **settings))
    except (TypeError, AssertionError, ValueError) as error:
        raise DataError(
            describe(source, f"reasoning-gym refuses these settings: {error}", got=settings)
        ) from error
    if any(item["answer"] is None for item in items):
        wrong = f"reasoning-gym gives no answers to {task}: it judges replies by a function of its own"
        raise DataError(describe(source, wrong, todo="take another task"))
    return [_row(task, item) for item in items]


def write_gym_source(source: str, folder: Path) -> Path:
    """Write the rows as jsonl under `folder` and return the file. The name is the source, so it is written
    once."""
    name = "".join(c if c.isalnum() or c in "-_=" else "_" for c in source.removeprefix(SCHEME))
    path = folder / f"{name}.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Whole or not there: a run that is killed here would else train on the half of it.
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in gym_rows(source))
        replace_file(path, text.encode(), "gym", durable=False)
    return path


def _row(task: str, item: dict[str, Any]) -> dict[str, Any]:
    answer = str(item["answer"])
    solution = item["metadata"].get("answer_cot")
    if solution:
        steps = str(solution).split("####")[0].strip()
        reply = f"{steps}\nThe answer is \\boxed{{{answer}}}."
    else:
        reply = answer
    messages = [
        {"role": "user", "content": item["question"].strip()},
        {"role": "assistant", "content": reply},
    ]
    return {"messages": messages, "task": task, "answer": answer}


def _parse(source: str) -> tuple[str, dict[str, Any]]:
    parts = urlsplit(source)
    settings: dict[str, Any] = {}
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        # Settings of tasks are numbers or words, and a name has only text.
        number = value.lstrip("-")
        settings[key] = int(value) if number.isdigit() else value
    for key in ("size", "seed"):
        if not isinstance(settings.get(key, 0), int) or settings.get(key, 1) < (1 if key == "size" else 0):
            raise DataError(
                describe(
                    source, f"{key} is not usable", expected="a positive whole number", got=settings[key]
                )
            )
    return parts.path, settings


def _import() -> types.ModuleType:
    """reasoning_gym imports a SAT solver that has no wheel and that one task of a hundred needs: do without
    if absent."""
    try:
        import pycosat  # noqa: F401
    except ImportError:
        stand_in = types.ModuleType("pycosat")
        stand_in.__doc__ = "absent: the one reasoning-gym task that solves SAT cannot run"
        sys.modules["pycosat"] = stand_in
    try:
        import reasoning_gym
    except ImportError as error:
        raise DataError(
            describe(
                SCHEME,
                f"the package reasoning-gym cannot be imported ({error})",
                todo="pip install reasoning-gym",
            )
        ) from error
    return reasoning_gym
