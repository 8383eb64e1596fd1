"""Non-finite numbers that are reverted, memory that runs out: what changes, what does not, and what is
said."""

import weakref

import pytest
import torch

from repsft_fast import train
from repsft_fast.config import Config
from repsft_fast.errors import TrainingError
from repsft_fast.training import build as building
from repsft_fast.training import recovery, trainer
from repsft_fast.training.snapshots import closed_list
from tests.helpers import run_jobs, runs

NEVER_STOPS = {"stop__token_accuracy": None, "budget__epochs": 3}


@pytest.fixture
def ends(monkeypatch):
    """The weights at the end of every run."""
    found = []
    finish = trainer.finish

    def at_the_end(run):
        found.append({name: p.detach().clone() for name, p in run.parts.model.named_parameters()})
        return finish(run)

    monkeypatch.setattr(trainer, "finish", at_the_end)
    return found


def at_call(monkeypatch, calls, happening):
    """`happening(parts, update, plain)` takes the place of train_step's n-th call for every n in `calls` (0,
    1, …)."""
    plain, count = trainer.train_step, 0

    def step(parts, update):
        nonlocal count
        count += 1
        if count - 1 in calls:
            happening(parts, update, plain)
        else:
            plain(parts, update)

    monkeypatch.setattr(trainer, "train_step", step)


def poisoned(parts, update, plain):
    with runs.losses_not_finite(parts.model):
        plain(parts, update)


def test_a_revert_goes_back_to_the_epochs_start_and_passes_the_update_over(tmp_path, monkeypatch):
    """6 updates an epoch; the third of the second is refused, noticed after the fourth: updates 7 and 8 are
    made again."""
    at_call(monkeypatch, {8}, poisoned)
    result = train(
        runs.settings(tmp_path, numbers__on_nonfinite="revert", log__every_updates=10, **NEVER_STOPS)
    )
    reverts = runs.metrics(tmp_path, "revert")
    assert [(line["update"], line["from"], line["passed_over"]) for line in reverts] == [(6, 10, [[0, 1, 2]])]
    assert result.updates == 18, "the budget is updates, whatever was passed over"
    assert result.more["work"]["updates"] == 18 + 4
    assert result.more["vetoed"] == 1
    epochs = runs.metrics(tmp_path, "epoch")
    assert epochs[1]["total"] < epochs[0]["total"]


def test_after_a_revert_the_run_is_one_that_never_met_the_update(tmp_path, monkeypatch, ends):
    """Bit for bit, counters of the whole run aside: a run that passes the update over from the start."""
    from repsft_fast.training.recovery import Recovery

    settings = {"numbers__on_nonfinite": "revert", "log__every_updates": 3, **NEVER_STOPS}
    with monkeypatch.context() as patch:
        at_call(patch, {8}, poisoned)
        train(runs.settings(tmp_path / "reverted", **settings))
    monkeypatch.setattr(
        Recovery, "is_passed_over", lambda self, cursor: (cursor.epoch, cursor.update) == (1, 2)
    )
    train(runs.settings(tmp_path / "never", **settings))
    reverted, never = ends
    assert all(torch.equal(reverted[name], never[name]) for name in never)


def test_two_bad_updates_in_one_epoch_are_both_passed_over(tmp_path, monkeypatch):
    """They are bad whenever they are made: the second revert must not forget the first."""
    plain = trainer.train_step

    def step(parts, update):
        bad = (update.cursor.epoch, update.cursor.update) in {(1, 2), (1, 4)}
        poisoned(parts, update, plain) if bad else plain(parts, update)

    monkeypatch.setattr(trainer, "train_step", step)
    result = train(
        runs.settings(tmp_path, numbers__on_nonfinite="revert", log__every_updates=1, **NEVER_STOPS)
    )
    assert [line["passed_over"] for line in runs.metrics(tmp_path, "revert")] == [[[0, 1, 2]], [[0, 1, 4]]]
    assert (result.updates, result.more["vetoed"]) == (18, 2)


def test_a_run_that_is_never_finite_again_ends_with_the_reason(tmp_path, monkeypatch):
    at_call(monkeypatch, set(range(3, 100)), poisoned)
    with pytest.raises(TrainingError, match="went back 8 times"):
        train(
            runs.settings(
                tmp_path, numbers__on_nonfinite="revert", log__every_updates=1, **NEVER_STOPS, samples=80
            )
        )
    assert '"nonfinite"' in (tmp_path / "run" / "result.json").read_text()


