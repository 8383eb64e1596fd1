"""Rows of part M: no prompt in two parts, wrong replies in training alone and in their exact share, the same from
a seed."""

import json
import re

import pytest

from benchmarks.suites.gpu import overfit_tasks


def truth(task, prompt):
    if task == "larger":
        return str(max(map(int, re.findall(r"\d+", prompt))))
    if task == "mood":
        return next(
            mood for mood, words in overfit_tasks.MOODS.items() if any(f" was {w}." in prompt for w in words)
        )
    if task == "backward":
        return prompt.split(": ")[1][::-1]
    return str(sum(map(int, re.findall(r"\d+", prompt))))


@pytest.mark.parametrize("task", overfit_tasks.TASKS)
def test_parts_share_no_prompt_and_only_training_replies_are_wrong(task):
    parts = overfit_tasks.deal(task, 1)
    prompts = [prompt for rows in parts.values() for prompt, _ in rows]
    assert len(set(prompts)) == len(prompts) == 350 + 300 + 300
    assert {part: len(rows) for part, rows in parts.items()} == overfit_tasks.SIZES
    wrong = {part: sum(truth(task, p) != reply for p, reply in rows) for part, rows in parts.items()}
    assert wrong == {"train": {"larger": 105, "mood": 105}.get(task, 0), "validation": 0, "test": 0}


def test_a_seed_decides_the_rows():
    assert overfit_tasks.deal("sum", 1) == overfit_tasks.deal("sum", 1) != overfit_tasks.deal("sum", 2)


def test_files_hold_the_rows(tmp_path):
    files = overfit_tasks.write(tmp_path, 0, {"train": 4, "test": 2})
    assert {part: sorted(of) for part, of in files.items()} == {
        part: sorted(overfit_tasks.TASKS) for part in ("train", "test")
    }
    with open(files["train"]["mood"]) as file:
        lines = [json.loads(line)["messages"] for line in file]
    assert [(user["content"], reply["content"]) for user, reply in lines] == overfit_tasks.deal(
        "mood", 0, {"train": 4, "test": 2}
    )["train"]
