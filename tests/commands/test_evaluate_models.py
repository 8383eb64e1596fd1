"""What MODEL and --base of `repsft eval` may name, and which settings are left out for each."""

import json

import pytest

from repsft_fast.commands.evaluate_models import base, evaluated, held_as_computed, settings_file
from repsft_fast.config import Config
from repsft_fast.errors import ConfigError

RUN = {
    "run.folder": "somewhere", "data.train": "a.jsonl", "budget.epochs": 1, "model.path": "owner/base",
    "model.gguf_file": "x.gguf", "model.compile": True, "tokenizer.path": "owner/other",
    "model.activation_checkpointing": "full",
}  # fmt: skip


def folder(tmp_path, *files, **settings):
    for name in files:
        (tmp_path / name).write_text("{}")
    config = Config.of({**RUN, **settings})
    if "run.yaml" in files:
        (tmp_path / "run.yaml").write_text(config.to_yaml())
    return str(tmp_path), config


@pytest.mark.parametrize("made", [{"model.lora": {"merge": True}}, {"model.resize_vocabulary": True}])
def test_a_runs_folder_is_its_saved_model_as_it_was_saved(tmp_path, made):
    path, config = folder(tmp_path, "run.yaml", "config.json", "tokenizer.json", **made)
    found = evaluated(path, config)
    model = found.config.model
    assert (found.name, model.path, model.gguf_file, model.lora, model.resize_vocabulary) == (
        "model",
        path,
        None,
        None,
        False,
    )
    assert (model.compile, model.activation_checkpointing) == (False, "none")
    assert found.config.tokenizer.path is None  # its own
    assert settings_file(path) == str(tmp_path / "run.yaml")


def test_a_folder_without_a_tokenizer_takes_the_one_that_is_named(tmp_path):
    path, config = folder(tmp_path, "config.json")
    assert evaluated(path, config).config.tokenizer.path == "owner/other"


def test_adapters_go_on_the_runs_base_or_on_what_their_file_names(tmp_path):
    path, config = folder(tmp_path, "run.yaml", "adapter_config.json", **{"model.lora": {"rank": 4}})
    found = evaluated(path, config).config.model
    assert (found.path, found.gguf_file, getattr(found.lora, "from")) == ("owner/base", "x.gguf", path)
    (tmp_path / "run.yaml").unlink()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/else"}))
    assert evaluated(path, config).config.model.path == "owner/else"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"base_model_name_or_path": null}', "x"])
def test_adapters_that_do_not_say_whose_are_refused(tmp_path, text):
    path, config = folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ConfigError, match="does not say which model the adapters are of"):
        evaluated(path, config)


def test_a_run_without_a_model_says_how_to_get_it(tmp_path):
    path, config = folder(tmp_path, "run.yaml")
    with pytest.raises(ConfigError, match=r"is a run's folder without a model.*repsft export"):
        evaluated(path, config)


def test_a_hub_id_or_a_file_is_taken_as_it_is(tmp_path):
    _, config = folder(tmp_path)
    for name in ("owner/name", "package:llm/x.gguf"):
        assert evaluated(name, config).config.model.path == name


@pytest.mark.parametrize("name", ["https://example.org/x", "$NOT_SET_AT_ALL/x"])
def test_what_is_no_path_is_refused(tmp_path, name):
    _, config = folder(tmp_path)
    with pytest.raises(ConfigError, match=r"^MODEL: "):
        evaluated(name, config)
    with pytest.raises(ConfigError, match=r"^--base: "):
        base(name, str(tmp_path), config)


@pytest.mark.parametrize(
    ("settings", "device", "held"),
    [
        ({}, "cpu", "auto"),
        ({}, "cuda", "bfloat16"),  # as training computes there, and not in the fp32 that masters are held in
        ({"model.compute_dtype": "float32"}, "cuda", "float32"),
        ({"model.compute_dtype": "bfloat16"}, "cpu", "bfloat16"),
        ({"model.param_dtype": "float32"}, "cuda", "float32"),
    ],
)
def test_weights_are_held_in_what_they_are_computed_in(settings, device, held):
    config = Config.of({**RUN, **settings})
    assert held_as_computed(config, device).model.param_dtype == held


class TestBase:
    def test_auto_is_what_the_run_began_with(self, tmp_path):
        path, config = folder(tmp_path, "run.yaml", "config.json", **{"model.lora": {"rank": 4}})
        found = base("auto", path, config).config
        assert (found.model.path, found.model.gguf_file, found.model.lora) == ("owner/base", "x.gguf", None)
        assert found.tokenizer.path == "owner/other"

    def test_of_a_run_that_went_on_from_adapters_they_are_part_of_the_base(self, tmp_path):
        path, config = folder(tmp_path, "run.yaml", "config.json", **{"model.lora": {"from": "adapters"}})
        assert getattr(base("auto", path, config).config.model.lora, "from") == "adapters"

    def test_it_is_not_known_without_a_run_or_of_random_weights(self, tmp_path):
        path, config = folder(tmp_path, "config.json")
        with pytest.raises(ConfigError, match=r"nobody knows its base.*--base FOLDER"):
            base("auto", path, config)
        path, config = folder(tmp_path, "run.yaml", "config.json", **{"model.init": "random"})
        with pytest.raises(ConfigError, match="began with random weights"):
            base("auto", path, config)

    def test_another_model_may_be_named(self, tmp_path):
        path, config = folder(tmp_path, "config.json")
        found = base("owner/another", path, config)
        assert (found.name, found.config.model.path, found.config.model.gguf_file) == (
            "base",
            "owner/another",
            None,
        )
