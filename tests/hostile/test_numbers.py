"""Numbers that go wrong: no update is applied, the sample is named, the setting decides."""

import json

import pytest
import torch
from safetensors.torch import load_file

from repsft_fast import train
from repsft_fast.errors import TrainingError
from repsft_fast.training import parts as parts_module
from tests import runs


@pytest.fixture
def poisoned(monkeypatch):
    """Every row that holds sample 3 gives NaN statistics and a NaN loss, whenever it is computed."""
    plain = parts_module.build_model

    def build_model(*given):
        model = plain(*given)
        loss_of = model.loss

        def loss(row):
            value, stats = loss_of(row)
            if 3 in row.samples:
                value = value * float("nan")
            return value, stats

        model.loss = loss
        model.loss_is_patched = True
        return model

    monkeypatch.setattr(parts_module, "build_model", build_model)
    monkeypatch.setattr(parts_module, "check_no_leak", lambda model, **_: None)


def test_stop_names_the_sample_and_leaves_a_result(tmp_path, poisoned):
    with pytest.raises(TrainingError, match=r"loss was not finite in .*train\.jsonl:4\b") as caught:
        train(runs.settings(tmp_path, log__every_updates=1))
    assert "no weight was changed" in str(caught.value)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["code"] == "nonfinite"
    assert result["success"] is False


def test_skip_goes_on_and_counts(tmp_path, poisoned):
    result = train(runs.settings(tmp_path, numbers__on_nonfinite="skip", budget__epochs=3, stop__token_accuracy=None))
    assert result.more["vetoed"] == 3
    vetoed = [line for line in runs.metrics(tmp_path, "update") if line.get("vetoed")]
    assert len(vetoed) == 3
    assert all(line["objective"] is None for line in vetoed), "a NaN is said, never shown as a number"
    assert all(torch.isfinite(value).all() for value in load_file(tmp_path / "run" / "model.safetensors").values())


def test_a_vetoed_update_changes_nothing_in_the_epochs_counts(tmp_path, poisoned):
    train(runs.settings(tmp_path, numbers__on_nonfinite="skip", budget__epochs=1, stop__token_accuracy=None))
    updates = runs.metrics(tmp_path, "update")
    epoch = runs.metrics(tmp_path, "epoch")[0]
    assert epoch["total"] == sum(line["total"] for line in updates if not line.get("vetoed"))
    assert epoch["total"] < sum(line["total"] for line in updates)
