"""The study's tasks: universes, replies, disjoint splits."""

import json
import math

import pytest

from benchmarks.studies import msft_tasks

ROWS = [(f"prompt {n}", f"reply {n}") for n in range(msft_tasks.STUDY_ROWS + 40)]


# Tasks whose packages are those of the test extra; the others' need the extra [study].
SKILLS = ("chain_sum", "spell_backward", "gcd", "letter_counting")


@pytest.mark.parametrize("task", SKILLS)
def test_a_universe_is_the_same_every_time_and_has_every_prompt_once(task):
    rows = msft_tasks.universe(task)
    assert rows == msft_tasks.universe(task)
    assert len({prompt for prompt, _ in rows}) == len(rows) > msft_tasks.STUDY_ROWS


def test_replies_are_right():
    for prompt, reply in msft_tasks.universe("gcd"):
        assert int(reply) == math.gcd(*(int(n) for n in prompt.removeprefix("gcd ").split(", ")))
    for prompt, reply in msft_tasks.universe("spell_backward"):
        assert reply == prompt.removeprefix("back ")[::-1]
    for prompt, reply in msft_tasks.universe("letter_counting"):
        letter, word = prompt.split(" in ")
        assert int(reply) == word.lower().count(letter)
    for prompt, reply in msft_tasks.universe("chain_sum"):
        first, sign, second = prompt.split()
        assert int(reply) == int(first) + int(sign + second)
        assert max(int(first), int(second)) < 50


def test_splits_are_disjoint_and_the_pool_is_nobodys():
    first, second, pool = msft_tasks.deal(ROWS, 1), msft_tasks.deal(ROWS, 2), msft_tasks.pool(ROWS)
    assert {part: len(rows) for part, rows in first.items()} == {
        "train": msft_tasks.TRAIN, "validation": msft_tasks.VALIDATION, "test": msft_tasks.TEST,
    }  # fmt: skip
    assert len(pool) == 40
    seen = [row for rows in (*first.values(), pool) for row in rows]
    assert len(set(seen)) == len(seen)
    assert first == msft_tasks.deal(ROWS, 1)
    assert first["train"] != second["train"]
    assert not {row for rows in second.values() for row in rows} & set(pool)


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match=f"expected {msft_tasks.STUDY_ROWS}, got 5"):
        msft_tasks.deal(ROWS[:5], 1)


def test_a_question_in_new_words_is_refused():
    assert msft_tasks.found(r"of (\d+)", "the sum of 12") == "12"
    with pytest.raises(ValueError, match="in the question, got 'another'"):
        msft_tasks.found(r"of (\d+)", "another")


def test_written_rows_are_messages(tmp_path):
    msft_tasks.write_rows(tmp_path / "new" / "a.jsonl", ROWS[:2])
    lines = [json.loads(line) for line in (tmp_path / "new" / "a.jsonl").read_text().splitlines()]
    assert [[m["content"] for m in line["messages"]] for line in lines] == [list(row) for row in ROWS[:2]]
