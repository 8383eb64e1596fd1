"""Runs that must be equal bit for bit in deterministic mode: however launches overlap, and resumed as well as
undisturbed."""

import json
import os

import pytest
import torch

from repsft_fast.distributed import World
from repsft_fast.distributed.lifecycle import start_alone
from repsft_fast.training import trainer
from repsft_fast.training.step import clip_and_veto, forward_backward
from tests.gpu import small_runs
from tests.gpu.places import anywhere


class Killed(BaseException):
    """What no handler of the run takes for an error of its own."""


@anywhere("train step", "adamw8bit", dtype="bfloat16")
def test_launches_that_overlap_give_what_blocking_ones_give(place, blocked, tmp_path):
    """FSDP2 writes gradients on a stream of its own, and the 8-bit AdamW reads them by raw addresses on the
    main one: 50 updates here beside 50 in a process under CUDA_LAUNCH_BLOCKING=1."""
    from tests.gpu import children

    assert os.environ.get("CUDA_LAUNCH_BLOCKING", "0") == "0"
    count = place.pick(2, children.UPDATES)
    here = children.updates(tmp_path / "here", count)
    there = blocked(count)
    assert len(here["losses"]) == count
    assert here["losses"] == there["losses"]
    assert here["hash"] == there["hash"]


@anywhere("train step", "adamw8bit", dtype="bfloat16")
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_gradients_are_whole_when_their_addresses_are_read(place, optimizer, tmp_path):
    """The same updates with the host waiting for the device before every optimizer step: a race would show as
    other bits."""
    ends = []
    for waits in (False, True):
        parts = small_runs.parts_of(tmp_path / str(waits), optim__name=optimizer)
        for update in small_runs.updates_of(parts)[: place.pick(2, 4)]:
            forward_backward(parts, update)
            if waits:
                place.wait()
            judged = clip_and_veto(parts)
            parts.optimizer.step(1e-3, found_inf=judged.veto, clip=judged.clip)
            parts.optimizer.zero_grad()
            parts.ledger.close(parts.progress.updates, 1e-3, judged.numbers, judged.applied)
            if waits:
                place.wait()
        ends.append((small_runs.losses(parts), small_runs.state_of(parts)))
    assert ends[0] == ends[1]


@anywhere("checkpoint", dtype="bfloat16")
def test_a_killed_run_resumes_to_the_undisturbed_one(place, tmp_path, monkeypatch):
    """Law 6, in one process: the run is left after update 5 as a kill leaves it, its last checkpoint being of
    update 4."""
    ends = []

    def end(run):
        ends.append((small_runs.state_of(run.parts), run.parts.progress.updates))

    monkeypatch.setattr(trainer, "finish", end)  # neither model nor picture is asked for
    # one group for all runs, which leave standing what they find: a new communicator would take its time
    start_alone(World(0, 1, 0, place.device))
    changes = {
        "optim__name": place.pick("adamw", "adamw8bit"), "checkpoint__every_updates": 2, "budget__epochs": None,
        "budget__updates": 7, "log__every_updates": 2,
    }  # fmt: skip

    def settings(name):
        return small_runs.settings_of(tmp_path / name, **changes)

    def kill(work):
        if work.updates == 5:
            raise Killed

    trainer.train(settings("whole"))
    with pytest.raises(Killed):
        trainer.train(settings("broken"), on_update=kill)
    assert json.loads((tmp_path / "broken" / "run" / "checkpoints" / "LATEST").read_text())["generation"] == 1
    torch.rand(5, device=place.device)  # a new process would have other streams
    trainer.train(settings("broken"), resume=True)
    assert ends[0] == ends[1]
    assert ends[1][1] == 7
