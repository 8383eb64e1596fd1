"""Decisions as JSON: there and back, what is refused, and what the first versions wrote."""

import json
from typing import get_args

import pytest

from repsft_fast.errors import TrainingError
from repsft_fast.policies import decisions
from repsft_fast.policies.decisions import from_json, to_json

DECISIONS = [
    decisions.Continue(),
    decisions.RollBack("m1", "a"),
    decisions.RollBack("m1", None),
    decisions.NewStage(
        "m1", ("a", "b"), {"a": 1.0, "b": 0.05}, decisions.Reset("restore", "rewind", "rewind")
    ),
    decisions.NewStage(None, ("a",)),
    decisions.Reweight({"a": 0.3}),
    decisions.SkipSamples((3, 5)),
    decisions.Probe(("a", "b")),
    decisions.Decay("plateau", "why", 3),
    decisions.Decay("budget", "why", None, "and why it ended"),
    *(decisions.Stop(code, "why") for code in get_args(decisions.Code)),
]


@pytest.mark.parametrize("decision", DECISIONS, ids=lambda d: type(d).__name__)
def test_decisions_go_through_json(decision):
    assert from_json(json.loads(json.dumps(to_json(decision)))) == decision


def test_foreign_decisions_are_refused():
    with pytest.raises(TrainingError, match="unknown decision"):
        from_json({"kind": "Exit"})
    with pytest.raises(TrainingError, match="Stop has unknown fields"):
        from_json({"kind": "Stop", "reason": "x", "force": True})
    with pytest.raises(TrainingError, match="unknown code, expected budget, token_accuracy, plateau, policy"):
        from_json({"kind": "Stop", "code": "whim", "reason": "x"})


ACCURACY = "token accuracy 98.00 % reached 97 % after epoch 1 (98 of 100 tokens)"
PLATEAU = "token accuracy has not risen by 0.001 for 2 epochs"


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (ACCURACY, "token_accuracy"),
        (PLATEAU, "plateau"),
        (f"{ACCURACY}; the budget of 9 updates is spent before the decay was done", "token_accuracy"),
        (f"{PLATEAU}; the budget of 9 updates is spent before the decay was done", "plateau"),
        ("the budget of 9 updates is spent", "budget"),
        ("the budget of 9 updates is nearly spent", "budget"),
        ("the budget is spent (budget.updates: 9)", "budget"),
        ("the schedule has come to its end", "budget"),
        ("1 epoch is done", "policy"),
        ("10 stages are done", "policy"),
        ("every task has had its turn", "policy"),
        ("every task has been dropped at its peak", "policy"),
        ("no task ever rose above the base", "policy"),
        ("no task is active any more", "policy"),
        ("every task is memorised", "policy"),
    ],
)
def test_a_stop_of_the_first_versions_has_the_code_of_its_sentence(reason, code):
    assert from_json({"kind": "Stop", "reason": reason}) == decisions.Stop(code, reason)


def test_a_decay_of_the_first_versions_knows_how_its_run_ends():
    old = {"kind": "Decay", "reason": "the budget of 2000 tokens is nearly spent", "updates": 3}
    ending = "the budget of 2000 tokens is spent"
    assert from_json(old) == decisions.Decay("budget", old["reason"], 3, ending)
    old = {"kind": "Decay", "reason": PLATEAU, "updates": 3}
    assert from_json(old) == decisions.Decay("plateau", PLATEAU, 3, None)


def test_a_sentence_decides_nothing_where_there_is_a_code():
    assert from_json({"kind": "Stop", "code": "policy", "reason": PLATEAU}) == decisions.Stop(
        "policy", PLATEAU
    )
