"""Mixtures that go wrong: tasks without rows or scores, budgets that cannot hold, the same moment gone back
to again."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from repsft_fast import cli, train
from repsft_fast.config import Config
from repsft_fast.errors import ConfigError, DataError, SnapshotError
from repsft_fast.policies.statistics import Score
from repsft_fast.report import timeline
from repsft_fast.training.build import build
from repsft_fast.training.evaluation import Scored, TaskScorer
from tests.helpers import runs

MIXTURE: dict[str, Any] = {
    "tasks": 3, "mixture__policy": "msft", "mixture__metric": "nll", "mixture__max_stages": 3, "schedule__name": "constant",
    "data__validation_fraction": 0.25, "mixture__rule": "paper",
}  # fmt: skip


def settings(folder, **changes):
    made = runs.settings(folder, **{"samples": 36, **MIXTURE, **changes})
    del made["budget"]
    return made


def rows(count, task, seed):
    lines = []
    for number in range(count):
        ids = [3 + (seed * 7 + number * 5 + k) % 50 for k in range(8)]
        lines.append(json.dumps({"input_ids": ids, "labels": [-100] * 4 + ids[4:], "task": task}))
    return lines


def given(folder, train_rows, validation_rows, **changes):
    """A run whose splits are files written here."""
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("\n".join(train_rows) + "\n")
    (folder / "validation.jsonl").write_text("\n".join(validation_rows) + "\n")
    changes = {
        "data__validation_fraction": 0.0,
        "data__validation": str(folder / "validation.jsonl"),
        **changes,
    }
    return settings(folder, **changes)


def decisions(folder):
    return json.loads((folder / "run" / timeline.FILE).read_text())["decisions"]


@pytest.mark.parametrize("rule", ["paper", "tested"])
def test_a_task_without_validation_rows_is_trained_and_never_best_nor_excluded(tmp_path, rule):
    train_rows = [*rows(12, "a", 1), *rows(12, "b", 2), *rows(12, "silent", 3)]
    made = given(tmp_path, train_rows, [*rows(5, "a", 4), *rows(5, "b", 5)], mixture__rule=rule, mixture__z=0.0,
                 mixture__min_looks=1, mixture__patience=1, optim__lr=3e-2)  # fmt: skip
    result = train(made)
    assert result.success
    assert result.more["mixture"]["standing"]["tasks"]["silent"] == {
        "score": None, "best": None, "state": "no validation rows",
    }  # fmt: skip
    found = decisions(tmp_path)
    assert "silent" not in {d.get("drop") for d in found}
    assert all("silent" in d["active"] for d in found if d["kind"] == "stage")
    evaluations = runs.metrics(tmp_path, "evaluation")
    assert {e["scores"]["silent"] for e in evaluations} == {None}
    assert all(isinstance(e["pooled"], float) for e in evaluations), (
        "a task that never had a score counts nowhere"
    )


def test_a_task_of_one_row_and_one_validation_row(tmp_path):
    made = given(
        tmp_path, [*rows(12, "a", 1), *rows(1, "single", 2)], [*rows(4, "a", 3), *rows(1, "single", 4)]
    )
    assert train(made).success
    assert all(e["errors"]["single"] is None for e in runs.metrics(tmp_path, "evaluation")), (
        "one row has no standard error"
    )


def test_one_task_alone_and_more_tasks_than_samples_per_update(tmp_path):
    alone = given(tmp_path / "alone", rows(8, "a", 1), rows(4, "a", 2))
    assert train(alone).success
    many = [line for task in range(9) for line in rows(2, f"t{task}", task)]
    held = [line for task in range(9) for line in rows(1, f"t{task}", 20 + task)]
    crowd = given(tmp_path / "crowd", many, held, batch__samples=2)
    assert train(crowd).success
    assert decisions(tmp_path / "crowd")[0]["text"] == "stage 0: 9 of 9 tasks active"


def test_a_constant_metric_under_the_literal_rule_goes_back_to_the_base_again_and_again(tmp_path):
    """Every first maximum is the one at 0.00: three reverts to one moment, and the result is the model as it
    came."""
    made = settings(tmp_path, mixture__metric="exact_match", mixture__max_stages=4)
    base = {name: tensor.clone() for name, tensor in build(Config.of(made)).model.state_dict().items()}
    result = train(made)
    backs = [d for d in decisions(tmp_path) if d["kind"] == "roll_back"]
    assert [d["drop"] for d in backs] == ["task0", "task1", "task2"]
    assert {d["to"] for d in backs} == {result.more["moment"]} == {"0.0"}
    assert result.reason == "no task is active any more"
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in base.items())
    account = result.more["account"]
    assert account["tokens"]["discarded"] == account["tokens"]["trained"] > 0
    assert account["tokens"]["result"] == 0


def test_a_constant_metric_under_the_tested_rule_excludes_nobody(tmp_path):
    result = train(settings(tmp_path, mixture__metric="exact_match", mixture__rule="tested"))
    assert not [d for d in decisions(tmp_path) if d["kind"] == "roll_back"]
    assert {t["state"] for t in result.more["mixture"]["standing"]["tasks"].values()} == {"not started"}


@pytest.mark.parametrize("rule", ["paper", "tested"])
@pytest.mark.parametrize("when", ["always", "after the first", "once"])
def test_a_task_whose_score_is_nan_is_never_best_nor_excluded_there(tmp_path, monkeypatch, rule, when):
    calls = [0]
    plain = TaskScorer.__call__

    def scoring(scorer):
        found = plain(scorer)
        calls[0] += 1
        if (
            when == "always"
            or (when == "after the first" and calls[0] > 1)
            or (when == "once" and calls[0] == 3)
        ):
            scores = {**found.scores, "task1": Score(math.nan, found.scores["task1"].n, None)}
            return Scored(
                scores, {**found.line, "scores": {**found.line["scores"], "task1": None}}, found.work
            )
        return found

    monkeypatch.setattr(TaskScorer, "__call__", scoring)
    changes = {
        "mixture__z": 0.0,
        "mixture__min_looks": 1,
        "mixture__patience": 1,
        "mixture__compute_budget": 2,
    }
    result = train(settings(tmp_path, mixture__rule=rule, optim__lr=3e-2, **changes))
    assert result.success
    text = (tmp_path / "run" / "result.json").read_text() + (tmp_path / "run" / timeline.FILE).read_text()
    assert "NaN" not in text
    by_moment = {e["moment"]: e for e in runs.metrics(tmp_path, "evaluation")}
    for decision in decisions(tmp_path):
        if decision["kind"] == "roll_back" and decision["drop"] == "task1":
            assert by_moment[decision["to"]]["scores"]["task1"] is not None
    if when != "always":
        assert by_moment[result.more["moment"]]["scores"]["task1"] is not None


def test_a_task_weight_of_zero_leaves_it_out(tmp_path):
    weights = {"task0": 1.0, "task1": 1.0, "task2": 0.0}
    result = train(settings(tmp_path, mixture__weights=weights))
    assert result.success
    assert all("task2" not in line["tasks"] for line in runs.metrics(tmp_path, "update"))


class TestDecidedBeforeAnyWork:
    @pytest.fixture(autouse=True)
    def no_update(self, monkeypatch):
        monkeypatch.setattr(
            "repsft_fast.training.trainer.train_step", lambda *_: pytest.fail("work was done")
        )
        monkeypatch.setattr(TaskScorer, "__call__", lambda *_: pytest.fail("an evaluation was made"))

    def test_c_shorter_than_one_evaluation_interval(self, tmp_path):
        with pytest.raises(
            ConfigError, match=r"compute_budget: a stage would end before its first evaluation.*0.25.*got 0.2"
        ):
            train(settings(tmp_path, mixture__compute_budget=0.2))

    def test_a_snapshot_budget_too_small_for_one_snapshot(self, tmp_path):
        made = settings(tmp_path, snapshot__device_bytes=1000, snapshot__pinned_bytes=0)
        with pytest.raises(
            SnapshotError, match=r"hold 0 of \d+ snapshots of [\d,]+ bytes.*device 1,000.*raise a budget"
        ):
            train(made)

    def test_validation_rows_of_a_task_that_is_not_trained(self, tmp_path):
        made = given(tmp_path, rows(8, "a", 1), [*rows(3, "a", 2), *rows(3, "b", 3)])
        with pytest.raises(DataError, match=r"tasks the training data has not.*'b'"):
            train(made)

    def test_no_validation_rows_at_all(self, tmp_path, capsys):
        made = settings(tmp_path, data__validation_fraction=0.0)
        path = tmp_path / "mix.yaml"
        path.write_text(yaml.safe_dump(made))
        assert cli.main(["msft", "--config", str(path)]) == 2
        assert "set data.validation or data.validation_fraction" in " ".join(capsys.readouterr().err.split())

    def test_two_tasks_of_one_name(self, tmp_path, capsys):
        (tmp_path / "a.jsonl").write_text("\n".join(rows(8, "a", 1)) + "\n")
        made = settings(tmp_path)
        del made["data"]["task_column"], made["data"]["train"]
        path = tmp_path / "mix.yaml"
        twice = f"  train:\n    boolq: {tmp_path}/a.jsonl\n    boolq: {tmp_path}/train.jsonl\n"
        text = yaml.safe_dump(made).replace("data:\n", "data:\n" + twice)
        assert text.count("boolq") == 2
        path.write_text(text)
        assert cli.main(["msft", "--config", str(path)]) == 2
        assert "boolq" in capsys.readouterr().err

    def test_answers_without_a_tokenizer(self, tmp_path):
        with pytest.raises(
            ConfigError,
            match=r"mixture.metric: answer reads text, and there is no tokenizer; set tokenizer.path",
        ):
            train(settings(tmp_path, mixture__metric="answer"))

    def test_weights_for_some_tasks_only(self, tmp_path):
        with pytest.raises(ConfigError, match=r"mixture.weights: some tasks have none.*task1"):
            train(settings(tmp_path, mixture__weights={"task0": 1.0}))


def test_an_interrupted_mixture_leaves_files_from_which_the_timeline_can_be_made(tmp_path):
    def stop(work):
        if work.updates == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings(tmp_path), on_update=stop)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["code"] == "interrupted"
    assert len(timeline.build(tmp_path / "run")["evaluations"]) >= 2
