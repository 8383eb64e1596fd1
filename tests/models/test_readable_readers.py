"""Every family's result, read by the transformers that reads its source: this one, and 4.57.6 in an
environment of its own."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from repsft_fast.models import load_model, load_tokenizer, save_pretrained
from tests.helpers.architectures import KINDS, tiny_config
from tests.helpers.sources import DIFFERENCES, differences, write


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_source_of_this_transformers_comes_back_as_it_was(kind, tmp_path):
    try:
        config = tiny_config(kind)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    except Exception as error:
        pytest.skip(f"no tiny configuration is known: {error}")
    if size > 5_000_000:
        pytest.skip(f"{size:,} parameters")
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    model = loaded(tmp_path / "source")
    if isinstance(model, Exception):
        pytest.skip(f"not loaded: {model}")
    save_pretrained(model, None, tmp_path / "result")
    assert differences(tmp_path / "source", tmp_path / "result") == set()


def loaded(source):
    """The model, packed or one sample a row; the error that refuses it both ways: which, is not told here."""
    found = None
    for packed in (True, False):
        try:
            return load_model(source, packed=packed)
        except Exception as error:
            found = error
    return found


OLD = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2")
READER = Path(__file__).with_name("old_reader.py")
# What 4 writes and 5 does not load whole: there is nothing to be saved.
NOT_WHOLE = {
    "cpmant": "the head is tied to more rows than it has in 5, and drawn",
    "gemma3n_text": "per_layer_model_projection is renamed on the way in, and drawn",
}


@pytest.fixture(scope="module")
def old_python(tmp_path_factory):
    """transformers 4.57.6 laid over what runs the tests: torch and the rest are found there."""
    folder = tmp_path_factory.mktemp("old")
    venv.create(folder, with_pip=False, symlinks=True)
    own = next(folder.glob("lib/python3*/site-packages"))
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "--target",
        str(own),
        *OLD,
    ]
    made = subprocess.run(install, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no environment with {OLD[0]}: {made.stderr.strip().splitlines()[-1][:200]}")
    here = next(path for path in sys.path if path.endswith("site-packages"))
    (own / "here.pth").write_text(f"import site; site.addsitedir({here!r})")
    return folder / "bin" / "python"


def old(python, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    made = subprocess.run(
        [python, READER, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert made.returncode == 0, made.stderr[-2000:]
    return json.loads(made.stdout)


def old_settings(kind):
    """A tiny configuration in keys that transformers 4 knows."""
    left = {"transformers_version", "dtype", "rope_parameters", "architectures", "experts_implementation"}

    def kept(values):
        return {
            name: kept(value) if isinstance(value, dict) else value
            for name, value in values.items()
            if name not in left and not name.startswith("_")
        }

    config = tiny_config(kind)
    return {**kept(config.to_diff_dict()), "model_type": config.model_type}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_transformers_4_reads_every_family(old_python, tmp_path):
    """Sources made by 4.57.6 itself, loaded and saved here, read by it again: logits, tokens, names and
    settings."""
    settings = {}
    for kind in KINDS:
        try:
            settings[kind] = old_settings(kind)
        except Exception:  # no tiny configuration is known
            continue
    write(tmp_path / "configs.json", settings)
    made = old(old_python, "make", tmp_path / "configs.json", tmp_path / "models")
    sources = [kind for kind, found in made.items() if found == "made"]
    assert len(sources) > 100, made
    refused = {}
    for kind in sources:
        source, result = (tmp_path / "models" / kind / name for name in ("source", "result"))
        model = loaded(source)
        if isinstance(model, Exception):
            refused[kind] = str(model)
        if kind in refused or kind in NOT_WHOLE:
            continue
        save_pretrained(model, load_tokenizer(source), result)
        unlike = differences(source, result) - {("model.safetensors", None)}
        named = {key for key in unlike if not key[0].endswith(".safetensors")} - DIFFERENCES.keys()
        assert not named, (kind, named)
    found = old(old_python, "read", tmp_path / "models")
    assert len(found) > 80, refused
    wrong = {}
    for kind, seen in found.items():
        if seen.get("source"):  # 4.57.6 does not read what it wrote
            continue
        if seen.get("unlike", ["error"]) or seen["difference"]:
            wrong[kind] = seen
    assert not wrong, f"{len(wrong)} of {len(found)}: {wrong}"
    print(f"{len(found)} of {len(sources)} families are equal")
