"""What a value that cannot be used is told: its setting, what it may be, and what was meant."""

import pytest

from repsft_fast.config import Config
from repsft_fast.errors import ConfigError

LEAST = {"run.folder": "r", "model.path": "m", "data.train": "a.jsonl", "budget.epochs": 3}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim.name": "adamv"}, ("optim.name: cannot be used", "got adamv", "did you mean adamw?")),
        ({"optim.name": "zzzzzz"}, ("optim.name: cannot be used", "'adamw'")),
        ({"optim.lr": "fast"}, ("optim.lr: cannot be used", "got fast")),
    ],
)
def test_a_wrong_value_is_explained_in_one_line(changes, words):
    with pytest.raises(ConfigError) as caught:
        Config.of(LEAST | changes)
    (problem,) = caught.value.problems
    assert [word for word in words if word not in problem] == []
    assert ("did you mean" in problem) == any("did you mean" in word for word in words)


def test_what_is_missing_says_where_it_is_set():
    with pytest.raises(ConfigError) as caught:
        Config.of({name: value for name, value in LEAST.items() if name != "run.folder"})
    assert caught.value.problems == ["run.folder: is missing; set it in the file or with --run.folder"]
