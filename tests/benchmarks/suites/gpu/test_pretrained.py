"""Part P: the recipe's run is recorded with its curves, held against a CPU's, and fed from the file that was
carried."""

import dataclasses
import json

import pytest

from benchmarks.harness import records
from benchmarks.suites.gpu import goals, pretrained
from benchmarks.suites.gpu.session import LEFT_OUT, RECORDS, read_lines
from repsft_fast.config import Config
from repsft_fast.data.gym import gym_rows
from repsft_fast.errors import DataError
from repsft_fast.training import trainer
from tests.benchmarks.suites.gpu.toys import fail_check, fed, session_at

CPU_ONLY = "24 rows: accuracy curve, bf16 against fp32 on a CPU"


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("P")
    pretrained.run(session_at(folder, "P"))
    return folder


def of_rows(folder, rows):
    (record,) = (r for r in read_lines(folder / RECORDS) if r["shape"]["rows"] == rows)
    return record


class TestPart:
    def test_every_goal_is_fed(self, rehearsed, monkeypatch):
        monkeypatch.setattr(pretrained, "of_cpu", lambda: {"accuracy_curve": [0.5]})
        assert [name for name, value in fed(pretrained.GOALS, rehearsed).items() if value is None] == []
        assert read_lines(rehearsed / LEFT_OUT) == []

    @pytest.mark.parametrize(("rows", "per_epoch"), [(24, 3), (128, 8)])
    def test_the_figures_are_the_runs_own(self, rehearsed, rows, per_epoch):
        record = of_rows(rehearsed, rows)
        assert len(record["rounds_ms"]) == record["updates"] == per_epoch + 1, (
            "an epoch, then a decay of one update"
        )
        assert record["epochs"] == pytest.approx(1 + 1 / per_epoch, abs=1e-3)
        assert (record["epochs_to_target"], record["updates_to_target"], record["code"]) == (
            1,
            per_epoch,
            "token_accuracy",
        )
        assert record["seconds_to_target"] == pytest.approx(
            sum(record["rounds_ms"][:per_epoch]) / 1e3, rel=1e-4
        )
        assert record["seconds"] > record["build_s"] + record["seconds_to_target"]
        assert record["accuracy_curve"] == [record["reached"]]
        assert record["reached"] >= record["target"]
        assert record["loss_curve"][0] == pytest.approx(6.24, abs=0.3), "ln 512"
        assert record["loss_before"] == pytest.approx(6.24, abs=0.3)

    def test_tokens_per_second_are_real_tokens_over_the_updates_times(self, tmp_path, monkeypatch):
        real, padded, results = trainer.run, pretrained.overrides, []
        monkeypatch.setattr(trainer, "run", lambda parts: results.append(real(parts)) or results[-1])
        monkeypatch.setattr(pretrained, "overrides", lambda *of: padded(*of) | {"batch.bucket_tokens": 128})
        pretrained.memorise(session_at(tmp_path, "P"), pretrained.RECIPE, tmp_path)
        (record,) = read_lines(tmp_path / RECORDS)
        work = results[0].more["work"]
        assert work["tokens"] < work["slots"], "padding is no work"
        assert record["tokens_per_s"] * sum(record["rounds_ms"]) / 1e3 == pytest.approx(
            work["tokens"], rel=1e-4
        )

    def test_a_red_update_measures_nothing_and_says_so(self, tmp_path):
        fail_check(tmp_path, "train step")
        pretrained.run(session_at(tmp_path, "P"))
        assert read_lines(tmp_path / RECORDS) == []
        assert [line["what"] for line in read_lines(tmp_path / LEFT_OUT)] == [
            "24 rows memorised",
            "128 rows memorised",
        ]

    def test_what_raises_is_named_and_the_next_is_measured(self, tmp_path, monkeypatch):
        real = pretrained.overrides

        def once(session, lesson, folder):
            if lesson is pretrained.RECIPE:
                raise OSError("no such file")
            return real(session, lesson, folder)

        monkeypatch.setattr(pretrained, "overrides", once)
        pretrained.run(session_at(tmp_path, "P"))
        assert [line["why"] for line in read_lines(tmp_path / LEFT_OUT)] == ["OSError: no such file"]
        assert [record["shape"]["rows"] for record in read_lines(tmp_path / RECORDS)] == [128]

    def test_a_run_that_was_cut_off_is_no_record(self, tmp_path, monkeypatch):
        real = trainer.run

        def cut(parts):
            result = real(parts)
            return dataclasses.replace(result, code="terminated", reason="SIGTERM after update 2")

        monkeypatch.setattr(trainer, "run", cut)
        with pytest.raises(RuntimeError, match="SIGTERM"):
            pretrained.memorise(session_at(tmp_path, "P"), pretrained.RECIPE, tmp_path)
        assert read_lines(tmp_path / RECORDS) == []

    def test_what_comes_too_late_is_named(self, tmp_path):
        pretrained.run(session_at(tmp_path, "P", left_s=3))
        assert len(read_lines(tmp_path / LEFT_OUT)) == 2
        assert read_lines(tmp_path / RECORDS) == []


