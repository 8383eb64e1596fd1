"""An update that trains nothing, or not all, is an error, unless there was nothing to learn: then it is
counted."""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from repsft_fast import train
from repsft_fast.config import Config
from repsft_fast.errors import TrainingError
from repsft_fast.selftest.syncs import SyncCounter
from repsft_fast.training import build as building
from repsft_fast.training.build import build
from repsft_fast.training.step import train_step
from tests.helpers import ranks, run_jobs, runs

SHARDED = {"model__config": {**runs.MODEL, "tie_word_embeddings": False}, "model__compute_dtype": "bfloat16"}
NEVER_STOPS = {"stop__token_accuracy": None, "budget__epochs": 2, "log__every_updates": 2}


@pytest.fixture(autouse=True)
def no_group_is_left():
    yield
    ranks.leave_group()


def made(folder, **changes):
    parts = build(Config.of(runs.settings(folder, **changes)))
    return parts, parts.plan.epoch(0, 0)[0]


def held(parts):
    return [held.detach().clone() for held in parts.optimizer.held.values()]


def unreached(patch, model):
    """A loss whose backward pass goes to no weight."""
    plain, leaf = model.loss, torch.zeros((), requires_grad=True)
    patch.setattr(model, "loss", lambda row: (lambda loss, stats: (loss.detach() + leaf, stats))(*plain(row)))


@pytest.mark.parametrize("fsdp", [False, True], ids=["masters", "FSDP2"])
@pytest.mark.parametrize("changes", [{}, SHARDED, {**SHARDED, "batch__samples": 8, "batch__row_tokens": 32}])
def test_no_gradient_at_all_is_an_error_and_changes_nothing(changes, fsdp, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "ONE_RANK_FSDP", fsdp)
    parts, update = made(tmp_path, **changes)
    assert isinstance(parts.model, FSDPModule) == (fsdp and bool(changes))
    unreached(monkeypatch, parts.model)
    weights = held(parts)
    samples = len(update.samples)
    with pytest.raises(
        TrainingError,
        match=rf"^update 1: its {samples} samples have left no gradient.*; --resume goes on from the last",
    ):
        train_step(parts, update)
    assert all(map(torch.equal, held(parts), weights))


@pytest.mark.parametrize("fsdp", [False, True], ids=["masters", "FSDP2"])
@pytest.mark.parametrize("lora", [False, True])
def test_the_host_alone_is_asked(lora, fsdp, tmp_path, monkeypatch):
    """Frozen weights have no gradient and are not missed."""
    monkeypatch.setattr(building, "ONE_RANK_FSDP", fsdp)
    changes = {
        **SHARDED,
        **({"model__lora": {"rank": 4}} if lora else {}),
        "batch__samples": 8,
        "batch__row_tokens": 32,
    }
    parts, update = made(tmp_path, **changes)
    train_step(parts, update)
    assert len(update.ranks[0]) == 4
    with SyncCounter() as syncs:
        train_step(parts, update)
    assert syncs.total == 0, syncs.found
    assert len(list(parts.model.parameters())) > len(parts.optimizer.names) or not lora
    assert all(record.grad_norm > 0.0 for record in parts.ledger.read())


def test_a_backward_pass_that_fsdp_has_not_ended_is_an_error(tmp_path, monkeypatch):
    """What an error inside torch 2.11's leaves behind: the layers have gradients, embedding and head have
    none."""
    monkeypatch.setattr(building, "ONE_RANK_FSDP", True)
    parts, update = made(tmp_path, **SHARDED)
    parts.model._get_fsdp_state()._state_ctx.post_backward_final_callback_queued = True
    weights = held(parts)
    with pytest.raises(
        TrainingError, match=r"^update 1: FSDP2 has not ended its backward pass.*no weight was changed"
    ):
        train_step(parts, update)
    there = {name: p.grad is not None for name, p in parts.optimizer.names.items()}
    assert there["model.layers.0.mlp.up_proj.weight"], "not all: the norm alone would not tell"
    assert not there["model.embed_tokens.weight"]
    assert all(map(torch.equal, held(parts), weights))


