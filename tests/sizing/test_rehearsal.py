"""A rehearsed update against a real one: the same messages, the same bytes, without the ranks."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from repsft_fast.cli import main
from repsft_fast.config import Config
from repsft_fast.distributed import World
from repsft_fast.errors import ConfigError
from repsft_fast.memory.model_size import ModelSize
from repsft_fast.optim import state_bytes
from repsft_fast.sizing.rehearsal import Message, Messages, rehearse
from repsft_fast.state import local
from repsft_fast.training.build import build
from repsft_fast.training.samples import build_plan, load_data
from repsft_fast.training.step import train_step
from tests.helpers import ranks, runs

CASES = {
    "one copy": {},
    "two copies": {"distributed__shard_ranks": 1, "batch__row_tokens": 24},
    "lora": {"model__lora": {"rank": 4}},
    "checkpointing": {"model__activation_checkpointing": "full", "optim__name": "adamw8bit"},
}


def settings(folder, **changes):
    return runs.settings(folder, samples=40, **{"batch__samples": 8, **changes})


def rehearsed(given, size, rank=0):
    config = Config.of(given)
    data = load_data(config, None, torch.device("cpu"), runs.VOCABULARY)
    plan = build_plan(config, data.train.index, World(0, size, 0, torch.device("cpu")))
    return rehearse(config, data, plan, plan.epoch(0, 0)[0], rank=rank)


def real_updates(world, cases):
    """For every case what one real update of this rank sent, and what the rank holds."""
    found = []
    for given in cases:
        parts = build(Config.of(given), world=world)
        with Messages() as messages:
            train_step(parts, parts.plan.epoch(0, 0)[0])
        held = sum(local(p).numel() * p.element_size() for p in parts.model.parameters())
        found.append(
            (
                held,
                state_bytes(parts.optimizer),
                {dataclasses.astuple(m): n for m, n in messages.found.items()},
            )
        )
    return found


def test_an_update_of_two_ranks_sends_and_holds_what_was_rehearsed(tmp_path):
    cases = [settings(tmp_path / name, **changes) for name, changes in CASES.items()]
    for rank, found in enumerate(ranks.run_ranks(real_updates, cases)):
        for name, given, (held, moments, messages) in zip(CASES, cases, found):
            expected = rehearsed(given, 2, rank)
            assert {dataclasses.astuple(m): n for m, n in expected.messages.items()} == messages, name
            assert (expected.weights, expected.moments) == (held, moments), name
    assert not dist.is_initialized()


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_one_rank_holds_masters_and_sends_nothing(compute_dtype, tmp_path):
    given = settings(tmp_path, model__compute_dtype=compute_dtype)
    found = rehearsed(given, 1)
    count = ModelSize.of(build(Config.of(given)).model).count
    assert found.weights == (4 if compute_dtype == "float32" else 2 + 4) * count
    assert found.gradients == 4 * count
    assert not found.messages


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd"])
@pytest.mark.parametrize("size", [8, 5])
def test_bytes_are_those_of_the_formula(size, optimizer, tmp_path):
    given = settings(tmp_path, optim__name=optimizer)
    found = rehearsed(given, size)
    shape = ModelSize.of(build(Config.of(given)).model)
    predicted = shape.held(optimizer, size)
    assert (found.weights, found.gradients, found.moments) == (
        predicted.weights,
        predicted.gradients,
        predicted.moments,
    )


def test_what_travels_is_the_formula_of_the_cluster_page(tmp_path):
    """Sharded over 4 of 8 ranks, computed in bf16, a row: layers gathered twice and the root once, every
    gradient reduced in fp32 inside the copy; once an update, its shard summed between the copies."""
    changes = {"batch__samples": 32, "batch__row_tokens": 24, "model__compute_dtype": "bfloat16"}
    found = rehearsed(settings(tmp_path, distributed__shard_ranks=4, **changes), 8)
    assert found.rows > 1
    model = ModelSize.of(build(Config.of(settings(tmp_path))).model)
    padded = {layer: sum(4 * shard for shard in shards) for layer, shards in shards_of(model, 4).items()}
    root, layers = padded.pop(None), sum(padded.values())
    payload = {name: 0 for name in ("all_gather", "reduce_scatter", "all_reduce")}
    for message, times in found.messages.items():
        payload[message.operation] += times * message.payload_bytes
    assert payload["all_gather"] == found.rows * 2 * (2 * layers + root)
    assert payload["reduce_scatter"] == found.rows * 4 * (layers + root)
    # shards between copies, once; the norm; what refuses
    assert payload["all_reduce"] == layers + root + 8 + 24
    assert {m.ranks for m in found.messages} == {4, 2, 8}


def shards_of(model, ranks):
    """Elements on a rank of every parameter, by layer."""
    shards = {}
    for p in model.parameters:
        rows, *rest = p.on_a_rank(ranks)
        shards.setdefault(p.layer, []).append(rows * (rest[0] if rest else 1))
    return shards


def test_a_ring_carries_an_all_reduce_twice():
    assert Message("all_gather", 800, 8).wire_bytes == 700
    assert Message("all_reduce", 800, 8).wire_bytes == 1400
    assert Message("reduce_scatter", 800, 1).wire_bytes == 0


class TestDryRun:
    def run(self, folder, *flags, **changes):
        import json

        path = folder / "run.yaml"
        path.write_text(json.dumps(settings(folder, **changes)))
        return main(["train", "--config", str(path), *flags])

    def test_prints_what_ranks_elsewhere_would_do(self, tmp_path, capsys):
        assert self.run(tmp_path, "--dry-run", "--world", "8", distributed__shard_ranks=4) == 0
        printed = capsys.readouterr().out
        assert "8 ranks, 2 copies over 4 ranks each; rank 0 holds weights" in printed
        assert "8 all_gather" not in printed
        assert "5 all_gather" in printed
        assert "1 parameters do not divide by 4: model.embed_tokens.weight [61, 32]" in printed
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("flags", "changes", "words"),
        [
            (
                ["--dry-run", "--world", "9"],
                {},
                "batch.samples: gives fewer samples per update than there are ranks",
            ),
            (
                ["--dry-run", "--world", "6"],
                {"distributed__shard_ranks": 4},
                "6 ranks do not divide into groups",
            ),
            (
                ["--dry-run", "--world", "2"],
                {"optim__name": "torchao_adamw8bit"},
                "its state cannot be split over ranks",
            ),
            (["--dry-run", "--world", "0"], {}, "--world: is not a number of GPUs"),
            (["--world", "2"], {}, "--world: trains nothing"),
        ],
    )
    def test_refuses_what_would_not_run(self, flags, changes, words, tmp_path, capsys):
        assert self.run(tmp_path, *flags, **changes) == 2
        assert words in " ".join(capsys.readouterr().err.split())
        assert not dist.is_initialized()

    def test_not_among_real_ranks(self, tmp_path):
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            with pytest.raises(ConfigError, match="--world: rehearses ranks"):
                rehearsed(settings(tmp_path), 2)
        finally:
            dist.destroy_process_group()
