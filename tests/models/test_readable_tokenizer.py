"""A saved tokenizer is read by whatever read its source: class, special tokens, chat templates, vocabulary
files."""

import json

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from repsft_fast.models import load_model, load_tokenizer, save_pretrained
from tests.helpers.sources import TEMPLATE, VOCABULARY, change, read, saved, token, write, write_source


@pytest.mark.parametrize("places", [("config",), ("file",), ("config", "file"), ()])
def test_the_chat_template_stands_where_it_stood(places, tmp_path):
    source = write_source(tmp_path / "source")
    if "file" in places:
        (source / "chat_template.jinja").write_text(TEMPLATE)
    if "config" not in places:
        config = read(source / "tokenizer_config.json")
        del config["chat_template"]
        write(source / "tokenizer_config.json", config)
    words = load_tokenizer(source)
    if places:
        words.chat_template = "another"
    save_pretrained(load_model(source), words, tmp_path / "result")
    made = read(tmp_path / "result" / "tokenizer_config.json")
    assert made.get("chat_template") == ("another" if "config" in places else None)
    assert (tmp_path / "result" / "chat_template.jinja").exists() == ("file" in places)
    assert load_tokenizer(tmp_path / "result").chat_template == ("another" if places else None)


@pytest.mark.parametrize("own", [None, TEMPLATE, "another"])
def test_the_template_of_a_processor(own, tmp_path):
    """Is its own, and stays as it was unless the tokenizer was given another."""
    source = write_source(tmp_path / "source")
    if own is None:
        config = read(source / "tokenizer_config.json")
        del config["chat_template"]
        write(source / "tokenizer_config.json", config)
    write(source / "chat_template.json", {"chat_template": "with pictures"})
    words = load_tokenizer(source)
    words.chat_template = own
    save_pretrained(load_model(source), words, tmp_path / "result")
    expected = "another" if own == "another" else "with pictures"
    assert read(tmp_path / "result" / "chat_template.json") == {"chat_template": expected}


def test_vocabulary_files_of_the_same_tokens_come_along(tmp_path):
    source = write_source(tmp_path / "source")
    (source / "tokenizer.model").write_bytes(b"pieces")
    write(source / "added_tokens.json", {"<think>": VOCABULARY - 1})
    saved(source, tmp_path / "result")
    assert (tmp_path / "result" / "tokenizer.model").read_bytes() == b"pieces"
    assert read(tmp_path / "result" / "added_tokens.json") == {"<think>": VOCABULARY - 1}


def test_where_the_same_tokens_are_written_otherwise(tmp_path):
    """transformers 5 writes Llama's without its unknown token and with a Metaspace, GPT-2's with empty
    affixes."""
    source = write_source(tmp_path / "source")
    pieces = {"<unk>": 0, "<s>": 1, "w2": 2, "▁": 3, "a": 4, "▁a": 5}
    added = [token(0, "<unk>"), token(1, "<s>"), token(2, "w2")]
    change(
        source / "tokenizer.json",
        model={"type": "BPE", "vocab": pieces, "merges": ["▁ a"], "unk_token": "<unk>", "fuse_unk": True},
        added_tokens=added,
        pre_tokenizer=None,
        normalizer={"type": "Prepend", "prepend": "▁"},
    )
    change(
        source / "tokenizer_config.json",
        tokenizer_class="LlamaTokenizer", unk_token="<unk>", bos_token="<s>", pad_token="<unk>",
        additional_special_tokens=[], added_tokens_decoder={},
    )  # fmt: skip
    (source / "special_tokens_map.json").unlink()
    (source / "tokenizer.model").write_bytes(b"pieces")
    saved(source, tmp_path / "result")
    assert read(tmp_path / "result" / "tokenizer.json")["model"] != read(source / "tokenizer.json")["model"]
    assert (tmp_path / "result" / "tokenizer.model").read_bytes() == b"pieces"


def test_of_other_pieces_they_stay_behind(tmp_path):
    source = write_source(tmp_path / "source")
    (source / "tokenizer.model").write_bytes(b"pieces")
    words = load_tokenizer(source)
    changed = read(source / "tokenizer.json")
    changed["model"]["vocab"]["more"] = VOCABULARY + 3
    words._tokenizer = Tokenizer.from_str(json.dumps(changed))
    save_pretrained(load_model(source), words, tmp_path / "result")
    assert not (tmp_path / "result" / "tokenizer.model").exists()


def test_what_was_added_since_is_told_beside_the_pieces(tmp_path):
    source = write_source(tmp_path / "source")
    (source / "tokenizer.model").write_bytes(b"pieces")
    write(source / "added_tokens.json", {"<think>": VOCABULARY - 1})
    config = read(source / "tokenizer_config.json")
    del config["added_tokens_decoder"]
    write(source / "tokenizer_config.json", config)
    words = load_tokenizer(source)
    words.add_tokens(["<new>"])
    words.add_special_tokens({"additional_special_tokens": ["<tool>", "<other>"]})
    save_pretrained(load_model(source), words, tmp_path / "result")
    assert (tmp_path / "result" / "tokenizer.model").exists()
    assert not (tmp_path / "result" / "added_tokens.json").exists()
    assert not (tmp_path / "result" / "special_tokens_map.json").exists()
    made = read(tmp_path / "result" / "tokenizer_config.json")
    assert made["additional_special_tokens"] == ["<tool>", "<other>"]
    assert made["extra_special_tokens"] == {}
    assert {entry["content"] for entry in made["added_tokens_decoder"].values()} >= {
        "<new>",
        "<other>",
        "<think>",
    }
    again = load_tokenizer(tmp_path / "result")
    assert again.get_vocab() == words.get_vocab()
    assert again("w5 <new> <other> <tool>")["input_ids"] == words("w5 <new> <other> <tool>")["input_ids"]


def test_named_special_tokens_stay_named(tmp_path):
    source = write_source(tmp_path / "source")
    change(
        source / "tokenizer_config.json", extra_special_tokens={"image_token": "<tool>"}, image_token="<tool>"
    )
    saved(source, tmp_path / "result")
    made = read(tmp_path / "result" / "tokenizer_config.json")
    assert made["extra_special_tokens"] == {"image_token": "<tool>"}
    assert AutoTokenizer.from_pretrained(tmp_path / "result").image_token == "<tool>"


def test_without_a_configuration_of_its_own(tmp_path):
    source = write_source(tmp_path / "source")
    (source / "tokenizer_config.json").unlink()
    saved(source, tmp_path / "result")
    assert "tokenizer_class" not in read(tmp_path / "result" / "tokenizer_config.json")
    assert load_tokenizer(tmp_path / "result").get_vocab() == load_tokenizer(source).get_vocab()


def test_of_the_new_form_it_stays_in_the_new_form(tmp_path):
    source = write_source(tmp_path / "source")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "new")
    words = load_tokenizer(tmp_path / "new")
    save_pretrained(load_model(source), words, tmp_path / "result")
    assert read(tmp_path / "result" / "tokenizer_config.json") == read(
        tmp_path / "new" / "tokenizer_config.json"
    )
