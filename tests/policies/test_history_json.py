"""The table's form in checkpoints: what the first versions wrote is read, and is written again but for the codes."""

import copy
import json
import math
from pathlib import Path

import pytest

from repsft_fast.policies import (
    Continue,
    History,
    Msft,
    MsftSettings,
    Saturation,
    SaturationSettings,
    Score,
    Stop,
)

TABLES = json.loads(Path(__file__).with_name("first_versions.json").read_text(encoding="utf-8"))


def loaded(name: str) -> History:
    return History.load(copy.deepcopy(TABLES[name]))


@pytest.mark.parametrize(
    ("name", "codes"),
    [
        ("saturation", {"code": "budget", "stop_reason": "the budget of 20 updates is spent"}),
        ("msft", {"code": "policy"}),
    ],
)
def test_every_key_and_value_is_as_it_was(name, codes):
    expected = copy.deepcopy(TABLES[name])
    expected["decisions"][-1]["decision"] |= codes
    written = json.loads(json.dumps(loaded(name).values(), allow_nan=False))
    assert written == expected
    assert list(written) == list(expected)
    assert History.load(written).values() == loaded(name).values()


def test_a_run_of_the_first_versions_goes_on_and_ends_with_its_budget():
    """Its checkpoint lies in the decay, one update before the budget is spent."""
    history = loaded("saturation")
    policy = Saturation(SaturationSettings(token_accuracy=None, budget_updates=20))
    assert policy.decide(history, history.active) == Continue()
    assert history.ended_by is None
    history.tick(20, 2.0, 2000, schedule_finished=True)
    stop = policy.decide(history, history.active)
    assert stop == Stop("budget", "the budget of 20 updates is spent")
    history.took(stop)
    assert History.load(history.values()).ended_by == "budget"


def test_a_mixture_that_had_ended():
    history = loaded("msft")
    assert history.ended_by == "policy"
    assert Msft(MsftSettings()).result(history) == "1.9"
    assert history.evaluation_of("0.0").scores["a"] == Score.of([1.0, 0.0])
    assert math.isnan(history.evaluation_of("0.2").scores["a"].value)
    assert history.epochs[0].losses[0] == 0.5
    assert math.isnan(history.epochs[0].losses[1])
