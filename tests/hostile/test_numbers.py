"""Numbers that go wrong: no update is applied, the sample is named, the setting decides."""

import json

import pytest
import torch
from safetensors.torch import load_file

from repsft_fast import train
from repsft_fast.config import Config
from repsft_fast.errors import TrainingError
from repsft_fast.training import build as building
from repsft_fast.training import refusals, trainer
from repsft_fast.training.progress import Lasting, load_values, values_of
from repsft_fast.training.snapshots import Snapshots, closed_list
from tests.helpers import runs


@pytest.fixture
def poisoned(monkeypatch):
    """Every row that holds sample 3 gives NaN statistics and a NaN loss, whenever it is computed."""
    plain = building.build_model

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

    monkeypatch.setattr(building, "build_model", build_model)
    monkeypatch.setattr(building, "check_no_leak", lambda model, **_: None)


def test_stop_names_the_sample_and_leaves_a_result(tmp_path, poisoned):
    with pytest.raises(TrainingError, match=r"loss was not finite in .*train\.jsonl:4\b") as caught:
        train(runs.settings(tmp_path, log__every_updates=1))
    assert "no weight was changed" in str(caught.value)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["code"] == "nonfinite"
    assert result["success"] is False


def test_skip_goes_on_and_counts(tmp_path, poisoned):
    result = train(
        runs.settings(tmp_path, numbers__on_nonfinite="skip", budget__epochs=3, stop__token_accuracy=None)
    )
    assert result.more["vetoed"] == 3
    vetoed = [line for line in runs.metrics(tmp_path, "update") if line.get("vetoed")]
    assert len(vetoed) == 3
    assert all(line["objective"] is None for line in vetoed), "a NaN is said, never shown as a number"
    assert all(
        torch.isfinite(value).all() for value in load_file(tmp_path / "run" / "model.safetensors").values()
    )


def test_a_vetoed_update_changes_nothing_in_the_epochs_counts(tmp_path, poisoned):
    train(runs.settings(tmp_path, numbers__on_nonfinite="skip", budget__epochs=1, stop__token_accuracy=None))
    updates = runs.metrics(tmp_path, "update")
    epoch = runs.metrics(tmp_path, "epoch")[0]
    assert epoch["total"] == sum(line["total"] for line in updates if not line.get("vetoed"))
    assert epoch["total"] < sum(line["total"] for line in updates)


# Runs in which no update is finite any more ---------------------------------------------------------------


def never_again(monkeypatch, after, harm=lambda parts: None):
    """From this update on (of all branches) every loss is NaN; `harm` is done to the parts when it begins."""
    plain = trainer.train_step

    def step(parts, update):
        if parts.lasting.all_work.updates < after:
            plain(parts, update)
            return
        if parts.lasting.all_work.updates == after:
            harm(parts)
        with runs.losses_not_finite(parts.model):
            plain(parts, update)

    monkeypatch.setattr(trainer, "train_step", step)


ENDLESS = {"budget__epochs": 1000, "stop__token_accuracy": None, "log__every_updates": 1}


def test_skipping_without_end_ends_with_a_stated_number(tmp_path, monkeypatch):
    monkeypatch.setattr(refusals, "_NAMED_IN_A_ROW", 1)
    never_again(monkeypatch, 7)
    words = r"64 updates in a row were refused.*every weight is finite.*lower optim\.lr"
    with pytest.raises(TrainingError, match=words) as caught:
        train(runs.settings(tmp_path, numbers__on_nonfinite="skip", **ENDLESS))
    assert caught.value.exit_code == 1
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["code"], result["success"], result["updates"]) == (
        "nonfinite",
        False,
        7 + refusals.REFUSED_IN_A_ROW,
    )


def test_it_names_the_weight_that_is_not_finite(tmp_path, monkeypatch):
    def harm(parts):
        with torch.no_grad():
            dict(parts.model.named_parameters())["model.layers.1.mlp.up_proj.weight"][3, 5] = float("inf")

    monkeypatch.setattr(refusals, "REFUSED_IN_A_ROW", 3)
    never_again(monkeypatch, 2, harm)
    with pytest.raises(
        TrainingError, match=r"the weight model\.layers\.1\.mlp\.up_proj\.weight is not finite"
    ):
        train(runs.settings(tmp_path, numbers__on_nonfinite="skip", **ENDLESS))


