"""`evaluate.tasks` in a run: looks at due moments and at the end, kept in files, told, counted apart, and seen by
nothing else in the run."""

import json
import os
import signal
import time

import pytest
import torch

from repsft_fast import train
from repsft_fast.errors import ConfigError, DataError, TrainingError
from repsft_fast.evaluate import decode
from repsft_fast.state import state_hash
from repsft_fast.suite import results
from repsft_fast.training import trainer
from repsft_fast.training.reporter import Reporter
from repsft_fast.training.snapshots import closed_list
from tests.helpers import ranks, runs, spelling

TASKS = ("words", "choice")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return spelling.settings(tmp_path_factory.mktemp("spelling"))


def events(folder, kind):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def run(settings, tmp_path, name="run", **changes):
    """(the result, the hash of the closed list before the end, but for its counters)"""
    finish, found = trainer.finish, {}

    def ending(run):
        state = closed_list(run.parts)
        streams = {name: value for name, value in state.values().items() if name.startswith("rng/")}
        found["hash"] = state_hash(state.tensors(), streams)
        return finish(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "finish", ending)
        torch.manual_seed(0)
        result = train(settings, {"run.folder": str(tmp_path / name), **changes})
    return result, found["hash"]


def test_a_run_is_judged_at_due_moments_and_at_its_end(settings, tmp_path):
    changes = {
        "evaluate.tasks": spelling.tasks(settings),
        "evaluate.tasks_every_epochs": 20,
        "budget.epochs": 40,
    }
    result, _ = run(settings, tmp_path, **changes, **{"stop.token_accuracy": None})
    looks = events(tmp_path / "run", "tasks")
    assert [look["epoch"] for look in looks] == [20.0, 40.0, 40.0]  # the last: of the result
    assert set(looks[0]["tasks"]) == set(TASKS)
    assert looks[0]["engine"] == "loop"
    last = result.more["tasks"]["tasks"]["words"]
    assert (last["problems"], last["n"], last["acc"]["value"]) == (8, 1, 0.75)  # six words were trained on
    assert set(last["groups"]) == {"s", "m", "t", "n", "r", "p", "d"}
    lines = (
        (tmp_path / "run" / "tasks" / f"update-{result.updates:08d}" / "words.jsonl").read_text().splitlines()
    )
    told = [json.loads(line) for line in lines]
    assert told[0]["update"] == result.updates
    assert [(line["problem"], line["answer"], line["verdict"]) for line in told[1:3]] == [
        ("1", "nus", "right"), ("2", "pam", "right"),
    ]  # fmt: skip
    assert last["ended"]["value"] == sum(line["finished"] for line in told[1:]) / 8


def test_prompts_in_another_form_than_is_trained_on_are_told(settings, tmp_path):
    changes = {"evaluate.tasks": spelling.tasks(settings, chat=True), "budget.epochs": 1}
    run(settings, tmp_path, **changes)
    notes = [note["text"] for note in events(tmp_path / "run", "note")]
    words = "words: its prompts end in '<|end|><|assistant|>', and those that are trained on in ''"
    assert [note for note in notes if note.startswith(words)]
    run(settings, tmp_path, "plain", **{"evaluate.tasks": spelling.tasks(settings), "budget.epochs": 1})
    assert not [note["text"] for note in events(tmp_path / "plain", "note") if "another form" in note["text"]]


def test_without_a_pace_of_its_own_it_is_judged_once(settings, tmp_path):
    result, _ = run(settings, tmp_path, **{"evaluate.tasks": spelling.tasks(settings), "budget.epochs": 2})
    assert len(events(tmp_path / "run", "tasks")) == 1
    assert result.more["tasks"]["epoch"] == 2.0


