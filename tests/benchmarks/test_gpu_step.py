"""Part C: whole updates timed one by one, and the processes they are timed in."""

import dataclasses
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from gpu_toys import fed, session_at
from gpu_workers import Here, without_processes
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.gpu import goals, kernels, processes, step, training
from benchmarks.gpu.session import LEFT_OUT, RECORDS, append_line, read_lines
from repsft_fast.models import layers, load
from repsft_fast.ops import attention
from repsft_fast.training import parts, trainer
from repsft_fast.training import step as training_step
from tests.fake_cuda import fake_cuda

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
            assert record["trained_tokens_per_s"] == pytest.approx(record["tokens_per_s"] / 2, rel=1e-9), "the second half"
            assert record["row_ms"] == pytest.approx(1e3 * seconds / 6, rel=1e-4)
            layer = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48  # A · D = 32, one head of keys and values
            flops = 6 * 2 * layer * tokens + 6 * 32 * 512 * tokens / 2 + 6 * 2 * 32 * (8 * 32**2)
            assert record["mfu"] == pytest.approx(3 * flops / seconds / 1e12, rel=1e-4), "a rehearsal's peak is 1 TFLOP/s"
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
            assert sum(record[f"{kind}_ms"] for kind in kernels.CLASSES) == pytest.approx(record["kernels_ms"])
            assert sum(record[f"{kind}_share"] for kind in kernels.CLASSES) == pytest.approx(1.0)
            assert record["kernels"] > 100
            assert 0 < record["p50_ms"] <= record["span_ms"]
        text = (rehearsed / training.KERNELS).read_text()
        assert "earlier" not in text
        assert [f"layers {variant}, 2 rows of 128" in text for variant in training.VARIANTS] == [True] * 3
        assert len(text) < 1 << 16

    def test_predictions_are_the_budgets_sums(self):
        by_name = {goal.name: goal.predicted(H100) for goal in step.GOALS if goal.predicted}
        assert by_name["0.6B, layers plain: ms a row of 8,192"] == pytest.approx(38.7 + 7.7 + 26 + 83.5 + 4.2 + 8.3 / 2)
        assert by_name["0.6B, layers compiled: ms a row of 8,192"] == pytest.approx(98, abs=0.2)
        assert all(goal.predicted(goals.Card("no such card", {})) in (None, 1.0) for goal in step.GOALS if goal.predicted)


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

    def test_a_red_compile_takes_compiled_layers_out_and_no_others(self, tmp_path, monkeypatch):
        assert [v for v, _ in self.asked(tmp_path, monkeypatch, red={("compile", "bfloat16")})] == ["plain", "liger"]
        assert [line["what"] for line in read_lines(tmp_path / LEFT_OUT)] == ["layers compiled"]

    @pytest.mark.parametrize("operation", ["train step", "head", "row kernel", "attention"])
    def test_a_red_operation_of_every_update_takes_all_out(self, tmp_path, monkeypatch, operation):
        assert self.asked(tmp_path, monkeypatch, red={(operation, "bfloat16")}) == []
        assert len(read_lines(tmp_path / LEFT_OUT)) == 3
        assert len(self.asked(tmp_path, monkeypatch, red={(operation, "float16"), ("checkpoint", "any")})) == 3

    def test_what_comes_too_late_is_named(self, tmp_path, monkeypatch):
        assert [v for v, _ in self.asked(tmp_path, monkeypatch, left_s=32)] == ["plain", "liger"]
        (line,) = read_lines(tmp_path / LEFT_OUT)
        assert line["what"] == "layers compiled"
        assert "35 s" in line["why"]

    def test_sizing_that_raises_is_named_and_the_updates_are_measured(self, tmp_path, monkeypatch):
        def fails(*_):
            raise ValueError("no such shape")

        seen = []
        told = SimpleNamespace(measure=lambda session, wanted, limit_s: seen.append(wanted.predicted_bytes), close=None)
        without_processes(monkeypatch, lambda: told)
        monkeypatch.setattr(step, "predicted_bytes", fails)
        step.run(session_at(tmp_path, "C"))
        assert seen == [None] * 3
        assert [line["why"] for line in read_lines(tmp_path / LEFT_OUT)] == ["ValueError: no such shape"]


