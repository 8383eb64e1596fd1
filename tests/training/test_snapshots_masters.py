"""Whoever writes into the closed list, weights follow their masters: looked at in every forward pass of whole
runs. And what is kept, saved and resumed is the masters."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from repsft_fast import checkpoint, train
from repsft_fast.config import Config
from repsft_fast.distributed import held_parameters
from repsft_fast.errors import SnapshotError, TrainingError
from repsft_fast.selftest import table
from repsft_fast.snapshot import SnapshotPool
from repsft_fast.training import build as building
from repsft_fast.training import finish, step, trainer
from repsft_fast.training.build import build
from repsft_fast.training.snapshots import Snapshots, closed_list
from repsft_fast.training.step import forward_backward, train_step
from tests.helpers import ranks, runs

BF16 = {"model__compute_dtype": "bfloat16"}
LORA = {"model__lora": {"rank": 4}}
MIXTURE = {
    "samples": 36, "tasks": 3, "data__validation_fraction": 0.25, "budget__epochs": 6, "stop__token_accuracy": None,
    "optim__lr": 3e-2, "mixture__metric": "nll", "mixture__rule": "paper", "mixture__policy": "msft",
    "mixture__max_stages": 4,
}  # fmt: skip
ON_DISK = {"snapshot__device_bytes": 0, "snapshot__disk_bytes": "64MiB"}
BEST = {"evaluate__keep": "best", "data__validation_fraction": 0.25, "optim__lr": 5e-2, "budget__epochs": 6}


def follow(model):
    found = model.masters
    return all(torch.equal(w, found.held[n].to(w.dtype)) for n, w in found.weights.items())


@pytest.fixture
def looked(monkeypatch):
    """How often a model was passed forward; in each the weights are what their masters round to."""
    lay_out, saved = building._lay_out, finish.save_model
    seen = []

    def watched(model, config, world):
        lay_out(model, config, world)
        loss, generate = model.loss, model.generate

        def looks(call):
            def inner(*arguments, **options):
                assert follow(model)
                seen.append(call.__name__)
                return call(*arguments, **options)

            return inner

        model.loss, model.generate = looks(loss), looks(generate)

    def save(parts, reporter):
        assert follow(parts.model)
        saved(parts, reporter)

    monkeypatch.setattr(building, "_lay_out", watched)
    monkeypatch.setattr(finish, "save_model", save)
    return seen


@pytest.mark.parametrize(
    ("changes", "event"),
    [
        (MIXTURE, "roll_back"),
        ({**MIXTURE, **ON_DISK, **LORA}, "roll_back"),
        ({**MIXTURE, "mixture__optimizer": "restore", "optim__name": "adamw8bit"}, "roll_back"),
        ({**BEST, "optim__name": "sgd"}, "evaluation"),
        (
            {
                "samples": 36, "tasks": 3, "data__validation_fraction": 0.25, "mixture__policy": "dynamix",
                "mixture__compute_budget": 2.5, "batch__samples": 1, "stop__token_accuracy": None,
            },
            "decision",
        ),
    ],
    ids=["memory", "disk", "8 bits", "best", "probes"],
)  # fmt: skip
def test_in_every_pass_of_a_run(changes, event, looked, tmp_path):
    train(runs.settings(tmp_path, **BF16, **changes))
    assert runs.metrics(tmp_path, event)
    assert len(looked) > 20
    assert not dist.is_initialized()


NUMBERS = {
    "numbers__on_nonfinite": "revert", "numbers__on_out_of_memory": "retry", "batch__samples": 8, "budget__epochs": 5,
    "stop__token_accuracy": None,
}  # fmt: skip


def test_after_a_revert(looked, tmp_path, monkeypatch):
    plain, made = trainer.train_step, []

    def spoilt_once(parts, update):
        made.append(update)
        with runs.losses_not_finite(parts.model) if len(made) == 9 else nullcontext():
            plain(parts, update)

    monkeypatch.setattr(trainer, "train_step", spoilt_once)
    train(runs.settings(tmp_path, **BF16, **NUMBERS))
    assert runs.metrics(tmp_path, "revert")
    assert len(looked) > 20


def test_after_memory_ran_out_between_two_rows(looked, tmp_path, monkeypatch):
    plain, raised = step.begin_row, []

    def full_once(model, *, first, last):
        if not first and not raised:
            raised.append(True)
            raise torch.OutOfMemoryError("out of memory. Tried")
        plain(model, first=first, last=last)

    monkeypatch.setattr(step, "begin_row", full_once)
    result = train(runs.settings(tmp_path, **BF16, **NUMBERS))
    assert raised
    assert result.updates == 15
    assert all(update["grad_norm"] > 0.0 for update in runs.metrics(tmp_path, "update"))
    assert len(looked) > 20


class Killed(BaseException):
    """What no handler of the run takes for an error of its own."""


def killed_after(updates):
    def kill(work):
        if work.updates == updates:
            raise Killed

    return kill


@pytest.mark.parametrize("changes", [MIXTURE, {**BEST, **LORA}], ids=["moments", "best"])
def test_after_a_resumption(changes, looked, tmp_path):
    settings = runs.settings(tmp_path, **BF16, **changes, checkpoint__every_updates=3)
    with pytest.raises(Killed):
        train(settings, on_update=killed_after(13))
    held = checkpoint.newest(tmp_path / "run" / "checkpoints").manifest.tensors
    assert any(name.startswith(("moments/", "best/")) for name in held)
    before = len(looked)
    train(settings, resume=True)
    assert runs.metrics(tmp_path, "resume")
    assert len(looked) > before


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_what_is_kept_and_saved_is_the_masters(changes, tmp_path, monkeypatch):
    ends = {}

    def end(run):
        ends.update({n: t.detach().clone() for n, t in held_parameters(run.parts.model) if t.requires_grad})
        return finish.finish(run)

    monkeypatch.setattr(trainer, "finish", end)
    settings = runs.settings(
        tmp_path,
        **BF16,
        **changes,
        model__save_dtype="float32",
        checkpoint__every_updates=3,
        budget__epochs=1,
    )
    train(settings)
    assert {t.dtype for t in ends.values()} == {torch.float32}
    assert any(not torch.equal(t, t.bfloat16().float()) for t in ends.values())
    shards = Path(checkpoint.newest(tmp_path / "run" / "checkpoints").path).rglob("state-*.safetensors")
    kept = {name: t for path in shards for name, t in load_file(path).items() if name.startswith("model/")}
    assert kept.keys() == {f"model/{name}" for name in ends}
    assert all(torch.equal(kept[f"model/{name}"], t) for name, t in ends.items())
    file = tmp_path / "run" / ("adapter_model.safetensors" if changes else "model.safetensors")
    saved = load_file(file)
    strip = "base_model.model."
    for name, t in ends.items():
        named = strip + name.replace(".default", "") if changes else name
        assert torch.equal(saved[named], t), name


def test_a_run_of_the_time_before_masters_goes_on(tmp_path, monkeypatch):
    """Its checkpoint, of one rank under FSDP2, holds what is on the list now; and the other way round."""
    for before in (True, False):
        folder = tmp_path / str(before)
        settings = runs.settings(folder, **BF16, checkpoint__every_updates=3, stop__token_accuracy=None)
        try:
            monkeypatch.setattr(building, "ONE_RANK_FSDP", before)
            with pytest.raises(Killed):
                train(settings, on_update=killed_after(8))
            ranks.leave_group()
            monkeypatch.setattr(building, "ONE_RANK_FSDP", not before)
            result = train(settings, resume=True)
        finally:
            ranks.leave_group()
        (line,) = runs.metrics(folder, "resume")
        assert line["update"] == 6
        assert result.updates == 18


class TestPools:
    @pytest.fixture
    def parts(self, tmp_path):
        made = build(Config.of(runs.settings(tmp_path, **BF16)))
        (tmp_path / "run").mkdir(exist_ok=True)
        return made

    def test_best_weights_alone_are_published_too(self, parts):
        kept = Snapshots(parts, closed_list(parts), 1, weights_only=True)
        kept.take("here")
        before = {n: w.detach().clone() for n, w in parts.model.named_parameters()}
        train_step(parts, parts.plan.epoch(0, 0)[0])
        assert any(not torch.equal(before[n], w) for n, w in parts.model.named_parameters())
        kept.restore("here")
        assert all(torch.equal(before[n], w) for n, w in parts.model.named_parameters())
        kept.close()

    def test_no_snapshot_in_the_middle_of_an_update(self, parts):
        """Gradients are the weights', and the list holds the masters."""
        kept = Snapshots(parts, closed_list(parts), 1, weights_only=False)
        forward_backward(parts, parts.plan.epoch(0, 0)[0])
        with pytest.raises(SnapshotError, match="in the middle of an update"):
            kept.take("here")
        parts.optimizer.zero_grad()
        kept.take("here")
        forward_backward(parts, parts.plan.epoch(0, 0)[0])
        kept.restore("here")
        assert all(p.grad is None for p in parts.model.parameters())
        kept.close()

    def test_a_writing_that_breaks_off_is_followed(self, parts):
        state = closed_list(parts)

        def break_off():
            with torch.no_grad(), state.writing() as live:
                next(iter(live.values())).mul_(2.0)
                raise KeyError

        with pytest.raises(KeyError):
            break_off()
        assert follow(parts.model)

    def test_the_check_sees_a_pool_without_the_door(self, parts):
        """What `writing` is for: without it the next update is refused."""
        state = closed_list(parts)
        pool = SnapshotPool(state.tensors(), device_bytes=2**26, pinned_bytes=0, keep=1)
        pool.take("here", {})
        train_step(parts, parts.plan.epoch(0, 0)[0])
        pool.restore("here")
        assert not follow(parts.model)
        with pytest.raises(TrainingError, match="not where they are computed with"):
            train_step(parts, parts.plan.epoch(0, 0)[1])
        pool.close()


@pytest.mark.parametrize("law", [law for law, _, _ in table.CHECKS])
def test_laws_on_a_users_machine_hold_in_bf16(law, tmp_path):
    """One rank with masters, as a GPU is by default; law 2 in float64."""
    settings = table.settings_of(None, tmp_path, [])
    settings["model"] = {**settings["model"], "compute_dtype": "bfloat16"}
    check = {number: check for number, _, check in table.CHECKS}[law]
    try:
        parts = build(Config.of(settings))
        weights = {n: (w.data_ptr(), w.dtype, w.grad_dtype) for n, w in parts.model.named_parameters()}
        for _ in range(2):
            found = check(parts)
            assert found.holds, found.figure
            assert follow(parts.model)
        assert law != 2 or "in float64" in found.figure
        after = {n: (w.data_ptr(), w.dtype, w.grad_dtype) for n, w in parts.model.named_parameters()}
        assert after == weights
    finally:
        torch.use_deterministic_algorithms(False)
