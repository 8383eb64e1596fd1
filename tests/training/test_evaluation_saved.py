"""The saved model's own token accuracy: that of the folder that is written, and no part of the run."""

import json

import pytest
import torch

from repsft_fast import train
from repsft_fast.config import Config
from repsft_fast.training import evaluation
from repsft_fast.training.build import build
from repsft_fast.training.reporter import Reporter
from tests.helpers import runs
from tests.training.test_trainer_ranks import start

SHORT = {"budget__epochs": 30, "stop__token_accuracy": None}


def read_again(folder, chosen=None):
    """(right, of) trained tokens by transformers' own forward pass over the saved folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "run").eval()
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    correct = total = 0
    for row in rows if chosen is None else [rows[i] for i in chosen]:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            said = model(ids).logits[0, :-1].argmax(-1)
        correct += int((said == labels)[labels != -100].sum())
        total += int((labels != -100).sum())
    return correct, total


def counts(folder):
    return json.loads((folder / "run" / "result.json").read_text())["more"]["saved_token_accuracy"]


def test_is_that_of_the_folder(tmp_path):
    result = train(runs.settings(tmp_path, **SHORT))
    found = counts(tmp_path)
    assert (found["correct"], found["total"]) == read_again(tmp_path)
    assert found["samples"] == 24
    assert result.saved_token_accuracy == found["correct"] / found["total"] != result.token_accuracy


def test_of_the_best_validation_where_that_is_saved(tmp_path):
    """Not of the last state, which has gone on to memorise."""
    train(
        runs.settings(
            tmp_path, **{**SHORT, "budget__epochs": 12}, data__validation_fraction=0.25, evaluate__keep="best",
            evaluate__every_epochs=1,
        )
    )  # fmt: skip
    found = counts(tmp_path)
    last = runs.metrics(tmp_path, "epoch")[-1]
    assert found["correct"] / found["total"] < last["token_accuracy"]
    assert found["total"] == last["total"]


def test_of_adapters(tmp_path):
    result = train(runs.settings(tmp_path, **SHORT, model__lora={"rank": 4, "alpha": 8, "dropout": 0.5}))
    assert 0 < result.saved_token_accuracy < 1
    assert counts(tmp_path)["samples"] == 24


def test_two_ranks_say_what_one_says(server, tmp_path):
    settings = runs.settings(tmp_path, **SHORT)
    assert [child.wait(90).exit_code for child in start(server, settings)] == [0, 0]
    found = counts(tmp_path)
    assert (found["correct"], found["total"]) == read_again(tmp_path)


def test_at_most_200_samples_fixed_by_the_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "SAVED_SAMPLES", 7)
    drawn = []
    for seed in (1, 1, 2):
        parts = build(Config.of({**runs.settings(tmp_path), "run": {"folder": str(tmp_path), "seed": seed}}))
        scored, plain = [], parts.scorer
        parts.scorer = lambda store, samples, plain=plain, scored=scored: (
            scored.extend(samples) or plain(store, samples)
        )
        assert evaluation.saved_accuracy(parts, Reporter(parts)).samples == 7
        drawn.append(scored)
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 7


def test_draws_nothing_and_counts_as_no_work(tmp_path):
    parts = build(Config.of(runs.settings(tmp_path, model__lora={"rank": 4, "alpha": 8, "dropout": 0.5})))
    reporter, stream, work = Reporter(parts), torch.get_rng_state(), parts.lasting.evaluated.values()
    evaluation.saved_accuracy(parts, reporter)
    assert torch.equal(torch.get_rng_state(), stream)
    assert parts.lasting.evaluated.values() == work
    assert all(parameter.grad is None for parameter in parts.model.parameters())


def test_no_memory_for_it_costs_the_figure_and_not_the_run(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(evaluation.TeacherForced, "__call__", full)
    result = train(runs.settings(tmp_path, **SHORT))
    assert (result.success, result.saved_token_accuracy, counts(tmp_path)) == (True, None, None)
    assert any("own token accuracy is not known: out of" in n["text"] for n in runs.metrics(tmp_path, "note"))


@pytest.mark.parametrize(
    ("full", "reason"), [(0, "CUDA out of memory"), (1, "memory ran out on 1 of 2 ranks")]
)
def test_nor_where_one_of_several_ranks_has_none(full, reason, server, tmp_path):
    settings = runs.settings(tmp_path, **{**SHORT, "budget__epochs": 2})
    outcomes = [child.wait(90) for child in start(server, settings, **{f"rank{full}": {"full_at_end": True}})]
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes[0].output + outcomes[1].output
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (written["success"], written["saved_token_accuracy"], counts(tmp_path)) == (True, None, None)
    noted = [line["text"] for line in runs.metrics(tmp_path, "note")]
    assert f"the saved model's own token accuracy is not known: out of memory ({reason})" in noted
    assert read_again(tmp_path)[1], "the model is there"


def test_numbers_that_are_none_make_no_share(tmp_path):
    assert evaluation.Saved(3, 4, 1, nonfinite=0, seconds=0.1).token_accuracy == 0.75
    assert evaluation.Saved(3, 4, 1, nonfinite=1, seconds=0.1).token_accuracy is None
    assert evaluation.Saved(0, 0, 0, nonfinite=0, seconds=0.1).token_accuracy is None


class TestLooksAtTheModel:
    """Before a decay that a prediction begins, and never counted as training."""

    def test_are_of_the_model_at_the_epochs_end(self, tmp_path):
        """And change nothing: the same updates without looks end in the same weights."""
        settings = {"budget__epochs": 60, "optim__warmup_fraction": None, "optim__warmup_updates": 5}
        train(runs.settings(tmp_path, **settings, stop__token_accuracy=0.95))
        begun = runs.metrics(tmp_path, "decay")[0]
        seen = [line for line in runs.metrics(tmp_path, "epoch") if "own_token_accuracy" in line]
        assert "decaying now so that the finished model is predicted at " in begun["reason"]
        assert (
            f"{100 * seen[-1]['own_token_accuracy']:.2f} % after epoch {begun['epoch']:g}" in begun["reason"]
        )
        plain = {
            **settings,
            "budget__epochs": None,
            "budget__updates": begun["update"],
            "stop__token_accuracy": None,
        }
        other = tmp_path / "other"
        other.mkdir()
        (other / "train.jsonl").write_bytes((tmp_path / "train.jsonl").read_bytes())
        train(runs.settings(other, **plain, schedule__name="constant"))
        correct, total = read_again(other)
        assert seen[-1]["own_token_accuracy"] == correct / total

    def test_without_a_number_there_are_none(self, tmp_path):
        train(
            runs.settings(
                tmp_path, budget__epochs=60, stop__token_accuracy=0.95, stop__decay_token_accuracy=0.9
            )
        )
        assert not [line for line in runs.metrics(tmp_path, "epoch") if "own_token_accuracy" in line]
        assert "reached 90 %" in runs.metrics(tmp_path, "decay")[0]["reason"]

    def test_a_probe_is_the_look(self, tmp_path):
        settings = {"budget__epochs": 60, "stop__token_accuracy": 0.95, "stop__probe_samples": 12}
        train(runs.settings(tmp_path, **settings))
        lines = [line for line in runs.metrics(tmp_path, "epoch") if "own_token_accuracy" in line]
        assert lines
        assert all(line["own_token_accuracy"] == line["token_accuracy"] for line in lines)

    @pytest.mark.parametrize(
        ("samples", "tokens", "looked_at"),
        [
            (1600, 10**6, 200), (10**5, 10**8, 200), (800, 10**6, 100), (801, 10**6, 101), (400, 10**6, 50),
            (60, 10**6, 50), (30, 10**6, 30), (400, 1084, 200), (400, 4000, 100), (10, 0, 10),
        ],
    )  # fmt: skip
    def test_how_many_samples(self, samples, tokens, looked_at):
        assert evaluation.look_samples(samples, tokens) == looked_at