def test_a_run_that_is_looked_at_equals_one_that_is_not(settings, tmp_path):
    plain, before = run(settings, tmp_path, name="plain", **{"budget.epochs": 6})
    tasks = spelling.tasks(settings, n=2)
    looked, after = run(
        settings, tmp_path, name="looked",
        **{"budget.epochs": 6, "evaluate.tasks": tasks, "evaluate.tasks_every_epochs": 0.5},
    )  # fmt: skip
    assert before == after
    assert len(events(tmp_path / "looked", "tasks")) > 6
    names = ("update", "loss", "grad_norm", "correct", "lr")
    lines, others = (
        [[line[key] for key in names] for line in events(tmp_path / name, "update")]
        for name in ("plain", "looked")
    )
    assert lines == others
    assert (plain.updates, plain.token_accuracy) == (looked.updates, looked.token_accuracy)


def on_ranks(world, settings, folder, changes):
    torch.manual_seed(0)
    train(settings, {"run.folder": folder, **changes})


def test_ranks_that_share_a_model_walk_in_step_and_find_what_one_finds(settings, tmp_path):
    """Several words end at different places: a rank that leaves a batch alone would leave the others waiting."""
    changes = {
        "evaluate.tasks": spelling.tasks(settings),
        "evaluate.tasks_every_epochs": 20,
        "budget.epochs": 40,
    }
    found = []
    for size in (1, 2):
        folder = tmp_path / str(size)
        ranks.run_ranks(on_ranks, settings, str(folder), changes, size=size)
        looks = events(folder, "tasks")
        found.append([
            (look["epoch"], look["tasks"]["words"]["acc"], look["tasks"]["words"]["lengths"], look["tasks"]["choice"]["accuracy"])
            for look in looks
        ])  # fmt: skip
    assert found[0] == found[1]
    assert len(found[0]) == 3


def full_on_one(world, settings, folder, changes):
    forward = decode.Loop.forward

    def full(self, ids, *arguments):
        if world.rank == 1 and ids.shape[1] == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, ids, *arguments)

    decode.Loop.forward = full
    result = train(settings, {"run.folder": folder, **changes})
    return result.success, result.more["troubles"]


def test_memory_that_runs_out_on_one_rank_ends_the_look_on_all(settings, tmp_path):
    changes = {"evaluate.tasks": spelling.tasks(settings), "budget.epochs": 2}
    (success, troubles), other = ranks.run_ranks(full_on_one, settings, str(tmp_path / "run"), changes)
    assert success
    assert other[0]
    assert any("evaluate.tasks: out of memory" in text for text in troubles)


def failing_on_main(world, settings, folder, changes):
    def fail(*_, **__):
        raise RuntimeError("no judge here")

    if world.is_main:
        results.judged_lines = fail
    with pytest.raises((RuntimeError, TrainingError)) as caught:
        train(settings, {"run.folder": folder, **changes})
    return str(caught.value)


def test_what_fails_where_it_is_judged_all_ranks_hear(settings, tmp_path):
    changes = {"evaluate.tasks": spelling.tasks(settings), "budget.epochs": 1}
    texts = ranks.run_ranks(failing_on_main, settings, str(tmp_path / "run"), changes)
    assert all("no judge here" in text for text in texts)


