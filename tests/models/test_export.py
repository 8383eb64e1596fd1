"""What is saved loads with transformers (and peft) and computes the same, from one process and from two
ranks."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from repsft_fast.distributed import shard
from repsft_fast.errors import ModelError
from repsft_fast.models import load_model, load_tokenizer, save_pretrained
from tests.helpers import ranks, tiny

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13]])
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def build(name="llama", **options):
    torch.manual_seed(1)
    return load_model(tiny.config(name), **options)


def tokenizer():
    words = {f"w{i}": i for i in range(tiny.VOCABULARY)}
    words_of_spaces = Tokenizer(models.WordLevel(words, unk_token="w0"))
    words_of_spaces.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words_of_spaces, eos_token="w2")
    made.chat_template = TEMPLATE
    return made


def train_one_step(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.loss(tiny.row(tiny.documents((9, 5)), denominator=2))[0].backward()
    optimizer.step()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_model_loads_bit_equal(name, tmp_path):
    model = build(name)
    train_one_step(model)
    save_pretrained(model, tokenizer(), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.dtype == torch.float32
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value), key
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_what_lies_in_the_folder(tmp_path):
    save_pretrained(build("llama-tied"), tokenizer(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert "repsft" not in json.dumps(config), "an attention only we know"
    weights = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in weights) != ("model.embed_tokens.weight" in weights), (
        "tied weights are written once"
    )
    assert not list(tmp_path.glob("*.bin"))
    assert not list(tmp_path.glob("*.pt"))


def test_the_tokenizer_and_its_template_come_along(tmp_path):
    save_pretrained(build(), tokenizer(), tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert loaded.chat_template == TEMPLATE
        assert loaded("w5 w6")["input_ids"] == [5, 6]
    with pytest.raises(ModelError, match=r"^tokenizer\.path: "):
        load_tokenizer(tmp_path / "nowhere")


def test_in_another_type(tmp_path):
    model = build("llama-tied")
    save_pretrained(model, None, tmp_path, dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert len(load_file(tmp_path / "model.safetensors")) == len(model.state_dict()) - 1, (
        "tied weights are written once"
    )
    assert model.dtype == torch.float32
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_saving_twice_leaves_the_second(tmp_path):
    model = build()
    save_pretrained(model, None, tmp_path)
    train_one_step(model)
    save_pretrained(model, None, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


class TestLora:
    @staticmethod
    def trained(**options):
        model = build(lora={"rank": 4, "alpha": 8.0}, **options)
        for _ in range(2):
            train_one_step(model)
        return model

    def test_adapters_load_as_a_peft_folder(self, tmp_path):
        from peft import PeftModel

        model = self.trained()
        save_pretrained(model, tokenizer(), tmp_path)
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {
            file.name for file in tmp_path.iterdir()
        }
        assert not (tmp_path / "model.safetensors").exists()
        loaded = PeftModel.from_pretrained(build(), tmp_path)
        assert not torch.allclose(logits(build()), logits(model), atol=1e-3), "the adapters do something"
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)

    def test_merged_it_is_a_plain_model(self, tmp_path):
        model = self.trained()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        save_pretrained(model, None, tmp_path, merge_lora=True)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.state_dict().keys() == build().state_dict().keys()
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), (
            "the live model is untouched"
        )

    def test_merging_nothing(self, tmp_path):
        with pytest.raises(ModelError, match=r"model\.lora\.merge: there are no adapters to merge"):
            save_pretrained(build(), None, tmp_path, merge_lora=True)


def save_from_ranks(world, name, folder, options, merge):
    model = build(name, **options)
    shard(model, world)
    save_pretrained(model, tokenizer() if world.is_main else None, folder, merge_lora=merge, world=world)
    return type(model).__name__


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_two_ranks_save_one_whole_model(name, tmp_path):
    assert ranks.run_ranks(save_from_ranks, name, tmp_path, {}, False) == ["FSDPLlamaForCausalLM"] * 2
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in build(name).state_dict().items())


def test_two_ranks_save_adapters(tmp_path):
    ranks.run_ranks(save_from_ranks, "llama", tmp_path, {"lora": {"rank": 4}}, False)
    expected = {n: p for n, p in build(lora={"rank": 4}).named_parameters() if "lora_A" in n}
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 2 * len(expected)
    for name, value in expected.items():
        assert torch.equal(saved["base_model.model." + name.replace(".default", "")], value)
