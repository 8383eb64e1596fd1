"""Law 4 in the trainer: a run with snapshots equals one without, bit for bit: losses, weights, moments,
random streams."""

from __future__ import annotations

from typing import Any

import pytest

from repsft_fast import train
from repsft_fast.state import state_hash
from repsft_fast.training import trainer
from repsft_fast.training.snapshots import Snapshots, closed_list
from tests.helpers import runs

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"model__lora": {"rank": 4, "dropout": 0.2}},
    "adamw8bit": {"optim__name": "adamw8bit"},
    "masters": {"model__compute_dtype": "bfloat16"},
}
PLAIN: dict[str, Any] = {
    "samples": 48, "tasks": 3, "data__validation_fraction": 0.25, "schedule__name": "constant", "budget__epochs": 3,
    "optim__warmup_fraction": 0.0, "stop__token_accuracy": None, "log__every_updates": 3,
}  # fmt: skip
SNAPSHOTS = {"mixture__policy": "sft", "mixture__compute_budget": 3, "mixture__metric": "nll"}


def run(folder, watch: pytest.MonkeyPatch, **changes: Any) -> tuple[list[tuple], str, int]:
    """(loss, norm, counts and rate of every update, hash of the closed list at the end but for its counters,
    moments taken)"""
    finish, take = trainer.finish, Snapshots.take
    found: dict[str, Any] = {"taken": 0}

    def ending(run: Any) -> Any:
        state = closed_list(run.parts)
        streams = {name: value for name, value in state.values().items() if name.startswith("rng/")}
        found["hash"] = state_hash(state.tensors(), streams)
        return finish(run)

    def taking(moments: Snapshots, name: str) -> None:
        found["taken"] += 1
        take(moments, name)

    with watch.context() as patch:
        patch.setattr(trainer, "finish", ending)
        patch.setattr(Snapshots, "take", taking)
        train(runs.settings(folder, **{**PLAIN, **changes}))
    updates = runs.metrics(folder, "update")
    return (
        [(u["update"], u["loss"], u["grad_norm"], u["correct"], u["lr"]) for u in updates],
        found["hash"],
        found["taken"],
    )


@pytest.mark.parametrize(
    "tier", [{}, {"snapshot__device_bytes": 0, "snapshot__disk_bytes": "64MiB"}], ids=["memory", "disk"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_evaluates_and_keeps_moments_is_the_run_that_does_neither(
    kind, tier, tmp_path, monkeypatch
):
    plain, plain_hash, none = run(tmp_path / "plain", monkeypatch, **KINDS[kind])
    kept, kept_hash, taken = run(tmp_path / "kept", monkeypatch, **KINDS[kind], **SNAPSHOTS, **tier)
    assert none == 0
    assert taken >= 3
    assert len(plain) == 27
    assert kept == plain
    assert kept_hash == plain_hash
