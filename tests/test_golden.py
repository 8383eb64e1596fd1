"""Runs of the tree as users start them leave the counts and decisions that tests/golden.json holds."""

import json

import pytest

from tests import golden

CHEAP = ("lora", "msft")  # each in a second or two


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return golden.kept_facts(tmp_path_factory.mktemp("golden") / "runs", CHEAP)


@pytest.mark.parametrize("name", CHEAP)
def test_counts_and_decisions_are_those_kept(name, found):
    assert found[name] == json.loads(golden.KEPT.read_text())[name], (
        "tests/golden.py --write, if this is meant"
    )


def test_one_bit_of_one_figure_is_a_difference():
    old = {("run/metrics.jsonl", "3", "loss"): 0.1, ("run/result.json", "", "code"): "budget"}
    assert golden.differences(old, dict(old)) == []
    new = {**old, ("run/metrics.jsonl", "3", "loss"): 0.1 + 2**-56}
    assert golden.differences(old, new) == ["run/metrics.jsonl · line 3 · loss: 0.1 → 0.10000000000000002"]
    new = {key: value for key, value in old.items() if key[2] != "code"}
    assert golden.differences(old, new) == ['run/result.json · code: "budget" → nothing']


def test_a_renamed_key_is_no_difference_and_times_are_not_looked_at():
    old = {"loss": 1.0, "more": {"seconds": 3.0, "spiked": 2}, "text": "went back in 0.4 ms"}
    new = {"mean_loss": 1.0, "more": {"seconds": 4.0, "spikes": 2}, "text": "went back in 0.5 ms"}
    renamed = {"loss": "mean_loss", "more.spiked": "spikes"}
    assert dict(golden.flat(old, renamed)) == dict(golden.flat(new, {})) != dict(golden.flat(old, {}))
