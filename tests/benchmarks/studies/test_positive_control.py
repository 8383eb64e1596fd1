"""The positive control's arms: equal tokens, the same start, weights that name every task."""

import json

import pytest

from benchmarks.studies import msft_study
from benchmarks.studies import positive_control as study
from benchmarks.studies import positive_control_tasks as tasks


def record(arm, seed, test, mixture="A"):
    curve = [["0.0", 0, 0.0, 1.0, 0.3, 0.1], ["0.1", 0, 1.0, 0.5, 0.9, 0.9]]
    return {
        "mixture": mixture, "arm": arm, "seed": seed, "study": study.STUDY, "test_macro": test,
        "tasks": ["harmed", "noisy", "slow"], "curve": curve,
    }  # fmt: skip


@pytest.mark.parametrize("mixture", ["A", "B"])
def test_arms_differ_in_the_mixture_section_alone_and_end_at_the_same_tokens(mixture):
    made = {arm: study.sections(mixture, arm) for arm in study.ARMS}
    for own in made.values():
        assert {name: own[name] for name in own if name != "mixture"} == {
            name: made["sft"][name] for name in own if name != "mixture"
        }
        assert set(own["mixture"]["weights"]) == set(tasks.MIXTURES[mixture])
        assert own["mixture"]["metric"] == "exact_match"
    assert made["sft"]["budget"] == {"tokens": study.tokens(mixture)}
    assert (
        made["tested"]["mixture"]["compute_budget"] * made["tested"]["mixture"]["max_stages"] > study.EPOCHS
    )


def test_the_verdict_is_on_fresh_seeds():
    assert not set(study.SEEDS["A"]) & set(study.SEEDS["B"])
    assert len(study.SEEDS["A"]) == len(study.SEEDS["B"]) == 12


def test_static_weights_follow_the_same_seeds_own_best_moments():
    records = [record("sft", 0, 0.5), record("sft", 1, 0.5) | {"curve": [["0.0", 0, 0.0, 1.0, 1.0, 1.0]]}]
    found = study.static_weights(records, "A", 1)
    assert found == dict.fromkeys(found, 1.0)
    with pytest.raises(ValueError, match="unpack"):
        study.static_weights(records, "A", 2)


def test_b_runs_what_a_chose_beside_none():
    records = [record("sft", 0, 0.5), record("tested", 0, 0.5), record("tested 0.2", 0, 0.6)]
    assert study.arms_of("B", records)[:3] == ["sft", "tested 0.2", "tested"]
    assert set(study.arms_of("A", [])) == set(study.ARMS)
    with pytest.raises(SystemExit, match="mixture A comes first"):
        study.arms_of("B", [])


def test_first_arms_come_first_in_every_seed():
    found = study.order(list(study.ARMS), [0, 1])
    assert found[:4] == [(arm, 0) for arm in list(study.ARMS)[:4]]
    assert found[4:8] == [(arm, 1) for arm in list(study.ARMS)[:4]]
    assert len(found) == 2 * len(study.ARMS)


def test_records_are_resumed_by_mixture_arm_and_seed(tmp_path):
    path = tmp_path / "r.jsonl"
    for each in (record("sft", 0, 0.5), record("sft", 0, 0.6), record("sft", 0, 0.7, "B")):
        msft_study.append(path, each)
    msft_study.append(path, record("sft", 1, 0.6) | {"study": study.STUDY - 1})
    assert [r["test_macro"] for r in study.read(path)] == [0.6, 0.7]
    assert json.loads(path.read_text().splitlines()[0])["seed"] == 0
