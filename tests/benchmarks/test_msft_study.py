"""The pure parts of the mSFT study: its tasks, its splits, its records and the arithmetic of its tables."""

import json
import math

import pytest

from benchmarks import msft_study, msft_table, msft_tasks
from repsft_fast.config import Config
from repsft_fast.training.parts import build
from repsft_fast.training.rundir import RunFolder
from repsft_fast.training.trainer import run
from tests import runs

ROWS = [(f"prompt {n}", f"reply {n}") for n in range(msft_tasks.STUDY_ROWS + 40)]
# Tasks whose packages are those of the test extra; the others' need the extra [study].
SKILLS = ("chain_sum", "spell_backward", "gcd", "letter_counting")


def record(cell="sft C=6", seed=1, **changes):
    made = {
        "study": msft_study.STUDY, "cell": cell, "seed": seed, "tasks": ["a", "b"], "test": {"a": 0.5, "b": 0.7},
        "test_macro": 0.6, "validation": 0.6, "validation_start": 0.2, "result_moment": "0.2", "stages": 1, "updates": 10,
        "kept_updates": 8, "tokens": 1000, "discarded_tokens": 200, "evaluated_tokens": 500, "extra_tokens": 0,
        "train_flops": 1e12, "evaluation_flops": 2e12, "seconds": 9.0, "evaluation_seconds": 3.0,
        "snapshots": {"seconds": 0.002}, "exclusions": [],
        "curve": [["0.0", 0, 0.0, 0.1, 0.3], ["0.1", 0, 0.25, 0.6, 0.2], ["0.2", 0, 0.5, 0.6, 0.5]],
    }  # fmt: skip
    return made | changes


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


def test_the_last_record_of_a_cell_counts_and_other_studies_do_not(tmp_path):
    path = tmp_path / "records.jsonl"
    assert msft_study.read(path) == []
    for made in (record(updates=1), record(seed=2), record(updates=3), record(seed=3, study=msft_study.STUDY + 1)):
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


def test_every_cell_is_a_setting_the_trainer_knows(tmp_path):
    from repsft_fast.config import Config

    for mixture in msft_study.CELLS.values():
        made = msft_study.settings(tmp_path, {"a": "t"}, tmp_path, 3, mixture=mixture, data={"validation": {"a": "v"}},
                                   model={"path": "m"}, budget={"epochs": 10}, schedule={"name": "constant"})  # fmt: skip
        config = Config.of(made)
        assert (config.mixture.policy, config.run.seed, config.data.train) == (mixture["policy"], 3, {"a": "t"})


def test_intervals_are_students():
    assert msft_table.interval([0.5]) == (0.5, math.inf)
    middle, half = msft_table.interval([1.0, 2.0, 3.0])
    assert middle == 2.0
    assert half == pytest.approx(4.303 / math.sqrt(3), rel=1e-12)
    with pytest.raises(ValueError, match="no values"):
        msft_table.interval([])


def test_differences_are_taken_seed_by_seed():
    middle, half = msft_table.paired({1: 0.5, 2: 0.7, 9: 0.0}, {1: 0.4, 2: 0.6, 3: 1.0})
    assert middle == pytest.approx(0.1)
    assert half == pytest.approx(0.0, abs=1e-12)  # the same difference in both common seeds
    assert msft_table.paired({1: 0.5}, {2: 0.5}) is None


def test_a_peak_is_the_first_maximum():
    assert msft_table.peaks(record()) == {"a": 0.25, "b": 0.5}


def test_forgetting_looks_at_tasks_that_left_before_the_result():
    gone = {"task": "a", "epoch": 0.25, "score": 0.6, "score_in_result": 0.5, "stage": 1}
    run = record(result_moment="0.1", exclusions=[gone | {"moment": "0.0"}, gone | {"moment": "0.2"}])
    assert msft_table.forgetting([run]) == [pytest.approx(-0.1)]


def test_the_table_has_a_line_per_cell_and_says_what_was_measured():
    gone = {"task": "a", "moment": "0.0", "epoch": 0.25, "score": 0.6, "score_in_result": 0.5, "stage": 1}
    runs = [record(), record(seed=2, test_macro=0.8), record("msft", 1, test_macro=0.5, exclusions=[gone]),
            record("msft", 2, test_macro=0.8)]  # fmt: skip
    text = msft_table.table(runs)
    lines = text.splitlines()
    assert "| sft C=6 | 2 | 0.700 ± 1.271 |  | 0.600 | 0.200 |" in lines
    assert any(line.startswith("| msft | 2 | 0.650 ± 1.906 | -0.050 ± 0.635 |") for line in lines)
    assert any("seed 1: a 0.25" in line and "-0.100 (1 tasks)" in line for line in lines)
    assert "| seed 1 | 0.25 | 0.50 |" in lines
    with pytest.raises(ValueError, match="no records"):
        msft_table.table([])


def test_the_cells_compared_first_come_first_in_every_seed():
    cells = list(msft_study.CELLS)
    places = {pair: place for place, pair in enumerate(msft_study.order(cells, [1, 2]))}
    assert len(places) == 2 * len(cells)
    assert places[cells[4], 2] < places[cells[5], 1] < places[cells[6], 1] < places[cells[5], 2]


def test_a_record_holds_what_a_run_left_behind(tmp_path):
    """Whatever decides: the test's exact match of every task, and the probes' work beside the training's."""
    changes = {"mixture__policy": "dynamix", "mixture__metric": "nll", "mixture__compute_budget": 8, "budget__epochs": 60}
    held = {"data__validation_fraction": 0.25, "data__test_fraction": 0.1, "schedule__name": "constant"}
    config = Config.of(runs.settings(tmp_path, samples=48, tasks=3, **changes, **held))
    with RunFolder(config):
        result = run(parts := build(config))
    made = msft_study.summary(runs.metrics(tmp_path), result, parts)
    lines = runs.metrics(tmp_path, "evaluation")
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert set(made["test"]) == set(made["tasks"]) == {"task0", "task1", "task2"}
    assert made["test"] == {task: found["exact_match"] for task, found in result.more["test"]["tasks"].items()}
    account = result.more["account"]
    assert made["extra_tokens"] == account["tokens"]["probed"] > 0
    assert made["evaluated_tokens"] - msft_study.tokens_of(parts.data.test, 1) == account["tokens"]["evaluated"]
    assert made["train_flops"] == pytest.approx(account["flops"]["trained"] + account["flops"]["probed"], rel=1e-12)
    assert len(made["curve"]) == len(lines)
    assert made["stages"] == msft_table.stages(made) == 1
    assert made["updates"] == len(runs.metrics(tmp_path, "update"))


def test_stages_are_counted_by_the_curve():
    assert msft_table.stages(record(curve=[["0.0", 0, 0.0, 0.1, 0.3], ["2.1", 2, 0.25, 0.6, 0.2]], stages=4)) == 3
