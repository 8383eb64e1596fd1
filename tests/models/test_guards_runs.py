"""Model folders at the command line: on one rank, on two and in a dry run the same refusal, exit 2, no
traceback, no wait."""

import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from repsft_fast import cli
from tests.helpers import runs
from tests.helpers.ranks import _free_port
from tests.helpers.sources import change, write, write_source

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
)


def of_weights(make):
    def changed(folder):
        weights = make(load_file(folder / WEIGHTS))
        save_file(
            {name: value.clone() for name, value in weights.items()},
            folder / WEIGHTS,
            metadata={"format": "pt"},
        )

    return changed


def spoilt(weights):
    weights["model.norm.weight"][3] = float("nan")
    return weights


def index_outside(folder):
    weights = load_file(folder / WEIGHTS)
    shutil.move(folder / WEIGHTS, folder.parent / "outside.safetensors")
    write(folder / INDEX, {"metadata": {}, "weight_map": dict.fromkeys(weights, "../outside.safetensors")})


def pickles_only(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def adapters(folder):
    for file in list(folder.iterdir()):
        file.unlink()
    write(
        folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "owner/base", "r": 4}
    )


# Each: what is done to a folder, the words that the refusal has.
WRONG = {
    "prefix": (
        of_weights(lambda w: {f"module.{k}": v for k, v in w.items()}),
        "its names carry module. of DataParallel",
    ),
    "one layer more": (
        lambda folder: change(folder / CONFIG, num_hidden_layers=3),
        "more layers than the file (layer 2)",
    ),
    "one name less": (
        of_weights(lambda w: {k: v for k, v in w.items() if "norm" not in k}),
        "weights are missing in it",
    ),
    "another shape": (
        lambda folder: change(folder / CONFIG, intermediate_size=80),
        "[48, 32] in the file, [80, 32] by the",
    ),
    "pointer": (lambda folder: (folder / WEIGHTS).write_text(POINTER), "is a pointer of Git LFS"),
    "pointer for a tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text(POINTER),
        "is a pointer of Git LFS",
    ),
    "page for a config": (
        lambda folder: (folder / CONFIG).write_text("<!DOCTYPE html>"),
        "config.json: is a web page",
    ),
    "pickles": (pickles_only, "its weights are pickles (pytorch_model.bin)"),
    "adapters": (adapters, "holds adapters, no model"),
    "outside": (index_outside, "leads outside its folder"),
    "quantised": (
        lambda folder: change(folder / CONFIG, quantization_config={"quant_method": "gptq"}),
        "quantised (gptq)",
    ),
    "not a number": (of_weights(spoilt), "1 numbers in 1 of its weights are not finite"),
    "generation": (
        lambda folder: change(folder / "generation_config.json", max_new_tokens="5"),
        "generation_config.json: Typ",
    ),
    "encoder": (
        lambda folder: change(folder / CONFIG, is_causal=False),
        "looks at later tokens too (is_causal: false)",
    ),
}
READ_TO_BE_SEEN = {"not a number"}  # a dry run reads no weights


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture
def folder(source, tmp_path):
    return shutil.copytree(source, tmp_path / "model")


def settings(folder, **changes):
    made = runs.settings(folder.parent, **{"budget__epochs": 1, "stop__token_accuracy": None, **changes})
    return {**made, "model": {"path": str(folder)}}


def alone(made, folder, capfd, *flags):
    """(Exit code, stderr) of `repsft train` in this process."""
    file = folder.parent / "settings.yaml"
    write(file, made)  # JSON is YAML
    code = cli.main(["train", "--config", str(file), *flags])
    return code, " ".join(capfd.readouterr().err.split())


def on_two_ranks(server, made, folder):
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    children = []
    for rank in range(2):
        own = folder.parent / f"rank{rank}"
        own.mkdir(exist_ok=True)
        env = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        children.append(
            server.spawn("tests.helpers.run_jobs:command_line", {"settings": made, "folder": str(own)}, env)
        )
    return [child.wait(60) for child in children]


def refused_once(code, said, words):
    assert code == 2, said
    assert words in said
    assert said.count("error model.path") == 1
    assert "Traceback" not in said


@pytest.mark.parametrize("name", WRONG)
def test_a_run_and_its_dry_run_are_refused_alike(name, folder, capfd):
    spoil, words = WRONG[name]
    spoil(folder)
    made, began = settings(folder), time.monotonic()
    refused_once(*alone(made, folder, capfd), words)
    assert not (folder.parent / "run" / "metrics.jsonl").exists()
    if name in READ_TO_BE_SEEN:
        assert alone(made, folder, capfd, "--dry-run")[0] == 0
    else:
        refused_once(*alone(made, folder, capfd, "--dry-run"), words)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("name", WRONG)
def test_two_ranks_are_refused_as_one(name, server, folder):
    """Rank 0 tells it, also of weights that it alone has read; none waits for another."""
    spoil, words = WRONG[name]
    spoil(folder)
    began = time.monotonic()
    outcomes = on_two_ranks(server, settings(folder), folder)
    assert [outcome.exit_code for outcome in outcomes] == [2, 2], outcomes[0].output + outcomes[1].output
    refused_once(2, " ".join(outcomes[0].output.split()), words)
    assert outcomes[1].output == ""
    assert time.monotonic() - began < 30


def test_the_same_folder_unspoilt_trains(server, folder, capfd):
    """The control of all the refusals above."""
    made = settings(folder)
    assert alone(made, folder, capfd, "--dry-run")[0] == 0
    code, said = alone(made, folder, capfd)
    assert code == 0, said
    shutil.rmtree(folder.parent / "run")
    assert [outcome.exit_code for outcome in on_two_ranks(server, made, folder)] == [0, 0]
