"""Compiled layers with launches shared and apart: one process, two compilations, the same weights."""

import dataclasses

import pytest
import torch

from benchmarks.suites.gpu import goals, launches, step, training
from benchmarks.suites.gpu.session import LEFT_OUT, RECORDS, read_lines
from repsft_fast.models import compiled as models_compiled
from repsft_fast.models.compiled import compiled_layers
from repsft_fast.training import compiled
from tests.benchmarks.suites.gpu.toys import session_at

H100 = goals.Card("NVIDIA H100 80GB HBM3", {})
OFF = 1e-4  # what a layer with separate launches is made wrong by
ROUNDING = 5e-7  # measured: 1.7e-7


class Compiler:
    """Makes graphs whose first result is `off` of its size; counts them."""

    def __init__(self, off):
        self.off, self.graphs = off, 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        (end,) = (node for node in graph.graph.nodes if node.op == "output")
        (first, *others) = end.args[0]
        with graph.graph.inserting_before(end):
            scaled = graph.graph.call_function(torch.mul, (first, 1.0 + self.off))
        end.args = ((scaled, *others),)
        graph.recompile()
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@pytest.fixture
def compilers(monkeypatch):
    """What makes layers with launches shared, and apart, which are wrong by OFF: one sees whose numbers are
    whose."""
    torch._dynamo.reset()
    made = {launches.SHARED: Compiler(0.0), launches.SEPARATE: Compiler(OFF)}
    make = torch.compile

    def compiler(function, options=None, **o):
        return make(function, backend=made[launches.SHARED if options else launches.SEPARATE], **o)

    monkeypatch.setattr(models_compiled, "compiler_options", lambda: {"combo_kernels": True})
    monkeypatch.setattr(torch, "compile", compiler)
    yield made
    torch._dynamo.reset()


@pytest.fixture
def built(tmp_path, monkeypatch, compilers):
    """The parts of compiled layers' updates at toy size, as they are after the measured ones."""
    real = training.settings_of

    def settings(session, wanted, folder):
        found = real(session, wanted, folder)
        found["model"]["compile"] = True
        found["batch"]["row_lengths"] = [wanted.row_tokens]
        return found

    monkeypatch.setattr(training, "settings_of", settings)
    # a call per document would break the graph
    monkeypatch.setattr("repsft_fast.training.attention.decide", lambda *_: ("mask", []))
    monkeypatch.setattr("repsft_fast.training.warm_up.keep_graphs", lambda config: None)
    session = session_at(tmp_path / "out", "C")
    session.out.mkdir()
    wanted = training.point("m", step.MODEL, "compiled", 8192, toy=True, updates=2, warm=1)
    folder = tmp_path / "work"
    folder.mkdir()
    with training.trained(session, wanted, folder, training.Stamps("cpu", 1, 2)) as parts:
        yield session, wanted, parts


def found_in(session):
    return goals.Found(read_lines(session.out / RECORDS))