class TestSettings:
    def settings(self, tmp_path):
        session = session_at(tmp_path, "P")
        session.rehearsal = False
        return Config.of("smollm2", pretrained.overrides(session, pretrained.RECIPE, tmp_path))

    def test_the_recipe_is_what_is_run(self, tmp_path, monkeypatch):
        monkeypatch.delenv(pretrained.VARIABLE, raising=False)
        made, recipe = self.settings(tmp_path), Config.of("smollm2")
        for section in ("model", "optim", "schedule", "budget", "stop", "batch", "loss"):
            assert getattr(made, section) == getattr(recipe, section), section
        assert made.data.validation is None
        assert made.stop.token_accuracy == pretrained.TARGET

    def test_the_file_that_was_carried_is_taken_where_it_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setenv(pretrained.VARIABLE, "/somewhere/joined.gguf")
        assert self.settings(tmp_path).model.path == "/somewhere/joined.gguf"

    def test_the_rows_are_what_the_recipes_source_generates(self):
        try:
            generated = gym_rows("reasoning-gym:gsm_symbolic?size=128&seed=7")
        except DataError as error:
            pytest.skip(str(error))
        ours = [json.loads(line) for line in pretrained.ROWS.read_text(encoding="utf-8").splitlines()]
        assert ours == generated
        assert ours[:24] == gym_rows(str(Config.of("smollm2").data.train))
        assert pretrained.ROWS.stat().st_size < 100_000


class TestCurve:
    def test_a_target_that_was_not_met_has_no_time(self):
        lines = [
            {"kind": "update", "objective": 2.0}, {"kind": "epoch", "token_accuracy": 0.5, "loss": 1.5, "update": 1},
            {"kind": "update", "objective": 1.0}, {"kind": "epoch", "token_accuracy": 0.9, "loss": 0.7, "update": 2},
        ]  # fmt: skip
        found = pretrained.progress(lines, [1000.0, 2000.0], 0.97)
        assert found == {
            "accuracy_curve": [0.5, 0.9],
            "loss_curve": [1.5, 0.7],
            "loss_before": 2.0,
            "loss_after": 1.0,
        }
        met = pretrained.progress(lines, [1000.0, 2000.0, 4000.0], 0.9)
        assert (met["epochs_to_target"], met["updates_to_target"], met["seconds_to_target"]) == (2, 2, 3.0)

    def test_it_is_compared_epoch_by_epoch_with_the_newest_record_of_a_cpu(self, tmp_path, monkeypatch):
        session = session_at(tmp_path, "P")
        shape = pretrained.RECIPE.shape
        for name, curve in (
            ("cuda bfloat16", [0.1]),
            ("cpu float32", [0.5]),
            ("cpu float32", [0.2, 0.6, 0.9]),
        ):
            session.record(pretrained.OP, name, [1.0], shape, dtype="float32", accuracy_curve=curve)
        session.record(
            pretrained.OP,
            "cpu float32",
            [1.0],
            pretrained.LARGER.shape,
            dtype="float32",
            accuracy_curve=[0.0],
        )
        made = pretrained.of_cpu(tmp_path / RECORDS)
        assert made["accuracy_curve"] == [0.2, 0.6, 0.9]
        monkeypatch.setattr(pretrained, "of_cpu", lambda: made)
        gpu = {
            "op": pretrained.OP,
            "implementation": "cuda bfloat16",
            "shape": shape,
            "accuracy_curve": [0.21, 0.57],
        }
        (goal,) = (goal for goal in pretrained.GOALS if goal.name == CPU_ONLY)
        assert goal.read(goals.Found([gpu])) == pytest.approx(0.03)
        assert goal.read(goals.Found([])) is None

    def test_without_a_record_of_a_cpu_the_goal_is_open(self, tmp_path, monkeypatch):
        assert pretrained.of_cpu(tmp_path / "none.jsonl") is None
        monkeypatch.setattr(pretrained, "of_cpu", lambda: None)
        for goal in pretrained.GOALS:
            if goal.predicted is not None:
                goal.predicted(goals.Card("NVIDIA H100", {}))

    @pytest.mark.skipif(not pretrained.RECORD.exists(), reason="no record was made on a CPU")
    def test_the_record_of_a_cpu_reached_the_target_with_the_recipes_rows(self):
        *_, record = records.read(pretrained.RECORD)
        assert record["implementation"] == "cpu float32"
        assert record["shape"] == pretrained.RECIPE.shape
        assert record["reached"] >= pretrained.TARGET
        assert record["rehearsal"] is False
