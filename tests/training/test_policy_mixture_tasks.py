"""Which tasks a mixture has and how often each is drawn: columns, files and hub ids; weights, temperature,
rehearsal."""

from __future__ import annotations

import json
import math
from collections import Counter

import datasets
import numpy as np
import pytest

from repsft_fast import train
from repsft_fast.config import Config
from repsft_fast.errors import ConfigError
from repsft_fast.policies.history import shares
from repsft_fast.training.build import build
from repsft_fast.training.policy import sampling_rates
from tests.helpers import runs
from tests.training.test_conductor import MIXTURE

SIZES = {"a": 10, "b": 30, "c": 60}


def rates(**mixture):
    settings = {
        "run": {"folder": "f"},
        "model": {"path": "m"},
        "data": {"train": "t"},
        "budget": {"epochs": 1},
        "mixture": mixture,
    }
    return sampling_rates(Config.of(settings), tuple(SIZES), np.repeat(np.arange(3), list(SIZES.values())))


class TestRates:
    def test_by_size_where_nothing_is_set(self):
        assert rates() == {}

    def test_weights_are_shares_of_what_is_drawn_whatever_the_sizes(self):
        found = rates(weights={"a": 1, "b": 1, "c": 2})
        assert shares(SIZES, found, SIZES) == pytest.approx({"a": 0.25, "b": 0.25, "c": 0.5})

    @pytest.mark.parametrize("temperature", [1.0, 2.0, 1000.0])
    def test_a_temperature_flattens_the_sizes(self, temperature):
        drawn = shares(SIZES, rates(temperature=temperature), SIZES)
        mass = {task: size ** (1 / temperature) for task, size in SIZES.items()}
        assert drawn == pytest.approx({task: m / sum(mass.values()) for task, m in mass.items()})

    @pytest.mark.parametrize("mixture", [{"weights": {"a": 5, "b": 1, "c": 0}}, {"temperature": 3.0}])
    def test_an_epoch_is_as_long_as_without_them(self, mixture):
        found = rates(**mixture)
        assert math.fsum(found[task] * size for task, size in SIZES.items()) == pytest.approx(100)

    @pytest.mark.parametrize("temperature", [1e-3, 1e-308, 5e-324])
    def test_a_temperature_of_almost_nothing_draws_the_largest_alone(self, temperature):
        assert shares(SIZES, rates(temperature=temperature), SIZES) == pytest.approx(
            {"a": 0.0, "b": 0.0, "c": 1.0}
        )

    def test_powers_past_the_largest_number_are_the_same_shares(self):
        mass = {task: (size / 60) ** 200.0 for task, size in SIZES.items()}
        drawn = shares(SIZES, rates(temperature=1 / 200), SIZES)
        assert drawn == pytest.approx({task: m / sum(mass.values()) for task, m in mass.items()}, rel=1e-9)

    def test_weights_whose_sum_no_number_holds(self):
        drawn = shares(SIZES, rates(weights={"a": 1e308, "b": 1e308, "c": 0.5e308}), SIZES)
        assert drawn == pytest.approx({"a": 0.4, "b": 0.4, "c": 0.2})

    def test_every_task_needs_a_weight(self):
        with pytest.raises(ConfigError, match=r"mixture.weights: some tasks have none, got \['c'\]"):
            rates(weights={"a": 1, "b": 1})


def drawn(folder):
    """Trained tokens per task over the run."""
    found = Counter()
    for line in runs.metrics(folder, "update"):
        found.update({task: counts["total"] for task, counts in line["tasks"].items()})
    return found


def test_weights_are_drawn_in_the_run(tmp_path):
    """Tasks of equal size and length, drawn 8 : 1 : 1."""
    weights = {"task0": 8.0, "task1": 1.0, "task2": 1.0}
    mixture = {"mixture__policy": "sft", "mixture__compute_budget": 6, "mixture__weights": weights}
    train(runs.settings(tmp_path, **{**MIXTURE, **mixture, "mixture__evaluations_per_epoch": 1}))
    assert len(runs.metrics(tmp_path, "update")) == 6 * 36 / 4, "an epoch is as long as without weights"
    found = drawn(tmp_path)
    assert 0.65 < found["task0"] / found.total() < 0.95  # 216 draws: 0.8 within five standard errors
    assert found["task1"] > 0
    assert found["task2"] > 0


def test_an_excluded_task_keeps_its_share_of_samples_under_rehearsal(tmp_path):
    changes = {
        "mixture__policy": "msft",
        "mixture__compute_budget": 6,
        "mixture__max_stages": 2,
        "mixture__rehearsal": 0.25,
    }
    train(runs.settings(tmp_path, **{**MIXTURE, **changes, "optim__lr": 3e-2}))
    stage = runs.metrics(tmp_path, "stage")[1]
    (excluded,) = {"task0", "task1", "task2"} - set(stage["active"])
    assert stage["weights"] == {**dict.fromkeys(stage["active"], 1.0), excluded: 0.25}
    assert "1 excluded task rehearsed (11.1% of the samples)" in stage["text"]
    lines = runs.metrics(tmp_path)
    after = [line for line in lines[lines.index(stage) :] if line["kind"] == "update"]
    found = Counter()
    for line in after:
        found.update({task: counts["total"] for task, counts in line["tasks"].items()})
    assert 0.03 < found[excluded] / found.total() < 0.25, (
        "a ninth of about 160 draws, within five standard errors"
    )


def write(path, task, count, offset):
    ids = [[3 + (offset + number * 5 + k) % 50 for k in range(8)] for number in range(count)]
    path.write_text("".join(json.dumps({"input_ids": i, "labels": [-100] * 4 + i[4:]}) + "\n" for i in ids))
    return str(path)


def test_a_file_for_each_task_and_split(tmp_path):
    made = runs.settings(
        tmp_path, **{key: value for key, value in MIXTURE.items() if key not in ("samples", "tasks")}
    )
    for split, count in (("train", 12), ("validation", 5), ("test", 4)):
        made["data"][split] = {
            task: write(tmp_path / f"{task}.{split}.jsonl", task, count, 7 * i + len(split))
            for i, task in enumerate(("sums", "words"))
        }
    made["data"]["validation_fraction"] = 0.0
    made["mixture"] |= {"policy": "msft", "max_stages": 2}
    result = train(made)
    assert set(result.more["test"]["tasks"]) == {"sums", "words"}
    assert set(runs.metrics(tmp_path, "evaluation")[0]["scores"]) == {"sums", "words"}
    assert result.more["mixture"]["result"]["tasks"].keys() == {"sums", "words"}


def test_hub_ids_as_tasks(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, subset, *, split):
        asked.append((name, subset, split))
        rows = [{"input_ids": [3 + (len(asked) * 9 + n * 5 + k) % 50 for k in range(8)]} for n in range(12)]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    made = runs.settings(
        tmp_path, **{key: value for key, value in MIXTURE.items() if key not in ("samples", "tasks")}
    )
    made["data"]["train"] = {"sums": "owner/sums", "words": "owner/words:english"}
    data = build(Config.of({**made, "mixture": {"policy": "sft"}})).data
    assert asked == [("owner/sums", None, "train"), ("owner/words", "english", "train")]
    assert data.task_names == ("sums", "words")
    assert Counter(data.validation.index.tasks.tolist()) == {0: 3, 1: 3}
