"""Part C: whole updates timed one by one, and the processes they are timed in."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.suites.gpu import goals, kernels, launches, step, training
from benchmarks.suites.gpu.session import LEFT_OUT, RECORDS, read_lines
from tests.benchmarks.suites.gpu.toys import fed, session_at
from tests.benchmarks.suites.gpu.workers import Here, without_processes

H100 = goals.Card("NVIDIA H100 80GB HBM3", {})


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The part in rehearsal, its worker's process apart."""
    folder = tmp_path_factory.mktemp("C")
    (folder / training.KERNELS).write_text("of an earlier session")
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_processes(monkeypatch, Here)
        step.run(session_at(folder, "C"))
    return folder


class TestPart:
    def test_every_goal_is_fed_and_nothing_is_left_out(self, rehearsed):
        read = fed(step.GOALS, rehearsed)
        assert [name for name, value in read.items() if value is None] == []
        assert read_lines(rehearsed / LEFT_OUT) == []

    def test_the_figures_of_an_update_are_its_times_and_its_tokens(self, rehearsed):
        found = goals.Found(read_lines(rehearsed / RECORDS))
        for variant in training.VARIANTS:
            record = found.one("update", variant, model=step.MODEL)
            seconds, tokens = sum(record["rounds_ms"]) / 1e3, 2 * 128  # two rows of 8,192 / 64
            assert len(record["rounds_ms"]) == record["updates"] == 3
            assert record["tokens_per_s"] == pytest.approx(3 * tokens / seconds, rel=1e-4)
            assert record["trained_tokens_per_s"] == pytest.approx(record["tokens_per_s"] / 2, rel=1e-9), (
                "the second half"
            )
            assert record["row_ms"] == pytest.approx(1e3 * seconds / 6, rel=1e-4)
            layer = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48  # A · D = 32, one head of keys and values
            flops = 6 * 2 * layer * tokens + 6 * 32 * 512 * tokens / 2 + 6 * 2 * 32 * (8 * 32**2)
            assert record["mfu"] == pytest.approx(3 * flops / seconds / 1e12, rel=1e-4), (
                "a rehearsal's peak is 1 TFLOP/s"
            )
            assert record["flops_per_s"] == pytest.approx(flops / (record["p50_ms"] / 1e3), rel=1e-3)
            assert record["first_update_ms"] > 0
            assert len(record["host_loop_ms"]) == 3
            assert record["until_s"] > record["build_s"] > 0

    def test_only_plain_layers_are_held_against_our_sizing(self, rehearsed):
        found = goals.Found(read_lines(rehearsed / RECORDS)).all("update", model=step.MODEL)
        assert [v for v in training.VARIANTS if "predicted_peak_bytes" in found[v]] == ["plain"]
        plain = found["plain"]
        share = fed(step.GOALS, rehearsed)["0.6B, plain: peak memory / our sizing's"]
        assert share == pytest.approx(plain["peak_bytes"] / plain["predicted_peak_bytes"])

    def test_kernels_are_classes_that_add_up_and_a_table_a_variant(self, rehearsed):
        for record in read_lines(rehearsed / RECORDS):
            if record["op"] != "kernels of an update":
                continue
            assert sum(record[f"{kind}_ms"] for kind in kernels.CLASSES) == pytest.approx(
                record["kernels_ms"]
            )
            assert sum(record[f"{kind}_share"] for kind in kernels.CLASSES) == pytest.approx(1.0)
            assert record["kernels"] > 100
            assert 0 < record["p50_ms"] <= record["span_ms"]
        text = (rehearsed / training.KERNELS).read_text()
        assert "earlier" not in text
        tables = (*training.VARIANTS, launches.SEPARATE)
        assert [f"layers {variant}, 2 rows of 128" in text for variant in tables] == [True] * 4
        assert len(text) < 1 << 16

    def test_predictions_are_the_budgets_sums(self):
        by_name = {goal.name: goal.predicted(H100) for goal in step.GOALS if goal.predicted}
        assert by_name["0.6B, layers plain: ms a row of 8,192"] == pytest.approx(
            38.7 + 7.7 + 26 + 83.5 + 1.6 + 6.8 / 2
        )
        assert by_name["0.6B, layers compiled: ms a row of 8,192"] == pytest.approx(94.7, abs=0.2)
        assert all(
            goal.predicted(goals.Card("no such card", {})) in (None, 1.0)
            for goal in step.GOALS
            if goal.predicted
        )


