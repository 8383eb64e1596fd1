"""`repsft eval --rows`: the rows in place of the training's, all of them."""

import pytest

from repsft_fast.commands.evaluate_rows import with_rows
from repsft_fast.config import Config
from repsft_fast.errors import ConfigError

CONFIG = Config.of({
    "run.folder": "x", "data.train": {"a": "train.jsonl"}, "data.validation": "v.jsonl", "budget.epochs": 1,
    "data.samples": 7, "data.test_fraction": 0.1, "model.config": {"model_type": "llama"}, "mixture.policy": "sft",
})  # fmt: skip


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("b.jsonl", "b.jsonl"),
        ("{x: b.jsonl}", {"x": "b.jsonl"}),
        ("[b.jsonl, c.jsonl]", ["b.jsonl", "c.jsonl"]),
    ],
)
def test_nothing_of_the_runs_own_rows_is_left(written, found):
    data = with_rows(CONFIG, written).data
    assert (data.train, data.validation, data.samples, data.test_fraction) == (found, None, None, 0.0)


def test_tasks_are_named_once():
    column = CONFIG.model_copy(
        update={"data": CONFIG.data.model_copy(update={"train": "t.jsonl", "task_column": "task"})}
    )
    assert with_rows(column, "b.jsonl").data.task_column == "task"
    assert with_rows(column, "{x: b.jsonl}").data.task_column is None


@pytest.mark.parametrize("written", ["3", "{}", "[]", "", "[a, a]"])
def test_what_names_no_rows_is_refused_under_its_own_name(written):
    with pytest.raises(ConfigError, match=r"^--rows: ") as caught:
        with_rows(CONFIG, written)
    assert "data.train" not in str(caught.value)