class TestMeasure:
    def test_what_raises_after_the_times_is_named_and_they_stay(self, tmp_path, monkeypatch):
        def blind(*_, **__):
            raise kernels.NoKernels("torch's profiler saw no CUDA kernels here")

        monkeypatch.setattr(kernels, "traced", blind)
        training.measure(session_at(tmp_path, "C"), training.point("x", step.MODEL, "plain", 8192, toy=True))
        assert [record["op"] for record in read_lines(tmp_path / RECORDS)] == ["update", "host of an update"]
        (line,) = read_lines(tmp_path / LEFT_OUT)
        assert line["what"] == "kernels of an update of x, layers plain"
        assert "saw no CUDA kernels" in line["why"]

    def test_updates_are_timed_on_the_devices_clock_and_the_peak_begins_after_the_warm_up(self, monkeypatch):
        clock, resets = iter([0.0, 10.0, 13.0, 17.0]), []

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self):
                self.at = next(clock)

            def elapsed_time(self, later):
                return later.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append(len(stamps.work)))
        stamps = training.Stamps("cuda", warm=1, updates=3)
        stamps.mark()
        stamps({})
        stamps({})
        with pytest.raises(training.Measured):
            stamps({})
        assert stamps.update_ms() == [10.0, 3.0, 4.0]
        assert resets == [1]
        assert len(stamps.host_ms()) == 3

    def test_samples_have_their_second_half_trained_and_fill_their_rows(self, tmp_path):
        session = session_at(tmp_path, "C")
        point = training.point("x", step.MODEL, "plain", 8192, toy=True)
        stamps = training.Stamps("cpu", point.warm, point.updates)
        with training.trained(session, point, tmp_path, stamps) as parts:
            index = parts.data.train.index
            assert set(index.lengths.tolist()) == {32}
            assert set(index.trained.tolist()) == {16}
            (row, _) = parts.rows(parts.plan.epoch(0, 0)[0])
            assert row.num_segments == 4
            assert row.real_tokens == row.tokens.shape[1] == 128
            assert row.trained_rows.tolist() == [32 * s + t for s in range(4) for t in range(16, 32)]

    def test_short_updates_have_as_many_rows_and_segments_and_no_padding(self, tmp_path, monkeypatch):
        session, seen = session_at(tmp_path, "C"), []
        point = training.point("x", step.MODEL, "plain", 8192, toy=False)  # its shape alone: nothing of it is built
        told = SimpleNamespace(
            world=SimpleNamespace(device=torch.device("cpu")), model=SimpleNamespace(compute_dtype=torch.float32)
        )
        monkeypatch.setattr(dataclasses, "replace", lambda of, **changes: SimpleNamespace(**{**vars(of), **changes}))
        monkeypatch.setattr(training_step, "train_step", lambda parts, update: seen.append((parts.data.train, update)))
        told.data = SimpleNamespace()
        training._record_host(session, point, told)
        store, update = seen[0]
        (rows,) = update.ranks
        assert [(row.real_tokens, row.padded_tokens, row.samples.tolist()) for row in rows] == [
            (128, 128, [0, 1, 2, 3]), (128, 128, [4, 5, 6, 7]),
        ]  # fmt: skip
        assert (update.denominator, set(store.index.lengths), set(store.index.trained)) == (8.0, {32}, {16})

    def test_the_settings_of_a_gpu_are_the_variants(self, tmp_path):
        session = session_at(tmp_path, "C")
        session.device, session.rehearsal = "cuda", False
        seen = {}
        for variant in training.VARIANTS:
            point = training.point("x", step.MODEL, variant, 8192, toy=True)
            model = training.settings_of(session, point, tmp_path)["model"]
            seen[variant] = (model["layer_kernels"], model["compile"])
        assert seen == {"plain": ("none", False), "liger": ("liger", False), "compiled": ("none", True)}

    def test_the_true_point_is_the_published_model_and_a_row_is_four_samples(self):
        point = training.point("x", step.MODEL, "plain", 8192, toy=False)
        names = ("hidden_size", "num_hidden_layers", "vocab_size")
        assert [point.config[name] for name in names] == [1024, 28, 151936]
        assert (point.samples, point.rows, point.updates) == (8, 2, 12)

    def test_a_head_product_is_longer_than_the_limit_and_a_layers_is_not(self):
        parts = SimpleNamespace(
            model=SimpleNamespace(
                named_parameters=lambda: [
                    ("embed_tokens", torch.empty(151936, 1024, device="meta")),
                    ("layers.0.up", torch.empty(3072, 1024, device="meta")),
                ]
            ),
            shape=SimpleNamespace(hidden=1024, vocabulary=151936),
        )
        limit = training._long_product_ms(training.point("x", step.MODEL, "plain", 8192, toy=False), parts, 800e12)
        of_layer, of_head = 2e3 * 8192 * 1024 * 3072 / 800e12, 2e3 * 4096 * 1024 * 151936 / 800e12
        assert 3 * of_layer < limit < of_head / 3


