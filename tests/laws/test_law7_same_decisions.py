"""Law 7: every rank takes the same decision on the same update, whatever one of them sees first. Two ranks over
gloo, each with half of every update, write down what they decide and when."""

from __future__ import annotations

import os
import signal
from typing import Any
from unittest.mock import patch

import pytest

from repsft_fast import train
from repsft_fast.policies import History
from repsft_fast.policies.decisions import to_json
from repsft_fast.training import saver
from tests.helpers import ranks, runs

# Tasks peak, fall and leave within a few epochs; the last rate is too high to learn calmly.
MSFT = {
    "samples": 36, "tasks": 3, "data__validation_fraction": 0.25, "budget__epochs": 6, "stop__token_accuracy": None,
    "optim__lr": 3e-2, "mixture__policy": "msft", "mixture__metric": "nll", "mixture__rule": "paper",
    "mixture__max_stages": 4,
}  # fmt: skip
SATURATION = {"budget__epochs": 60, "stop__token_accuracy": 0.6}
LONG = {"budget__epochs": 40, "stop__token_accuracy": None}


def decided(world: Any, settings: dict[str, Any], first: str = "") -> tuple[list[tuple], str]:
    """(what this rank decided: (update, decision) and (update, why) of every save, in order; how its run
    ended). first: `signal` or `clock`, which rank 1 alone sees, after update 7."""
    seen: list[tuple] = []
    took, save, between = History.took, saver.Saver.save, saver.Saver.between_updates

    def noting(self: History, decision: Any) -> None:
        seen.append((self.position.update, to_json(decision)))
        took(self, decision)

    def saving(self: saver.Saver, why: str, **more: Any) -> None:
        seen.append((self.parts.progress.updates, why))
        save(self, why, **more)

    def seeing_first(self: saver.Saver) -> bool:
        if world.rank == 1 and self.parts.progress.updates == 7:
            if first == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            elif first == "clock":
                self._clock -= 3600.0
        return between(self)

    with (
        patch.object(History, "took", noting),
        patch.object(saver.Saver, "save", saving),
        patch.object(saver.Saver, "between_updates", seeing_first),
        patch.object(saver, "_ASK_EVERY_S", 0.05),  # several updates apart, and often in so short a run
    ):
        result = train(settings)
    return seen, result.code


def of_both(folder, first: str = "", **changes: Any) -> tuple[list[tuple], str]:
    """What both ranks decided, once it is seen to be the same."""
    one, other = ranks.run_ranks(decided, runs.settings(folder, **changes), first, timeout_s=120)
    assert one == other
    return one


def kinds(seen: list[tuple]) -> list[str]:
    return [what["kind"] if isinstance(what, dict) else what for _, what in seen]


def test_a_mixture_is_rolled_back_and_tasks_leave_alike(tmp_path):
    seen, code = of_both(tmp_path, **MSFT)
    found = kinds(seen)
    assert code == "policy"
    assert {"RollBack", "NewStage", "Stop"} <= set(found)
    rolled = [what for _, what in seen if isinstance(what, dict) and what["kind"] == "RollBack"]
    assert any(what["drop"] for what in rolled), "a task was excluded"


def test_a_memorised_run_decays_and_stops_alike(tmp_path):
    seen, code = of_both(tmp_path, **SATURATION)
    assert code == "token_accuracy"
    assert kinds(seen)[-2:] == ["Stop", "the end"]
    assert "Decay" in kinds(seen)


@pytest.mark.parametrize("every", [1, 4])
def test_one_ranks_signal_ends_all_on_one_update(every, tmp_path):
    seen, code = of_both(tmp_path, "signal", log__every_updates=every, **LONG)
    assert code == "terminated"
    (last, why) = seen[-1]
    assert why == "a signal"
    assert last >= 7


def test_one_ranks_clock_is_a_checkpoint_of_all(tmp_path):
    seen, _ = of_both(
        tmp_path, "clock", checkpoint__every_minutes=30.0, checkpoint__keep_extendable=False, **LONG
    )
    assert [why for _, why in seen if why == "due"] == ["due"]
