"""Graphs are made before the first update and not after it; nothing of the run moves for them, and what
cannot be compiled leaves plain layers, for the whole run and all ranks."""

import json
import os
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from repsft_fast import checkpoint
from repsft_fast.config import Config
from repsft_fast.distributed import World, held_parameters
from repsft_fast.errors import TrainingError
from repsft_fast.evaluate.teacher_forced import TeacherForced
from repsft_fast.models import compiled as models_compiled
from repsft_fast.models.compiled import CompiledLayers, Warming, compiled_layers
from repsft_fast.state import state_hash
from repsft_fast.training import compiled, recovery
from repsft_fast.training.build import build
from repsft_fast.training.snapshots import closed_list
from repsft_fast.training.step import train_step
from repsft_fast.training.trainer import train
from repsft_fast.training.warm_up import TRAINED, keep_graphs, kept_in, row_of, shapes_of, warm_up
from tests.helpers import runs
from tests.helpers.ranks import run_ranks

SETTINGS = {"model__compile": True, "batch__row_tokens": 96, "data__validation_fraction": 0.25}
FEW = {"data__validation_fraction": 0.0, "batch__row_lengths": [96]}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr("repsft_fast.report.pictures.draw", lambda folder, **more: None)
    with torch._inductor.config.patch(deterministic=False):
        yield
    torch._dynamo.reset()
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)


@pytest.fixture
def counted(monkeypatch):
    counter, make = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, options=None, **o: make(function, backend=counter, **o)
    )
    return counter


@pytest.fixture
def apart(monkeypatch):
    """A compiler that can do what it is asked for without options alone; what it was asked for."""
    counter, make, asked = CompileCounterWithBackend("eager"), torch.compile, []

    def no_kernel(graph, inputs):
        raise RuntimeError("no kernel for two")

    def compiler(function, options=None, **o):
        asked.append(options)
        return make(function, backend=counter if options is None else no_kernel, **o)

    monkeypatch.setattr(models_compiled, "compiler_options", lambda: {"combo_kernels": True})
    monkeypatch.setattr(torch, "compile", compiler)
    return asked


@pytest.fixture
def broken(monkeypatch):
    """A compiler that has no kernel."""

    def backend(graph, inputs):
        raise RuntimeError("no kernel for this\nsecond line")

    make = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, options=None, **o: make(function, backend=backend, **o)
    )


def made(tmp_path, **changes):
    return build(Config.of(runs.settings(tmp_path, **SETTINGS | changes)))


def figures(folder):
    """What the updates of a run were, the clock aside."""
    kept = ("update", "loss", "objective", "grad_norm", "lr")
    return [{name: line.get(name) for name in kept} for line in runs.metrics(folder, "update")]


def notes(folder):
    return [line["text"] for line in runs.metrics(folder, "note")]