@pytest.fixture
def fake_gpu(monkeypatch):
    """A GPU without arithmetic: every branch for CUDA is run, no number can be read."""
    with fake_cuda(monkeypatch, every=1 << 30) as gpu:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
        plain = parts.build_model

        def build_model(*given):
            built = plain(*given)
            built.tie_weights()  # the way to a GPU keeps what is tied; the way to a fake one does not
            return built

        monkeypatch.setattr(parts, "build_model", build_model)
        monkeypatch.setattr(load, "check_head", lambda *_: None)  # they look at numbers
        monkeypatch.setattr(parts, "check_no_leak", lambda *_, **__: None)
        monkeypatch.setattr(layers, "apply_layer_kernels", lambda *_: None)
        monkeypatch.setitem(attention._grouped, 0, True)
        for name, answer in (("reset_peak_memory_stats", None), ("max_memory_reserved", 7), ("max_memory_allocated", 5)):
            monkeypatch.setattr(torch.cuda, name, lambda *_, _answer=answer: _answer)
        yield gpu


class TestOnAGpu:
    def test_a_point_is_measured_in_bf16_without_a_wait_in_its_updates(self, tmp_path, monkeypatch, fake_gpu):
        """Run without its figures: a rehearsal on a CPU takes none of these branches."""
        trace = kernels.Trace((kernels.Kernel("nvjet_x", 1, 1.0, "products"),), 1.0, 1.0, 1)
        asked, step_of, waits = [], training_step.train_step, []

        def watched(*of):
            before = fake_gpu.waits.total()
            step_of(*of)
            waits.append(fake_gpu.waits.total() - before)

        def traced(call, device, *, long_product_ms):
            asked.append((device, long_product_ms))
            call()
            return trace

        monkeypatch.setattr(kernels, "traced", traced)
        assert trainer.train_step is step_of, "bound before, so that only the updates after the loop are watched"
        monkeypatch.setattr(training_step, "train_step", watched)
        session = session_at(tmp_path, "C")
        session.device, session.rehearsal = "cuda", False
        monkeypatch.setattr(training, "SHORT_ROUNDS", 1)
        point = training.point("x", step.MODEL, "plain", 8192, toy=True, updates=3)
        training.measure(session, dataclasses.replace(point, config={**point.config, "num_hidden_layers": 1}))
        assert read_lines(tmp_path / LEFT_OUT) == []
        update, host, run = read_lines(tmp_path / RECORDS)
        assert (update["op"], host["op"], run["op"]) == ("update", "host of an update", "kernels of an update")
        assert {update["dtype"], host["dtype"], run["dtype"]} == {"bfloat16"}
        assert update["rounds_ms"] == [1.0], "the device's own milliseconds, of which this one knows one"
        assert (update["peak_bytes"], update["reserved_bytes"]) == (5, 7)
        assert update["mfu"] == pytest.approx(update["flops_per_s"] / 989e12)
        assert (run["kernels"], run["products_ms"]) == (1, 1.0)
        assert len(host["rounds_ms"]) == 1
        assert asked[0][0] == "cuda"
        assert waits == [0, 0, 0], "two short updates, of which one is recorded, and the profiled one"
        assert fake_gpu.launches["cross_entropy_rows_kernel"] == 2 * (3 + 2 + 1), "every row's head is on the kernel path"
        assert not fake_gpu.strangers


