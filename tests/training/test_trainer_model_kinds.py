"""Whole runs of every kind of architecture against a plain Hugging Face loop over the same samples, and their
laws."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from repsft_fast import cli
from repsft_fast.config import Config
from repsft_fast.data.plan import Plan, SampleIndex
from repsft_fast.errors import DataError
from repsft_fast.evaluate.generate import generate
from repsft_fast.ops import attention
from repsft_fast.selftest import laws
from repsft_fast.selftest.table import selftest, settings_of
from repsft_fast.throughput import ModelShape
from repsft_fast.training import build, recovery, trainer
from repsft_fast.training.samples import row_bucket
from tests.helpers import ranks, runs
from tests.helpers.architectures import tiny_config

EPOCHS, LR = 3, 3e-3
PLAIN = {
    "stop__token_accuracy": None, "budget__epochs": EPOCHS, "log__every_updates": 1, "optim__warmup_fraction": 0.0,
    "optim__lr": LR, "optim__max_norm": None, "schedule__name": "constant",
}  # fmt: skip
APART = {"batch__pack": False}
ROPES = ("llama, dynamic RoPE", "phi3, longrope")  # which compute a sample of more than 8 positions otherwise


def model_folder(folder: Path, name: str, **changes) -> str:
    torch.manual_seed(5)
    try:
        model = AutoModelForCausalLM.from_config(tiny_config(name, **changes))
    # Granite hybrid of transformers 5.0, without the keys that a later one fills in
    except TypeError as error:
        pytest.skip(f"this transformers builds no {name}: {error}")
    model.save_pretrained(folder / "base")
    return str(folder / "base")


def settings(folder: Path, name: str, *, sizes=None, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    made = runs.settings(folder, **{**PLAIN, **changes})
    made["model"] = {**made["model"], "config": None, "path": model_folder(folder, name, **(sizes or {}))}
    return made


def plain_losses(made, average: str = "sample") -> list[float]:
    """The loss of every update, the mean of its trained tokens: transformers' model, a sample a pass, torch's
    AdamW."""
    lines = [json.loads(line) for line in Path(made["data"]["train"]).read_text().splitlines()]
    count = np.array([sum(label >= 0 for label in line["labels"]) for line in lines])
    lengths = np.array([len(line["input_ids"]) - 1 for line in lines])
    index = SampleIndex(lengths, count, np.zeros(len(lines), np.int32), np.ones(len(lines)), ("task",))
    plan = Plan(
        index,
        seed=made["run"]["seed"],
        row_tokens=64,
        bucket_tokens=1,
        batch_samples=made["batch"]["samples"],
    )
    model = AutoModelForCausalLM.from_pretrained(made["model"]["path"], dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    losses, rotary = [], copy.deepcopy(getattr(model.base_model, "rotary_emb", None))
    for epoch in range(EPOCHS):
        for update in plan.epoch(0, epoch):
            divisor = len(update.samples) if average == "sample" else count[update.samples].sum()
            total = 0.0
            for line in (lines[i] for i in update.samples):
                ids, labels = (torch.tensor(line[name]) for name in ("input_ids", "labels"))
                end = int((labels >= 0).nonzero()[-1]) + 1  # nothing behind its last target is read
                if "dynamic" in str(getattr(model.config, "rope_parameters", None)):
                    # else it remembers the longest sample it has seen
                    model.model.rotary_emb = copy.deepcopy(rotary)
                logits = model(input_ids=ids[None, : end - 1], use_cache=False).logits[0]
                how = "mean" if average == "sample" else "sum"
                loss = F.cross_entropy(logits, labels[1:end], reduction=how) / divisor
                loss.backward()
                total += (
                    F.cross_entropy(logits.detach(), labels[1:end], reduction="sum").item()
                    / count[update.samples].sum()
                )
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
    return losses


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt_oss", {"batch__bucket_tokens": 16}),
        ("gemma3n_text", {"batch__bucket_tokens": 16, "model__activation_checkpointing": "full"}),
        ("llama, dynamic RoPE", {"batch__bucket_tokens": 16}),
        ("phi3, longrope", {"batch__bucket_tokens": 64}),
        pytest.param("phi3, longrope", APART, marks=pytest.mark.slow),
        pytest.param("lfm2", APART, marks=pytest.mark.slow),
        ("qwen3_next", {**APART, "batch__bucket_tokens": 16}),
        ("mamba2", {**APART, "loss__average": "token"}),
        pytest.param(
            "granitemoehybrid", {**APART, "model__activation_checkpointing": "full"}, marks=pytest.mark.slow
        ),
        pytest.param("bloom", APART, marks=pytest.mark.slow),
    ],
)
def test_updates_are_those_of_a_plain_loop(name, changes, tmp_path):
    """Not the first loss alone: the ninth update's hangs on eight gradients."""
    made = settings(tmp_path, name, samples=12, **changes)
    assert trainer.train(made).success
    losses = [line["loss"] for line in runs.metrics(tmp_path, "update")]
    expected = plain_losses(made, changes.get("loss__average", "sample"))
    assert len(losses) == len(expected) == 9
    assert losses == pytest.approx(expected, rel=2e-4)
    assert abs(losses[-1] - losses[0]) > 0.1


