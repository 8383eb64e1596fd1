"""A task whose score is not a number: said as that, from where on, and never taken for a figure."""

import json
import math

import numpy as np
import pytest

from repsft_fast import train
from repsft_fast.evaluate.answered import Answered, Answers
from repsft_fast.evaluate.teacher_forced import SampleScores, TeacherForced
from repsft_fast.policies import MsftSettings, NewStage
from repsft_fast.policies.history import History
from repsft_fast.policies.msft import Msft
from repsft_fast.policies.statistics import Score
from repsft_fast.report import live_mixture
from repsft_fast.stats import COLUMNS, TokenStats
from repsft_fast.training.evaluation import line_of
from repsft_fast.training.outcome import nan_since, said_of_scores
from tests.helpers import runs

NAN = float("nan")
MIXTURE = {
    "samples": 24, "tasks": 2, "mixture__policy": "msft", "mixture__max_stages": 2, "schedule__name": "constant",
    "data__validation_fraction": 0.25,
}  # fmt: skip


def history_of(values: list[float], updates: list[int], rows: int = 2) -> History:
    history = History.start([("a", 8), ("b", 8)])
    history.took(NewStage(None, ("a", "b")))
    for number, (value, update) in enumerate(zip(values, updates, strict=True)):
        history.tick(update, update / 10, 0)
        history.evaluated(f"m{number}", {"a": Score.of([value] * rows), "b": Score.of([number / 10] * 2)})
    return history


class TestSaid:
    @pytest.mark.parametrize(
        ("values", "since"),
        [([0.5], None), ([0.5, NAN], 10), ([0.5, NAN, NAN], 10), ([NAN, NAN], 0), ([0.5, NAN, 0.4], None),
         ([0.5, NAN, 0.4, -math.inf], 30), ([0.5, math.inf], 10)],
    )  # fmt: skip
    def test_since_when(self, values, since):
        assert nan_since(history_of(values, [0, 10, 20, 30][: len(values)]), "a") == since

    def test_once_when_it_stops_and_once_when_it_begins_again(self):
        values, updates = [0.5, NAN, NAN, 0.4], [0, 10, 20, 1030]
        said = [said_of_scores(history_of(values[:n], updates[:n])) for n in (1, 2, 3, 4)]
        assert said[0] == said[2] == []
        assert said[1] == [
            "the score of `a` is not a number since update 10 (2 of its 2 validation rows): it is neither a"
            " best nor a fall; no moment can be the result until it is one again"
        ]
        assert said[3] == ["the score of `a` is a number again at update 1,030"]

    def test_a_task_without_rows_is_another_thing(self):
        history = history_of([NAN], [0], rows=0)
        assert nan_since(history, "a") is None
        assert said_of_scores(history) == [
            "`a` has no validation rows: nothing excludes it, and it counts in no score"
        ]
        history = history_of([NAN, NAN], [0, 10], rows=0)
        assert said_of_scores(history) == []


@pytest.mark.parametrize("items", [[0.5, NAN], [0.5, math.inf], [math.inf, -math.inf], []])
def test_one_item_that_is_no_number_makes_the_score_none(items):
    score = Score.of(items)
    assert not score.defined
    assert math.isnan(score.value)
    assert score.n == len(items)


@pytest.mark.parametrize("rule", ["paper", "tested"])
def test_it_makes_no_task_overfit_and_no_moment_the_best(rule):
    settings = MsftSettings(
        rule=rule, evaluations_per_epoch=1, compute_budget=0.3, z=0.0, min_looks=1, patience=1
    )
    history = history_of([0.5, 0.9, NAN, NAN], [0, 1, 2, 3])
    decision = Msft(settings).decide(history, history.active)
    assert decision == NewStage("m3", ("a", "b")), "going on, nobody excluded"
    assert history.best().snapshot_id == "m1"