def out_of_memory_in(place, rows=2):
    """Memory runs out in the forward pass of the `rows`-th row, in its backward pass, or in the optimizer."""

    def happening(parts, update, plain):
        loss, step, seen = parts.model.loss, parts.optimizer.step, []

        def full(*_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")

        def failing(row):
            seen.append(row)
            if place == "forward" and len(seen) == rows:
                full()
            value, stats = loss(row)
            torch.rand(3)  # dropout draws from this stream
            if place == "backward" and len(seen) == rows:
                value.register_hook(full)
            return value, stats

        parts.model.loss = failing
        if place == "step":
            parts.optimizer.step = full
        before = closed_list(parts).hash()
        try:
            plain(parts, update)
        finally:
            parts.model.loss, parts.optimizer.step = loss, step
            assert place == "step" or len(seen) == rows
            assert closed_list(parts).hash() == before
            assert all(p.grad is None for p in parts.model.parameters())
            assert float(parts.ledger.open_loss()) == 0.0

    return happening


@pytest.mark.parametrize("place", ["forward", "backward", "step"])
def test_out_of_memory_changes_nothing_and_says_what_to_lower(place, tmp_path, monkeypatch):
    at_call(monkeypatch, {7}, out_of_memory_in(place, rows=1))
    words = "half an update ahead" if place == "step" else "nothing was changed"
    pattern = (
        rf"update 8: out of memory \(CUDA out of memory\); .*{words}.*lower batch.row_tokens from 64 to 32"
    )
    with pytest.raises(TrainingError, match=pattern):
        train(runs.settings(tmp_path, **NEVER_STOPS))
    assert '"out_of_memory"' in (tmp_path / "run" / "result.json").read_text()


def test_out_of_memory_where_rows_cannot_be_shorter_names_other_ways(tmp_path, monkeypatch):
    at_call(monkeypatch, {1}, out_of_memory_in("forward", rows=1))
    with pytest.raises(
        TrainingError, match=r"longest sample needs that: set model\.activation_checkpointing"
    ):
        train(runs.settings(tmp_path, batch__row_tokens=19, **NEVER_STOPS))


@pytest.mark.parametrize(
    ("compute", "rel", "fsdp"),
    [("float32", 1e-5, False), ("bfloat16", 0.01, False), ("bfloat16", 0.01, True)],
    ids=["fp32", "masters", "FSDP2"],
)
def test_a_retry_gives_the_same_run_in_shorter_rows(compute, rel, fsdp, tmp_path, monkeypatch):
    """Not to the bit: other chunks of rows."""
    monkeypatch.setattr(building, "ONE_RANK_FSDP", fsdp)
    settings = {
        "model__compute_dtype": compute,
        "batch__samples": 8,
        "batch__bucket_tokens": 8,
        "numbers__on_out_of_memory": "retry",
        "log__every_updates": 1,
        **NEVER_STOPS,
    }
    plain = train(runs.settings(tmp_path / "plain", **settings))
    at_call(monkeypatch, {4}, out_of_memory_in("backward", rows=2))
    retried = train(runs.settings(tmp_path / "retried", **settings))
    assert (retried.updates, retried.code) == (plain.updates, plain.code)
    pairs = zip(
        runs.metrics(tmp_path / "plain", "update"), runs.metrics(tmp_path / "retried", "update"), strict=True
    )
    for one, other in pairs:
        assert (one["total"], one["update"], one["lr"]) == (other["total"], other["update"], other["lr"])
        assert other["loss"] == pytest.approx(one["loss"], rel=rel)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=10 * rel)
    assert any("made again in rows of 32" in note for note in run_jobs.notes(tmp_path / "retried" / "run"))
    assert retried.more["work"]["slots"] != plain.more["work"]["slots"]


def test_after_out_of_memory_the_run_is_resumed_with_the_rows_that_were_named(tmp_path, monkeypatch):
    settings = runs.settings(tmp_path, batch__samples=8, checkpoint__every_updates=100, **NEVER_STOPS)
    with monkeypatch.context() as patch:
        at_call(patch, {4}, out_of_memory_in("forward", rows=2))
        with pytest.raises(TrainingError, match="from 64 to 32"):
            train(settings)
    settings["batch"]["row_tokens"] = 32
    result = train(settings, resume=True)
    assert result.updates == 9
    assert runs.metrics(tmp_path, "resume")[0]["update"] == 4


def test_a_retry_finds_the_memory_of_the_pass_that_failed_free(tmp_path, monkeypatch):
    """Whatever is made before the update is made again: the error's frames would hold every activation."""
    held, found, plain = [], [], recovery.warm_up

    def happening(parts, update, step):
        loss = parts.model.loss

        def failing(row):
            activation = loss(row)[0]
            held.append(weakref.ref(activation))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        parts.model.loss = failing
        try:
            step(parts, update)
        finally:
            parts.model.loss = loss

    def warmed(parts, say):
        found.extend(reference() for reference in held)
        return plain(parts, say)

    monkeypatch.setattr(recovery, "warm_up", warmed)
    at_call(monkeypatch, {1}, happening)
    settings = {"batch__samples": 8, "numbers__on_out_of_memory": "retry", **NEVER_STOPS}
    train(runs.settings(tmp_path, **settings))
    assert found == [None]


@pytest.mark.parametrize(("asked", "rows"), [(64, 32), (48, 32), (16, 16)])
def test_shorter_rows_that_are_asked_for_win_over_those_the_run_had_come_to(asked, rows, tmp_path):
    """What an error has named as the way out must be one."""
    parts = building.build(Config.of(runs.settings(tmp_path, batch__row_tokens=asked, samples=8)))
    parts.lasting.row_tokens = 32
    recovery.use_row_tokens(parts)
    assert parts.plan.row_tokens == recovery.row_tokens(parts) == rows


def test_out_of_memory_beside_gathered_weights_names_them(tmp_path, monkeypatch):
    monkeypatch.setattr(recovery, "gathered_stay", lambda model: True)
    at_call(monkeypatch, {1}, out_of_memory_in("forward", rows=1))
    with pytest.raises(TrainingError, match=r"or set distributed.keep_gathered: false"):
        train(runs.settings(tmp_path, **NEVER_STOPS))
