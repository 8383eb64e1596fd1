"""batch.pack: false: architectures whose layers cannot keep the documents of a row apart train whole runs,
one sample a row."""

import pytest
import torch
from safetensors.torch import load_file

from repsft_fast.errors import ModelError
from repsft_fast.training.trainer import train
from tests.helpers import runs
from tests.helpers.architectures import tiny_config

SMALL = {"stop__token_accuracy": None, "budget__epochs": 2, "data__validation_fraction": 0.25}


def weights(folder, **changes):
    assert train(runs.settings(folder, **{**SMALL, **changes})).success
    return load_file(folder / "run" / "model.safetensors")


def of(name):
    config = tiny_config(name).to_dict()
    return {key: value for key, value in config.items() if key != "transformers_version"}


def test_packing_does_not_change_what_an_update_is(tmp_path):
    packed, apart = weights(tmp_path / "packed"), weights(tmp_path / "apart", batch__pack=False)
    assert packed.keys() == apart.keys()
    for name, value in packed.items():
        torch.testing.assert_close(value, apart[name], rtol=0, atol=2e-5)
    for kind in ("epoch", "eval"):
        lines = [runs.metrics(tmp_path / where, kind) for where in ("packed", "apart")]
        assert [line.get("loss") for line in lines[0]] == pytest.approx(
            [line.get("loss") for line in lines[1]], rel=1e-4
        )


@pytest.mark.parametrize("name", ["stablelm", "qwen3_next", "mamba", "gptj"])
def test_what_cannot_be_packed_says_so_and_trains_alone(name, tmp_path, capsys):
    with pytest.raises(ModelError, match=r"does not take packed rows \(.*\); set batch.pack: false"):
        train(runs.settings(tmp_path / "packed", model__config=of(name), **SMALL))
    assert weights(tmp_path / "apart", model__config=of(name), batch__pack=False)
    losses = [line["loss"] for line in runs.metrics(tmp_path / "apart", "epoch")]
    assert losses[-1] < losses[0]


def test_a_run_that_was_killed_goes_on_alike(tmp_path):
    changes = {"batch__pack": False, "model__config": of("qwen3_next"), "checkpoint__every_updates": 3}
    expected = weights(tmp_path / "whole", **changes)

    def killed(work):
        if work.updates == 5:
            raise RuntimeError("killed")

    settings = runs.settings(tmp_path / "killed", **{**SMALL, **changes})
    with pytest.raises(RuntimeError, match="killed"):
        train(settings, on_update=killed)
    assert train(settings, resume=True).success
    found = load_file(tmp_path / "killed" / "run" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
