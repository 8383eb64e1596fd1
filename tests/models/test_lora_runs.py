"""Whole runs with adapters at the command line, on one rank and on two: what is saved, merged, gone on from
and resumed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from repsft_fast import cli
from tests.helpers import run_jobs, runs
from tests.helpers.architectures import tiny_config
from tests.helpers.ranks import _free_port

EXPERTS = ["all-linear", "experts.gate_up_proj", "experts.down_proj"]
# Transposed layers, a tied head, experts that are named or not, with and without biases.
KINDS = {
    "llama": ("llama", {}, {}),
    "tied": ("llama", {"tie_word_embeddings": True}, {}),
    "gpt2": ("gpt2", {}, {}),
    "mixture": ("qwen3_moe", {}, {}),
    "experts": ("qwen3_moe", {}, {"target_modules": EXPERTS}),
    "experts with biases": ("gpt_oss", {}, {"target_modules": EXPERTS}),
}
FAST = (("gpt2", 1), ("experts", 2))
ALL = [
    pytest.param(
        name, size, marks=() if (name, size) in FAST else pytest.mark.slow, id=f"{name}, {size} ranks"
    )
    for name in KINDS
    for size in (1, 2)
]
IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(2))


def base(folder, kind="llama", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(kind, **changes), dtype=dtype).save_pretrained(folder)
    return folder


def of_base(folder, path, lora, *, epochs=1, **model):
    """Settings of six updates an epoch, with checkpoints after every second."""
    made = runs.settings(
        folder, budget__epochs=epochs, stop__token_accuracy=None, checkpoint__every_updates=2
    )
    return {**made, "model": {"path": str(path), "lora": lora, **model}}


def on_ranks(server, target, size, folder, settings, **more):
    """How each rank ended. target: a function of run_jobs or of this file."""
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    children = []
    for rank in range(size):
        given = {"settings": settings, **more}
        if target != "tests.helpers.run_jobs:train":
            given["folder"] = str(folder / f"rank{rank}")
            Path(given["folder"]).mkdir(exist_ok=True)
        env = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}
        children.append(server.spawn(target, given, env))
    return [child.wait(90) for child in children]


def codes(outcomes):
    return [outcome.exit_code for outcome in outcomes]


def command(server, size, folder, settings, **more):
    return on_ranks(server, "tests.helpers.run_jobs:command_line", size, folder, settings, **more)


def full_disk(settings, folder, resume=False):
    """`repsft train` where no model can be written; adapters can."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    PreTrainedModel.save_pretrained = full
    run_jobs.command_line(settings, folder, resume=resume)


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def by_peft(path, folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), folder)


def same(one, other):
    one, other = load_file(one), load_file(other)
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(("name", "size"), ALL)
def test_merged_weights_compute_what_the_adapters_beside_them_do(name, size, server, tmp_path, monkeypatch):
    kind, changes, lora = KINDS[name]
    path = base(tmp_path / "base", kind, **changes)
    ended = command(server, size, tmp_path, of_base(tmp_path, path, {"rank": 2, "merge": True, **lora}))
    assert codes(ended) == [0] * size, ended[0].output
    monkeypatch.chdir("/")
    run = tmp_path / "run"
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(value.any() for name, value in weights.items() if "lora_B" in name), (
        "one that was never trained"
    )
    expected = logits(by_peft(path, run / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(run)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(path))).abs().max() > 1e-3, (
        "the adapters do nothing"
    )
    assert not (run / "adapter_config.json").exists()
    assert json.loads((run / "result.json").read_text())["code"] == "budget"


