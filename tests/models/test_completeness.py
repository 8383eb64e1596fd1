"""A model is loaded whole or refused: every tensor misspelt, dropped and reshaped once; the causes that are
named."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from repsft_fast.errors import ModelError
from repsft_fast.models import load_model
from repsft_fast.models.completeness import check_header, count_non_finite
from repsft_fast.models.folder import stored_weights
from repsft_fast.models.guards import quiet
from tests.helpers import tiny
from tests.helpers.architectures import KINDS, tiny_config

WAYS = ({}, {"device": "meta"}, {"weights_on": "cpu"}, {"weights_on": "meta"})
# The first of every kind of name that transformers turns into others as it loads: experts merged, projections
# split, prefixes.
CHEAP = (
    "llama",
    "gpt2",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
    "phi3",
    "gemma3_text",
    "mamba2",
    "bloom",
    "opt",
    "olmoe",
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    made = {}
    for name in ("llama", "llama-tied"):
        made[name] = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(tiny.config(name)).save_pretrained(made[name])
    return made


@pytest.fixture
def changed(sources, tmp_path):
    def make(change, name="llama", **settings):
        folder = tmp_path / "m"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sources[name], folder)
        weights = change(load_file(folder / "model.safetensors"))
        save_file(
            {key: value.clone() for key, value in weights.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
        return folder

    return make


def refused(folder, *words, ways=WAYS):
    for way in ways:
        with pytest.raises(ModelError) as raised:
            load_model(folder, **way)
        assert str(raised.value).startswith("model.path: ")
        assert [word for word in words if word not in str(raised.value)] == [], str(raised.value)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_every_tensor_misspelt_dropped_and_reshaped(changed, sources, name):
    names = sorted(load_file(sources[name] / "model.safetensors"))
    assert len(names) == (21 if name == "llama" else 20)
    for key in names:
        folder = changed(lambda w, key=key: {(f"{k}x" if k == key else k): v for k, v in w.items()}, name)
        refused(
            folder,
            "1 of the model's",
            f"missing in it ({key})",
            f"1 weights of it are not the model's ({key}x)",
            ways=WAYS[1:2],
        )
        folder = changed(lambda w, key=key: {k: v for k, v in w.items() if k != key}, name)
        refused(folder, "1 of the model's", f"({key})", ways=WAYS[1:2])
        folder = changed(lambda w, key=key: {k: v[:-1] if k == key else v for k, v in w.items()}, name)
        size = list(load_file(sources[name] / "model.safetensors")[key].shape)
        refused(
            folder,
            f"{key}: {[size[0] - 1, *size[1:]]} in the file, {size} by the configuration",
            ways=WAYS[1:2],
        )


SLOW = ("gpt2", "qwen3_moe", "deepseek_v3", "gpt_oss", "phi3", "gemma3_text", "bloom", "mamba2", "olmoe")


@pytest.mark.parametrize("name", ["mixtral", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_every_tensor_of_architectures_that_rename_and_merge(tmp_path, name):
    """Of some of them transformers merges experts or splits projections as it loads; none says which."""
    with quiet():
        AutoModelForCausalLM.from_config(tiny_config(name)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    options = {"device": "meta", "packed": name != "mamba2"}
    assert load_model(tmp_path, **options).load_said == []
    kinds = {re.sub(r"\d+", "0", key): key for key in sorted(weights)}  # the last layer's and expert's
    for key in sorted(kinds.values() if name == "mixtral" else weights):
        for made in (
            {(f"{k}x" if k == key else k): v for k, v in weights.items()},
            {k: v for k, v in weights.items() if k != key},
            {k: v[:-1].clone() if k == key else v for k, v in weights.items()},
        ):
            save_file(made, tmp_path / "model.safetensors", metadata={"format": "pt"})
            with pytest.raises(ModelError, match=r"^model\.path: ") as raised:
                load_model(tmp_path, **options)
            assert "conversion" not in str(raised.value), (key, str(raised.value))


def test_weights_of_single_experts_are_named(tmp_path):
    with quiet():
        AutoModelForCausalLM.from_config(tiny_config("mixtral")).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    key = next(key for key in sorted(weights) if "experts.1." in key)
    save_file({k: v for k, v in weights.items() if k != key}, tmp_path / "model.safetensors")
    refused(tmp_path, f"1 weights of single experts are missing in it ({key})")
    weights[key] = weights[key][:-1].clone()
    save_file(weights, tmp_path / "model.safetensors")
    refused(tmp_path, f"1 are of another shape than those of the other experts ({key}: ")


@pytest.mark.parametrize(
    "prefix", ["module.", "base_model.model.", "_orig_mod.", "foo.bar.", "_forward_module."]
)
def test_a_foreign_prefix(changed, prefix):
    folder = changed(lambda w: {prefix + k: v for k, v in w.items()})
    refused(
        folder,
        "21 of the model's 21 weights are missing",
        "21 weights of it are not",
        f"its names carry {prefix}",
    )


def test_a_prefix_in_place_of_another_or_missing(changed):
    text = changed(lambda w: {k.replace("model.", "model.language_model.", 1): v for k, v in w.items()})
    refused(text, "its names say model.language_model. where the model says model.: rename them")
    # a backbone saved alone, and its head
    bare = changed(lambda w: {k.removeprefix("model."): v for k, v in w.items()})
    whole = changed(lambda w: w)
    assert all(
        torch.equal(a, b)
        for a, b in zip(load_model(bare).parameters(), load_model(whole).parameters(), strict=True)
    )


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"mlp_bias": True}, {"model_type": "qwen3"}])
def test_weights_missing_in_every_layer_are_no_further_layers(changed, changes):
    refused(changed(lambda w: w, **changes), "missing in it", "is its config.json that of these weights?")


def test_a_head_of_another_kind_is_no_further_layer(changed):
    refused(
        changed(lambda w: w | {"medusa_head.0.linear.weight": torch.ones(2, 2)}),
        "is its config.json that of these weights?",
    )


@pytest.mark.parametrize("name", ["score", "v_head.summary", "model.score", "classifier.dense", "qa_outputs"])
@pytest.mark.parametrize("kept", [True, False])
def test_a_classifier_or_a_value_model_is_called_that(changed, name, kept):
    def other_head(weights):
        weights = weights | {f"{name}.weight": torch.ones(2, 32)}
        return weights if kept else {key: value for key, value in weights.items() if key != "lm_head.weight"}

    refused(
        changed(other_head),
        f"a model with another head ({name}.weight): give the causal language model",
        ways=WAYS[:2],
    )


@pytest.mark.parametrize(
    ("layers", "words"), [(3, ("9 of the model's 30", "more layers")), (1, ("9 weights", "fewer layers"))]
)
def test_another_number_of_layers(changed, layers, words):
    refused(changed(lambda w: w, num_hidden_layers=layers), *words, "model.init: random")


def test_both_shapes_are_named_and_random_weights_are_the_way_out(changed):
    folder = changed(lambda w: w, intermediate_size=80)
    refused(
        folder,
        "6 weights have another shape",
        "down_proj.weight: [32, 48] in the file, [32, 80] by the",
        "model.init: random",
    )
    assert load_model(folder, random_weights=True).model.layers[0].mlp.down_proj.weight.shape == (32, 80)


def test_no_head_of_its_own(changed):
    folder = changed(lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"})
    refused(folder, "(lm_head.weight)", "set tie_word_embeddings to true")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_without_a_word_in_the_config(changed, dtype):
    folder = changed(lambda w: {k: v.to(dtype) if v.ndim == 2 else v for k, v in w.items()})
    refused(
        folder,
        "16 of its 21 weights are no floating-point numbers",
        "give the repository it was quantised from",
    )
    folder = changed(lambda w: w | {f"{k}_scale_inv": v for k, v in w.items() if "_proj" in k})
    refused(folder, "14 weights of it are not the model's", "it is quantised")


def test_adapters_among_the_weights(changed):
    refused(
        changed(lambda w: w | {"model.layers.0.x.lora_A.weight": torch.ones(2, 2)}),
        "model.lora.from to their folder",
    )


def test_two_names_of_one_weight(changed):
    refused(
        changed(lambda w: w | {"model.model.norm.weight": w["model.norm.weight"] + 1}),
        "are the same weight of the model",
    )


def test_a_tied_model_whose_file_has_another_head(changed):
    key = "model.embed_tokens.weight"
    refused(
        changed(lambda w: w | {"lm_head.weight": w[key] + 1}, "llama-tied"),
        "the file holds two different ones",
    )
    model = load_model(changed(lambda w: w | {"lm_head.weight": w[key]}, "llama-tied"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    alone = load_model(
        changed(lambda w: {("lm_head.weight" if k == key else k): v for k, v in w.items()}, "llama-tied")
    )
    # the head alone, under its own name
    assert alone.model.embed_tokens.weight.equal(model.model.embed_tokens.weight)
    assert alone.lm_head.weight is alone.model.embed_tokens.weight


def test_old_tables_of_positions_and_heads_of_several_tokens_are_no_reason(changed):
    folder = changed(lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert load_model(folder).load_said == []
    folder = changed(
        lambda w: w | {"mtp.fc.weight": torch.ones(3), "mtp.layers.0.norm.weight": torch.ones(3)}
    )
    for way in WAYS:
        (said,) = load_model(folder, **way).load_said
        assert "holds 2 weights whose head that predicts several tokens is not loaded" in said


def test_what_the_class_leaves_out_in_silence_is_said(tmp_path):
    """A layer that it knows by number as a head that predicts several tokens; masks and positions of old
    files are not."""

    def said(name, *more, **options):
        with quiet():
            AutoModelForCausalLM.from_config(tiny_config(name)).save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        save_file({**weights, **dict(more)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        made = [load_model(tmp_path, **options, **way).load_said for way in WAYS[:2]]
        assert made[0] == made[1]
        return made[0]

    further = (
        ("model.layers.61.eh_proj.weight", torch.ones(2, 2)),
        ("model.layers.61.enorm.weight", torch.ones(2)),
    )
    (words,) = said("deepseek_v3", *further)
    assert (
        "holds 2 weights (model.layers.61.eh_proj.weight, model.layers.61.enorm.weight) that transformers"
        " leaves" in words
    )
    masks = torch.ones(1, 1, 4, 4, dtype=torch.uint8), torch.tensor(-1e4)
    for name in ("gpt2", "gptj"):
        old = ("transformer.h.0.attn.bias", masks[0]), ("transformer.h.0.attn.masked_bias", masks[1])
        assert said(name, *old, packed=False) == []
    inv_freq = ("gpt_neox.layers.0.attention.rotary_emb.inv_freq", torch.ones(4))
    assert said("gpt_neox", ("gpt_neox.layers.0.attention.bias", masks[0]), inv_freq) == []


def test_numbers_that_are_not_finite_in_the_type_of_most_files(changed):
    folder = changed(
        lambda w: (
            {k: v.bfloat16() for k, v in w.items()} | {"model.norm.weight": torch.full((32,), float("nan"))}
        )
    )
    with pytest.raises(ModelError, match=r"held in bfloat16 \(model\.norm\.weight: 32\)"):
        load_model(folder, param_dtype="bfloat16")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_counted_and_named(changed, value):
    def spoil(weights):
        weights["model.norm.weight"][3:5] = value
        weights["lm_head.weight"][7, 7] = value
        return weights

    words = ("3 numbers in 2 of its weights are not finite", "model.norm.weight: 2", "lm_head.weight: 1")
    refused(changed(spoil), *words, ways=({}, {"weights_on": "cpu"}))


def test_counting_sees_each_number():
    model = torch.nn.Linear(3, 2)
    assert count_non_finite(model) == {}
    with torch.no_grad():
        model.weight[1, 2] = float("inf")
    assert count_non_finite(model) == {"weight": 1}


def test_numbers_the_type_cannot_hold_are_not_finite(changed):
    folder = changed(lambda w: w | {"model.norm.weight": w["model.norm.weight"] * 1e6})
    load_model(folder)
    with pytest.raises(ModelError, match=r"held in float16 \(model\.norm\.weight: 32\)"):
        load_model(folder, param_dtype="float16")


def saved_and_compared(name, folder):
    """What the architecture writes, its own header holds whole; and not when a name is dropped."""
    with quiet():
        config = tiny_config(name)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    stored = stored_weights(folder, "model.path")
    assert check_header(model, stored, "model.path", name, {"dtype": torch.float32}) == []
    key = next((key for key in sorted(stored) if "norm" in key or ".ln" in key), max(stored))
    with pytest.raises(ModelError, match="missing in it"):
        check_header(
            model, {k: v for k, v in stored.items() if k != key}, "model.path", name, {"dtype": torch.float32}
        )


@pytest.mark.parametrize("name", CHEAP)
def test_what_an_architecture_writes_is_whole(tmp_path, name):
    saved_and_compared(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(KINDS) - set(CHEAP)))
def test_what_every_architecture_writes_is_whole(tmp_path, name):
    try:
        with quiet(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(tiny_config(name))
    except Exception as error:  # a configuration that the tiny sizes do not fit: nothing to compare
        pytest.skip(f"not built: {type(error).__name__}")
    if sum(parameter.numel() for parameter in model.parameters()) > 30_000_000:
        pytest.skip("not made tiny by these sizes")
    saved_and_compared(name, tmp_path)
