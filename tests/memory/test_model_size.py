"""Predicted bytes against real ones: parameters, moments, snapshots, checkpoints, activations."""

import json
import math
from pathlib import Path

import pytest

from repsft_fast import checkpoint
from repsft_fast.cli import main
from repsft_fast.config import Config
from repsft_fast.distributed import shard
from repsft_fast.memory.activations import Saved, fake_row, rehearsed, saved_bytes, saved_per_token
from repsft_fast.memory.model_size import SPIKES, ModelSize, kept_layers
from repsft_fast.models.load import config_of, load_model
from repsft_fast.optim import build_optimizer, masters, state_bytes
from repsft_fast.sizing import page
from repsft_fast.sizing.known_models import MODELS
from repsft_fast.snapshot.slots import Layout
from repsft_fast.state import local
from repsft_fast.training.build import build
from repsft_fast.training.snapshots import closed_list
from repsft_fast.training.spikes import WINDOW
from repsft_fast.training.trainer import train
from tests.helpers import peak, ranks, runs, tiny

# What the cards say: all parameters, or those beside the embedding tables.
CARDS = {
    "SmolLM2-135M": 134_515_008, "Qwen3-0.6B": 0.44e9, "Qwen3-1.7B": 1.4e9, "Qwen3-4B": 3.6e9, "Olmo3-7B": 7.30e9,
    "Llama-3.1-8B": 8_030_261_248, "Qwen3-32B": 31.2e9,
}  # fmt: skip


def meta(config, **options):
    return ModelSize.of(load_model(config, device="meta", **options))


def bytes_of(tensors):
    return sum(local(t).numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_card(name):
    size, card = meta(MODELS[name]), CARDS[name]
    if name.startswith("Qwen3"):  # their cards count without embeddings
        tables = size.vocabulary * size.hidden * (1 if MODELS[name]["tie_word_embeddings"] else 2)
        assert round((size.count - tables) / 1e9, 2 if card < 1e9 else 1) == card / 1e9
    elif isinstance(card, int):
        assert size.count == card
    else:
        assert round(size.count / 1e9, 2) == card / 1e9


OPTIMIZERS = ("adamw", "adamw8bit", "sgd", "bnb_adamw8bit", "torchao_adamw8bit")
# rows of 256: wide enough for 8-bit moments
WIDE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 101}


class TestState:
    @pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3"])
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_alone(self, name, optimizer):
        if optimizer.startswith(("bnb", "torchao")):
            pytest.importorskip({"b": "bitsandbytes", "t": "torchao"}[optimizer[0]])
        model = load_model(tiny.config(name, **WIDE))
        real = build_optimizer(model, optimizer, lr=1e-3, momentum=0.9 if optimizer == "sgd" else 0.0)
        predicted = meta(tiny.config(name, **WIDE)).held(optimizer)
        assert predicted.weights == bytes_of(model.parameters())
        assert predicted.moments == state_bytes(real)

    @pytest.mark.parametrize("options", [{}, {"lora": {"rank": 4}}, {"param_dtype": "bfloat16"}])
    @pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd"])
    def test_computed_in_another_type(self, optimizer, options):
        """Weights in the compute type and masters beside those that are held in fp32; frozen ones are held in
        the compute type already."""
        options = {**options, "compute_dtype": "bfloat16"}
        model = load_model(tiny.config("llama", **WIDE), **options)
        beside = masters.beside(model)
        momentum = 0.9 if optimizer == "sgd" else 0.0
        real = build_optimizer(model, optimizer, lr=1e-3, momentum=momentum, masters=beside)
        predicted = meta(tiny.config("llama", **WIDE), **options).held(optimizer)
        assert predicted.weights == bytes_of(model.parameters())
        assert predicted.masters == (bytes_of(beside.held.values()) if beside else 0)
        assert bool(predicted.masters) == ("param_dtype" not in options)
        assert predicted.moments == state_bytes(real)
        model.loss(tiny.row(tiny.documents((9,))))[0].backward()
        assert predicted.gradients == bytes_of(p.grad for p in model.parameters() if p.grad is not None)

    def test_two_ranks_odd_shapes(self):
        optimizers = ("adamw", "adamw8bit")
        for optimizer, found in zip(optimizers, zip(*ranks.run_ranks(held_by_a_rank, optimizers))):
            predicted = meta(tiny.config("llama", **WIDE)).held(optimizer, 2)
            assert tuple(map(max, zip(*found))) == (predicted.weights, predicted.gradients, predicted.moments)
            assert min(found) < max(found), "101 rows of vocabulary do not divide"

    def test_spikes_are_judged_by_as_many_updates(self):
        assert SPIKES[0] == WINDOW * 2 * 8

    def test_more_ranks_than_rows(self):
        size = meta(tiny.config("llama"))
        uneven = {p.name: empty for p, empty in size.uneven(64)}
        assert uneven["lm_head.weight"] == 64 - math.ceil(97 / 2)
        assert uneven["model.norm.weight"] == 32
        assert "lm_head.weight" not in {p.name for p, _ in size.uneven(97)}

    @pytest.mark.parametrize(
        "changes", [{}, {"optim__name": "adamw8bit", "tasks": 3}, {"model__lora": {"rank": 4}}]
    )
    def test_a_snapshot(self, changes, tmp_path):
        parts = build(Config.of(runs.settings(tmp_path, **changes)))
        layout = Layout([local(t) for t in closed_list(parts).tensors().values()])
        optimizer, tasks = parts.config.optim.name, parts.num_tasks
        assert ModelSize.of(parts.model).held(optimizer, tasks=tasks).snapshot == layout.bytes_each

    @pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
    def test_a_checkpoint(self, optimizer, tmp_path):
        model = {**runs.MODEL, **WIDE, "vocab_size": runs.VOCABULARY}
        settings = runs.settings(tmp_path, budget__updates=3, optim__name=optimizer, model__config=model)
        settings["checkpoint"] = {"every_updates": 1}
        train(settings)
        found = checkpoint.newest(tmp_path / "run" / "checkpoints")
        real = sum(tensor_bytes(path) for path in Path(found.path).rglob("*.safetensors"))
        assert meta(model).checkpoint(optimizer) == real