def padding_alone(world, settings):
    """The samples of this rank's rows, and the norm of an update of one sample: an epoch's last may be
    short."""
    parts = build(Config.of(settings), world=world)
    update = parts.plan.epoch(0, 0)[-1]
    train_step(parts, update)
    return [len(row.samples) for row in update.ranks[world.rank]], parts.ledger.read()[0].grad_norm


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_rank_with_padding_alone_has_its_part(compute, tmp_path):
    settings = runs.settings(tmp_path, samples=3, batch__samples=2, model__compute_dtype=compute)
    one, other = ranks.run_ranks(padding_alone, settings)
    assert sorted([one[0], other[0]]) == [[0], [1]]
    assert one[1] == other[1] > 0.0


def zero_gradients(monkeypatch, of=lambda loss: loss.detach()):
    """Gradients are there and are zero; the loss is `of` the real one."""
    from repsft_fast.training import trainer

    plain = trainer.train_step

    def step(parts, update):
        model_loss = parts.model.loss
        parts.model.loss = lambda row: (lambda loss, stats: (0.0 * loss + of(loss), stats))(*model_loss(row))
        try:
            plain(parts, update)
        finally:
            parts.model.loss = model_loss

    monkeypatch.setattr(trainer, "train_step", step)


def counted(folder):
    return runs.metrics(folder, "no_gradient")


class TestZeroGradients:
    """All there, all zero: noticed when the ledger is read, after the second update here."""

    @pytest.mark.parametrize("changes", [{}, SHARDED, {"loss__skip_below": 1e-6}])
    def test_where_there_was_something_to_learn(self, changes, tmp_path, monkeypatch):
        zero_gradients(monkeypatch)
        settings = runs.settings(tmp_path, checkpoint__every_updates=2, **NEVER_STOPS, **changes)
        pattern = (
            r"^update 1: every gradient was exactly 0 although there was something to learn, got a loss of"
            r" 4\.\d+; --resume"
        )
        with pytest.raises(TrainingError, match=pattern):
            train(settings)
        assert [line["grad_norm"] for line in runs.metrics(tmp_path, "update")] == [
            0.0,
            0.0,
        ], "written before it ends"
        assert not list((tmp_path / "run").glob("checkpoints/gen-*")), (
            "no checkpoint of weights that stood still"
        )

    def test_left_out_by_the_setting(self, tmp_path):
        """Nothing is as unlikely as that: every position counts as memorised."""
        result = train(runs.settings(tmp_path, loss__skip_below=0.999999, **NEVER_STOPS))
        assert result.updates == 12
        lines = counted(tmp_path)
        assert [number for line in lines for number in line["updates"]] == list(range(1, 13))
        assert (lines[-1]["so_far"], lines[-1]["reason"]) == (12, "every position was below loss.skip_below")
        (told,) = [text for text in run_jobs.notes(tmp_path / "run") if "has no gradient" in text]
        assert told.startswith(
            "update 1 has no gradient: every position was below loss.skip_below; such updates are counted"
        )

    def test_learned_to_the_last_bit(self, tmp_path, monkeypatch):
        zero_gradients(monkeypatch, of=lambda loss: 0.0 * loss.detach())
        assert train(runs.settings(tmp_path, **NEVER_STOPS)).updates == 12
        assert counted(tmp_path)[-1]["so_far"] == 12
        assert counted(tmp_path)[-1]["reason"] == "the loss is exactly 0"

    def test_a_vetoed_update_is_another_matter(self, tmp_path, monkeypatch):
        zero_gradients(monkeypatch, of=lambda loss: loss.detach() * float("nan"))
        with pytest.raises(TrainingError, match="none of the run's 12 updates was finite"):
            train(runs.settings(tmp_path, numbers__on_nonfinite="skip", **NEVER_STOPS))
        assert not counted(tmp_path)