class TestLeftOut:
    def asked(self, tmp_path, monkeypatch, *, red=(), left_s=300.0, device="cuda"):
        """Which variants are measured. The device is said to be a GPU; nothing touches it."""
        seen = []

        class Told(Here):
            def measure(self, session, wanted, limit_s):
                seen.append((wanted.variant, limit_s))
                return True

        without_processes(monkeypatch, Told)
        monkeypatch.setattr(step, "predicted_bytes", lambda *_: 1)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        session = session_at(tmp_path, "C", left_s=left_s)
        session.rehearsal, session.device, session.red = False, device, frozenset(red)
        step.run(session)
        return seen

    def test_most_valuable_first_and_each_within_its_share(self, tmp_path, monkeypatch):
        seen = self.asked(tmp_path, monkeypatch)
        assert [variant for variant, _ in seen] == ["plain", "liger", "compiled"]
        assert all(limit <= step.SHARE_S[variant] + step.IMPORTS_S for variant, limit in seen)
        assert self.asked(tmp_path, monkeypatch, left_s=30)[0][1] < 30, "and within what is left"

    def test_launches_are_shared_and_apart_in_the_compiled_ones_alone(self, tmp_path, monkeypatch):
        seen = []
        told = SimpleNamespace(
            measure=lambda session, wanted, limit_s: seen.append((wanted.variant, wanted.launches)),
            close=None,
        )
        without_processes(monkeypatch, lambda: told)
        monkeypatch.setattr(step, "predicted_bytes", lambda *_: 1)
        step.run(session_at(tmp_path, "C"))
        assert seen == [("plain", False), ("liger", False), ("compiled", True)]

    def test_a_red_compile_takes_compiled_layers_out_and_no_others(self, tmp_path, monkeypatch):
        assert [v for v, _ in self.asked(tmp_path, monkeypatch, red={("compile", "bfloat16")})] == [
            "plain",
            "liger",
        ]
        assert [line["what"] for line in read_lines(tmp_path / LEFT_OUT)] == ["layers compiled"]

    @pytest.mark.parametrize("operation", ["train step", "head", "row kernel", "attention"])
    def test_a_red_operation_of_every_update_takes_all_out(self, tmp_path, monkeypatch, operation):
        assert self.asked(tmp_path, monkeypatch, red={(operation, "bfloat16")}) == []
        assert len(read_lines(tmp_path / LEFT_OUT)) == 3
        assert (
            len(self.asked(tmp_path, monkeypatch, red={(operation, "float16"), ("checkpoint", "any")})) == 3
        )

    def test_what_comes_too_late_is_named(self, tmp_path, monkeypatch):
        assert [v for v, _ in self.asked(tmp_path, monkeypatch, left_s=32)] == ["plain", "liger"]
        (line,) = read_lines(tmp_path / LEFT_OUT)
        assert line["what"] == "layers compiled"
        assert "35 s" in line["why"]

    def test_sizing_that_raises_is_named_and_the_updates_are_measured(self, tmp_path, monkeypatch):
        def fails(*_):
            raise ValueError("no such shape")

        seen = []
        told = SimpleNamespace(
            measure=lambda session, wanted, limit_s: seen.append(wanted.predicted_bytes), close=None
        )
        without_processes(monkeypatch, lambda: told)
        monkeypatch.setattr(step, "predicted_bytes", fails)
        step.run(session_at(tmp_path, "C"))
        assert seen == [None] * 3
        assert [line["why"] for line in read_lines(tmp_path / LEFT_OUT)] == ["ValueError: no such shape"]