class TestRuns:
    """Task 1 of two gives NaN from the second look on: at the first token of one of its rows."""

    @pytest.fixture
    def poisoned(self, monkeypatch):
        plain, looks = TeacherForced.__call__, [0]

        def look(scorer, model):
            found = plain(scorer, model)
            looks[0] += 1
            if looks[0] > 1:
                table = found.stats.table.clone()
                table[
                    int(np.flatnonzero(found.tasks == found.tasks.max())[0]), COLUMNS.index("nonfinite")
                ] = 1
                found = SampleScores(
                    found.samples, found.tasks, TokenStats(table), found.tokens, found.trained, 1
                )
            return found

        monkeypatch.setattr(TeacherForced, "__call__", look)

    @pytest.mark.parametrize("metric", ["nll", "exact_match", "token_accuracy"])
    @pytest.mark.parametrize("rule", ["paper", "tested"])
    def test_a_mixture_says_it_everywhere(self, tmp_path, poisoned, metric, rule):
        made = runs.settings(tmp_path, mixture__metric=metric, mixture__rule=rule, **MIXTURE)
        del made["budget"]
        result = train(made)
        evaluations = runs.metrics(tmp_path, "evaluation")
        assert [e["scores"]["task1"] is None for e in evaluations[:3]] == [False, True, True]
        assert all(e["scores"]["task0"] is not None for e in evaluations)
        since = f"not a number since update {evaluations[1]['update']}"
        notes = [line["text"] for line in runs.metrics(tmp_path, "note")]
        assert (
            sum(
                since in text and "`task1`" in text and "(1 of its 3 validation rows)" in text
                for text in notes
            )
            == 1
        )
        stood = result.more["mixture"]["standing"]["tasks"]["task1"]
        assert stood["score"] is None
        assert "not a number since update" in stood["state"], "from where on on this branch"
        assert not [line for line in runs.metrics(tmp_path, "roll_back") if line["drop"] == "task1"]
        assert result.more["mixture"]["result"]["moment"] == "0.0"
        assert stood["state"] in "\n".join(live_mixture.lines(result.more["mixture"]["standing"]))
        assert "NaN" not in (tmp_path / "run" / "result.json").read_text()

    def test_a_plain_run_says_it_and_keeps_an_earlier_best(self, tmp_path, poisoned):
        made = runs.settings(
            tmp_path, data__validation_fraction=0.25, evaluate__keep="best", budget={"epochs": 5}
        )
        made["budget"], made["stop"] = {"epochs": 5}, {}
        result = train(made)
        evaluations = runs.metrics(tmp_path, "evaluation")
        assert [e["loss"] is None for e in evaluations[:3]] == [False, True, True]
        assert all(
            e["exact_match"] is e["token_accuracy"] is None and e["nonfinite"] == 1 for e in evaluations[1:]
        )
        assert result.validation_loss == evaluations[0]["loss"]
        notes = [line["text"] for line in runs.metrics(tmp_path, "note")]
        assert (
            sum("the validation loss is not a number at update" in text for text in notes)
            == len(evaluations) - 1
        )


def test_an_answer_of_a_model_without_numbers_is_neither_right_nor_wrong(monkeypatch):
    from repsft_fast.training import evaluation

    table = TokenStats.zeros(2).table
    table[:, COLUMNS.index("total")] = 4
    table[0, COLUMNS.index("nonfinite")] = 4
    found = SampleScores(np.arange(2), np.array([0, 1], np.int32), TokenStats(table), 8, 8, 8)
    scorer = object.__new__(evaluation.TaskScorer)
    scorer.parts = type("P", (), {"model": None, "data": type("D", (), {"task_names": ("a", "b")})})
    scorer._forced, scorer.metric = (lambda model: found), "answer"
    scorer._answered = object.__new__(Answered)
    monkeypatch.setattr(
        Answered, "__call__", lambda self, model: Answers(np.zeros(2), np.ones(2, bool), 4, 2, 8)
    )
    scored = scorer()
    assert scored.line["scores"] == {"a": None, "b": 0.0}
    assert scored.line["answer"] is None
    assert json.dumps(scored.line, allow_nan=False)
    assert line_of(found, ("a", "b"))["tasks"]["a"]["exact_match"] is None
