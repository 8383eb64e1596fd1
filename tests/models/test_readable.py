"""Whatever could read a model's source can read what is saved of it: forms, types, modes, generation
settings, tokenizer."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from repsft_fast import train
from repsft_fast.config import Config
from repsft_fast.config.checks import warnings
from repsft_fast.errors import ModelError
from repsft_fast.models import load_model, load_tokenizer, save_pretrained
from repsft_fast.models.export import cast
from repsft_fast.models.load import _forget_quantisation
from repsft_fast.models.readable import ModelForm, model_form, tokenizer_form
from tests.helpers import ranks, runs, tiny
from tests.helpers.architectures import tiny_config
from tests.helpers.sources import (
    DIFFERENCES,
    OLD_FORMS,
    THETA,
    VOCABULARY,
    change,
    differences,
    read,
    saved,
    write,
    write_source,
)


@pytest.mark.parametrize("kind", OLD_FORMS)
def test_a_result_is_in_the_form_of_its_source(kind, tmp_path):
    write_source(tmp_path / "source", kind)
    saved(tmp_path / "source", tmp_path / "result", load={"packed": kind != "mamba2"})
    found = differences(tmp_path / "source", tmp_path / "result")
    assert found - {("config.json", "dtype")} <= DIFFERENCES.keys()
    made = read(tmp_path / "result" / "config.json")
    assert made["dtype"] == made["torch_dtype"] == "bfloat16"
    again = load_model(tmp_path / "result", packed=kind != "mamba2")
    assert again.config.to_dict() == load_model(
        tmp_path / "source", packed=kind != "mamba2"
    ).config.to_dict() | {"_name_or_path": str(tmp_path / "result")}


def test_merged_adapters_too(tmp_path):
    write_source(tmp_path / "source")
    saved(tmp_path / "source", tmp_path / "result", load={"lora": {"rank": 2}}, merge_lora=True)
    assert (
        differences(tmp_path / "source", tmp_path / "result") - {("config.json", "dtype")}
        <= DIFFERENCES.keys()
    )
    saved(tmp_path / "source", tmp_path / "adapters", load={"lora": {"rank": 2}})
    assert (
        read(tmp_path / "adapters" / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    )


def test_a_checkpoint_holds_the_model_in_the_same_form(tmp_path):
    source = write_source(tmp_path / "source", vocab_size=VOCABULARY)
    settings = runs.settings(tmp_path, checkpoint__every_updates=2) | {
        "model": {"path": str(source)},
        "budget": {"updates": 3},
    }
    train(Config.of(settings))
    generation = sorted((tmp_path / "run" / "checkpoints").glob("gen-*"))[0]
    (folder,) = {file.parent for file in generation.rglob("config.json")}
    for made in (folder, tmp_path / "run"):
        config = read(made / "config.json")
        assert (config["rope_theta"], config["torch_dtype"]) == (THETA, "bfloat16")
        assert read(made / "tokenizer_config.json")["additional_special_tokens"] == ["<tool>"]


def test_what_lay_beside_a_source_that_is_gone(tmp_path):
    write_source(tmp_path / "source")
    model, words = load_model(tmp_path / "source"), load_tokenizer(tmp_path / "source")
    model_form(model), tokenizer_form(words)
    shutil.rmtree(tmp_path / "source")
    save_pretrained(model, words, tmp_path / "result")
    assert read(tmp_path / "result" / "config.json")["rope_theta"] == THETA
    assert (tmp_path / "result" / "special_tokens_map.json").exists()


def test_what_lies_beside_a_gguf_file_is_not_its_source(tmp_path):
    """Of a model before it was quantised, or of another: its types and its rope_theta say nothing of these
    weights."""
    model = load_model(write_source(tmp_path / "source"))
    del model.__dict__["_source_form"]
    _forget_quantisation(model)  # which is what tells them apart
    assert model_form(model) == ModelForm()


def test_a_source_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    import huggingface_hub
    import transformers.utils.hub

    cached = tmp_path / "cache" / "models--owner--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("a" * 40)
    source = write_source(cached / "snapshots" / ("a" * 40))
    for module, flag in (
        (transformers.utils.hub, "HF_HUB_CACHE"),
        (transformers.utils.hub, "TRANSFORMERS_CACHE"),
        (huggingface_hub.constants, "HF_HUB_CACHE"),
    ):
        if hasattr(module, flag):
            monkeypatch.setattr(module, flag, str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model, words = load_model("owner/name"), load_tokenizer("owner/name")
    save_pretrained(model, words, tmp_path / "result")
    assert differences(source, tmp_path / "result") - {("config.json", "dtype")} <= DIFFERENCES.keys()


def save_from_ranks(world, source, folder):
    from repsft_fast.distributed import shard

    model = load_model(source)
    shard(model, world)
    save_pretrained(model, load_tokenizer(source), folder, world=world)


def test_from_two_ranks(tmp_path):
    write_source(tmp_path / "source")
    ranks.run_ranks(save_from_ranks, tmp_path / "source", tmp_path / "result")
    assert (
        differences(tmp_path / "source", tmp_path / "result") - {("config.json", "dtype")}
        <= DIFFERENCES.keys()
    )


def test_code_that_comes_with_a_model(tmp_path):
    places = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    source = write_source(
        tmp_path / "source", auto_map=places, model_type="own", architectures=["OwnForCausalLM"]
    )
    (source / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (source / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    saved(source, tmp_path / "result", load={"trust_remote_code": True})
    found = differences(source, tmp_path / "result")
    assert found - {("config.json", "dtype")} <= DIFFERENCES.keys()
    load_model(tmp_path / "result", trust_remote_code=True)


def test_a_type_for_adapters_has_no_effect(tmp_path):
    for lora, said in (({"rank": 2}, 1), ({"rank": 2, "merge": True}, 0), (None, 0)):
        config = Config.of(runs.settings(tmp_path, model__save_dtype="bfloat16", model__lora=lora))
        assert sum(text.startswith("model.save_dtype: has no effect") for text in warnings(config)) == said


class TestTypes:
    def test_each_weight_as_the_source_has_it(self, tmp_path):
        source = write_source(tmp_path / "source")
        weights = load_file(source / "model.safetensors")
        weights["model.norm.weight"] = torch.full((32,), 1 / 3)
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
        _, said = saved(source, tmp_path / "result")
        assert said == []
        assert differences(source, tmp_path / "result") - {("config.json", "dtype")} <= DIFFERENCES.keys()

    def test_what_the_cast_costs_is_counted(self, tmp_path):
        source = write_source(tmp_path / "source")
        model = load_model(source)
        with torch.no_grad():
            model.model.norm.weight[:3] += 1e-4
        (said,) = save_pretrained(model, None, tmp_path / "result")
        total = sum(p.numel() for p in model.parameters())
        assert said.startswith(
            f"3 of {total:,} weights are rounded to bfloat16, the source's type; model.save_dtype: float32"
        )
        assert save_pretrained(model, None, tmp_path / "wide", dtype="float32") == []
        assert load_file(tmp_path / "wide" / "model.safetensors")["model.norm.weight"].dtype == torch.float32
        assert read(tmp_path / "wide" / "config.json")["torch_dtype"] == "float32"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_a_base_held_narrower_than_its_source(self, tmp_path, dtype):
        """Frozen weights are held in what is computed with: merged, all of them are rounded, in a file of the
        source's type."""
        source = write_source(tmp_path / "source", dtype=dtype)
        model = load_model(source, compute_dtype="bfloat16", lora={"rank": 2})
        told = save_pretrained(model, None, tmp_path / "result", merge_lora=True)
        total = sum(value.numel() for value in load_file(source / "model.safetensors").values())
        name = str(dtype).removeprefix("torch.")
        said = (
            f"{total:,} of {total:,} merged weights are of a base held in bfloat16, rounded from {name};"
            " model.compute_dtype"
        )
        assert [one.startswith(said) for one in told] == ([] if dtype == torch.bfloat16 else [True])
        # as it was wanted
        assert save_pretrained(model, None, tmp_path / "narrow", merge_lora=True, dtype="bfloat16") == []
        assert save_pretrained(model, None, tmp_path / "adapters") == []

    def test_names_in_the_file_that_are_not_the_modules(self, tmp_path):
        source = write_source(tmp_path / "source", "gpt2")
        saved(source, tmp_path / "same")
        saved(source, tmp_path / "wide", dtype="float32")
        for name, dtype in (("same", "bfloat16"), ("wide", "float32")):
            weights = load_file(tmp_path / name / "model.safetensors")
            assert {str(value.dtype) for value in weights.values()} == {f"torch.{dtype}"}
            config = read(tmp_path / name / "config.json")
            assert (config["dtype"], config["torch_dtype"]) == (dtype, dtype)

    def test_a_type_that_cannot_hold_a_weight_is_not_taken(self, tmp_path):
        source = write_source(tmp_path / "source", dtype=torch.float16)
        model = load_model(source)
        with torch.no_grad():
            model.model.norm.weight[:2] = 70000.0
            model.model.norm.weight[2] = float("inf")
        (said,) = save_pretrained(model, None, tmp_path / "result")
        assert "not as float16: 2 of model.norm.weight are larger than float16 can hold (65,504)" in said
        weights = load_file(tmp_path / "result" / "model.safetensors")
        assert {value.dtype for value in weights.values()} == {torch.float32}
        assert weights["model.norm.weight"][0] == 70000.0
        config = read(tmp_path / "result" / "config.json")
        assert config["dtype"] == config["torch_dtype"] == "float32"

    def test_random_weights_are_saved_as_they_are_held(self, tmp_path):
        source = write_source(tmp_path / "source")
        _, said = saved(source, tmp_path / "result", load={"random_weights": True})
        weights = load_file(tmp_path / "result" / "model.safetensors")
        assert said == []
        assert {value.dtype for value in weights.values()} == {torch.float32}
        assert read(tmp_path / "result" / "config.json")["torch_dtype"] == "float32"

    def test_a_weight_that_the_file_calls_otherwise(self):
        types = {"a.weight": torch.bfloat16, "b.weight": torch.float32, "mlp.bias_of_experts": torch.float32}
        form = ModelForm(types=types, most=torch.bfloat16)
        names = ("a.weight", "b.weight", "gate.mlp.bias_of_experts", "gate.mlp.weight", "unknown")
        made, _ = cast({name: torch.ones(1) for name in names}, form)
        assert [str(value.dtype).removeprefix("torch.") for value in made.values()] == [
            "bfloat16", "float32", "float32", "bfloat16", "bfloat16",
        ]  # fmt: skip

    @pytest.mark.parametrize(("kind", "wide"), [("mixtral", "block_sparse_moe.gate"), ("gpt2", "ln_")])
    def test_weights_that_the_library_renames(self, kind, wide, tmp_path):
        """Mixtral's routers and stacked experts; GPT-2's files leave out the first part of every name."""
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.bfloat16).save_pretrained(
            tmp_path / "source"
        )
        file = tmp_path / "source" / "model.safetensors"
        weights = load_file(file)
        assert any(wide in name for name in weights)
        save_file(
            {
                name.removeprefix("transformer."): value.float() + 1 / 3 if wide in name else value
                for name, value in weights.items()
            },
            file,
            metadata={"format": "pt"},
        )
        assert save_pretrained(load_model(tmp_path / "source"), None, tmp_path / "result") == []
        old, new = load_file(file), load_file(tmp_path / "result" / "model.safetensors")
        assert {name: value.dtype for name, value in new.items()} == {
            name: torch.float32 if wide in name else torch.bfloat16 for name in weights
        }
        assert all(torch.equal(new[name], old[name.removeprefix("transformer.")]) for name in new)

    def test_a_stack_has_the_widest_type_of_its_parts(self, tmp_path):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(tiny_config("mixtral"), dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / "source")
        file = tmp_path / "source" / "model.safetensors"
        weights = load_file(file)
        name = next(name for name in weights if name.endswith("experts.1.w2.weight"))
        save_file({**weights, name: weights[name].float()}, file, metadata={"format": "pt"})
        save_pretrained(load_model(tmp_path / "source"), None, tmp_path / "result")
        made = load_file(tmp_path / "result" / "model.safetensors")
        assert made[name].dtype == torch.float32
        assert made[name.replace("w2", "w1")].dtype == torch.bfloat16

    def test_tied_weights_stay_one(self):
        value = torch.ones(2, 2)
        made, _ = cast(
            {"a": value, "b": value, "n": torch.ones(1, dtype=torch.int64)}, ModelForm(most=torch.bfloat16)
        )
        assert made["a"] is made["b"]
        assert (made["a"].dtype, made["n"].dtype) == (torch.bfloat16, torch.int64)

    @pytest.mark.parametrize("name", ["int8", "float8_e4m3fn", "half", torch.int64, torch.float8_e4m3fn])
    def test_other_types_are_refused(self, name, tmp_path):
        with pytest.raises(
            ModelError,
            match=r"^model\.save_dtype: is no type for weights, expected auto, float32, bfloat16, fl",
        ):
            save_pretrained(load_model(tiny.config("llama")), None, tmp_path, dtype=name)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_modes_are_the_umasks(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        for name, lora in (("model", None), ("adapter_model", {"rank": 2})):
            save_pretrained(load_model(tiny.config("llama"), lora=lora), None, tmp_path)
            assert (tmp_path / f"{name}.safetensors").stat().st_mode & 0o777 == mode
        assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {mode}
        assert os.umask(mask) == mask, "asking has not changed it"
    finally:
        os.umask(before)


POLICY = {"mixture__policy": "msft", "data__validation_fraction": 0.25}


@pytest.mark.parametrize(
    ("mask", "changes"),
    [
        (0o022, {}),
        (0o027, {"model__lora": {"rank": 2, "merge": True}}),
        (0o077, POLICY),
        (0o002, {"model__lora": {"rank": 2}}),
    ],
)
def test_modes_of_everything_a_run_writes_are_the_umasks(mask, changes, tmp_path):
    settings = runs.settings(tmp_path, tasks=2, checkpoint__every_updates=2, budget__epochs=1, **changes)
    before = os.umask(mask)
    try:
        train(Config.of(settings))
    finally:
        os.umask(before)
    written = [
        path for folder in ("run", "cache") for path in [tmp_path / folder, *(tmp_path / folder).rglob("*")]
    ]
    assert {path.name for path in written} >= {
        "result.json",
        "run.yaml",
        "run.png",
        "metrics.jsonl",
        "MANIFEST.json",
        ".lock",
    }
    modes = {str(path.relative_to(tmp_path)): path.stat().st_mode & 0o7777 for path in written}
    assert modes == {name: (0o777 if (tmp_path / name).is_dir() else 0o666) & ~mask for name in modes}


SAMPLED = {
    "temperature": 0.6,
    "do_sample": False,
    "top_p": 0.9,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "own_key": 3,
}


class TestGeneration:
    @pytest.mark.parametrize("lora", [None, {"rank": 2}])
    def test_settings_that_transformers_refuses_to_write(self, lora, tmp_path):
        source = write_source(tmp_path / "source")
        write(source / "generation_config.json", SAMPLED)
        model = load_model(source, lora=lora)
        model.generation_config.eos_token_id = [2, 7]
        save_pretrained(model, None, tmp_path / "result")
        made = read(tmp_path / "result" / "generation_config.json")
        made.pop("transformers_version")
        assert made == {**SAMPLED, "eos_token_id": [2, 7]}

    def test_ends_that_were_set_are_not_derived_again(self, tmp_path):
        """Settings that were derived from the configuration transformers 4 derives again when it
        generates."""
        source = write_source(tmp_path / "source", temperature=0.7)
        change(source / "generation_config.json", _from_model_config=True)
        model = load_model(source)
        save_pretrained(model, None, tmp_path / "same")
        assert read(tmp_path / "same" / "generation_config.json")["_from_model_config"]
        model.generation_config.eos_token_id = [2, 7]
        save_pretrained(model, None, tmp_path / "result")
        assert "_from_model_config" not in read(tmp_path / "result" / "generation_config.json")

    def test_settings_in_the_model_configuration(self, tmp_path):
        source = write_source(tmp_path / "source", temperature=0.7, max_length=50)
        (source / "generation_config.json").unlink()
        saved(source, tmp_path / "result")
        assert read(tmp_path / "result" / "config.json")["temperature"] == 0.7
        made = read(tmp_path / "result" / "generation_config.json")
        assert (made["temperature"], made["max_length"]) == (0.7, 50)
        load_model(tmp_path / "result")


def test_what_is_not_saved_here_is_refused_in_words(tmp_path):
    import peft

    config = peft.LoraConfig(target_modules=["q_proj"])
    plain = AutoModelForCausalLM.from_config(tiny.config("llama"))
    with pytest.raises(
        ModelError, match=r"is for a PreTrainedModel, got PeftModel; a PeftModel has a save_pretrained"
    ):
        save_pretrained(peft.get_peft_model(plain, config), None, tmp_path)
    other = AutoModelForCausalLM.from_config(tiny.config("llama"))
    other.add_adapter(config, adapter_name="mine")
    with pytest.raises(ModelError, match=r"knows adapters of one name, expected default, got mine"):
        save_pretrained(other, None, tmp_path)


def test_what_has_changed_since_is_not_put_back():
    from repsft_fast.models.readable import _in_the_form_of as formed

    source = {
        "theta": 5.0,
        "n_vocab": 10,
        "ids": 3,
        "gone": 1,
        "quantization_config": {},
        "part": {"theta": 5.0, "size": 1},
    }
    then = {"vocab_size": 10, "gone": 1, "part": {"size": 1, "new": 2}, "version": 1}
    now = {"vocab_size": 12, "ids": 4, "part": {"size": 2, "new": 2}, "version": 1}
    assert formed(source, then, now, {"n_vocab": "vocab_size"}) == {
        "theta": 5.0, "n_vocab": 12, "vocab_size": 12, "ids": 4, "part": {"theta": 5.0, "size": 2, "new": 2}, "version": 1,
    }  # fmt: skip