def test_what_goes_wrong_in_a_look_is_told_and_ends_nothing(settings, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(decode.Loop, "generate", fail)
    result, _ = run(settings, tmp_path, **{"evaluate.tasks": spelling.tasks(settings), "budget.epochs": 2})
    assert result.success
    assert result.more["tasks"] is None
    assert any("evaluate.tasks: RuntimeError: no such kernel" in text for text in result.more["troubles"])


def test_want_of_memory_in_a_look_says_what_to_lower(settings, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(decode.Loop, "generate", fail)
    result, _ = run(settings, tmp_path, **{"evaluate.tasks": spelling.tasks(settings), "budget.epochs": 2})
    assert result.success
    assert any("lower evaluate.batch_replies" in text for text in result.more["troubles"])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"evaluate.tasks": "missing.jsonl"}, DataError, "missing.jsonl"),
        ({"evaluate.engine": "vllm"}, ConfigError, "evaluate.engine: vllm reads a saved folder.*repsft eval"),
        ({"evaluate.tasks": {"x": {"source": "hellaswag", "layout": "lm_eval"}}}, ConfigError, "is lm-eval's"),
        ({"tokenizer.path": None}, ConfigError, "evaluate.tasks: are text, and there is no tokenizer"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_told_before_work_is_spent(settings, tmp_path, changes, error, words):
    given = {"evaluate.tasks": spelling.tasks(settings), "run.folder": str(tmp_path / "run"), **changes}
    if changes.get("tokenizer.path", "") is None:
        runs.write_samples(tmp_path / "ids.jsonl", 8)
        given["data.train"] = str(tmp_path / "ids.jsonl")
    with pytest.raises(error, match=words):
        train(settings, given)


def test_choices_longer_than_a_training_row_have_rows_of_their_own(settings, tmp_path):
    tasks = {"choice": spelling.tasks(settings)["choice"]}
    result, _ = run(
        settings, tmp_path, **{"evaluate.tasks": tasks, "batch.row_tokens": 16, "budget.epochs": 1}
    )
    assert result.more["troubles"] == []
    assert result.more["tasks"]["tasks"]["choice"]["problems"] == 3


def test_a_signal_cuts_a_look_short_and_the_run_is_saved(settings, tmp_path, monkeypatch):
    generate, asked = decode.Loop.generate, []

    def interrupted(self, requests, *arguments, **more):
        asked.append(len(requests))
        os.kill(os.getpid(), signal.SIGTERM)
        generate(self, requests, *arguments, **more)

    monkeypatch.setattr(decode.Loop, "generate", interrupted)
    changes = {
        "evaluate.tasks": spelling.tasks(settings),
        "evaluate.tasks_every_epochs": 1,
        "budget.epochs": 4,
    }
    torch.manual_seed(0)
    result = train(settings, {"run.folder": str(tmp_path / "run"), **changes})
    assert (result.code, result.updates, len(asked)) == ("terminated", 2, 1)
    notes = [note["text"] for note in events(tmp_path / "run", "note")]
    assert "evaluate.tasks: cut short by a signal" in notes
    monkeypatch.setattr(decode.Loop, "generate", generate)
    result = train(settings, {"run.folder": str(tmp_path / "run"), **changes}, resume=True)
    assert (result.success, result.updates) == (True, 8)
    assert [look["epoch"] for look in events(tmp_path / "run", "tasks")] == [2.0, 3.0, 4.0, 4.0]


def test_somebodys_folder_of_the_name_is_refused(settings, tmp_path):
    (tmp_path / "run" / "tasks").mkdir(parents=True)
    with pytest.raises(ConfigError, match="tasks"):
        train(settings, {"run.folder": str(tmp_path / "run"), "evaluate.tasks": spelling.tasks(settings)})
    result = train(
        settings, {"run.folder": str(tmp_path / "run"), "budget.epochs": 1}
    )  # without tasks it is no matter
    assert result.success


def test_the_result_is_asked_anew_though_its_update_was_looked_at_and_seconds_are_no_trainings(
    settings, tmp_path, monkeypatch
):
    """The result may be other weights than the last update's: nothing of the look before is taken for it."""
    generate, asked, apart = decode.Loop.generate, [], []

    def slow(self, requests, *arguments, **more):
        asked.append(len(requests))
        time.sleep(0.3)
        generate(self, requests, *arguments, **more)

    monkeypatch.setattr(decode.Loop, "generate", slow)
    monkeypatch.setattr(Reporter, "exclude_seconds", lambda self, seconds: apart.append(seconds))
    changes = {
        "evaluate.tasks": spelling.tasks(settings),
        "evaluate.tasks_every_epochs": 2,
        "budget.epochs": 2,
    }
    run(settings, tmp_path, **changes)
    assert asked == [8, 8]
    assert sum(seconds > 0.3 for seconds in apart) == 2