@pytest.mark.parametrize("name", ["gpt2", "opt"])
@pytest.mark.parametrize("changes", [{"batch__bucket_tokens": 64}, APART])
def test_padding_needs_no_position_that_a_model_did_not_learn(name, changes, tmp_path):
    """Rows are padded to 64 slots, and 20 positions have an embedding."""
    sizes = {"n_positions": 20, "max_position_embeddings": 20}
    made = settings(tmp_path, name, sizes=sizes, samples=12, **changes)
    assert trainer.train(made).success
    assert [line["loss"] for line in runs.metrics(tmp_path, "update")] == pytest.approx(
        plain_losses(made), rel=2e-4
    )


def test_longer_than_the_learned_positions(tmp_path, capsys):
    sizes = {"n_positions": 12}
    with pytest.raises(DataError, match=r"longer than the 12 positions.* set data.max_tokens: 12"):
        trainer.train(settings(tmp_path / "refused", "gpt2", sizes=sizes))
    assert trainer.train(settings(tmp_path / "kept", "gpt2", sizes=sizes, data__max_tokens=12)).success
    assert "dropped: 13 × over-long" in capsys.readouterr().out


def command_line(folder: Path, made, *more: str) -> int:
    (folder / "settings.json").write_text(json.dumps(made))
    return cli.main(["train", "--config", str(folder / "settings.json"), *more])


@pytest.mark.parametrize("name", ["qwen3_next", "mamba2"])
def test_the_refusal_at_the_command_line_and_its_way_out(name, tmp_path, capsys):
    made = settings(tmp_path, name, budget__epochs=1)
    assert command_line(tmp_path, made) == 2
    assert "does not take packed rows" in (said := capsys.readouterr().err)
    assert "set batch.pack: false" in said
    assert "Traceback" not in said
    assert command_line(tmp_path, made, "--batch.pack", "false") == 0


def test_a_dry_run_says_what_is_computed(tmp_path, capsys):
    """No padding where a sample is given alone, activations of the longest sample; experts end no dry run."""
    made = settings(tmp_path, "qwen3_next", batch__pack=False, batch__bucket_tokens=16, samples=9)
    assert command_line(tmp_path, made, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "9 per epoch of at most 64 tokens" in said
    assert "100.0 % of the computed slots are real" in said
    made = settings(tmp_path / "packed", "qwen3_moe")
    assert command_line(tmp_path, made, "--dry-run") == 0
    made = settings(tmp_path / "llama", "llama", batch__pack=False)
    assert command_line(tmp_path, made, "--dry-run") == 0
    assert "a row of 19 tokens keeps" in capsys.readouterr().out


def test_a_dry_run_on_ranks_that_cannot_be_rehearsed(tmp_path, capsys):
    made = settings(tmp_path, "llama, dynamic RoPE")
    assert command_line(tmp_path, made, "--dry-run", "--world", "2") == 0
    assert "not possible with this architecture" in capsys.readouterr().out


def test_slots_that_are_counted_are_slots_that_are_computed(tmp_path):
    made = settings(tmp_path, "mamba2", batch__pack=False, batch__bucket_tokens=16, model__compile=False)
    config = Config.of(made)
    assert row_bucket(config, torch.device("cuda")) == row_bucket(config, torch.device("cpu")) == 1
    trainer.train(config)
    assert all(line["slots"] == line["tokens"] for line in runs.metrics(tmp_path, "update"))


LAWS = (laws.split_does_not_matter, laws.sums_do_not_depend_on_order, laws.no_host_sync)


@pytest.mark.parametrize(
    ("name", "changes"),
    [(name, {}) for name in (*ROPES, "qwen3_moe", "gpt_oss")] + [("qwen3_next", APART), ("gpt2", APART)],
)
def test_laws_of_the_selftest(name, changes, tmp_path):
    made = settings(tmp_path, name, sizes={"n_positions": 32} if name == "gpt2" else None, **changes)
    built = build.build(Config.of({**settings_of(Config.of(made), tmp_path, []), "run": made["run"]}))
    for law in LAWS:
        found = law(built)
        assert found.holds, found.figure
    if changes:
        with pytest.raises(laws.Skipped, match="no samples share a row"):
            laws.packed_equals_unpacked(built)
    else:
        assert laws.packed_equals_unpacked(built).holds


def test_waits_that_are_ours_still_break_law_8(tmp_path, monkeypatch):
    made = settings(tmp_path, "llama, dynamic RoPE")
    built = build.build(Config.of(made))
    train_step = laws.train_step

    def reads(parts, update):
        train_step(parts, update)
        next(parts.model.parameters()).detach().sum().item()

    monkeypatch.setattr(laws, "train_step", reads)
    found = laws.no_host_sync(built)
    assert not found.holds
    assert "in the architecture's own layers" in found.figure


def test_the_selftest_takes_pack_from_the_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "repsft_fast.selftest.kill_and_resume.killed_and_resumed", lambda *_: laws.Found("", True)
    )
    outcome = selftest(Config.of(settings(tmp_path, "lfm2", **APART)))
    assert outcome.exit_code == 0
    assert [line.law for line in outcome.lines if line.holds is None] == [1]


