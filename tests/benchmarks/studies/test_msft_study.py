"""The pure parts of the mSFT study: its tasks, its splits, its records and the arithmetic of its tables."""

import json
import math

import pytest

from benchmarks.studies import msft_study, msft_table
from repsft_fast.config import Config
from repsft_fast.rundir.folder import RunFolder
from repsft_fast.training.build import build
from repsft_fast.training.trainer import run
from tests.benchmarks.studies.study_records import record
from tests.helpers import runs


def test_the_last_record_of_a_cell_counts_and_other_studies_do_not(tmp_path):
    path = tmp_path / "records.jsonl"
    assert msft_study.read(path) == []
    for made in (
        record(updates=1),
        record(seed=2),
        record(updates=3),
        record(seed=3, study=msft_study.STUDY + 1),
    ):
        msft_study.append(path, made)
    assert [(r["seed"], r["updates"]) for r in msft_study.read(path)] == [(1, 3), (2, 10)]
    with pytest.raises(ValueError, match="not JSON compliant"):
        msft_study.append(path, record(test_macro=math.nan))
    assert len(path.read_text().splitlines()) == 4


def test_exclusions_are_read_from_a_runs_lines():
    def looked(moment, epoch, a, b):
        return {"kind": "evaluation", "moment": moment, "epoch": epoch, "scores": {"a": a, "b": b}}

    lines = [
        looked("0.0", 0.0, 0.1, 0.1), looked("0.1", 0.5, 0.4, 0.2), looked("0.2", 1.0, 0.3, 0.3),
        {"kind": "stage", "stage": 1, "active": ["b"], "start": "0.1"},
        final := looked("1.3", 1.5, 0.35, 0.6),
        {"kind": "stage", "stage": 2, "active": ["b"], "start": "1.3"},
    ]  # fmt: skip
    assert msft_study.exclusions(lines, ["a", "b"], final) == [
        {"task": "a", "stage": 1, "moment": "0.1", "epoch": 0.5, "score": 0.4, "score_in_result": 0.35}
    ]


def test_a_task_of_weight_0_is_no_exclusion():
    lines = [
        {"kind": "stage", "stage": 0, "active": ["b"], "start": None},
        {"kind": "evaluation", "moment": "0.0", "epoch": 0.0, "scores": {"a": 0.1, "b": 0.1}},
        {"kind": "stage", "stage": 1, "active": [], "start": "0.0"},
    ]
    assert [gone["task"] for gone in msft_study.exclusions(lines, ["a", "b"], lines[1])] == ["b"]


def test_the_oracle_weighs_by_the_epoch_of_the_smoothed_best():
    curve = [[f"0.{n}", 0, n / 4, 0.1 * n, 0.9 - 0.1 * n, 0.5 - 0.1 * abs(n - 3)] for n in range(7)]
    weights = msft_study.own_best_weights(record(tasks=["a", "b", "c"], curve=curve))
    assert weights == {"a": 1.0, "b": 0.0, "c": 0.5}
    with pytest.raises(ValueError, match="no weights: no unbroken stretch of 5"):
        msft_study.own_best_weights(record())


def test_the_oracle_needs_its_seeds_baseline(tmp_path):
    with pytest.raises(ValueError, match="needs sft C=6 of seed 2"):
        msft_study.run_cell(tmp_path, msft_study.ORACLE, 2, [record(seed=1)])


def test_the_control_with_resets_is_what_msft_is_when_nobody_leaves(tmp_path):
    def evaluations(policy):
        held = {"data__validation_fraction": 0.25, "schedule__name": "constant", "budget__epochs": 60}
        mixture = {"mixture__policy": policy, "mixture__max_stages": 2, "mixture__metric": "nll"}
        config = Config.of(runs.settings(tmp_path / policy, samples=48, tasks=2, **held, **mixture))
        with RunFolder(config):
            run(build(config))
        lines = runs.metrics(tmp_path / policy, "evaluation")
        return [(line["moment"], line["stage"], line["loss"], line["scores"]) for line in lines]

    found = evaluations("sft_resets")
    assert found == evaluations("msft")
    assert {stage for _, stage, _, _ in found} == {0, 1}
    assert found[0][2] > found[-1][2]


def test_every_cell_is_a_setting_the_trainer_knows(tmp_path):
    from repsft_fast.config import Config

    for mixture in msft_study.CELLS.values():
        made = msft_study.settings(tmp_path, {"a": "t"}, tmp_path, 3, mixture=mixture, data={"validation": {"a": "v"}},
                                   model={"path": "m"}, budget={"epochs": 10}, schedule={"name": "constant"})  # fmt: skip
        config = Config.of(made)
        assert (config.mixture.policy, config.run.seed, config.data.train) == (
            mixture["policy"],
            3,
            {"a": "t"},
        )


def test_the_cells_compared_first_come_first_in_every_seed():
    cells = list(msft_study.CELLS)
    places = {pair: place for place, pair in enumerate(msft_study.order(cells, [1, 2]))}
    assert len(places) == 2 * len(cells)
    assert places[cells[4], 2] < places[cells[5], 1] < places[cells[6], 1] < places[cells[5], 2]


def test_a_record_holds_what_a_run_left_behind(tmp_path):
    """Whatever decides: the test's exact match of every task, and the probes' work beside the training's."""
    changes = {
        "mixture__policy": "dynamix",
        "mixture__metric": "nll",
        "mixture__compute_budget": 8,
        "budget__epochs": 60,
    }
    held = {"data__validation_fraction": 0.25, "data__test_fraction": 0.1, "schedule__name": "constant"}
    config = Config.of(runs.settings(tmp_path, samples=48, tasks=3, **changes, **held))
    with RunFolder(config):
        result = run(parts := build(config))
    made = msft_study.summary(runs.metrics(tmp_path), result, parts)
    lines = runs.metrics(tmp_path, "evaluation")
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert set(made["test"]) == set(made["tasks"]) == {"task0", "task1", "task2"}
    assert made["test"] == {
        task: found["exact_match"] for task, found in result.more["test"]["tasks"].items()
    }
    account = result.more["account"]
    assert made["extra_tokens"] == account["tokens"]["probed"] > 0
    assert (
        made["evaluated_tokens"] - msft_study.tokens_of(parts.data.test, 1) == account["tokens"]["evaluated"]
    )
    assert made["train_flops"] == pytest.approx(
        account["flops"]["trained"] + account["flops"]["probed"], rel=1e-12
    )
    assert len(made["curve"]) == len(lines)
    assert made["stages"] == msft_table.stages(made) == 1
    assert made["updates"] == len(runs.metrics(tmp_path, "update"))
