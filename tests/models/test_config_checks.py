"""What a configuration asks for and would not get is refused or said: on one rank, on meta, on ranks that are
sent theirs."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from repsft_fast.errors import ModelError
from repsft_fast.models import load_model
from repsft_fast.models.checks import check_no_leak
from repsft_fast.models.config_checks import said_of_config
from repsft_fast.models.guards import quiet
from tests.helpers import tiny
from tests.helpers.architectures import tiny_config
from tests.helpers.sources import change, read, write

WAYS = ({}, {"device": "meta"}, {"weights_on": "meta"})


def refused(folder, words):
    for way in WAYS:
        with pytest.raises(ModelError) as raised:
            load_model(folder, **way)
        assert str(raised.value).startswith("model.path config.json: ")
        assert words in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"is_encoder_decoder": True}, "has an encoder"),
        ({"output_attentions": True}, "set output_attentions to false"),
        ({"return_dict": False}, "set return_dict to true"),
        ({"attention_dropout": 7}, "attention_dropout is no share, expected 0 or more, below 1, got 7"),
        ({"attention_dropout": 1.0}, "is no share"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is no small number"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}},
            "rope_theta gives no rotary frequencies",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}},
            "rope_theta gives no rotary frequencies",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "factor": 2.0}},
            "factor of the rotary frequencies has no effect",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": float("inf")}},
            "gives no rotary frequencies",
        ),
        ({"is_causal": False}, "looks at later tokens too (is_causal: false)"),
        ({"model_type": "llamma"}, "upgrade transformers"),
    ],
)
def test_what_would_train_something_else_is_refused(folder, changes, words):
    change(folder / "config.json", **changes)
    refused(folder, words)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("bert-generation", {"is_decoder": False}, "(is_decoder: false)"),
        ("roberta", {"is_decoder": False}, "(is_decoder: false)"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "(use_bidirectional_attention: True)"),
    ],
)
def test_encoders_that_load_as_causal_models(kind, changes, words):
    config = tiny_config(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ModelError, match="looks at later tokens too") as raised:
        load_model(config, device="meta")
    assert words in str(raised.value)


def test_what_changes_nothing_is_no_reason(folder):
    """Keys of other tools and of older versions, and numbers at their bounds."""
    rope = {"rope_type": "default", "rope_theta": 5e3, "factor": 1.0}
    change(
        folder / "config.json",
        attention_dropout=0.0,
        rms_norm_eps=0.5,
        rope_parameters=rope,
        is_causal=True,
        torch_dtype="x",
    )
    change(
        folder / "config.json",
        torch_dtype="bfloat16",
        rope_theta=5e3,
        _name_or_path="/x",
        quantization={},
        unsloth_version="1",
    )
    for way in WAYS:
        assert load_model(folder, **way).load_said == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"tie_word_embedding": True},
            "tie_word_embedding is no key that transformers knows of llama; did you mean tie_word_",
        ),
        ({"rope_scalling": {}}, "did you mean rope_scaling?"),
        (
            {"architectures": ["Qwen3ForCausalLM"]},
            "architectures names Qwen3ForCausalLM, model_type is llama: it is loaded as L",
        ),
        ({"architectures": ["BertForMaskedLM", "LlamaForCausalLM"]}, "architectures names BertForMaskedLM"),
    ],
)
def test_what_has_no_effect_is_said(folder, changes, words):
    written = read(folder / "config.json")
    if "tie_word_embedding" in changes:
        written.pop("tie_word_embeddings")
    write(folder / "config.json", {**written, **changes})
    for way in WAYS:
        (said,) = load_model(folder, **way).load_said
        assert said.startswith("model.path config.json: ")
        assert words in said


@pytest.mark.parametrize("names", [["LlamaForCausalLM"], ["LlamaModel"], ["OfSomebodyForCausalLM"], [], None])
def test_names_of_architectures_that_say_nothing_else(folder, names):
    change(folder / "config.json", architectures=names)
    assert load_model(folder, device="meta").load_said == []


@pytest.mark.parametrize("name", ["tie_encoder_decoder", "eos_token_id", "sep_token_id"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_keys_that_every_configuration_had_once_are_no_slips(kind, name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(kind))
    assert said_of_config(model, {name: 1}, "here") == []


@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2", "somebody's"])
def test_an_attention_named_in_the_file_is_not_taken_in_place_of_ours(folder, name):
    """It may not be installed; and in packed rows it would let documents see each other."""
    change(folder / "config.json", _attn_implementation=name)
    for way in WAYS:
        model = load_model(folder, **way)
        assert {
            module.config._attn_implementation for module in model.modules() if hasattr(module, "config")
        } == {"repsft"}
    check_no_leak(load_model(folder))
    assert load_model(folder, packed=False).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["t5", "qwen2_5_vl", "clip"])
def test_models_of_another_kind_are_called_that(tmp_path, kind):
    write(tmp_path / "config.json", {"model_type": kind})
    refused(tmp_path, f"model_type {kind} is no causal language model to transformers")
    with pytest.raises(ModelError, match=rf"^model\.config: model_type {kind} is no causal language model"):
        load_model({"model_type": kind})


@pytest.mark.parametrize("end", [97, -5, 10**30])
def test_ends_that_the_model_has_no_token_for_are_said(folder, end):
    change(folder / "generation_config.json", eos_token_id=[2, end])
    for way in WAYS:
        (said,) = load_model(folder, **way).load_said
        assert f"generation_config.json: eos_token_id {end}: the model has 97 tokens" in said
    change(folder / "generation_config.json", eos_token_id=96)
    assert load_model(folder).load_said == []
    (said,) = load_model(tiny.config("llama", eos_token_id=end)).load_said  # no file to name
    assert said.startswith(f"model.config: eos_token_id {end}: ")


@pytest.mark.parametrize(
    "changes", [{"max_new_tokens": "5"}, {"cache_implementation": "x"}, {"watermarking_config": {"x": 1}}]
)
def test_generation_settings_that_cannot_be_read_are_refused_in_every_way(folder, changes):
    change(folder / "generation_config.json", **changes)
    for way in WAYS:
        with pytest.raises(ModelError, match=r"^model\.path generation_config\.json: .*; correct it"):
            load_model(folder, **way)


def test_a_text_model_of_several_parts_is_refused_in_words():
    with pytest.raises(ModelError, match=r"^model\.config: "):
        load_model({"model_type": "musicgen"})


def test_matrices_of_zeros_are_said(folder):
    """A download that reserved its room and was cut short; layers added on purpose begin so too."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"].zero_()
    weights["model.layers.0.input_layernorm.weight"].zero_()  # norms that add 1 begin so
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (said,) = load_model(folder).load_said
    assert "1 of its 16 matrices are zero throughout (model.layers.1.mlp.down_proj.weight)" in said


def test_every_causal_architecture_passes():
    """The rules are about slips: no public architecture, as its own class makes it, breaks one."""
    for kind in (
        "gpt2",
        "mixtral",
        "gemma3_text",
        "gpt_oss",
        "deepseek_v3",
        "mamba2",
        "phi3",
        "bloom",
        "falcon_h1",
        "xlnet",
    ):
        with quiet():
            config = tiny_config(kind)
        model = load_model(config, device="meta", packed=False)
        assert model.load_said == [], kind
        assert json.dumps(model.config.to_dict(), default=str)
    assert torch.get_default_dtype() == torch.float32
