"""How an update is measured: its point, its clock, its rows."""

import dataclasses
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.suites.gpu import kernels, step, training
from benchmarks.suites.gpu.session import LEFT_OUT, RECORDS, read_lines
from repsft_fast.models import layers, load
from repsft_fast.ops import attention
from repsft_fast.training import build, compiled, parts, trainer
from repsft_fast.training import step as training_step
from tests.benchmarks.suites.gpu.toys import session_at
from tests.helpers.fake_cuda import fake_cuda


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

    @pytest.mark.parametrize(
        ("now", "name"),
        [
            (True, "compiled"),
            ("separate", "compiled, but separate"),
            ("failed", "compiled, but failed"),
            (False, "compiled, but plain"),
        ],
    )
    def test_layers_that_were_not_compiled_are_not_called_so(self, now, name, tmp_path, monkeypatch):
        """Goals and part D would take another's figures for theirs."""
        session = session_at(tmp_path, "C")
        point = training.point("x", step.MODEL, "plain", 8192, toy=True, updates=2, warm=1)
        stamps = training.Stamps("cpu", point.warm, point.updates)
        stack = SimpleNamespace(counts=SimpleNamespace(stacked=4, apart=1), why={1: "b", 2: "a", 3: "b"})
        with training.trained(session, point, tmp_path, stamps) as parts:
            session.device = "cuda"
            monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 7)
            monkeypatch.setattr(compiled, "now", lambda given: now)
            parts.model.compiled_layers = SimpleNamespace(stack=stack)
            training._record_updates(
                session, dataclasses.replace(point, variant="compiled"), parts, stamps, 0.0
            )
        (record,) = read_lines(tmp_path / RECORDS)
        assert (record["implementation"], record["layers"]) == (name, name)
        assert (record["rows_stacked"], record["rows_apart"], record["why_apart"]) == (4, 1, ["a", "b"])
        assert len(read_lines(tmp_path / LEFT_OUT)) == (now is not True)

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
            assert row.trained_positions.tolist() == [32 * s + t for s in range(4) for t in range(16, 32)]

    def test_short_updates_have_as_many_rows_and_segments_and_no_padding(self, tmp_path, monkeypatch):
        session, seen = session_at(tmp_path, "C"), []
        # its shape alone: nothing of it is built
        point = training.point("x", step.MODEL, "plain", 8192, toy=False)
        told = SimpleNamespace(
            world=SimpleNamespace(device=torch.device("cpu")),
            model=SimpleNamespace(compute_dtype=torch.float32),
        )
        monkeypatch.setattr(
            dataclasses, "replace", lambda of, **changes: SimpleNamespace(**{**vars(of), **changes})
        )
        monkeypatch.setattr(
            training_step, "train_step", lambda parts, update: seen.append((parts.data.train, update))
        )
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
        limit = training._long_product_ms(
            training.point("x", step.MODEL, "plain", 8192, toy=False), parts, 800e12
        )
        of_layer, of_head = 2e3 * 8192 * 1024 * 3072 / 800e12, 2e3 * 4096 * 1024 * 151936 / 800e12
        assert 3 * of_layer < limit < of_head / 3


class InTheLoop:
    """Updates whose rows are made when they are asked for."""

    def __init__(self, epoch, start):
        self.updates = epoch[start:]

    def __iter__(self):
        return iter(self.updates)

    def take_waited(self):
        return 0.0


@pytest.fixture
def fake_gpu(monkeypatch):
    """A GPU without arithmetic: every branch for CUDA is run, no number can be read."""
    with fake_cuda(monkeypatch, every=1 << 30) as gpu:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
        plain = build.build_model

        def build_model(*given):
            built = plain(*given)
            built.tie_weights()  # the way to a GPU keeps what is tied; the way to a fake one does not
            return built

        monkeypatch.setattr(build, "build_model", build_model)
        monkeypatch.setattr(load, "check_head", lambda *_: None)  # they look at numbers
        monkeypatch.setattr(build, "check_no_leak", lambda *_, **__: None)
        monkeypatch.setattr(layers, "apply_layer_kernels", lambda *_: None)
        monkeypatch.setitem(attention._grouped, 0, True)
        # a fake GPU is one thread's alone
        monkeypatch.setattr(
            parts.Parts, "rows_ahead", contextmanager(lambda self, *of: (yield InTheLoop(*of)))
        )
        for name, answer in (
            ("reset_peak_memory_stats", None),
            ("max_memory_reserved", 7),
            ("max_memory_allocated", 5),
        ):
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
        assert trainer.train_step is step_of, (
            "bound before, so that only the updates after the loop are watched"
        )
        monkeypatch.setattr(training_step, "train_step", watched)
        session = session_at(tmp_path, "C")
        session.device, session.rehearsal = "cuda", False
        monkeypatch.setattr(training, "SHORT_ROUNDS", 1)
        point = training.point("x", step.MODEL, "plain", 8192, toy=True, updates=3)
        training.measure(session, dataclasses.replace(point, config={**point.config, "num_hidden_layers": 1}))
        assert read_lines(tmp_path / LEFT_OUT) == []
        update, host, run = read_lines(tmp_path / RECORDS)
        assert (update["op"], host["op"], run["op"]) == (
            "update",
            "host of an update",
            "kernels of an update",
        )
        assert {update["dtype"], host["dtype"], run["dtype"]} == {"bfloat16"}
        assert update["rounds_ms"] == [1.0], "the device's own milliseconds, of which this one knows one"
        assert (update["peak_bytes"], update["reserved_bytes"]) == (5, 7)
        assert update["mfu"] == pytest.approx(update["flops_per_s"] / 989e12)
        assert (run["kernels"], run["products_ms"]) == (1, 1.0)
        assert len(host["rounds_ms"]) == 1
        assert asked[0][0] == "cuda"
        assert waits == [0, 0, 0], "two short updates, of which one is recorded, and the profiled one"
        assert fake_gpu.launches["cross_entropy_rows_kernel"] == 2 * (3 + 2 + 1), (
            "every row's head is on the kernel path"
        )
        assert not fake_gpu.strangers