class TestARun:
    def test_nothing_is_compiled_in_the_loop_and_the_figures_are_the_plain_runs(self, tmp_path, counted):
        seen = []
        changes = SETTINGS | {"evaluate__every_epochs": 1, "batch__samples": 3}
        config = runs.settings(tmp_path / "compiled", **changes)
        train(config, on_update=lambda work: seen.append(counted.frame_count))
        assert seen[0] > 0
        assert seen == seen[:1] * len(seen), "compiled anew in the loop"
        assert counted.frame_count == seen[0], "an evaluation compiled"
        assert runs.metrics(tmp_path / "compiled", "evaluation")
        plain = runs.settings(tmp_path / "plain", **changes | {"model__compile": False})
        plain["batch"]["row_lengths"] = lengths_of(tmp_path / "compiled")
        train(plain)
        assert figures(tmp_path / "compiled") == figures(tmp_path / "plain")
        said = notes(tmp_path / "compiled")
        assert any(text.startswith("compiling the layers for rows of ") for text in said)
        assert any("layers compiled in " in text and "graphs are kept in " in text for text in said)
        result = json.loads((tmp_path / "compiled" / "run" / "result.json").read_text())
        assert result["seconds"] > 0

    def test_a_failed_compile_is_said_once_and_kept(self, tmp_path, broken):
        train(runs.settings(tmp_path / "broken", **SETTINGS))
        said = [text for text in notes(tmp_path / "broken") if "stay plain" in text]
        assert len(said) == 1
        assert "no kernel for this" in said[0]
        assert "second line" not in said[0]
        newest = checkpoint.newest(tmp_path / "broken" / "run" / "checkpoints").path
        assert checkpoint.values_of(newest)["decided"]["choices"]["compiled"] == compiled.FAILED

    @pytest.mark.parametrize("asked", [True, "auto"])
    def test_kernels_that_fail_side_by_side_are_launched_one_by_one(
        self, tmp_path, apart, monkeypatch, asked
    ):
        """So does a resumption from the start, where they could be launched together, too."""
        monkeypatch.setattr("repsft_fast.training.build.compiles", lambda *a, **k: True)
        monkeypatch.setattr("repsft_fast.training.row_lengths.are_few", lambda *a: True)
        changes = SETTINGS | {"model__compile": asked, "stop__token_accuracy": None}
        config = runs.settings(tmp_path, **changes, checkpoint__every_updates=1)

        def killed(work):
            if work.updates == 2:
                raise RuntimeError("killed")

        with pytest.raises(RuntimeError, match="killed"):
            train(config, on_update=killed)
        said = [text for text in notes(tmp_path) if "compil" in text]
        assert [text.split(" in ")[0] for text in said[1:]] == [
            "compiling the layers failed, so every kernel gets a launch of its own: RuntimeError: no kernel for two",
            "layers compiled",
        ]
        newest = checkpoint.newest(tmp_path / "run" / "checkpoints").path
        assert checkpoint.values_of(newest)["decided"]["choices"]["compiled"] == compiled.SEPARATE
        apart.clear()
        monkeypatch.setattr(torch, "compile", works := Mock(side_effect=torch.compile))
        train(config, resume=True)
        assert [call.kwargs.get("options") for call in works.call_args_list] == [
            {"combo_kernels": True},
            None,
        ]
        again = [text for text in notes(tmp_path) if "compil" in text][len(said) :]
        assert not any(text.startswith("compiling the layers failed") for text in again)
        kept = "stays compiled layers, every kernel in a launch of its own (side by side they failed)"
        assert any(kept in text for text in again)
        assert any(text.startswith("layers compiled in ") for text in again)

    @pytest.mark.parametrize("lengths", ["auto", "off"])
    def test_what_was_asked_for_and_failed_is_not_tried_again(self, tmp_path, broken, lengths, monkeypatch):
        """Where it works by now, too: a resumption equals the run that was not interrupted (law 6)."""
        changes = SETTINGS | {"batch__row_lengths": lengths, "stop__token_accuracy": None}

        def killed(work):
            if work.updates == 2:
                raise RuntimeError("killed")

        whole = runs.settings(tmp_path / "whole", **changes)
        train(whole)
        config = runs.settings(tmp_path / "run", **changes, checkpoint__every_updates=1)
        with pytest.raises(RuntimeError, match="killed"):
            train(config, on_update=killed)
        with monkeypatch.context() as mended:
            mended.setattr(torch, "compile", lambda function, **_: pytest.fail("compiled"))
            mended.setattr(CompiledLayers, "add", lambda self, layer: None)
            train(config, resume=True)
        said = [text for text in notes(tmp_path / "run") if text.startswith("--resume: model.compile")]
        assert len(said) == 1
        assert "stays plain layers (compiling them failed; a run in another folder tries again)" in said[0]
        assert figures(tmp_path / "run") == figures(tmp_path / "whole")

    def test_one_length_of_many_that_cannot_be_compiled_says_what_can_be_done(self, tmp_path, monkeypatch):
        """The one that is tried before the first update can; another is met in the loop, since dropout
        breaks the layers and every length is a graph of its own."""
        first, make = [], torch.compile

        def backend(graph, inputs):
            lengths = [x.shape[1] for x in inputs if isinstance(x, torch.Tensor) and x.dim() > 2]
            first.append(lengths[0])
            if lengths[0] != first[0]:
                raise RuntimeError("no kernel for this length")
            return graph.forward

        monkeypatch.setattr(torch, "compile", lambda function, **o: make(function, backend=backend, **o))
        changes = {"batch__row_lengths": "off", "data__validation_fraction": 0.0, "batch__bucket_tokens": 1}
        changes["model__config"] = runs.MODEL | {"attention_dropout": 0.1}
        words = r"could not be compiled for .*no kernel for this length.*model.compile: false and --resume"
        with pytest.raises(TrainingError, match=words):
            train(runs.settings(tmp_path, **SETTINGS | changes))

    @pytest.mark.parametrize("where", ["plain", "compiled"])
    def test_memory_that_runs_out_halves_rows_as_in_training(self, tmp_path, counted, monkeypatch, where):
        rows = small_machine(monkeypatch, 150, where)
        changes = {"batch__row_tokens": 512, "batch__samples": 18, "numbers__on_out_of_memory": "retry"}
        result = train(runs.settings(tmp_path, **SETTINGS | changes | {"data__validation_fraction": 0.0}))
        assert result.updates > 0
        assert rows[0] > 150
        assert max(rows[-3:]) <= 128
        said = [text for text in notes(tmp_path) if text.startswith("out of memory in rows of ")]
        assert said == [
            f"out of memory in rows of {a} tokens, for which layers were compiled: rows take {b} from here on"
            for a, b in ((512, 256), (256, 128))
        ]
        assert any("layers compiled in " in text for text in notes(tmp_path)), "they stayed plain"
        # a resumption begins with the lengths that the run began with, so a graph rounds by the same one
        compiling = [text for text in notes(tmp_path) if text.startswith("compiling the layers for rows of ")]
        assert len(compiling) == 3
        assert set(compiling[0].split()[6:]) - {"tokens"} <= {
            each.strip(",") for each in compiling[-1].split()
        } | set(compiling[-1].split())

    @pytest.mark.parametrize("where", ["plain", "compiled"])
    def test_memory_that_runs_out_says_what_to_lower(self, tmp_path, counted, monkeypatch, where):
        small_machine(monkeypatch, 150, where)
        changes = {"batch__row_tokens": 512, "batch__samples": 18, "data__validation_fraction": 0.0}
        with pytest.raises(TrainingError, match=r"out of memory .*lower batch.row_tokens from 512 to 256"):
            train(runs.settings(tmp_path, **SETTINGS | changes))
        assert json.loads((tmp_path / "run" / "result.json").read_text())["code"] == "out_of_memory"

    def test_rows_of_an_evaluation_are_not_halved_by_halving(self, tmp_path, counted, monkeypatch):
        small_machine(monkeypatch, 0, "evaluation")
        changes = {"numbers__on_out_of_memory": "retry", "batch__samples": 18}
        with pytest.raises(TrainingError, match="out of memory"):
            train(runs.settings(tmp_path, **SETTINGS | changes))
        assert not any("from here on" in text for text in notes(tmp_path))

    def test_auto_writes_down_what_it_came_to(self, tmp_path, monkeypatch, broken):
        monkeypatch.setattr("repsft_fast.training.build.compiles", lambda *a, **k: True)
        monkeypatch.setattr("repsft_fast.training.row_lengths.are_few", lambda *a: True)
        train(runs.settings(tmp_path, **SETTINGS | {"model__compile": "auto"}))
        assert "compile: false" in (tmp_path / "run" / "run.yaml").read_text()

    @pytest.mark.slow
    def test_compiled_by_inductor(self, tmp_path):
        """The whole way once: its numbers are plain layers' but for rounding, its graphs lie where they are kept."""
        changes = SETTINGS | {"budget__updates": 2, "budget__epochs": None, "data__validation_fraction": 0.0}
        changes |= {"batch__row_lengths": [96]}
        config = runs.settings(tmp_path / "c", samples=8, **changes)
        config["model"]["config"] = runs.MODEL | {"num_hidden_layers": 1}
        train(config)
        assert any("layers compiled in " in text for text in notes(tmp_path / "c")), notes(tmp_path / "c")
        assert any((tmp_path / "c" / "cache" / "compiled").rglob("*"))
        plain = runs.settings(tmp_path / "p", samples=8, **changes | {"model__compile": False})
        plain["model"]["config"] = config["model"]["config"]
        train(plain)
        for a, b in zip(figures(tmp_path / "c"), figures(tmp_path / "p"), strict=True):
            assert a == pytest.approx(b, rel=1e-4)