def test_going_back_without_end_ends_though_every_checkpoint_is_a_new_safe_state(tmp_path, monkeypatch):
    """The state gone back to is renewed by every checkpoint, so that its own count never ends the run."""
    monkeypatch.setattr(refusals, "REFUSED_IN_A_ROW", 12)
    monkeypatch.setattr(refusals, "_NAMED_IN_A_ROW", 0)
    never_again(monkeypatch, 3)
    settings = {**ENDLESS, "checkpoint__every_updates": 1, "numbers__on_nonfinite": "revert"}
    with pytest.raises(TrainingError, match="12 updates in a row were refused"):
        train(runs.settings(tmp_path, **settings))


def test_one_finite_update_begins_the_count_anew(tmp_path, poisoned, monkeypatch):
    """Sample 3 spoils one update in six: never two in a row."""
    monkeypatch.setattr(refusals, "REFUSED_IN_A_ROW", 2)
    result = train(
        runs.settings(tmp_path, numbers__on_nonfinite="skip", budget__epochs=4, stop__token_accuracy=None)
    )
    assert result.more["vetoed"] == 4


def test_the_count_outlives_a_roll_back_and_a_resumption(tmp_path):
    """A policy that goes back cannot make the number start again; a checkpoint of before there was a count
    can be loaded."""
    parts = building.build(Config.of(runs.settings(tmp_path)))
    state = closed_list(parts)
    moments = Snapshots(parts, state, 1, weights_only=False)
    moments.take("here")
    parts.lasting.refused_in_a_row, parts.lasting.spiked = 5, 2
    moments.restore("here")
    assert (parts.lasting.refused_in_a_row, parts.lasting.spiked) == (5, 2)
    saved = values_of(parts.progress, parts.lasting)
    assert (saved["refused_in_a_row"], saved["spiked"]) == (5, 2)
    fresh = Lasting()
    older = {name: value for name, value in saved.items() if name not in ("refused_in_a_row", "spiked")}
    load_values(older, fresh)
    assert (fresh.refused_in_a_row, fresh.spiked) == (0, 0)
    moments.close()


@pytest.mark.parametrize("policy", ["skip", "revert"])
def test_a_run_whose_every_update_was_refused_is_no_success(policy, tmp_path, monkeypatch):
    """It ends before the stated number: nothing was trained, and the weights would be those it began with."""
    never_again(monkeypatch, 0)
    monkeypatch.setattr("repsft_fast.training.recovery.MAX_REVERTS", 100)
    monkeypatch.setattr(refusals, "REFUSED_IN_A_ROW", 10 if policy == "revert" else 64)
    settings = {**ENDLESS, "budget__epochs": 1, "numbers__on_nonfinite": policy}
    with pytest.raises(
        TrainingError, match="nothing was trained" if policy == "skip" else "10 updates in a row"
    ):
        train(runs.settings(tmp_path, **settings))
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_weights_that_are_not_finite_at_the_end_are_no_result(tmp_path, monkeypatch):
    """The last update's numbers were finite and what it made of a weight is not: no next update sees it."""
    plain = trainer.train_step

    def step(parts, update):
        plain(parts, update)
        if parts.lasting.all_work.updates == 5:
            with torch.no_grad():
                next(parts.model.parameters())[0, 0] = float("nan")

    monkeypatch.setattr(trainer, "train_step", step)
    with pytest.raises(TrainingError, match=r"the trained weight model\.embed_tokens\.weight is not finite"):
        train(runs.settings(tmp_path, budget__epochs=1, stop__token_accuracy=None))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["code"] == "nonfinite"
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_checkpoint_whose_weights_are_not_finite_is_never_gone_on_from(tmp_path, monkeypatch):
    """Nor does it push the good ones out: the one before is resumed from, though two newer ones were
    saved."""
    plain = trainer.train_step

    def step(parts, update):
        if parts.lasting.all_work.updates == 6:
            raise RuntimeError("ended by the test")
        plain(parts, update)
        if parts.lasting.all_work.updates == 3:
            with torch.no_grad():
                # a token that no sample has, and the head's row is tied
                next(parts.model.parameters())[60, 0] = float("nan")

    changes = {"numbers__on_nonfinite": "skip", "checkpoint__every_updates": 1, "checkpoint__keep_last": 2}
    settings = runs.settings(tmp_path, **{**ENDLESS, **changes, "budget__epochs": 2})
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", step)
        with pytest.raises(RuntimeError, match="ended by the test"):
            train(settings)
    train(settings, resume=True)
    assert runs.metrics(tmp_path, "resume")[0]["update"] == 3
