"""What a folder's files may be before a library reads them, and that all a library raises is one error of
ours."""

import json
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from repsft_fast.errors import ModelError
from repsft_fast.models import config_of, load_model, load_tokenizer
from repsft_fast.models.guards import bounded_building, library, machine_memory, quiet

READERS = (lambda folder: load_model(folder), lambda folder: load_model(folder, device="meta"))
SETTINGS = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "vocab_size": 97,
}


def rewrite(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(folder, match):
    for read in READERS:
        with pytest.raises(ModelError, match=match):
            read(folder)


def shard(folder, names=("a.safetensors", "b.safetensors")):
    """Two files with an index, in place of the one."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = [dict(list(weights.items())[:10]), dict(list(weights.items())[10:])]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name, metadata={"format": "pt"})
    write_index(folder, {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part})
    return parts


def write_index(folder, named):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": named}))


def test_a_pipe_a_folder_a_device_and_a_link_to_nothing_are_not_waited_for(folder):
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        kept = (folder / name).read_bytes()
        made = (
            (lambda file: os.mkfifo(file), "is a named pipe"),
            (lambda file: file.mkdir(), "is a folder"),
            (lambda file: file.symlink_to("/dev/zero"), "is a device"),
            (lambda file: file.symlink_to("nothing"), "No such file"),
        )
        for make, word in made:
            (folder / name).unlink()
            make(folder / name)
            refused(folder, rf"^model\.path {name}: .*{word}")
            (folder / name).rmdir() if word == "is a folder" else (folder / name).unlink()
            (folder / name).write_bytes(kept)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "holds a list"),
        ("{", "is no JSON"),
        ("[" * 100_000, "nested too deep"),
        ('{"a":' * 300 + "1" + "}" * 300, "nested over 100 deep"),
        ('{"eos_token_id": 1, "eos_token_id": 2}', "eos_token_id is there twice"),
        ('{"eos_token_id": {"a": 1}}', "eos_token_id is no token"),
    ],
)
def test_json_of_another_shape(folder, text, words):
    (folder / "generation_config.json").write_text(text)
    refused(folder, rf"^model\.path generation_config\.json: .*{words}")
    if words.startswith(("holds", "is no JSON", "nested")):
        (folder / "tokenizer_config.json").write_text(text)
        with pytest.raises(ModelError, match=rf"^tokenizer\.path tokenizer_config\.json: .*{words}"):
            load_tokenizer(folder)


def test_an_enormous_file_is_not_read(folder):
    with open(folder / "config.json", "ab") as file:
        file.truncate(2**27)  # a hole: takes no room
    refused(folder, r"^model\.path config\.json: is too large")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": "310"}, "(vocab_size|TypeError)"),
        ({"hidden_size": 30}, "(not a multiple|another shape)"),
        ({"intermediate_size": -5}, "negative"),
        ({"vocab_size": 10**18}, "overflow"),
        ({"num_hidden_layers": 10**9}, "more than any model has"),
        ({"num_labels": 10**9}, "more than any model has"),
        ({"model_type": ["llama"]}, "unhashable"),
        ({"dtype": "nonsense"}, "nonsense"),
        ({"rope_parameters": "x"}, "(rope_parameters|AttributeError)"),
    ],
)
def test_settings_no_model_has(folder, changes, words):
    begun = time.monotonic()
    rewrite(folder, **changes)
    refused(folder, rf"^model\.path.*: .*{words}")
    if isinstance(changes.get("model_type", ""), str) and changes.get("dtype") is None:
        with pytest.raises(ModelError, match=r"^model"):
            load_model({**SETTINGS, **changes})
    assert time.monotonic() - begun < 20


def test_weights_larger_than_the_machine_are_summed_before_they_are_made():
    assert machine_memory() > 2**28
    words = (
        r"its weights are 25\.6 TB in float32, of which .*\[100000000000, 64\] is 25\.6 TB; cpu has .* in all"
    )
    with pytest.raises(ModelError, match=rf"^model\.config: {words}"):
        load_model({**SETTINGS, "hidden_size": 64, "vocab_size": 10**11, "tie_word_embeddings": True})
    # sized for another machine
    assert load_model({**SETTINGS, "vocab_size": 10**9}, device="meta").lm_head.weight.is_meta


def test_building_is_bounded_in_time(monkeypatch):
    monkeypatch.setattr("repsft_fast.models.guards.SECONDS", -1.0)
    with pytest.raises(ModelError, match="takes over"), bounded_building("model.config", "x"):
        torch.nn.Linear(2, 2, device="meta")


@pytest.mark.parametrize(
    "method", ["bitsandbytes", "gptq", "awq", "fp8", "mxfp4", "compressed-tensors", "a new one", None]
)
def test_quantised_folders_are_called_that(folder, method):
    rewrite(folder, quantization_config={"quant_method": method, "bits": 4})
    refused(
        folder,
        rf"^model\.path: its weights are quantised \({method or 'unnamed'}\).*give the repository it was"
        r" quantised from",
    )


def test_adapters_are_called_that(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/x/base"}))
    refused(folder, "holds a model and adapters")
    (folder / "config.json").unlink()
    refused(folder, r"holds adapters, no model.*base \(/x/base\)(,| and) model\.lora\.from to this folder")


class TestIndex:
    @pytest.mark.parametrize("metadata", [None, [], "x", "absent"])
    def test_metadata_that_the_library_needs(self, folder, metadata):
        shard(folder)
        file = folder / "model.safetensors.index.json"
        named = json.loads(file.read_text())["weight_map"]
        file.write_text(
            json.dumps({"weight_map": named, **({} if metadata == "absent" else {"metadata": metadata})})
        )
        refused(folder, r"^model\.path model\.safetensors\.index\.json: has no metadata, expected an object")

    @pytest.mark.parametrize(
        "metadata", [{}, {"total_size": "12"}, {"total_size": 10**40}, {"total_size": None, "x": [1]}]
    )
    def test_metadata_says_nothing_of_the_weights(self, folder, metadata):
        shard(folder)
        file = folder / "model.safetensors.index.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "metadata": metadata}))
        assert load_model(folder).load_said == []

    def test_two_sets_of_weights(self, source, folder):
        shard(folder)
        shutil.copy(source / "model.safetensors", folder)
        refused(
            folder,
            r"^model\.path: it holds two sets of weights: model.safetensors, and a.safetensors, b.safetensors"
            r" named",
        )
        (folder / "a.safetensors").unlink()
        refused(folder, "two sets of weights")
        (folder / "b.safetensors").unlink()  # an index left behind
        assert load_model(folder).load_said == []

    def test_other_files_beside_the_weights(self, folder):
        """Mistral ships its own form beside; trainers leave their state."""
        for name in (
            "consolidated.safetensors",
            "optimizer.pt",
            "pytorch_model.bin",
            "original/consolidated.00.pth",
        ):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"x")
        assert load_model(folder).load_said == []

    def test_shards_load_as_one_file_does(self, source, folder):
        shard(folder)
        one, other = load_model(source), load_model(folder)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))

    @pytest.mark.parametrize("kind", ["up", "absolute", "link"])
    def test_nothing_outside_is_read(self, folder, kind):
        first, second = shard(folder)
        outside = folder.parent / "outside.safetensors"
        shutil.move(folder / "b.safetensors", outside)
        name = {"up": "../outside.safetensors", "absolute": str(outside), "link": "b.safetensors"}[kind]
        if kind == "link":
            (folder / name).symlink_to(outside)
        write_index(folder, dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, name))
        refused(folder, r"^model\.path model\.safetensors\.index\.json: .*leads outside")

    def test_a_folder_of_links_with_other_names_as_the_hubs_cache_is(self, source, folder):
        shard(folder)
        blobs, snapshot = folder.parent / "blobs", folder.parent / "snapshots" / "abc"
        blobs.mkdir()
        snapshot.mkdir(parents=True)
        for number, file in enumerate(sorted(folder.iterdir())):
            file.rename(blobs / str(number))
            (snapshot / file.name).symlink_to(f"../../blobs/{number}")
        assert load_model(snapshot).lm_head.weight.equal(load_model(source).lm_head.weight)

    def test_a_folder_of_links_as_the_hubs_cache_makes_them(self, source, folder):
        shard(folder)
        links = folder.parent / "links"
        links.mkdir()
        for file in folder.iterdir():
            (links / file.name).symlink_to(file)
        assert load_model(links).lm_head.weight.equal(load_model(source).lm_head.weight)

    def test_files_that_are_not_there_or_not_of_it(self, folder):
        first, second = shard(folder)
        save_file({**second, "lm_head.weight": torch.zeros(97, 32)}, folder / "b.safetensors")
        assert "lm_head.weight" in first
        refused(folder, "lm_head.weight is in two files")
        save_file(dict(list(second.items())[1:]), folder / "b.safetensors")
        refused(folder, "1 of its 21 tensors are not in the file it names")
        (folder / "b.safetensors").unlink()
        refused(folder, "1 of its 2 files are not here, first b.safetensors")
        (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
        refused(folder, "has no weight_map")

    def test_a_weights_file_named_by_the_config_stays_inside(self, folder):
        shutil.move(folder / "model.safetensors", folder.parent / "x.safetensors")
        rewrite(folder, transformers_weights="../x.safetensors")
        refused(folder, "transformers_weights names no safetensors file of this folder")


def test_weights_cut_short(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        file.write_bytes(whole[:length])
        refused(folder, r"^model\.path model\.safetensors: .*damaged or cut short")


def test_a_distributed_checkpoint_is_not_read(folder):
    (folder / "__0_0.distcp").write_bytes(b"")
    refused(folder, "distributed checkpoint")


class Panic(BaseException):
    pass


Panic.__name__ = "PanicException"  # what tokenizers' Rust raises


@pytest.mark.parametrize(
    "error",
    [RecursionError("deep"), MemoryError(), KeyError("x"), Exception("plain"), Panic("index"), SystemExit(3)],
)
def test_every_exception_of_a_library_is_ours(error):
    with (
        pytest.raises(ModelError, match=r"^here: .*got there; do that$"),
        library("here", "there", "do that"),
    ):
        raise error
    with pytest.raises(KeyboardInterrupt), library("here", "there"):
        raise KeyboardInterrupt


def test_transformers_says_nothing_and_speaks_again_afterwards(folder, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet():
        logging.get_logger("transformers").critical("spoken")
    load_model(folder)
    assert capfd.readouterr().err == ""
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_a_gguf_file_cut_short(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 40)
    for read in (load_model, config_of, load_tokenizer):
        with pytest.raises(ModelError, match=r"^(model|tokenizer)\.path"):
            read(tmp_path / "m.gguf")


@pytest.mark.parametrize("device", ["tpu", "gpu", "cuda:-1"])
def test_a_device_that_torch_does_not_know(folder, device):
    with pytest.raises(ModelError, match=rf"^device: .*got {device}; give cpu, cuda or meta"):
        load_model(folder, device=device)


def test_a_device_that_is_not_here(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"^device: torch finds no CUDA device, got cuda"):
        load_model(folder, device="cuda")
