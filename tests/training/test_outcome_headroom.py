"""Head-room where people meet it: result.json, the lines at a run's end, the timeline, the picture."""

import io
import json
import math

import pytest

from repsft_fast import train
from repsft_fast.config.sections import Mixture
from repsft_fast.policies.headroom import of_records
from repsft_fast.policies.history import History
from repsft_fast.report import live_mixture, mixture_picture, timeline
from repsft_fast.report.live import Live
from repsft_fast.training import outcome
from tests.helpers import runs
from tests.training.test_conductor import MIXTURE
from tests.training.test_msft_report import STANDING

FOUND = {"value": 0.0174, "interval": 0.0041, "by_chance": 0.0032, "unit": "share"}


@pytest.fixture(scope="module", params=["exact_match", "nll"])
def run(request, tmp_path_factory):
    where = tmp_path_factory.mktemp(request.param)
    more = {"mixture__policy": "sft", "mixture__compute_budget": 2, "mixture__metric": request.param}
    train(runs.settings(where, **{**MIXTURE, **more}))
    return request.param, where / "run"


class TestRun:
    def test_result_json_holds_it_with_its_unit(self, run):
        metric, folder = run
        mixture = json.loads((folder / "result.json").read_text())["more"]["mixture"]
        found = mixture["headroom"]
        assert found["unit"] == {"exact_match": "share", "nll": "nats"}[metric]
        assert found["value"] >= 0.0
        assert set(found["tasks"]) == set(mixture["standing"]["tasks"])
        rooms = found["tasks"].values()
        assert found["value"] == pytest.approx(
            sum(room["own_best"] - room["in_common"] for room in rooms) / len(rooms), abs=1e-12
        )
        if metric == "nll":
            assert all(room["own_best"] < 0 for room in rooms), "higher is better, as in `standing`"

    def test_it_can_be_found_again_from_the_lines_of_the_run(self, run):
        _, folder = run
        data = timeline.build(folder)
        looks = [(e["moment"], e["stage"], e["epoch"], e["scores"]) for e in data["evaluations"]]
        found = of_records(looks, {stage["stage"]: stage["start"] for stage in data["stages"]})
        whole = json.loads((folder / "result.json").read_text())["more"]["mixture"]["headroom"]
        assert found.value == pytest.approx(whole["value"], abs=1e-6)
        assert found.common.moment == whole["common"]["moment"]

    def test_the_timeline_and_the_picture_have_it(self, run):
        _, folder = run
        data = timeline.build(folder)
        assert data["result"]["headroom"]["value"] >= 0.0
        figure = mixture_picture._figure_of(folder, data, run[0])
        words = " ".join(t.get_text() for part in figure.subfigs for t in part.texts)
        assert "an ideal schedule could have won at most" in words
        rings = [line for axes in figure.axes for line in axes.lines if line.get_markerfacecolor() == "white"]
        assert len(rings) == len(data["result"]["headroom"]["tasks"])
        if run[0] == "nll":
            assert all(line.get_ydata()[0] > 0 for line in rings), "a loss is drawn the right way round"


class TestNone:
    def mixture(self, metric="exact_match"):
        return Mixture(metric=metric)

    def test_the_reason_is_said_and_no_line_is_shown(self):
        found = outcome.headroom_result(History.start([("a", 8), ("b", 8)]), self.mixture())
        assert found == {"value": None, "reason": "no unbroken stretch of 5 evaluations", "unit": "share"}
        assert live_mixture.headroom_line(found) == []

    def test_what_only_reports_fails_no_run(self, monkeypatch):
        def broken(_):
            raise ZeroDivisionError("by zero")

        monkeypatch.setattr(outcome, "headroom", broken)
        found = outcome.headroom_result(None, self.mixture("nll"))
        assert found["value"] is None
        assert found["reason"] == "it could not be computed: ZeroDivisionError: by zero"
        assert found["unit"] == "nats"

    @pytest.mark.parametrize(
        "found", [None, 3, [], {}, {"value": None}, {"value": "much"}, {"value": math.nan}]
    )
    def test_records_that_are_not_whole_show_nothing(self, found):
        assert live_mixture.headroom_line(found) == []


class TestLine:
    def test_points(self):
        assert live_mixture.headroom_line(FOUND) == [
            "an ideal schedule could have won at most 1.7 ± 0.4 points here (noise alone shows 0.3 or more)"
        ]

    def test_nats_and_no_interval(self):
        found = {"value": 0.0174, "interval": None, "unit": "nats"}
        assert live_mixture.headroom_line(found) == [
            "an ideal schedule could have won at most 0.017 nats here"
        ]

    def test_the_end_of_a_run_says_it(self):
        tasks = {task: {"score": 0.5} for task in STANDING["tasks"]}
        for result in (None, {"stage": 0, "epochs": 1.0, "pooled": 0.5, "tasks": tasks}):
            stream = io.StringIO()
            live = Live(stream=stream, terminal=False)
            live.mixture(STANDING)
            mixture = {"result": result, "headroom": FOUND}
            live.end({"reason": "done", "success": True, "more": {"mixture": mixture}})
            assert stream.getvalue().count("at most 1.7 ± 0.4 points here") == 1