class TestWorker:
    """The protocol, with small processes in place of trainers."""

    def worker(self, monkeypatch, body):
        real = processes.subprocess.Popen
        code = f"import os, sys, time\nanswers = int(sys.argv[1])\nfor line in sys.stdin:\n    {body}\n"

        def start(command, **settings):
            return real([sys.executable, "-S", "-c", code, command[-1]], **settings)

        monkeypatch.setattr(processes.subprocess, "Popen", start)
        return processes.Worker("qwen3")

    def measured(self, tmp_path, worker, limit_s):
        point = training.point("x", step.MODEL, "plain", 8192, toy=True)
        try:
            return worker.measure(session_at(tmp_path, "C"), point, limit_s)
        finally:
            worker.close()
            assert worker.process.returncode is not None

    def test_an_answer_is_waited_for(self, tmp_path, monkeypatch):
        worker = self.worker(monkeypatch, "os.write(answers, b'.')")
        assert self.measured(tmp_path, worker, 30)
        assert read_lines(tmp_path / LEFT_OUT) == []

    def test_one_that_outlives_its_share_is_ended_and_named(self, tmp_path, monkeypatch):
        began = time.monotonic()
        assert not self.measured(tmp_path, self.worker(monkeypatch, "time.sleep(100)"), 0.5)
        assert time.monotonic() - began < 10
        (line,) = read_lines(tmp_path / LEFT_OUT)
        assert line["what"] == "the rest of an update of x, layers plain"
        assert "its share" in line["why"]

    def test_one_that_dies_is_named_with_its_code_and_stays_dead(self, tmp_path, monkeypatch):
        worker = self.worker(monkeypatch, "os._exit(7)")
        assert not self.measured(tmp_path, worker, 30)
        assert not self.measured(tmp_path, worker, 30)
        whys = [line["why"] for line in read_lines(tmp_path / LEFT_OUT)]
        assert "ended with 7" in whys[0]
        assert whys[1] == "the process that measures has ended"

    def test_a_real_process_measures_one_point_after_another(self, tmp_path):
        session = session_at(tmp_path, "C")
        with processes.workers(session, ["qwen3", "qwen3"]) as (first, second):
            assert first is second, "in a rehearsal"
            for variant in ("plain", "liger"):
                point = training.point("x", step.MODEL, variant, 8192, toy=True, kernels=False)
                assert first.measure(session, point, 90)
        assert first.process.returncode is not None
        made = [(record["op"], record["implementation"]) for record in read_lines(tmp_path / RECORDS)]
        assert made == [(op, v) for v in ("plain", "liger") for op in ("update", "host of an update")]
        assert read_lines(tmp_path / LEFT_OUT) == []

    def test_a_session_reaches_the_process_whole(self, tmp_path):
        session = session_at(tmp_path, "C", left_s=50)
        append_line(tmp_path / LEFT_OUT, {"run": "r", "part": "C", "what": "a", "why": "b"})
        session.red = frozenset({("head", "bfloat16")})
        given = processes._plain(session, limit_s=20)
        assert given["ends"] == pytest.approx(time.monotonic() + 20, abs=1)
        assert given["red"] == [("head", "bfloat16")]
        assert given["out"] == str(tmp_path)
        assert set(given) == set(vars(session))