@pytest.mark.parametrize("pack", [True, False])
def test_out_of_memory_advises_what_can_help(pack, tmp_path):
    """Rows of one sample get no shorter by batch.row_tokens: no retry in rows of half as many tokens, and no
    such advice."""
    built = build.build(Config.of(settings(tmp_path, "llama", batch__pack=pack)))
    assert recovery.smaller_rows(built) == (32 if pack else None)
    meeting = recovery.Recovery(built, None, None, None)
    problem = trainer.OutOfMemory(torch.OutOfMemoryError("no room"), torn=False)
    words = str(meeting.out_of_memory(problem))
    assert ("lower batch.row_tokens from 64 to 32" in words) == pack
    assert ("batch.pack is false" in words) != pack


def test_floating_point_work_of_each_kind():
    """Matrices that a token meets: of 4 experts 2; attention in the layers that have it; none in Mamba."""

    def shape(name, **changes):
        return ModelShape.of(AutoModelForCausalLM.from_config(tiny_config(name, **changes)))

    dense, many = shape("mixtral", num_local_experts=4), shape("mixtral", num_local_experts=8)
    routers = 2 * 32 * 4
    assert many.backbone_parameters - dense.backbone_parameters == routers
    assert dense.backbone_parameters == 2 * (2 * 32 * 32 + 2 * 16 * 32 + 4 * 32 + 2 * 3 * 48 * 32)
    assert shape("gpt2").backbone_parameters == 2 * (4 * 32 * 32 + 2 * 32 * 48)  # positions are looked up
    assert shape("llama").layers == shape("gpt_oss").layers == 2
    assert shape("qwen3_next").layers == shape("lfm2").layers == 1
    assert shape("mamba2").flops(0, 0, 1000) == 0
    assert shape("deepseek_v3").attention_width == 4 * (8 + 4 + 8) // 2


PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [20], [3, 4, 5, 6], [21], [9, 8, 7, 6, 5, 4, 3]]


@pytest.mark.parametrize("name", ["llama", "mamba2", "gpt_oss", "rwkv", *ROPES])
def test_replies_in_a_batch_are_those_of_prompts_alone(name):
    """Padding is masked, but RWKV reads on, and some frequencies follow the length of the batch."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name)).eval()
    model.config.use_cache = True
    replies = generate(model, PROMPTS, end_ids=[], max_new_tokens=6)
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert reply.ids == ids[len(prompt) :]


def trained_on_ranks(world, made):
    result = trainer.train(made)
    return result.success


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3_next", APART),  # a gate of [1, H]: one rank holds nothing of it
        ("phi3, longrope", {"batch__bucket_tokens": 64}),  # keeps a table once it has computed
        pytest.param("mamba2", APART, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_are_one(name, changes, tmp_path):
    """Updates of 3 samples on 2 ranks: where none share a row, every update leaves one rank a row without a
    sample."""
    changes = {
        **changes,
        "batch__samples": 3,
        "samples": 9,
        "budget__epochs": 2,
        "data__validation_fraction": 0.25,
    }
    made = [settings(tmp_path / str(size), name, **changes) for size in (1, 2)]
    assert trainer.train(made[0]).success
    assert ranks.run_ranks(trained_on_ranks, made[1], timeout_s=60) == [True, True]
    losses = [[line["loss"] for line in runs.metrics(tmp_path / size, "update")] for size in ("1", "2")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    one, two = (load_file(tmp_path / size / "run" / "model.safetensors") for size in ("1", "2"))
    for tensor, value in one.items():
        torch.testing.assert_close(two[tensor], value, rtol=0, atol=1e-3)


def test_waits_in_attention_are_ours_though_an_architectures_layers_call_it(tmp_path, monkeypatch):
    built = build.build(Config.of(settings(tmp_path, "llama, dynamic RoPE")))
    plain = attention._segments

    def reads(query, *more, **named):
        query.detach().sum().item()
        return plain(query, *more, **named)

    monkeypatch.setitem(attention._RUN, "segments", reads)
    found = laws.no_host_sync(built)
    assert not found.holds
    assert "in the architecture's own layers" in found.figure
