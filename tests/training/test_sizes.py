"""What a run says it will hold."""

import torch

from repsft_fast.config import Config
from repsft_fast.distributed import World
from repsft_fast.report.format import size
from repsft_fast.training import sizes
from repsft_fast.training.build import model_on_meta
from tests.helpers import runs
from tests.helpers.fake_runs import MODELS, fake_run

GPU = World(0, 1, 0, torch.device("cuda", 0))


def of(folder, **changes):
    config = Config.of(runs.settings(folder, **changes))
    return config, sizes.sizes_of(config, model_on_meta(config, None))


def test_the_line_names_each_part(tmp_path):
    config, found = of(tmp_path, model__compute_dtype="bfloat16")
    line = sizes.told(config, found, GPU, 512, chunk_bytes=1000)
    held = found.model.held("adamw")
    for words in (
        f"weights {size(held.weights)}, masters {size(held.masters)}, gradients {size(held.gradients)}",
        f"moments {size(held.moments)}; a snapshot {size(held.snapshot)}",
        "a row of 512 tokens keeps",
        "(checkpointing none; selective",
        "1000 B of logits at once",
        f"{size(sizes.fullest(config, found, 1, 512, chunk_bytes=1000).total)} at the fullest moment",
    ):
        assert words in line, (words, line)


def test_masters_are_named_where_there_are_some(tmp_path):
    config, found = of(tmp_path, model__compute_dtype="bfloat16", model__param_dtype="bfloat16")
    assert "masters" not in sizes.told(config, found, GPU, 512)
    config, found = of(tmp_path, model__compute_dtype="bfloat16")
    two = World(0, 2, 0, torch.device("cuda", 0))
    assert "masters" not in sizes.told(config, found, two, 512), "several ranks cast what they gather"


def test_what_cannot_be_counted_is_said(tmp_path, monkeypatch):
    def raises(*_, **__):
        raise NotImplementedError("read numbers")

    monkeypatch.setattr(sizes, "saved_per_token", raises)
    config, found = of(tmp_path)
    assert found.saved is None
    line = sizes.told(config, found, GPU, 512)
    assert "activations come on top and cannot be counted here (NotImplementedError read numbers" in line
    assert sizes.fullest(config, found, 1, 512) is None


def test_adapters_are_counted(tmp_path):
    full, adapters = of(tmp_path)[1], of(tmp_path, model__lora={"rank": 4})[1]
    assert adapters.saved is not None, adapters.why
    assert adapters.saved.layer < full.saved.layer


def test_a_run_on_a_gpu_says_it_before_its_first_update(tmp_path, monkeypatch):
    with fake_run(monkeypatch, tmp_path, MODELS["qwen3"]) as (_, parts):
        (line,) = [text for text in parts.data.warnings if text.startswith("memory: ")]
        held = parts.sizes.model.held("adamw")
        assert f"weights {size(held.weights)}, masters {size(held.masters)}" in line
        assert f"{parts.model.loss_settings.chunk_bytes}" not in line
        assert "at the fullest moment of an update" in line


def test_a_number_in_the_place_of_auto(tmp_path):
    config = Config.of(runs.settings(tmp_path, batch__row_tokens="auto"))
    assert sizes.with_row_tokens(config, 640).batch.row_tokens == 640
    assert config.batch.row_tokens == "auto"
