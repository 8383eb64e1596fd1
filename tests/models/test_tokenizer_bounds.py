"""Tokenizers that would work without end: refused by their files, before a library reads them; public ones
pass."""

import json

import pytest

from repsft_fast.errors import ModelError
from repsft_fast.models import load_tokenizer
from repsft_fast.models.tokenizer_bounds import MOST_ADDED, MOST_SPECIAL, check_bounds
from tests.helpers.sources import write_source

DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
# As in tokenizer.json of SentencePiece models, of BERT and of T5.
PUBLIC = (
    {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
                                         {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
    {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True},
    {"type": "Sequence", "normalizers": [{"type": "Precompiled", "precompiled_charsmap": "AA=="}, {"type": "NFKC"},
                                         {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}]},
    None, {}, "x", [], {"type": "Replace"}, {"type": "Sequence", "normalizers": None},
)  # fmt: skip


@pytest.mark.parametrize("normalizer", PUBLIC)
def test_public_ones_and_what_only_a_library_can_judge(normalizer):
    check_bounds(
        {"normalizer": normalizer}, {"extra_ids": 100, "offset": 103, "model_max_length": 10**30}, "where"
    )


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Sequence", "normalizers": [DOUBLE] * 60},
        {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [DOUBLE] * 4}] * 2},
        {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 1000},
        {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a" * 1000}] * 3},
    ],
)
def test_normalizers_that_make_a_text_longer_and_longer(normalizer):
    with pytest.raises(
        ModelError, match=r"where tokenizer\.json: its normalizers make a text over 100 times longer"
    ):
        check_bounds({"normalizer": normalizer}, {}, "where")


@pytest.mark.parametrize(
    ("file", "settings", "words"),
    [
        (
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 2000}},
            {},
            "normalizer: has more parts",
        ),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}] * 2000}},
            {},
            "pre_tokenizer: has more",
        ),
        (
            {"post_processor": {"type": "TemplateProcessing", "single": [{}] * 2000}},
            {},
            "post_processor: has more parts",
        ),
        ({"added_tokens": [{}] * (MOST_ADDED + 1)}, {}, "tokenizer.json: added_tokens are more than"),
        (
            {},
            {"added_tokens_decoder": dict.fromkeys(range(MOST_ADDED + 1))},
            "tokenizer_config.json: added_tokens_decoder",
        ),
        ({}, {"additional_special_tokens": ["x"] * (MOST_SPECIAL + 1)}, "additional_special_tokens are more"),
        ({}, {"extra_special_tokens": ["x"] * (MOST_SPECIAL + 1)}, "extra_special_tokens are more"),
        ({}, {"extra_ids": 10**9}, "tokenizer_config.json: extra_ids is more"),
        ({}, {"offset": 10**9}, "tokenizer_config.json: offset is more"),
    ],
)
def test_counts_that_no_tokenizer_has(file, settings, words):
    with pytest.raises(ModelError, match=words):
        check_bounds(file, settings, "where")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("head_dim", 10**9, "head_dim: is wider than any head"),
        ("num_labels", 10**8, "num_labels: is more than any model has"),
        ("id2label", {str(n): "x" for n in range(20_001)}, "id2label: has more entries than any model's"),
        ("layer_types", ["full_attention"] * 20_001, "layer_types: has more entries"),
    ],
)
def test_a_tokenizer_is_not_read_beside_a_configuration_without_end(tmp_path, name, value, words):
    """transformers reads config.json for the tokenizer's class, lists and all."""
    folder = write_source(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(ModelError, match=rf"tokenizer\.path config\.json {words}"):
        load_tokenizer(folder)


def test_a_folder_with_one_is_refused(tmp_path):
    folder = write_source(tmp_path / "model")
    file = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(
        json.dumps({**file, "normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 60}})
    )
    with pytest.raises(ModelError, match=r"tokenizer\.path tokenizer\.json: its normalizers"):
        load_tokenizer(folder)


def model(**changes):
    return {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "dropout": None} | changes}


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (model(vocab={"a": 0, "b": 4 * 10**9}), r"its vocab has 2 entries, and an id far beyond that"),
        (model(dropout=0.1), r"its dropout cuts a text by chance.*\"dropout\": null"),
        ({"model": {"vocab": {"a": 0}, "dropout": 1}}, r"its dropout"),
    ],
)
def test_ids_far_beyond_the_entries_and_dropout(file, words):
    with pytest.raises(ModelError, match=words):
        check_bounds(file, {}, "where")


@pytest.mark.parametrize(
    "file",
    [model(), model(dropout=0.0), model(vocab={"a": 0, "b": 10**6}), model(vocab={}), {"model": []},
     {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "dropout": 0.1}}, model(vocab={"a": "0"})],
)  # fmt: skip
def test_holes_as_real_ones_have_and_dropout_that_does_nothing(file):
    check_bounds(file, {}, "where")
