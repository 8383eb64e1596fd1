"""Adapters trained with peft elsewhere go on as peft computes them, are saved as it reads them, or are
refused in words."""

import json
import shutil

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from repsft_fast.errors import ModelError
from repsft_fast.models import load_model, save_pretrained
from repsft_fast.models.lora import lora_said
from tests.helpers import tiny
from tests.helpers.architectures import tiny_config

NAMES = ["q_proj", "v_proj", "down_proj"]
IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(2))
# What a person gives peft's LoraConfig: (architecture, changes).
TAKEN = {
    "plain": ("llama", {}),
    "rank-stabilised": ("llama", {"use_rslora": True}),
    "ranks and alphas of their own": (
        "llama",
        {"rank_pattern": {"q_proj": 2, "^model.layers.1.mlp.down_proj": 6}, "alpha_pattern": {"q_proj": 32}},
    ),
    "one layer of the model": ("llama", {"layers_to_transform": 1, "layers_pattern": "layers"}),
    "names left out": ("llama", {"exclude_modules": r".*layers\.0.*q_proj"}),
    "a regular expression": (
        "llama",
        {"target_modules": r"model\.layers\.\d+\.(self_attn|mlp)\.(q_proj|up_proj)"},
    ),
    "all linear layers of peft's": ("llama", {"target_modules": "all-linear"}),
    "a fraction for alpha": ("llama", {"lora_alpha": 3.5}),
    "begun by a Gaussian": ("llama", {"init_lora_weights": "gaussian"}),
    "begun orthogonal": ("llama", {"init_lora_weights": "orthogonal"}),
    "dropout and no task": ("llama", {"lora_dropout": 0.1, "task_type": None}),
    "embeddings": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "transposed, said": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "transposed, not said": ("gpt2", {"target_modules": ["c_attn"]}),
    "experts": (
        "qwen3_moe",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "experts alone": ("qwen3_moe", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    "experts by their old names": (
        "qwen3_moe",
        {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
    ),
    "experts of one layer, with biases": (
        "gpt_oss",
        {
            "target_modules": "all-linear",
            "target_parameters": ["1.mlp.experts.down_proj", "0.mlp.experts.gate_up_proj"],
        },
    ),
    "a router": ("qwen2_moe", {"target_modules": ["shared_expert_gate"]}),
}
LAST = "merge them into their base with peft"
REFUSED = {
    "DoRA": ({"use_dora": True}, f"use_dora is not understood.*{LAST}"),
    "biases": ({"bias": "all"}, f"bias is not understood.*{LAST}"),
    "biases of the layers": ({"bias": "lora_only"}, f"bias is not understood.*{LAST}"),
    "the head trained whole": (
        {"modules_to_save": ["lm_head"]},
        f"modules_to_save is not understood.*{LAST}",
    ),
    "tokens": ({"trainable_token_indices": [5, 6]}, f"trainable_token_indices is not understood.*{LAST}"),
    "the base's singular values": (
        {"init_lora_weights": "pissa"},
        f"the base's own weights, which it changed.*{LAST}",
    ),
    "the base's factors": (
        {"init_lora_weights": "olora"},
        f"the base's own weights, which it changed.*{LAST}",
    ),
    "the head adapted": (
        {"target_modules": ["q_proj", "lm_head"]},
        "on the output head .lm_head., which stays frozen",
    ),
}


def saved_by_peft(folder, kind="llama", config=None, *, save=None, **changes):
    """(base, adapters): a model and adapters that were trained, as peft saves them."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(kind)).save_pretrained(folder / "base")
    given = {"r": 4, "lora_alpha": 8, "target_modules": NAMES, "task_type": "CAUSAL_LM", **changes}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "base"), config or LoraConfig(**given)
    )
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    model.save_pretrained(folder / "adapters", **(save or {}))
    return folder / "base", folder / "adapters"


def by_peft(base, folder):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def loaded(base, folder, **lora):
    return load_model(base, packed=False, lora={"from": str(folder), **lora})


@pytest.mark.parametrize("name", TAKEN)
def test_they_go_on_as_peft_computes_them(name, tmp_path, monkeypatch):
    kind, changes = TAKEN[name]
    base, folder = saved_by_peft(tmp_path, kind, **changes)
    expected = logits(by_peft(base, folder))
    model = loaded(base, folder, merge=True)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 1e-2, (
        "they do something"
    )
    monkeypatch.chdir(tmp_path)
    save_pretrained(model, None, "again")
    monkeypatch.chdir("/")
    torch.testing.assert_close(logits(by_peft(base, tmp_path / "again")), expected, rtol=0, atol=0)
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(base)
    save_pretrained(model, None, tmp_path / "merged", merge_lora=True)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(logits(loaded(base, tmp_path / "again")), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", ["rank-stabilised", "ranks and alphas of their own", "transposed, said", "experts"]
)
def test_one_update_is_pefts(name, tmp_path):
    """What is trained, and how: after one step of plain descent the logits are those of peft's model after
    the same step."""
    kind, changes = TAKEN[name]
    base, folder = saved_by_peft(tmp_path, kind, **changes)
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), folder, is_trainable=True
    ).train()
    ours = loaded(base, folder)
    document = tiny.documents((12,))[0]
    ids = torch.tensor([document])
    scores = theirs(input_ids=ids[:, :-1], use_cache=False).logits[0]
    torch.nn.functional.cross_entropy(scores, ids[0, 1:]).backward()
    ours.loss(tiny.row([document]))[0].backward()
    for model in (ours, theirs):
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter in trained:
                parameter -= 0.1 * parameter.grad
    count = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
    assert count[0] == count[1]
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_has_and_is_not_done_here(name, tmp_path):
    changes, words = REFUSED[name]
    base, folder = saved_by_peft(tmp_path, **changes)
    with pytest.raises(ModelError, match=rf"model\.lora\.from.*{words}"):
        loaded(base, folder)


@pytest.mark.parametrize("kind", ["IA3", "PromptTuning", "LoHa", "AdaLora"])
def test_other_methods(kind, tmp_path):
    more = {
        "IA3": {"target_modules": ["k_proj"], "feedforward_modules": []},
        "PromptTuning": {"num_virtual_tokens": 4},
        "LoHa": {"target_modules": NAMES},
        "AdaLora": {"target_modules": NAMES, "total_step": 10},
    }[kind]
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **more)
    base, folder = saved_by_peft(tmp_path, config=config)
    with pytest.raises(
        ModelError, match=rf"model\.lora\.from adapter_config\.json: is of no LoRA adapters.*got .*{LAST}"
    ):
        loaded(base, folder)


def test_adapters_of_experts_that_were_a_layer_each(tmp_path):
    """Mixtures as transformers 4 had them: peft reads these; saved by it they are read here."""
    base, folder = saved_by_peft(
        tmp_path, "qwen3_moe", target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"]
    )
    weights = {
        name: value
        for name, value in load_file(folder / "adapter_model.safetensors").items()
        if "experts" not in name
    }
    sizes = {"gate_proj": (32, 16), "up_proj": (32, 16), "down_proj": (16, 32)}
    for layer in range(2):
        for expert in range(4):
            for name, (inputs, outputs) in sizes.items():
                place = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                weights[f"{place}.lora_A.weight"] = torch.randn(4, inputs) * 0.1
                weights[f"{place}.lora_B.weight"] = torch.randn(outputs, 4) * 0.1
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    file = folder / "adapter_config.json"
    old = {
        "target_modules": ["q_proj", *sizes],
        "target_parameters": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | old))
    with pytest.raises(
        ModelError, match=r"48 weights .* are of experts that were a layer each.*save them again"
    ):
        loaded(base, folder)
    theirs = by_peft(base, folder)
    theirs.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(loaded(base, tmp_path / "again")), logits(theirs), rtol=0, atol=0)


class TestWeightsOfTheBase:
    """peft writes whole embeddings beside adapters where it thinks that they grew."""

    def test_the_bases_own_are_passed_over(self, tmp_path):
        base, folder = saved_by_peft(tmp_path, save={"save_embedding_layers": True})
        held = load_file(folder / "adapter_model.safetensors")
        assert any("embed_tokens" in name for name in held)
        torch.testing.assert_close(
            logits(loaded(base, folder)), logits(by_peft(base, folder)), rtol=0, atol=0
        )

    @pytest.mark.parametrize("change", ["trained", "grown"])
    def test_others_are_refused(self, change, tmp_path):
        base, folder = saved_by_peft(tmp_path, save={"save_embedding_layers": True})
        weights = load_file(folder / "adapter_model.safetensors")
        name = next(name for name in weights if "embed_tokens" in name)
        weights[name] = (
            weights[name] + 1 if change == "trained" else torch.cat([weights[name], weights[name][:2]])
        )
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        words = "other than the base's" if change == "trained" else "has another shape"
        with pytest.raises(ModelError, match=rf"model\.lora\.from.*embed_tokens.*{words}"):
            loaded(base, folder)


def test_a_tied_embedding_is_not_merged(tmp_path):
    base, folder = saved_by_peft(
        tmp_path, "gpt2", target_modules=["c_attn", "wte"], save={"save_embedding_layers": False}
    )
    torch.testing.assert_close(logits(loaded(base, folder)), logits(by_peft(base, folder)), rtol=0, atol=0)
    with pytest.raises(ModelError, match=r"transformer\.wte, whose weight the output head shares"):
        loaded(base, folder, merge=True)


def test_a_router_is_told(tmp_path):
    base, folder = saved_by_peft(tmp_path, "qwen2_moe", target_modules=["q_proj", "shared_expert_gate"])
    assert "on routers too, which go on being trained: mlp.shared_expert_gate (2)" in " ".join(
        lora_said(loaded(base, folder))
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"base_model_name_or_path": None}, {"base_model_name_or_path": "./base"}, {"revision": "abc"},
        {"base_model_name_or_path": "owner/model", "revision": "main"}, {"inference_mode": False}, {"lora_dropout": 0.5},
        {"some_new_key": None}, {"another_new_key": False}, {"task_type": "FEATURE_EXTRACTION"}, {"peft_version": "0.4.0"},
        {"loftq_config": None, "megatron_config": None, "rank_pattern": None, "alpha_pattern": None},
    ],
)  # fmt: skip
def test_settings_that_change_nothing(changes, tmp_path):
    base, folder = saved_by_peft(tmp_path)
    expected = logits(by_peft(base, folder))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert torch.equal(logits(loaded(base, folder)), expected)


def test_an_old_config_and_an_adapter_with_a_name(tmp_path):
    """peft 0.3 wrote a dozen keys; an adapter with a name lies in a folder of that name."""
    base, folder = saved_by_peft(tmp_path)
    expected = logits(by_peft(base, folder))
    file = folder / "adapter_config.json"
    kept = ("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights", "lora_alpha",
            "lora_dropout", "modules_to_save", "peft_type", "r", "target_modules", "task_type")  # fmt: skip
    file.write_text(
        json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name in kept})
    )
    shutil.move(folder, tmp_path / "outer" / "chat")
    with pytest.raises(
        ModelError, match=r"model\.lora\.from: holds no adapter_config\.json.*the folder inside it: chat"
    ):
        loaded(base, tmp_path / "outer")
    assert torch.equal(logits(loaded(base, tmp_path / "outer" / "chat")), expected)
