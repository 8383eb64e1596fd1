"""Every JSON file of a model folder, mutated: it loads, or is refused in one of our errors, and never takes long."""

import copy
import json
import random
import shutil
import time

import pytest
from transformers import AutoModelForCausalLM

from repsft_fast.errors import ModelError
from repsft_fast.models import load_model, load_tokenizer
from tests import tiny
from tests.models.test_door import shard

SECONDS = 30
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
VALUES = (
    None, True, -1, 0, 1.5, 10**9, 10**30, 1e308, float("nan"), float("inf"), "", "310", "\ud7ff\0", [], {}, [[]], {"a": {}},
    [1, "2"], ["x"] * 50, "../x", "a" * 10_000,
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("source")
    AutoModelForCausalLM.from_config(tiny.config("llama")).save_pretrained(folder)
    shard(folder)
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
    assert all((folder / name).is_file() for name in (*MODEL_FILES, *TOKENIZER_FILES))
    return folder


def places(value, path=()):
    """Every place in a JSON value, as the keys that lead to it."""
    found = [path]
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            found += places(value[key], (*path, key))
    return found


def mutated(text, draw):
    """Text with one value replaced, one taken out, or some bytes of it changed."""
    kind = draw.choice(("replace", "replace", "replace", "remove", "bytes", "cut"))
    if kind == "cut":
        return text[: draw.randrange(len(text))]
    if kind == "bytes":
        at = draw.randrange(len(text))
        return text[:at] + draw.choice('{}[]",:0-\0é') * draw.choice((1, 1, 3)) + text[at + 1 :]
    value = copy.deepcopy(json.loads(text))
    path = draw.choice(places(value))
    if not path:
        return json.dumps(draw.choice(VALUES))
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    if kind == "remove":
        del holder[path[-1]]
    else:
        holder[path[-1]] = draw.choice(VALUES)
    return json.dumps(value)


def attack(source, folder, name, times):
    """How many were refused of so many."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    text, draw, refusals = (source / name).read_text(), random.Random(name), 0
    for _ in range(times):
        made = mutated(text, draw)
        (folder / name).write_text(made, encoding="utf-8")
        begun = time.monotonic()
        try:
            if name in TOKENIZER_FILES:
                load_tokenizer(folder)
            else:
                load_model(folder)
        except ModelError:  # any other exception is what this looks for
            refusals += 1
        assert time.monotonic() - begun < SECONDS, made
    return refusals


@pytest.mark.parametrize("name", MODEL_FILES + TOKENIZER_FILES)
def test_mutated(source, tmp_path, name):
    assert attack(source, tmp_path, name, 40) > 5


@pytest.mark.slow
@pytest.mark.parametrize("name", MODEL_FILES + TOKENIZER_FILES)
def test_mutated_at_length(source, tmp_path, name):
    assert attack(source, tmp_path, name, 300) > 40
