"""Law 5 in the trainer: snapshot, train on, go back, train again: the same losses and the same state, bit for
bit.

From every tier there is on a CPU, for full weights, adapters with dropout, and 8-bit moments; with the
optimizer's moments put back, and with new ones.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from repsft_fast.config import Config
from repsft_fast.optim import reset
from repsft_fast.training.build import build
from repsft_fast.training.parts import Parts
from repsft_fast.training.snapshots import Snapshots, closed_list
from repsft_fast.training.step import train_step
from tests.helpers import runs
from tests.laws.test_law4_trainer import KINDS

TIERS = {
    "memory": {"snapshot__device_bytes": "64MiB"},
    "disk": {"snapshot__device_bytes": 0, "snapshot__pinned_bytes": 0, "snapshot__disk_bytes": "64MiB"},
}


def steps(parts: Parts, count: int) -> list[tuple[float, float]]:
    """Train `count` updates of the plan from the cursor on; the loss and the gradient's norm of each."""
    progress = parts.progress
    epoch = parts.plan.epoch(progress.stage, progress.epoch)
    for update in itertools.islice(epoch, progress.update, progress.update + count):
        train_step(parts, update)
        parts.step_done(update, len(epoch))
    return [(record.loss, record.grad_norm) for record in parts.ledger.read()]


@pytest.mark.parametrize("optimizer", ["restore", "reset"])
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_revert_is_as_if_one_had_never_left(kind, tier, optimizer, tmp_path):
    changes: dict[str, Any] = {**KINDS[kind], **TIERS[tier]}
    settings = runs.settings(tmp_path, samples=64, budget__epochs=3, stop__token_accuracy=None, **changes)
    parts = build(Config.of(settings))
    (tmp_path / "run").mkdir(exist_ok=True)
    state = closed_list(parts)
    moments = Snapshots(parts, state, 2, weights_only=optimizer == "reset")

    def back(name: str) -> None:
        moments.restore(name)
        if optimizer == "reset":
            reset(parts.optimizer)
            parts.ledger.start_epoch()
            parts.spikes.begin_anew()  # as every roll-back does: other tasks are trained from there

    steps(parts, 3)
    work = parts.lasting.all_work.tokens
    moments.take("here")
    assert moments.tier("here") == ("disk" if tier == "disk" else "device")
    back("here")  # a reset optimizer is part of what both branches begin with
    start = state.hash()
    first, end = steps(parts, 6), state.hash()
    assert end != start
    for again in range(2):  # twice to the same moment
        steps(parts, 2 + again)
        back("here")
        assert parts.lasting.all_work.tokens > work, "the work done is not undone"
        parts.lasting.all_work.__dict__.update(parts.progress.work.values())
        assert state.hash() == start
        assert steps(parts, 6) == first
        assert state.hash() == end
    state.check()
    moments.close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_moments_of_the_optimizer_matter(kind, tmp_path):
    """Were they not put back the run after a revert would be another: the test above can fail."""
    settings = runs.settings(tmp_path, samples=64, budget__epochs=3, stop__token_accuracy=None, **KINDS[kind])
    parts = build(Config.of(settings))
    moments = Snapshots(parts, closed_list(parts), 1, weights_only=False)
    steps(parts, 3)
    moments.take("here")
    first = steps(parts, 4)
    moments.restore("here")
    assert steps(parts, 4) == first
    moments.restore("here")
    reset(parts.optimizer)
    assert steps(parts, 4) != first