def small_machine(monkeypatch, most, where):
    """Memory runs out in a warm-up's rows of more than `most` tokens: in its plain pass, in what it compiles
    beside it, or in a row of an evaluation. Returns the rows' lengths."""
    seen, meet = [], Warming.meet

    def full(self, layer, plain, compiled, args, kwargs):
        def no_room(*_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        seen.append(args[0].shape[1])
        if seen[-1] > most and (where != "evaluation" or not self.stack.layers[layer].training):
            if where != "compiled":
                no_room()
            compiled = no_room
        return meet(self, layer, plain, compiled, args, kwargs)

    monkeypatch.setattr(Warming, "meet", full)
    return seen


def lengths_of(folder):
    import yaml

    return yaml.safe_load((folder / "run" / "run.yaml").read_text())["batch"]["row_lengths"]


class TestWarmUp:
    def test_nothing_moves(self, tmp_path, counted):
        parts = made(tmp_path)
        assert counted.frame_count == 0, "the checks at start were compiled for"
        state = closed_list(parts)
        before = {name: tensor.clone() for name, tensor in state.tensors().items()}
        streams, training = torch.get_rng_state(), parts.model.training
        said = []
        assert warm_up(parts, said.append) > 0
        assert len(said) == 2
        assert counted.frame_count > 0
        after = state.tensors()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert torch.equal(torch.get_rng_state(), streams)
        assert parts.model.training == training
        assert all(p.grad is None for p in parts.model.parameters())
        assert parts.progress.updates == 0
        # a second time there is nothing to do
        assert warm_up(parts, said.append) == 0.0
        assert len(said) == 2

    def test_dropout_draws_nothing_of_the_runs(self, tmp_path, counted):
        parts = made(tmp_path, model__lora={"rank": 2, "dropout": 0.5})
        streams = torch.get_rng_state()
        warm_up(parts, lambda text: None)
        assert compiled.now(parts)
        assert torch.equal(torch.get_rng_state(), streams)

    def test_checkpointing_stands_as_it_stood(self, tmp_path, counted):
        parts = made(tmp_path, model__activation_checkpointing="selective")
        layers = parts.model.model.layers
        before = [layer.gradient_checkpointing for layer in layers]
        warm_up(parts, lambda text: None)
        assert [layer.gradient_checkpointing for layer in layers] == before == [True, False]

    def test_plain_layers_have_nothing_to_warm(self, tmp_path):
        parts = made(tmp_path, model__compile=False)
        assert warm_up(parts, pytest.fail) == 0.0

    def test_rows_of_many_lengths_are_compiled_for_only_as_asked(self, tmp_path, counted):
        parts, said = made(tmp_path, batch__row_lengths="off"), []
        assert shapes_of(parts) is None
        assert warm_up(parts, said.append) > 0.0
        assert compiled_layers(parts.model).warm is None
        assert compiled.now(parts) is True
        assert "and others as they come" in said[0]
        tried = counted.frame_count
        assert tried > 0, "whether they can be compiled at all is seen before the first update"
        train_step(parts, parts.plan.epoch(0, 0)[0])
        assert warm_up(parts, said.append) == 0.0, "it is tried once"
        parts = made(tmp_path, batch__row_lengths="off")
        settings = parts.config.model.model_copy(update={"compile": "auto"})
        parts.config = parts.config.model_copy(update={"model": settings})
        warm_up(parts, said.append)
        assert not compiled.now(parts)
        assert "layers stay plain" in said[-1]

    def test_rows_halved_after_want_of_memory_are_warmed_too(self, tmp_path, counted):
        from repsft_fast.training.recovery import use_row_tokens

        parts = made(tmp_path)
        warm_up(parts, lambda text: None)
        before = set(compiled_layers(parts.model).warm)
        parts.lasting.row_tokens = 40
        use_row_tokens(parts)
        assert warm_up(parts, lambda text: None) > 0
        now = compiled_layers(parts.model).warm
        assert before < now
        assert set(shapes_of(parts)) <= now

    def test_an_update_made_again_in_shorter_rows_is_compiled_for_once(self, tmp_path, counted, monkeypatch):
        from repsft_fast.training import step

        compiled_by, made_rows = [], step.forward_backward

        def full(parts, update):
            if not compiled_by:
                compiled_by.append(counted.frame_count)
                raise torch.OutOfMemoryError("CUDA out of memory")
            made_rows(parts, update)

        monkeypatch.setattr(step, "forward_backward", full)
        seen = []
        changes = {"numbers__on_out_of_memory": "retry", "batch__row_tokens": 256, "batch__samples": 18}
        config = runs.settings(tmp_path, **SETTINGS | changes)
        train(config, on_update=lambda work: seen.append(counted.frame_count))
        assert seen[0] > compiled_by[0], "the shorter rows have no graphs"
        assert seen == seen[:1] * len(seen)

    def test_rows_pass_their_layers_together_and_the_updates_are_the_same(self, tmp_path, monkeypatch):
        make = torch.compile
        monkeypatch.setattr(torch, "compile", lambda function, **o: make(function, backend="aot_eager", **o))
        found = []
        for together in (True, False):
            said: list[str] = []
            parts = made(tmp_path, **FEW, model__compute_dtype="bfloat16")
            parts.model.loss_settings = replace(parts.model.loss_settings, attention="mask")
            warm_up(parts, said.append)
            assert not any("one by one" in text for text in said), said
            stack = compiled_layers(parts.model).stack
            if not together:
                stack._plans.clear()
            updates = list(parts.plan.epoch(0, 0))
            for update in updates:
                train_step(parts, update)
            passed = sum(len(update.ranks[0]) for update in updates)
            assert vars(stack.counts) == {
                "stacked": passed * together,
                "at_once": passed * together,
                "apart": passed * (not together),
            }
            found.append(state_hash({n: p.detach() for n, p in held_parameters(parts.model)}, {}))
        assert found[0] == found[1]

    def test_that_they_cannot_is_said_once(self, tmp_path, counted):
        parts, said = made(tmp_path, **FEW), []
        warm_up(parts, said.append)
        assert len([text for text in said if "one by one" in text and "one compiled function" in text]) == 1

    def test_recomputed_layers_are_not_tried(self, tmp_path, counted):
        parts, said = made(tmp_path, **FEW, model__activation_checkpointing="full"), []
        warm_up(parts, said.append)
        assert not compiled_layers(parts.model).stack.allowed
        assert not any("one by one" in text for text in said)

    def test_shapes_are_those_of_rows_that_come(self, tmp_path):
        parts = made(tmp_path)
        wanted = shapes_of(parts)
        assert wanted == sorted(wanted, reverse=True), "the longest first: what does not fit is seen at once"
        for number, update in enumerate(parts.plan.epoch(0, 0)):
            for row in parts.rows(update):
                shape = (row.tokens.shape[1], len(row.cu_seqlens), row.max_seqlen, True, True)
                assert shape in wanted, number
        scorer = parts.validation
        for planned in scorer.planned:
            row = scorer.store.row(planned, denominator=1.0, average="token")
            assert (row.tokens.shape[1], len(row.cu_seqlens), row.max_seqlen, False, False) in wanted


@pytest.mark.parametrize(("length", "longest"), [(64, 20), (60, 20), (5, 5), (128, 128)])
def test_a_row_of_a_shape_is_one(length, longest):
    row = row_of(length, 12, longest, 61, torch.device("cpu"))
    assert row.tokens.shape == row.positions.shape == (1, length)
    assert len(row.cu_seqlens) == 12
    assert row.cu_seqlens.tolist() == sorted(row.cu_seqlens.tolist())
    assert row.cu_seqlens[0] == 0
    assert row.cu_seqlens[-1] == length == sum(row.segment_lengths)
    assert max(row.segment_lengths) <= row.max_seqlen == longest
    assert int(row.tokens.max()) < 61
    starts = row.cu_seqlens[:-1][row.cu_seqlens.diff() > 0].long()
    assert not row.positions[0][starts].any()
    assert len(row.trained_positions) == min(TRAINED, length)
    assert row.num_segments == len(row.segment_lengths)


class TestWhereGraphsAreKept:
    def config(self, tmp_path, **changes):
        return Config.of(runs.settings(tmp_path, **changes))

    def test_beside_tokenised_data(self, tmp_path):
        keep_graphs(self.config(tmp_path))
        assert kept_in() == str(tmp_path / "cache" / "compiled")
        assert (tmp_path / "cache" / "compiled").is_dir()

    def test_where_the_user_says(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
        keep_graphs(self.config(tmp_path))
        assert kept_in() == "/elsewhere"

    def test_nowhere_of_ours_if_it_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        keep_graphs(self.config(tmp_path, data__cache_folder=str(tmp_path / "file" / "cache")))
        assert kept_in() == default_cache_dir()

    def test_torchs_own_choice_is_nobodys_wish(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
        keep_graphs(self.config(tmp_path))
        assert kept_in() == str(tmp_path / "cache" / "compiled")

    @pytest.mark.parametrize("deterministic", [True, False])
    def test_deterministic_runs_time_no_kernels(self, tmp_path, deterministic):
        keep_graphs(self.config(tmp_path, run__deterministic=deterministic))
        assert torch._inductor.config.deterministic is deterministic


def test_the_warm_up_is_no_training(tmp_path, counted, monkeypatch):
    monkeypatch.setattr(recovery, "warm_up", lambda parts, say: 1000.0)
    train(runs.settings(tmp_path, **SETTINGS))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["code"]
    speeds = [line for line in runs.metrics(tmp_path, "update") if "tokens_per_second" in line]
    assert speeds[0]["tokens_per_second"] > 1e6, "1,000 seconds are not this reading's: nothing is left of it"


def one_rank(world, folder, broken, dtype):
    """What a rank's warm-up comes to: (compiled or not, the last word, graphs then, graphs after updates)."""

    def backend(graph, inputs):
        if world.rank == broken:
            raise RuntimeError("no kernel on this rank")
        return counter(graph, inputs)

    counter, make = CompileCounterWithBackend("eager"), torch.compile
    torch.compile = lambda function, options=None, **o: make(function, backend=backend, **o)
    # every rank's shards in one file are no matter here: nothing is written
    changes = SETTINGS | {"model__compute_dtype": dtype, "batch__samples": 8}
    parts, said = build(Config.of(runs.settings(folder, **changes)), world=world), []
    warm_up(parts, said.append)
    graphs = counter.frame_count
    for update in list(parts.plan.epoch(0, 0))[:2]:
        train_step(parts, update)
    parts.validation(parts.model)
    losses = [record.loss for record in parts.ledger.read()]
    return compiled.now(parts), said[-1], graphs, counter.frame_count, losses


@pytest.mark.parametrize(("size", "dtype"), [(1, "bfloat16"), (2, "float32")])
def test_sharded_layers_are_warmed_as_they_are_trained(tmp_path, size, dtype):
    runs.settings(tmp_path)
    found = run_ranks(one_rank, tmp_path, None, dtype, size=size, timeout_s=180)
    for on, word, graphs, later, _ in found:
        assert on, word
        assert graphs > 0
        assert later == graphs, "an update or an evaluation was compiled for"


def test_ranks_warm_the_same_shapes(tmp_path):
    """They gather weights together in every pass: one more on one of them would wait for ever."""
    runs.settings(tmp_path, samples=100)
    parts, found, lengths = made(tmp_path, batch__samples=8), [], []
    alone = parts.validation
    for rank in range(2):
        world = World(rank, 2, rank, torch.device("cpu"))
        of: dict = {"row_tokens": 96, "bucket_tokens": 128, "world": world, "to": parts.row_lengths}
        parts.validation = TeacherForced(alone.store, alone.samples, **of)
        found.append(shapes_of(parts))
        lengths.append({row.padded_tokens for row in parts.validation.planned})
    assert lengths[0] != lengths[1], "the case is none: the ranks' rows have the same lengths"
    assert found[0] == found[1]
    assert {shape[0] for shape in found[0] if not shape[3]} == lengths[0] | lengths[1]


def test_all_ranks_stay_plain_where_one_cannot_compile(tmp_path):
    runs.settings(tmp_path)
    found = run_ranks(one_rank, tmp_path, 1, "float32", size=2, timeout_s=180)
    assert [on for on, *_ in found] == ["failed", "failed"]
    assert all("no kernel on this rank" in word for _, word, *_ in found)
    assert "rank 1" in found[0][1]
    assert found[0][4] == found[1][4]