def tensor_bytes(path):
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")


def held_by_a_rank(world, optimizers):
    model = load_model(tiny.config("llama", **WIDE))
    shard(model, world)
    model.loss(tiny.row(tiny.documents((9,))))[0].backward()
    parameters = list(model.parameters())
    held = bytes_of(parameters), bytes_of([p.grad for p in parameters])
    return [(*held, state_bytes(build_optimizer(model, name, lr=1e-3))) for name in optimizers]


SMALL = {"hidden_size": 64, "intermediate_size": 192, "vocab_size": 300}
ROW = 400


class TestActivations:
    @pytest.mark.parametrize("name", ["llama", "qwen3", "olmo3"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_what_is_kept_is_what_was_counted(self, name, dtype):
        """Real tensors of five layers against fake ones of one and two, to the few bytes that do not grow
        with the row."""
        config = tiny.config(name, num_hidden_layers=5, layer_types=None, sliding_window=ROW, **SMALL)
        saved = saved_per_token(config, compute_dtype=dtype, attention="segments", tokens=128)
        model = load_model(config, param_dtype=dtype)
        real = saved_bytes(model, tiny.row(tiny.documents([ROW], vocabulary=300)))
        assert real == pytest.approx((5 * saved.layer + saved.rest) * ROW, rel=1e-3)

    def test_the_formula_of_a_plain_llama(self):
        config = config_of(MODELS["Llama-3.1-8B"])
        hidden, attended, keys, inner = 4096, 4096, 1024, 14336
        saved = saved_per_token(config)
        expected = 16 * hidden + 4 * attended + 4 * keys + 8 * inner + 4 * 32 + 8
        assert saved.layer == pytest.approx(expected, abs=0.05)

    @pytest.mark.parametrize("mode", ["none", "selective", "full"])
    @pytest.mark.parametrize("layers", [4, 9])
    def test_the_peak_of_a_row(self, mode, layers):
        """On a CPU, whose head works otherwise (fp32 logits, a buffer that stays): below what is predicted,
        by a quarter at most."""
        config = tiny.config("qwen3", num_hidden_layers=layers, **SMALL)
        model = load_model(config, activation_checkpointing=mode)
        row = tiny.row(tiny.documents([ROW], vocabulary=300))
        model.loss(row)[0].backward()  # buffers that stay are there
        model.zero_grad()
        real = peak.peak_bytes(lambda: model.loss(row)[0].backward())
        size = ModelSize.of(model)
        saved = saved_per_token(config, compute_dtype="float32", attention="segments", tokens=128)
        found = size.peak("adamw", ROW, saved, mode, rows=1)
        predicted = found.total - found.weights - found.moments + size.held("adamw").gradients
        assert 0.75 * predicted <= real <= predicted

    def test_layers_that_keep_are_those_not_checkpointed(self):
        for mode in ("none", "selective", "full"):
            model = load_model(tiny.config("llama", num_hidden_layers=5), activation_checkpointing=mode)
            real = [not getattr(layer, "gradient_checkpointing", False) for layer in model.model.layers]
            assert list(kept_layers(5, mode)) == real

    def test_a_rehearsal_leaves_no_fake_buffer_behind(self):
        model = load_model(tiny.config("llama"), device="meta")
        rehearsed(lambda: saved_bytes(model, fake_row([9])))
        real = load_model(tiny.config("llama"))
        assert math.isfinite(real.loss(tiny.row(tiny.documents((9,))))[0].item())


class TestRows:
    def test_the_longest_row_fits_and_one_bucket_more_does_not(self):
        one = page.sized("SmolLM2-135M")
        memory = 8 * 10**9
        for mode in ("none", "selective", "full"):
            longest = one.fp32.longest_row(memory, "adamw", 8, one.saved, mode)
            used = [
                one.fp32.peak("adamw", n, one.saved, mode, ranks=8, chunk_bytes=memory // 64).total
                for n in (longest, longest + 128)
            ]
            assert used[0] <= 0.92 * memory < used[1]
        assert one.fp32.longest_row(10**9, "adamw", 1, one.saved) == 0

    @pytest.mark.parametrize("gigabytes", [4, 8, 24, 80])
    @pytest.mark.parametrize("mode", ["none", "full"])
    @pytest.mark.parametrize(
        ("vocabulary", "layer"), [(1_000, 300_000), (150_000, 300_000), (150_000, 4_000_000)]
    )
    def test_it_is_the_longest_of_all_lengths(self, gigabytes, mode, vocabulary, layer):
        """Logits at once or in chunks: with the row changes which of them, and the search knows both."""
        model = load_model(
            tiny.config("llama", vocab_size=vocabulary, hidden_size=64),
            device="meta",
            compute_dtype="bfloat16",
        )
        size, saved = ModelSize.of(model), Saved(layer=float(layer), rest=60_000.0, passing=9_000.0)
        memory = gigabytes * 10**9
        held = size.held("adamw")
        free = int(0.92 * memory) - held.state
        fitting = [
            n
            for n in range(0, int(free / size.row(saved, mode)) + 128, 128)
            if size.peak("adamw", n, saved, mode, chunk_bytes=size.chunk(n, memory, free), held=held).total
            <= int(0.92 * memory)
        ]
        assert size.longest_row(memory, "adamw", 1, saved, mode) == fitting[-1]

    def test_what_is_kept_gathered_costs_every_parameter_once(self):
        size = page.sized("Qwen3-0.6B").fp32
        root, layer = size.groups()
        more = size.passing(8, kept=True) - size.passing(8)
        assert more == 2 * (size.count - root - 2 * layer)
        assert size.passing(1) == 6 * 3072 * 1024, "a matrix in bf16 and as its fp32 gradient"

    def test_a_chunk_is_what_a_run_would_decide(self, monkeypatch):
        """All of a row's logits up to 1/16 of what the state leaves; past it, 1/64 of the memory."""
        size = ModelSize((), 1, 64, 1_000_000, 2)
        at_once = size.chunk(2_000, 80 * 10**9, 70 * 10**9)
        assert at_once == 2_000 * 2_000_000
        assert size.chunk(2_000, 80 * 10**9, 60 * 10**9) == 80 * 10**9 // 64
        assert size.chunk(300, 80 * 10**9, 10**9) == 300 * 2_000_000, "a chunk holds no more than there is"


class TestPage:
    def test_by_name_folder_and_file(self, tmp_path, capsys):
        config = tiny.config("llama")
        config.save_pretrained(tmp_path)
        models = f"smollm2-135m,{tmp_path},{tmp_path / 'config.json'}"
        assert main(["doctor", "--plan", "--models", models, "--gpus", "1,16"]) == 0
        lines = [
            line
            for line in capsys.readouterr().out.splitlines()
            if line.startswith(("| SmolLM2", f"| {tmp_path}"))
        ]
        assert len(lines) == 3 * 2 * 3 + 3 * 3, "state and rows on either number of GPUs, settings of one"
        assert len({line.split("|", 3)[3] for line in lines if f"| {tmp_path}" in line}) == 7, (
            "folder and file are one model"
        )

    @pytest.mark.parametrize(
        ("flags", "words"),
        [(["--models", "SmolLM2-13M"], "did you mean SmolLM2-135M"), (["--gpus", "1,x"], "--gpus: is not a list of numbers"),
         (["--gpus", "0"], "--gpus: is not a list of numbers")],
    )  # fmt: skip
    def test_what_cannot_be_read(self, flags, words, capsys):
        assert main(["doctor", "--plan", "--models", "SmolLM2-135M", *flags]) == 2
        assert words in capsys.readouterr().err
