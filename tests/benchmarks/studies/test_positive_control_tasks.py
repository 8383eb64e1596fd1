"""The positive control's tasks: deterministic, disjoint, wrong exactly where they should be."""

from pathlib import Path

import pytest

from benchmarks.studies import positive_control_tasks as tasks

EACH = [(mixture, task) for mixture, made in tasks.MIXTURES.items() for task in made]


@pytest.mark.parametrize(("mixture", "task"), EACH)
def test_rows_are_enough_and_no_prompt_lies_in_two_splits(mixture, task):
    made, rows = tasks.MIXTURES[mixture][task], tasks.deal(mixture, task, 3)
    assert rows == tasks.deal(mixture, task, 3)
    assert {split: len(some) for split, some in rows.items()} == {
        "pool": made.pool, "train": made.train, "validation": 300, "test": 300,
    }  # fmt: skip
    prompts = [prompt for some in rows.values() for prompt, _ in some]
    assert len(set(prompts)) == len(prompts)
    # Rows of one length: a budget in tokens is one in rows.
    assert {(len(prompt), len(reply)) for some in rows.values() for prompt, reply in some} == {(5, 1)}


@pytest.mark.parametrize(("mixture", "task"), EACH)
def test_only_training_rows_are_wrong_and_as_many_as_said(mixture, task):
    made, rows = tasks.MIXTURES[mixture][task], tasks.deal(mixture, task, 3)
    name = f"{mixture} {task}"
    wrong = {split: sum(made.reply(name, p[1:]) != a for p, a in some) for split, some in rows.items()}
    assert wrong == {"pool": 0, "train": round(made.wrong * made.train), "validation": 0, "test": 0}


def test_a_reply_depends_on_the_letters_at_the_tasks_places_alone():
    made = tasks.Task(10, (1, 3), pool=0, train=0)
    assert made.reply("x", "abcd") == made.reply("x", "jbjd")
    assert len({made.reply("x", f"ab{letter}c") for letter in "abcdefghij"}) == 1
    assert len({made.reply("x", f"a{letter}bc") for letter in "abcdefghij"}) > 1


def test_seeds_share_the_pool_and_differ_in_their_rows():
    one, other = tasks.deal("A", "slow", 0), tasks.deal("A", "slow", 1)
    assert one["pool"] == other["pool"]
    assert one["train"] != other["train"]


def test_mixtures_share_no_task_and_no_mark():
    assert not set(tasks.marks("A").values()) & set(tasks.marks("B").values())
    for task in tasks.MIXTURES["A"]:
        assert tasks.MIXTURES["A"][task] != tasks.MIXTURES["B"][task]


def test_written_rows_are_those_dealt(tmp_path):
    files = tasks.write(tmp_path, "B", 7)
    assert set(files) == {"pool", "train", "validation", "test"}
    lines = Path(files["train"]["slow"]).read_text(encoding="utf-8").splitlines()
    assert len(lines) == 600
    assert tasks.deal("B", "slow", 7)["train"][0][0] in lines[0]
