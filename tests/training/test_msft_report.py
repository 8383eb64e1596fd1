"""What a mixture's run says of itself: accounts that add up, a timeline that holds everything, a picture,
bars, the command."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import yaml

from repsft_fast import cli, train
from repsft_fast.config import Config
from repsft_fast.errors import RepsftError
from repsft_fast.report import live_mixture, mixture_picture, timeline
from repsft_fast.report.live import Live
from repsft_fast.throughput import Work
from repsft_fast.training.account import Spans, flops
from repsft_fast.training.build import build
from repsft_fast.training.probe import _batch
from tests.helpers import runs
from tests.training.test_conductor import MIXTURE, POLICIES


@pytest.fixture(scope="module", params=["msft-paper", "continual", "sro", "dynamix"])
def folder(request, tmp_path_factory):
    where = tmp_path_factory.mktemp(request.param)
    train(runs.settings(where, **{**MIXTURE, **POLICIES[request.param][0], "data__test_fraction": 0.1}))
    return where


def result_of(folder):
    return json.loads((folder / "run" / "result.json").read_text())


class TestAccount:
    def test_tokens_are_those_of_the_updates_and_add_up(self, folder):
        found = result_of(folder)["more"]["account"]
        updates = runs.metrics(folder, "update")
        assert found["updates"]["trained"] == len(updates)
        assert found["tokens"]["trained"] == updates[-1]["tokens"] == result_of(folder)["tokens"]
        assert 0 <= found["tokens"]["discarded"] < found["tokens"]["trained"]
        assert 0 < found["tokens"]["result"] <= found["tokens"]["trained"]

    def test_what_roll_backs_discard_is_the_work_after_the_moments_gone_back_to(self, folder):
        """Recounted from the lines: a revert to a moment undoes the updates made since, on that branch."""
        made: dict[str, int] = {}  # moment → updates on its branch
        branch = total = 0
        for line in runs.metrics(folder):
            if line["kind"] == "update":
                branch, total = branch + 1, total + 1
            elif line["kind"] == "evaluation":
                made[line["moment"]] = branch
            elif line["kind"] == "revert" and line["why"] != "the result":
                branch = made[line["moment"]]
        found = result_of(folder)["more"]["account"]["updates"]
        assert found["discarded"] == total - branch
        moment = result_of(folder)["more"]["moment"]
        assert found["result"] == made[moment]

    def test_evaluations_are_counted_by_what_they_read(self, folder):
        found = result_of(folder)["more"]["account"]
        parts = build(Config.of(folder / "run" / "run.yaml"))
        once = int(parts.data.validation.index.lengths.sum())
        assert found["tokens"]["evaluated"] == len(runs.metrics(folder, "evaluation")) * once > 0

    def test_probes_are_counted_apart_an_update_with_a_loss_before_and_after(self, folder):
        found = result_of(folder)["more"]["account"]
        parts = build(Config.of(folder / "run" / "run.yaml"))
        probed = Work()
        for line in runs.metrics(folder, "decision"):
            if line.get("decision") == "probe":
                parts.progress.updates = line["update"]
                for task in range(3):
                    probed.add(parts.work_of(_batch(parts, task)))
        assert (probed.tokens > 0) == (parts.config.mixture.policy == "dynamix")
        assert found["tokens"]["probed"] == probed.tokens
        one = flops(parts.shape, probed)
        assert found["flops"]["probed"] == pytest.approx(one + 2 * one / 3, rel=1e-12)
        whole = sum(found["flops"][name] for name in ("trained", "evaluated", "probed"))
        assert found["plain_sft"]["whole_ratio"] == pytest.approx(
            whole / found["plain_sft"]["flops"], rel=1e-12
        )

    def test_losses_of_samples_that_skip_an_epoch_are_counted_as_looked_at(self, tmp_path):
        train(runs.settings(tmp_path, **{**MIXTURE, **POLICIES["ies"][0]}))
        found = result_of(tmp_path)["more"]["account"]["tokens"]
        parts = build(Config.of(tmp_path / "run" / "run.yaml"))
        validation, every = (
            int(store.index.lengths.sum()) for store in (parts.data.validation, parts.data.train)
        )
        skipped = 8 * every - found["trained"]  # eight epochs
        assert skipped > 0
        assert found["evaluated"] == len(runs.metrics(tmp_path, "evaluation")) * validation + skipped

    def test_plain_sft_is_c_epochs_over_everything(self, folder):
        settings = yaml.safe_load((folder / "run" / "run.yaml").read_text())
        found = result_of(folder)["more"]["account"]
        plain = found["plain_sft"]
        assert plain["epochs"] == settings["mixture"]["compute_budget"]
        assert plain["training_ratio"] == pytest.approx(found["flops"]["trained"] / plain["flops"])
        assert plain["whole_ratio"] > plain["training_ratio"]

    def test_seconds_are_each_counted_once(self, folder):
        seconds = result_of(folder)["more"]["account"]["seconds"]
        named = (
            "training",
            "evaluation",
            "probes",
            "snapshots",
            "reverts",
            "decisions",
            "records",
            "planning",
        )
        assert all(seconds[name] >= 0 for name in named)
        assert sum(seconds[name] for name in named) == pytest.approx(seconds["loop"], rel=1e-6)
        assert seconds["outside"] == pytest.approx(sum(seconds[name] for name in named[3:]))
        assert seconds["evaluation"] > 0
        assert seconds["snapshots"] > 0

    def test_plain_sft_run_costs_what_plain_sft_costs(self, tmp_path):
        train(runs.settings(tmp_path, **{**MIXTURE, "mixture__policy": "sft", "mixture__compute_budget": 2}))
        found = result_of(tmp_path)["more"]["account"]
        assert found["plain_sft"]["training_ratio"] == pytest.approx(1.0, rel=1e-12)
        assert found["tokens"]["discarded"] == 0


def test_a_span_inside_another_is_not_part_of_it(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("repsft_fast.training.account.time.perf_counter", lambda: now[0])
    spans = Spans()
    with spans("decisions"):
        now[0] += 1
        with spans("reverts"):
            now[0] += 10
            with spans("records"):
                now[0] += 100
        now[0] += 2
    assert spans.seconds == {"records": 100.0, "reverts": 10.0, "decisions": 3.0}


class TestTimeline:
    def test_it_holds_every_event_of_the_run(self, folder):
        found = json.loads((folder / "run" / timeline.FILE).read_text())
        lines = runs.metrics(folder)
        assert [e["moment"] for e in found["evaluations"]] == [
            r["moment"] for r in lines if r["kind"] == "evaluation"
        ]
        for kind, name in (("snapshot", "snapshots"), ("revert", "reverts"), ("stage", "stages")):
            assert len(found[name]) == sum(r["kind"] == kind for r in lines)
        assert [d["kind"] for d in found["decisions"]] == [
            r["kind"] for r in lines if r["kind"] in timeline.DECISIONS
        ]
        done = [e["done"] for e in found["evaluations"]]
        assert done == sorted(done)
        assert found["result"]["moment"] == result_of(folder)["more"]["moment"]

    def test_every_revert_goes_to_a_moment_that_was_kept(self, folder):
        found = json.loads((folder / "run" / timeline.FILE).read_text())
        kept = {s["moment"] for s in found["snapshots"]}
        assert kept
        assert {r["moment"] for r in found["reverts"]} <= kept

    def test_it_can_be_made_again_from_the_files_and_without_a_result(self, folder, tmp_path):
        again = tmp_path / "again"
        again.mkdir()
        (again / "metrics.jsonl").write_bytes((folder / "run" / "metrics.jsonl").read_bytes() + b'{"torn')
        whole = json.loads((folder / "run" / timeline.FILE).read_text())
        made = timeline.build(again)
        assert made["evaluations"] == whole["evaluations"]
        assert made["result"]["moment"] is None
        assert mixture_picture.draw(again).stat().st_size > 8_000

    def test_a_run_without_tasks_says_so(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text('{"kind": "update", "update": 1}\n')
        with pytest.raises(RepsftError, match="no evaluation of tasks"):
            timeline.build(tmp_path)


class TestKeptBranch:
    EVALUATIONS = tuple(
        {"moment": m, "stage": s} for m, s in (("a", 0), ("b", 0), ("c", 0), ("d", 1), ("e", 1), ("f", 2))
    )

    @pytest.mark.parametrize(
        ("starts", "ended_at", "kept"),
        [
            ([None, "b", "e"], None, "abdef"),
            ([None, "b", "d"], None, "abdf"),
            ([None, "c", "b"], None, "abf"),
            ([None, "a", "a"], None, "af"),
            ([None, "b", "e"], "f", "abdef"),
            ([None, "b", "e"], "d", "abd"),
            ([None, "b", "e"], "a", "a"),
        ],
    )
    def test_the_way_to_where_the_run_ended(self, starts, ended_at, kept):
        stages = [{"stage": i, "start": start} for i, start in enumerate(starts)]
        assert timeline.kept_moments(self.EVALUATIONS, stages, ended_at) == set(kept)


@pytest.mark.parametrize("metric", ["nll", "exact_match"])
def test_the_picture_draws_undefined_scores_and_many_tasks(tmp_path, metric):
    names = [f"a task with a rather long name {i}" for i in range(27)]
    lines = [
        {
            "kind": "stage",
            "stage": 0,
            "epoch": 0.0,
            "done": 0,
            "active": names,
            "start": None,
            "weights": None,
        }
    ]
    for i in range(5):
        scores = {name: None if k == 3 else math.sin(i + k) / 2 for k, name in enumerate(names)}
        lines.append(
            {"kind": "evaluation", "moment": f"0.{i}", "stage": 0, "epoch": i / 4, "done": i, "scores": scores,
             "errors": dict.fromkeys(names), "pooled": None if i == 2 else 0.1 * i}
        )  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "run.yaml").write_text(f"mixture: {{metric: {metric}}}\n")
    assert mixture_picture.draw(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_an_axis_names_no_share_below_zero():
    assert [mixture_picture.share_label(share) for share in (-0.04, -1e-17, 0.0, 0.5, 1.0)] == [
        "",
        "0%",
        "0%",
        "50%",
        "100%",
    ]


STANDING = {
    "stage": 1, "policy": "msft", "metric": "exact_match", "best": {"moment": "0.3", "pooled": 0.5, "epochs": 0.75},
    "tasks": {
        "boolq": {"first": 0.5, "score": 0.618, "best": 0.641, "lowest": 0.5, "stage": 0, "epochs": 1.75, "kept": "device",
                  "state": "excluded"},
        "gsm8k": {"first": 0.0, "score": 0.0, "best": 0.0, "lowest": 0.0, "stage": 0, "epochs": 0.0, "kept": None,
                  "state": "not started"},
        "nothing": {"score": None, "best": None, "state": "no validation rows"},
    },
}  # fmt: skip


class TestLive:
    def test_lines_without_a_terminal_when_a_stage_begins_and_at_the_end(self):
        stream = io.StringIO()
        live = Live(stream=stream, terminal=False)
        live.start({"updates": 100})
        live.mixture({**STANDING, "stage": 0})
        assert "boolq" not in stream.getvalue()
        live.mixture(STANDING)
        text = stream.getvalue()
        assert "boolq     61.8 %  best  64.1 %  excluded · best kept (device)" in text
        assert "not started" in text
        assert "nothing        –  best       –  no validation rows" in text
        live.evaluation(
            {"moment": "1.9", "epoch": 2.5, "pooled": 0.6, "scores": {"boolq": 0.6, "gsm8k": None}}
        )
        assert "2.50 epochs  all 60.0 %  boolq 60.0 %  gsm8k –" in stream.getvalue()
        live.end({"reason": "done", "success": True})
        assert stream.getvalue().count("boolq     61.8 %") == 2

    def test_the_end_shows_the_result_and_the_test_not_the_last_look(self):
        stream = io.StringIO()
        live = Live(stream=stream, terminal=False)
        live.mixture(STANDING)
        scores = {"boolq": 0.641, "gsm8k": 0.02, "nothing": None}
        tasks = {name: {"score": score} for name, score in scores.items()}
        result = {"stage": 1, "epochs": 1.75, "pooled": 0.5, "tasks": tasks}
        test = {"pooled": 0.45, "scores": {"boolq": 0.6, "gsm8k": 0.0}}
        live.end({"reason": "done", "success": True, "more": {"mixture": {"result": result}, "test": test}})
        text = stream.getvalue()
        assert "the result (stage 1, 1.75 epochs): validation 50.0 %, test 45.0 %" in text
        assert "boolq    validation  64.1 %  test  60.0 %  excluded" in text
        assert "nothing  validation       –  test       –  no validation rows" in text
        assert "61.8 %" not in text, "the score of the last look is not the result's"

    def test_an_evaluation_too_wide_for_the_terminal_leaves_the_tasks_to_the_bars(self):
        record = {"epoch": 1.5, "pooled": 0.25, "scores": {f"task {i}": 0.5 for i in range(8)}}
        whole = live_mixture.evaluation_line(record, "exact_match")
        assert "task 7 50.0 %" in whole
        assert live_mixture.evaluation_line(record, "exact_match", len(whole)) == whole
        assert (
            live_mixture.evaluation_line(record, "exact_match", len(whole) - 1) == "  1.50 epochs  all 25.0 %"
        )

    def test_a_loss_is_shown_the_right_way_round(self):
        assert live_mixture.score_text(-2.3456, "nll") == "2.346"
        assert live_mixture.filled({"score": -2.0, "best": -1.0, "lowest": -3.0}, "nll") == (0.5, 1.0)
        assert live_mixture.filled({"score": -2.0, "best": -2.0, "lowest": -2.0}, "nll") == (0.0, 0.0)

    def test_bars_on_a_terminal_mark_the_best(self):
        assert live_mixture.bar(0.25, 0.75, 8, "green").plain == "━━────┃─"
        assert live_mixture.bar(1.0, 1.0, 4, "green").plain == "━━━━"
        assert live_mixture.bar(0.0, 0.0, 4, "green").plain == "────"

    @pytest.mark.parametrize("width", ["20", "60", "200"])
    def test_the_screen_shows_the_bars_at_any_width(self, width, monkeypatch):
        monkeypatch.setenv("COLUMNS", width)
        monkeypatch.setenv("TERM", "xterm-256color")
        stream = io.StringIO()
        with Live(stream=stream, terminal=True) as live:
            live.start({"updates": 100})
            live.mixture(STANDING)
            live.update({"update": 3, "loss": 1.0, "epoch": 0.5})
            live._screen.refresh()
        assert "boolq" in stream.getvalue()
        assert ("not started" in stream.getvalue()) == (int(width) >= live_mixture.NARROW)


@pytest.mark.parametrize(
    ("changes", "epochs"),
    [
        ({"mixture__policy": "sft", "mixture__compute_budget": 2.5}, 2.5),
        ({"mixture__policy": "msft", "mixture__compute_budget": 2, "mixture__max_stages": 4}, 8),
        ({"mixture__policy": "continual"}, 3),
        ({"mixture__policy": "sro", "mixture__compute_budget": 4}, 8),
        ({"mixture__policy": "msft", "budget__epochs": 3}, 3),
        ({"mixture__policy": None}, 60),
    ],
)
def test_the_most_updates_a_run_can_make_are_the_policys_where_a_budget_is_longer(changes, epochs, tmp_path):
    settings = runs.settings(tmp_path, **{**MIXTURE, **changes})
    if settings["mixture"]["policy"] is None:
        del settings["mixture"]
    budget = build(Config.of(settings)).budget
    assert budget.updates == settings["budget"]["epochs"] * budget.updates_per_epoch, (
        "the schedule's horizon stays the budget"
    )
    assert budget.most == math.ceil(epochs * budget.updates_per_epoch)


class TestCommand:
    def settings(self, tmp_path, **changes):
        settings = runs.settings(tmp_path, **{**MIXTURE, "mixture__max_stages": 2, **changes})
        del settings["budget"]
        path = tmp_path / "mix.yaml"
        path.write_text(yaml.safe_dump(settings))
        return str(path)

    def test_msft_needs_no_policy_and_no_budget(self, tmp_path, capsys):
        assert cli.main(["msft", "--config", self.settings(tmp_path)]) == 0
        written = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
        assert written["mixture"]["policy"] == "msft"
        assert result_of(tmp_path)["reason"] == "2 stages are done"
        out = capsys.readouterr().out
        assert "gone with roll-backs" in out
        assert "outside training and evaluation" in out

    def test_a_policy_in_the_file_wins(self, tmp_path):
        assert cli.main(["msft", "--config", self.settings(tmp_path, mixture__policy="sft")]) == 0
        assert result_of(tmp_path)["reason"] == "1 epoch is done"

    def test_a_budget_that_is_set_ends_the_run(self, tmp_path):
        assert cli.main(["msft", "--config", self.settings(tmp_path), "--budget.updates", "7"]) == 0
        result = result_of(tmp_path)
        assert result["code"] == "budget"
        assert "budget.updates: 7" in result["reason"]
        assert result["more"]["account"]["updates"]["trained"] == 7

    def test_without_tasks_it_says_what_to_do(self, tmp_path, capsys):
        path = self.settings(tmp_path)
        settings = yaml.safe_load(Path(path).read_text())
        del settings["data"]["task_column"]
        Path(path).write_text(yaml.safe_dump(settings))
        assert cli.main(["msft", "--config", path]) == 2
        assert "set data.task_column" in capsys.readouterr().err