class TestMeasure:
    def test_numbers_of_a_row_then_updates_in_turn(self, compilers, built):
        session, wanted, parts = built
        before = {name: p.detach().clone() for name, p in parts.model.named_parameters()}
        frames = compilers[launches.SHARED].graphs
        updates = []
        step_of = parts.optimizer.step
        parts.optimizer.step = lambda *a, **k: (updates.append(compiled.now(parts)), step_of(*a, **k))
        # No update before all numbers are known: they are of the same weights.
        real, seen = launches._time, []
        with pytest.MonkeyPatch.context() as patch:

            def timed(*of):
                seen.append(all(torch.equal(p, before[n]) for n, p in parts.model.named_parameters()))
                real(*of)

            patch.setattr(launches, "_time", timed)
            assert launches.measure(session, wanted.shape, parts)
        assert seen == [True]
        assert read_lines(session.out / LEFT_OUT) == []
        assert compiled.now(parts) == compiled.SEPARATE, "what is left in use is said"
        assert compilers[launches.SHARED].graphs == frames, "there already"
        assert compilers[launches.SEPARATE].graphs > 0
        found = found_in(session)
        numbers = found.all(launches.NUMBERS, model="m")
        fields = ("loss_off", "gradients_off", "layer_off", "outside_off")
        for name, limit in (("shared beside itself", 0.0), ("shared beside plain", ROUNDING)):
            assert max(numbers[name][field] for field in fields) <= limit, name
        for name in ("separate beside plain", "shared beside separate"):
            assert numbers[name]["layer_off"] == pytest.approx(0.947 * OFF, rel=3e-4), name
            assert numbers[name]["layers_off"][numbers[name]["layer"]] == numbers[name]["layer_off"]
            assert len(numbers[name]["layers_off"]) == 2
        shared, apart = (found.one(launches.UPDATES, way) for way in (launches.SHARED, launches.SEPARATE))
        assert len(shared["rounds_ms"]) == len(apart["rounds_ms"]) == 2
        assert apart["against"] == launches.SHARED
        assert apart["compiling_s"] > 0
        # to warm up, twice a round, and for the peak; shared ones are A/A's too
        assert (updates.count(True), updates.count(compiled.SEPARATE)) == (2 * (1 + 2 * 2) + 1, 1 + 2 * 2 + 1)

    def test_updates_go_the_way_they_are_called_by(self, compilers, built):
        _, _, parts = built
        ways = launches.Ways(parts)
        ways.compile_apart()
        stack, numbers = compiled_layers(parts.model).stack, {}
        for way in (launches.SHARED, launches.SEPARATE, launches.PLAIN, launches.SHARED):
            ways.take(way)
            row = parts.plan.epoch(0, 0)[0]
            before = stack.counts.stacked
            numbers.setdefault(way, []).append(launches.Numbers.of(parts, row))
            assert stack.counts.stacked - before == (0 if way == launches.PLAIN else 2), "under one function"
        first, last = numbers[launches.SHARED]
        assert last.beside(first)["gradients_off"] == 0.0
        assert first.beside(numbers[launches.PLAIN][0])["gradients_off"] <= ROUNDING
        assert first.beside(numbers[launches.SEPARATE][0])["gradients_off"] > 0.3 * OFF

    def test_a_compiler_that_fails_leaves_the_shared_ones(self, compilers, built, monkeypatch):
        session, wanted, parts = built

        def broken(function, options=None, **o):
            def no_kernel(*a, **k):
                raise RuntimeError("no kernel for one")

            return no_kernel

        monkeypatch.setattr(torch, "compile", broken)
        assert not launches.measure(session, wanted.shape, parts)
        (line,) = read_lines(session.out / LEFT_OUT)
        assert line["what"] == launches.WHAT
        assert "no kernel for one" in line["why"]
        assert compiled.now(parts) is True
        assert set(found_in(session).all(launches.NUMBERS)) == {"shared beside itself", "shared beside plain"}

    def test_where_nothing_is_shared_there_is_nothing_to_compare(self, compilers, built, monkeypatch):
        session, wanted, parts = built
        monkeypatch.setattr(models_compiled, "compiler_options", lambda: None)
        assert not launches.measure(session, wanted.shape, parts)
        (line,) = read_lines(session.out / LEFT_OUT)
        assert "not shared" in line["why"]
        assert compiled.now(parts) is True

    def test_what_comes_too_late_is_named_and_the_cheap_numbers_are_there(self, compilers, built):
        session, wanted, parts = built
        late = dataclasses.replace(session, rehearsal=False, ends=0.0)
        assert not launches.measure(late, wanted.shape, parts)
        (line,) = read_lines(session.out / LEFT_OUT)
        assert line["what"] == launches.WHAT
        assert compilers[launches.SEPARATE].graphs == 0
        assert found_in(session).one(launches.NUMBERS, "shared beside plain")["gradients_off"] <= ROUNDING


def test_differences_are_in_the_size_of_what_they_are_beside():
    names = ("model.layers.0.a", "model.layers.0.b", "model.layers.1.a", "model.embed.weight")
    one = launches.Numbers(2.0, {name: torch.full((4,), 1.0) for name in names}, 1.0)
    other = {name: gradient.clone() for name, gradient in one.gradients.items()}
    other["model.layers.1.a"][0] = 2.0
    other["model.layers.0.b"][1] = 0.0
    beside = launches.Numbers(1.5, other, 1.0).beside(one)
    assert beside["loss_off"] == 0.25
    assert beside["layers_off"] == pytest.approx([(1 / 8) ** 0.5, (1 / 4) ** 0.5])
    assert (beside["layer"], beside["layer_off"]) == (1, pytest.approx(0.5))
    assert beside["outside_off"] == 0.0
    assert beside["gradients_off"] == pytest.approx((2 / 16) ** 0.5)
    with pytest.raises(ValueError, match="other parameters"):
        launches.Numbers(1.5, {}, 1.0).beside(one)


def test_predictions_are_of_what_was_counted():
    """28 layers, ten launches of 2 us each, and 0.04 GB a layer the other way."""
    assert launches.saved_ms(3.0e12) == pytest.approx(28 * (10 * 2e-3 - 0.04e12 / 3.0e12))
    by_name = {goal.name: goal.predicted(H100) for goal in step.GOALS if goal.predicted}
    assert by_name["0.6B, compiled: kernels a row fewer, launches shared"] == 280
    assert by_name["0.6B, compiled: launches apart / shared"] == pytest.approx(1.00197, abs=5e-6)
