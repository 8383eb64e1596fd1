"""Every JSON file of a model folder, mutated: it loads as the same model, or is refused in one of our errors,
and in time."""

import copy
import json
import random
import shutil
import time

import pytest
import torch

from repsft_fast.errors import ModelError
from repsft_fast.models import load_model, load_tokenizer, save_pretrained
from tests.helpers.sources import VOCABULARY, write, write_source
from tests.models.test_guards import shard

SECONDS = 30
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json",
    "processor_config.json", "preprocessor_config.json",
)  # fmt: skip
OLD_FILES = ("vocab.json",)  # read where there is no tokenizer.json
ADAPTER_FILES = ("adapter_config.json",)
FILES = (*MODEL_FILES, *TOKENIZER_FILES, *OLD_FILES, *ADAPTER_FILES)
# Of which a value changed at random can be refused: the rest is kept as it is, for others to read.
REFUSED_OFTEN = (*MODEL_FILES, *TOKENIZER_FILES[:4], *OLD_FILES, *ADAPTER_FILES)
VALUES = (
    None, True, -1, 0, 1.5, 10**9, 10**30, 1e308, float("nan"), float("inf"), "", "310", "\ud7ff\0", [], {}, [[]], {"a": {}},
    [1, "2"], ["x"] * 50, "../x", "a" * 10_000,
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with all of them, adapters beside it."""
    folder = write_source(tmp_path_factory.mktemp("source") / "model")
    shard(folder)
    write(folder / "added_tokens.json", {"<tool>": VOCABULARY - 2, "<think>": VOCABULARY - 1})
    write(folder / "chat_template.json", {"chat_template": "{{ messages[0].content }}"})
    write(folder / "processor_config.json", {"processor_class": "LlavaProcessor", "image_token": "<tool>"})
    write(
        folder / "preprocessor_config.json",
        {"image_processor_type": "CLIPImageProcessor", "size": {"height": 8}},
    )
    letters = [chr(i) for i in range(33, 33 + VOCABULARY - 2)]
    write(
        folder / "vocab.json",
        {"<|endoftext|>": 0, "Ġ": 1, **{letter: i + 2 for i, letter in enumerate(letters)}},
    )
    (folder / "merges.txt").write_text("#version: 0.2\n")
    adapted = load_model(folder, lora={"rank": 2, "target_modules": ["q_proj"]})
    save_pretrained(adapted, None, folder.parent / "adapters")
    assert all((folder / name).is_file() for name in FILES if name not in ADAPTER_FILES)
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


class Attack:
    """Loads a copy of the folder with one file changed, and holds what loads against the original."""

    def __init__(self, source, folder, name):
        self.name, self.folder = name, shutil.copytree(source, folder / "model")
        self.adapters = shutil.copytree(source.parent / "adapters", folder / "adapters")
        if name in OLD_FILES:
            for file in (
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
                "added_tokens.json",
            ):
                (self.folder / file).unlink()
            write(self.folder / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
        self.file = (self.adapters if name in ADAPTER_FILES else self.folder) / name
        self.text = self.file.read_text()
        self.weights = {name: value.clone() for name, value in load_model(self.folder).state_dict().items()}
        self.config = load_model(self.folder, device="meta").config.to_dict()

    def load(self, text):
        """False where it is refused."""
        self.file.write_text(text, encoding="utf-8", errors="surrogatepass")
        begun = time.monotonic()
        try:
            if self.name in ADAPTER_FILES:
                load_model(self.folder, lora={"from": str(self.adapters)})
            elif self.name in MODEL_FILES:
                self.same_model(load_model(self.folder), text)
            else:
                load_tokenizer(self.folder)
        except ModelError:  # any other exception is what this looks for
            return False
        finally:
            assert time.monotonic() - begun < SECONDS, text
        return True

    def same_model(self, model, text):
        """Its weights are the file's; a key of its configuration that was changed has an effect, or is
        said."""
        for name, value in model.state_dict().items():
            assert torch.equal(value, self.weights[name]), (name, text)
        if self.name == "config.json":
            kept = self.config.keys() - {"transformers_version"}  # which is the library's own
            changed = {
                key for key, value in json.loads(text).items() if key in kept and value != self.config[key]
            }
            assert not changed or model.load_said or model.config.to_dict() != self.config, text


def attack(source, folder, name, times):
    """How many were refused of so many."""
    mounted, draw = Attack(source, folder, name), random.Random(name)
    assert mounted.load(mounted.text)
    return sum(not mounted.load(mutated(mounted.text, draw)) for _ in range(times))


@pytest.mark.parametrize("name", FILES)
def test_mutated(source, tmp_path, name):
    assert attack(source, tmp_path, name, 25) >= (4 if name in REFUSED_OFTEN else 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_mutated_at_length(source, tmp_path, name):
    assert attack(source, tmp_path, name, 300) > (40 if name in REFUSED_OFTEN else -1)
