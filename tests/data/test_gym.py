"""Rows that reasoning-gym generates: what a row is, how a source is spelled, and that its file is written once."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from repsft_fast.data import gym
from repsft_fast.errors import DataError

ITEMS = {
    "sums": {"question": " 1 + 2? ", "answer": 3, "metadata": {}},
    "worked": {"question": "2 · 3?", "answer": "6", "metadata": {"answer_cot": "3 + 3 is 6. \n#### 6"}},
}


@pytest.fixture
def asked(monkeypatch):
    """A package of two tasks in reasoning-gym's place; what it was asked for."""
    calls = []

    def create_dataset(task, *, size, seed, **settings):
        calls.append((task, size, seed, settings))
        if "odd" in settings:
            raise TypeError("no setting odd")
        return [ITEMS[task]] * size

    factory = ModuleType("reasoning_gym.factory")
    factory.DATASETS = ITEMS
    package = ModuleType("reasoning_gym")
    package.create_dataset, package.factory = create_dataset, factory
    monkeypatch.setitem(sys.modules, "pycosat", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    return calls


def test_a_row_is_a_conversation_with_the_worked_solution_where_there_is_one(asked):
    (plain,), (worked, _) = (
        gym.gym_rows(f"reasoning-gym:{source}") for source in ("sums?size=1", "worked?size=2")
    )
    assert plain == {
        "messages": [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}],
        "task": "sums",
        "answer": "3",
    }
    assert worked["messages"][1]["content"] == "3 + 3 is 6.\nThe answer is \\boxed{6}."


def test_a_source_names_size_seed_and_the_tasks_own_settings(asked):
    gym.gym_rows("reasoning-gym:sums")
    gym.gym_rows("reasoning-gym:sums?size=2&seed=7&low=-3&kind=odd_ones")
    assert asked == [("sums", 100, 42, {}), ("sums", 2, 7, {"low": -3, "kind": "odd_ones"})]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("sum", "did you mean sums?"),
        ("sums?size=0", "size is not usable"),
        ("sums?size=few", "size is not usable"),
        ("sums?seed=-1", "seed is not usable"),
        ("sums?odd=1", "refuses these settings: no setting odd"),
    ],
)
def test_what_cannot_be_generated_is_refused(asked, source, said):
    with pytest.raises(DataError, match=f"^reasoning-gym:{source.replace('?', '.')}: .*{said}"):
        gym.gym_rows(f"reasoning-gym:{source}")


def test_the_file_is_written_once_and_sources_have_files_of_their_own(asked, tmp_path):
    first, again, other = (
        gym.write_gym_source(f"reasoning-gym:sums?size={size}", tmp_path / "cache") for size in (2, 2, 3)
    )
    assert first == again != other
    assert [size for _, size, _, _ in asked] == [2, 3]
    rows = [json.loads(line) for line in first.read_text(encoding="utf-8").splitlines()]
    assert rows == gym.gym_rows("reasoning-gym:sums?size=2")


@pytest.mark.parametrize("task", ["rush_hour", "boxnet"])
def test_a_task_without_answers_is_refused_and_not_trained_on_as_the_word_none(task):
    with pytest.raises(DataError, match=f"gives no answers to {task}.*take another task"):
        gym.gym_rows(f"reasoning-gym:{task}?size=2&seed=1")