@pytest.mark.parametrize(
    "save", ["auto", *(pytest.param(save, marks=pytest.mark.slow) for save in ("float32", "float16"))]
)
def test_the_type_is_the_merged_models(save, server, tmp_path):
    """A base in bfloat16: adapters are fp32 whatever is asked, merged weights have the type that is asked or
    the base's."""
    path = base(tmp_path / "base", dtype=torch.bfloat16)
    made = of_base(tmp_path, path, {"rank": 2, "merge": True}, save_dtype=save)
    assert codes(command(server, 1, tmp_path, made)) == [0]
    run = tmp_path / "run"
    expected = {"auto": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}[save]
    assert {value.dtype for value in load_file(run / "model.safetensors").values()} == {expected}
    assert {value.dtype for value in load_file(run / "adapter" / "adapter_model.safetensors").values()} == {
        torch.float32
    }
    if save == "float32":
        merged = AutoModelForCausalLM.from_pretrained(run)
        torch.testing.assert_close(logits(merged), logits(by_peft(path, run / "adapter")), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_killed_and_resumed_a_run_ends_as_left_alone(size, server, tmp_path):
    """New adapters; then a run that goes on from them, in the folder they were moved to, and is resumed."""
    path = base(tmp_path / "base")

    def ended(name, lora, **how):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return on_ranks(
            server, "tests.helpers.run_jobs:train", size, folder, of_base(folder, path, lora, epochs=2), **how
        )

    for first, lora in (("new", {"rank": 2}), ("on", {"from": str(tmp_path / "moved"), "merge": True})):
        assert codes(ended(first, lora)) == [0] * size
        broken = f"{first}, broken"
        assert all(outcome.killed for outcome in ended(broken, lora, kill_after=9))
        assert (tmp_path / broken / "run" / "checkpoints" / "LATEST").exists()
        assert codes(ended(broken, lora, resume=True)) == [0] * size
        where = "adapter" if "merge" in lora else ""
        whole, other = (tmp_path / name / "run" for name in (first, broken))
        assert same(whole / where / "adapter_model.safetensors", other / where / "adapter_model.safetensors")
        if first == "new":
            shutil.move(whole, tmp_path / "moved")
        else:
            assert same(whole / "model.safetensors", other / "model.safetensors")
    assert not same(
        tmp_path / "moved" / "adapter_model.safetensors", whole / "adapter" / "adapter_model.safetensors"
    )
    before = (whole / "model.safetensors").stat().st_mtime_ns
    made = of_base(tmp_path / "on", path, lora, epochs=2)
    assert codes(command(server, size, tmp_path / "on", made, resume=True)) == [0] * size
    assert (whole / "model.safetensors").stat().st_mtime_ns == before, "an ended run is not trained again"


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_no_room_for_the_merged_model(size, server, tmp_path):
    path = base(tmp_path / "base")
    made = of_base(tmp_path, path, {"rank": 2, "merge": True})
    ended = on_ranks(server, "tests.models.test_lora_runs:full_disk", size, tmp_path, made)
    run = tmp_path / "run"
    assert ended[0].exit_code == 1
    assert all(codes(ended)), "no rank calls it a success"
    said = " ".join(ended[0].output.split())
    assert "the model could not be saved: OSError: [Errno 28] No space left on device" in said
    assert f"saved, whole, in {run / 'adapter'}: peft can merge them" in said
    assert "Traceback" not in said
    result = json.loads((run / "result.json").read_text())
    assert (result["code"], result["updates"]) == ("error", 6)
    assert str(run / "adapter") in result["reason"]
    adapters = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    logits(by_peft(path, run / "adapter"))
    updates = len(runs.metrics(tmp_path, "update"))
    again = command(server, size, tmp_path, made, resume=True)
    assert codes(again) == [0] * size, again[0].output
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapters
    assert len(runs.metrics(tmp_path, "update")) == updates, "the end was saved: nothing is trained again"
    expected = logits(by_peft(path, run / "adapter"))
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(path))).abs().max() > 1e-3, (
        "the adapters do nothing"
    )
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(run)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rank": 0}, "model.lora.rank: cannot be used"),
        ({"alpha": 0}, "model.lora.alpha: cannot be used"),
        ({"dropout": 1.0}, "model.lora.dropout: cannot be used"),
        ({"target_modules": []}, "model.lora.target_modules: there is nothing to adapt"),
        ({"target_modules": ["lm_head"]}, "stay frozen"),
        ({"target_modules": ["q_prog"]}, "did you mean q_proj?"),
        ({"from": "nowhere"}, "model.lora.from: no such folder"),
        ({"from": "BASE"}, "model.lora.from: holds a model, no adapters"),
        ({"from": "BASE/config.json"}, "model.lora.from: is a file"),
    ],
    ids=str,
)
def test_settings_are_refused_before_work(lora, words, tmp_path, capfd):
    path = base(tmp_path / "base")
    lora = {
        name: value.replace("BASE", str(path)) if isinstance(value, str) else value
        for name, value in lora.items()
    }
    file = tmp_path / "settings.yaml"
    file.write_text(json.dumps(of_base(tmp_path, path, lora)))
    assert cli.main(["train", "--config", str(file)]) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert words in said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
