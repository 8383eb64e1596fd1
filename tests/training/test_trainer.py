"""Whole runs of the trainer on a tiny model: how they end, what they leave behind, what they count."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from repsft_fast import train
from repsft_fast.config import Config
from repsft_fast.errors import ConfigError, DataError
from repsft_fast.training.build import build
from tests.helpers import runs


def test_stops_when_the_data_is_memorised_after_a_decay(tmp_path):
    result = train(runs.settings(tmp_path, budget__epochs=80))
    assert result.code == "token_accuracy"
    assert result.success
    assert result.token_accuracy < 0.97 <= result.saved_token_accuracy
    decay = runs.metrics(tmp_path, "decay")
    assert len(decay) == 1
    assert decay[0]["ends_at"] == result.updates < 80 * 6
    last = [line["lr"] for line in runs.metrics(tmp_path, "update")][-1]
    assert last < 1e-2, "the learning rate had not decayed when the run ended"
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written["reason"] == result.reason
    assert written["success"] is True


def test_epoch_accuracy_is_the_exact_ratio_of_the_update_counts(tmp_path):
    train(runs.settings(tmp_path, budget__epochs=2, stop__token_accuracy=None, log__every_updates=4))
    updates, epochs = runs.metrics(tmp_path, "update"), runs.metrics(tmp_path, "epoch")
    assert len(updates) == 12
    assert len(epochs) == 2
    for n, epoch in enumerate(epochs):
        mine = updates[6 * n : 6 * (n + 1)]
        assert epoch["total"] == sum(line["total"] for line in mine)
        assert epoch["correct"] == sum(line["correct"] for line in mine)
        assert epoch["token_accuracy"] == epoch["correct"] / epoch["total"]


@pytest.mark.parametrize(
    ("limit", "updates"), [({"updates": 7}, 7), ({"epochs": 1.5}, 9), ({"updates": 50, "epochs": 2}, 12)]
)
def test_the_budget_ends_the_run_at_the_update_it_names(tmp_path, limit, updates):
    settings = runs.settings(tmp_path, stop__token_accuracy=None)
    settings["budget"] = limit
    result = train(settings)
    assert result.updates == updates
    assert result.code == "budget"
    assert len(runs.metrics(tmp_path, "update")) == updates


def test_the_budget_in_tokens_is_not_passed_by_more_than_an_epoch_allows(tmp_path):
    settings = runs.settings(tmp_path, stop__token_accuracy=None, schedule__name="constant")
    settings["budget"] = {"tokens": 700}
    result = train(settings)
    assert 700 <= result.tokens < 700 + 4 * 20


def test_plateau_ends_the_run(tmp_path):
    settings = runs.settings(
        tmp_path,
        budget__epochs=50,
        stop__plateau_epochs=2,
        stop__plateau_min_delta=0.5,
        stop__token_accuracy=None,
    )
    result = train(settings)
    assert result.code == "plateau"
    assert result.epochs < 10


def test_a_probe_subset_judges_instead_of_the_training_pass(tmp_path):
    train(runs.settings(tmp_path, budget__epochs=2, stop__probe_samples=5))
    epochs = runs.metrics(tmp_path, "epoch")
    assert {line["accuracy_of"] for line in epochs} == {"probe"}
    trained = sum(line["total"] for line in runs.metrics(tmp_path, "update")) / len(epochs)
    assert epochs[0]["total"] < trained


def test_a_probe_measures_where_no_rule_reads_it(tmp_path):
    """At every epoch's end, and once at the run's end, which here lies amid an epoch."""
    result = train(
        runs.settings(
            tmp_path,
            budget__epochs=None,
            budget__updates=201,
            stop__token_accuracy=None,
            stop__probe_samples=12,
        )
    )
    epoch = runs.metrics(tmp_path, "epoch")[-1]
    assert (result.code, epoch["accuracy_of"]) == ("budget", "probe")
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written["token_accuracy"] == epoch["correct"] / epoch["total"]
    assert written["more"]["saved_token_accuracy"]["samples"] == 12
    assert written["more"]["saved_token_accuracy"]["total"] == epoch["total"]
    assert written["saved_token_accuracy"] != written["token_accuracy"], "three updates lie between them"


def test_the_folder_loads_with_from_pretrained_and_holds_what_was_trained(tmp_path):
    captured = {}
    settings = runs.settings(tmp_path, budget__epochs=1)
    train(settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    fresh = build(
        Config.of({**settings, "run": {**settings["run"], "folder": str(tmp_path / "other")}})
    ).model
    captured = {name: value for name, value in fresh.state_dict().items()}
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, captured[name])]
    assert len(moved) == len(captured), "some weights were never trained, or not saved"


def test_the_same_settings_give_the_same_run_bit_for_bit(tmp_path):
    for name in ("a", "b"):
        train(runs.settings(tmp_path / name, budget__epochs=2))
    a, b = (runs.metrics(tmp_path / name, "update") for name in ("a", "b"))
    assert [(x["loss"], x["grad_norm"], x["correct"]) for x in a] == [
        (x["loss"], x["grad_norm"], x["correct"]) for x in b
    ]
    weights = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "run").state_dict() for name in ("a", "b")
    ]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_another_seed_gives_another_run(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        train(runs.settings(tmp_path / name, budget__epochs=1, run__seed=seed))
    a, b = (runs.metrics(tmp_path / name, "update") for name in ("a", "b"))
    assert [x["loss"] for x in a] != [x["loss"] for x in b]


def test_keep_best_saves_the_weights_with_the_lowest_validation_loss(tmp_path):
    settings = runs.settings(
        tmp_path, budget__epochs=12, stop__token_accuracy=None, evaluate__keep="best", evaluate__every_epochs=1,
        data__validation_fraction=0.25, optim__lr=3e-2,
    )  # fmt: skip
    result = train(settings)
    losses = [line["loss"] for line in runs.metrics(tmp_path, "evaluation")]
    assert min(losses) < losses[-1], "the test needs a run that overfits"
    assert result.validation_loss == min(losses)
    saved = {
        **settings,
        "model": {"path": str(tmp_path / "run")},
        "run": {**settings["run"], "folder": str(tmp_path / "again")},
    }
    parts = build(Config.of(saved))
    again = float(parts.validation(parts.model).by_task(1).mean("loss")[0])
    assert again == pytest.approx(min(losses), rel=1e-5)


def test_a_used_folder_is_refused_and_left_alone(tmp_path):
    settings = runs.settings(tmp_path, budget__updates=2)
    train(settings)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="holds another run"):
        train(settings)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_run_that_never_began_leaves_its_folder_free(tmp_path):
    settings = runs.settings(tmp_path, budget__updates=2)
    with pytest.raises(DataError, match="over-long"):
        train({**settings, "data": {**settings["data"], "max_tokens": 3}})
    assert train(settings).updates == 2


@pytest.mark.parametrize(
    ("every", "updates"), [(2, [12, 24, 30]), (0.5, list(range(3, 31, 3))), (1.5, [9, 18, 27, 30])]
)
def test_validation_every_n_epochs_and_once_at_the_end(tmp_path, every, updates):
    settings = runs.settings(
        tmp_path, samples=30, data__validation_fraction=0.2, evaluate__every_epochs=every, budget__epochs=5,
        stop__token_accuracy=None,
    )  # fmt: skip
    train(settings)
    assert [line["update"] for line in runs.metrics(tmp_path, "evaluation")] == updates


@pytest.mark.parametrize(
    ("every", "budget", "updates"),
    [(2, 15, [12, 15]), (2, 12, [12]), (0.5, 15, [3, 6, 9, 12, 15]), (1, 1, [1])],
)
def test_validation_at_an_end_amid_an_epoch(tmp_path, every, budget, updates):
    settings = runs.settings(
        tmp_path, samples=30, data__validation_fraction=0.2, evaluate__every_epochs=every, budget__epochs=None,
        budget__updates=budget, stop__token_accuracy=None,
    )  # fmt: skip
    train(settings)
    assert [line["update"] for line in runs.metrics(tmp_path, "evaluation")] == updates


def test_one_sample_at_256_epochs_is_memorised(tmp_path):
    result = train(runs.settings(tmp_path, samples=1, budget__epochs=256, stop__token_accuracy=None))
    assert (result.updates, result.epochs) == (256, 256)
    last = runs.metrics(tmp_path, "epoch")[-1]
    assert last["correct"] == last["total"] > 0


def test_lora_trains_adapters_only_and_saves_a_peft_folder(tmp_path):
    settings = runs.settings(tmp_path, budget__epochs=2, model__lora={"rank": 4, "alpha": 8})
    parts = build(Config.of(settings))
    assert all("lora_" in name for name, p in parts.model.named_parameters() if p.requires_grad)
    train(settings)
    assert (tmp_path / "run" / "adapter_config.json").exists()


@pytest.mark.parametrize("name", ["sgd", "adamw8bit"])
def test_optimizers_by_name_learn(tmp_path, name):
    lr = {"sgd": 0.3, "adamw8bit": 1e-2}[name]
    train(
        runs.settings(tmp_path, budget__epochs=4, optim__name=name, optim__lr=lr, stop__token_accuracy=None)
    )
    losses = [line["loss"] for line in runs.metrics(tmp_path, "epoch")]
    assert losses[-1] < losses[0] - 0.1


def test_the_weights_are_on_the_disk_before_the_result_says_success(tmp_path, monkeypatch):
    seen = []
    sync = os.fsync

    def noting(fd):
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        seen.append((path.name, (tmp_path / "run" / "result.json").exists()))
        return sync(fd)

    monkeypatch.setattr(os, "fsync", noting)
    train(runs.settings(tmp_path, samples=8, budget__epochs=1))
    assert ("model.safetensors", False) in seen
