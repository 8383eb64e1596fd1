"""Arms, intervals, differences seed by seed: the arithmetic of `repsft compare`."""

import math
from dataclasses import replace

import pytest

from repsft_fast.errors import ConfigError
from repsft_fast.report import compare
from repsft_fast.report.compare import FinishedRun


def made(seed, score=0.5, rows=None, **settings):
    named = {"run.seed": seed, "run.folder": f"r{seed}", "mixture.policy": "sft"}
    named |= {name.replace("__", "."): value for name, value in settings.items()}
    return FinishedRun(f"r{seed}-{score}", seed, named, score, rows or {"a": 3}, 10 * seed, 2.0, 1.0)


def test_intervals_are_students():
    assert compare.interval([0.5]) == (0.5, math.inf)
    middle, half = compare.interval([1.0, 2.0, 3.0])
    assert (middle, half) == (2.0, pytest.approx(4.302652729749464 / math.sqrt(3), rel=1e-9))
    assert compare.interval(range(12))[1] == pytest.approx(2.2009851600 * math.sqrt(13 / 12), rel=1e-9)
    with pytest.raises(ValueError, match="no values"):
        compare.interval([])


def test_differences_are_taken_seed_by_seed():
    middle, half = compare.paired({1: 0.5, 2: 0.7, 9: 0.0}, {1: 0.4, 2: 0.6, 3: 1.0})
    assert middle == pytest.approx(0.1)
    assert half == pytest.approx(0.0, abs=1e-12)
    assert compare.paired({1: 0.5}, {2: 0.5}) is None


def test_seeds_are_one_arm_and_settings_part_arms():
    runs = [made(1), made(2), made(1, mixture__policy="msft"), made(2, mixture__policy="msft")]
    arms = compare.arms_of(runs)
    assert [(arm.name, list(arm.runs)) for arm in arms] == [
        ("mixture.policy=sft", [1, 2]),
        ("mixture.policy=msft", [1, 2]),
    ]
    assert (arms[0].mean("tokens"), arms[0].mean("gross")) == (15, 2.0)
    assert compare.arms_of(runs[:2])[0].name == "all runs"


def test_what_is_told_and_where_it_lies_parts_no_arm():
    runs = [made(1, log__every_updates=1, checkpoint__keep_last=2), made(2, log__every_updates=5)]
    runs += [made(3, model__attention="sdpa", data__cache_folder="x")]
    assert len(compare.arms_of(runs)) == 1


def test_a_data_file_that_carries_the_seed_is_one_file():
    runs = [made(n, data__train={"a": f"d/seed{n}/a.jsonl"}, data__test=f"Seed_0{n}.jsonl") for n in (1, 2)]
    assert len(compare.arms_of(runs)) == 1
    other = [made(1, data__train="v1/a.jsonl"), made(2, data__train="v1/a.jsonl")]
    assert len(compare.arms_of(other)) == 1
    assert len(compare.arms_of([made(1, data__train="seed10"), made(2, data__train="seed20")])) == 2


def test_by_alone_makes_an_arm_and_names_are_given_in_order():
    runs = [made(1, optim__lr=1), made(2, optim__lr=2), made(1, 0.6, mixture__policy="msft", optim__lr=3)]
    assert len(compare.arms_of(runs)) == 3
    arms = compare.arms_of(runs, ["mixture.policy"], ["one", "two"])
    assert [(arm.name, len(arm.runs)) for arm in arms] == [("one", 2), ("two", 1)]
    with pytest.raises(ConfigError, match=r"--names: does not fit the arms, expected 3 different names"):
        compare.arms_of(runs, None, ["one", "one", "two"])
    with pytest.raises(ConfigError, match=r"--by: is not a setting of every run, got optim.x"):
        compare.arms_of(runs, ["optim.x"])


def test_names_that_were_cut_to_the_same_are_told_apart():
    long = "x" * 60
    arms = compare.arms_of([made(1, data__train=long + "1"), made(1, data__train=long + "2")])
    assert [arm.name[-3:] for arm in arms] == ["(1)", "(2)"]
    assert len({arm.name for arm in arms}) == 2


def test_a_seed_twice_in_an_arm_is_refused():
    with pytest.raises(
        ConfigError, match=r"all runs: has seed 1 twice, got r1-0.5 and r1-0.6; leave one out"
    ):
        compare.arms_of([made(1), made(1, 0.6)])


def test_the_baseline_comes_first_and_is_found_by_a_part_of_its_name():
    runs = [made(1, 0.5), made(2, 0.5), *(made(n, 0.7, mixture__policy="msft") for n in (1, 2, 3))]
    arms = compare.arms_of(runs)
    first, second = compare.lines_of(arms)
    assert (first.difference, second.common) == (None, (1, 2))
    assert second.difference == (pytest.approx(0.2), pytest.approx(0, abs=1e-12))
    assert compare.lines_of(arms, "policy=msft")[0].arm.name == "mixture.policy=msft"
    assert compare.lines_of(arms, "msf")[0].arm.name == "mixture.policy=msft"
    assert compare.lines_of(arms[::-1], "sft")[0].arm.name == "mixture.policy=sft", "a part of msft, too"
    with pytest.raises(ConfigError, match=r"--baseline: is no arm, expected one of: mixture.policy=sft; "):
        compare.lines_of(arms, "sro")
    with pytest.raises(ConfigError, match="stands in the names of 2 arms"):
        compare.lines_of(arms, "policy")
    with pytest.raises(ConfigError, match="there is no run"):
        compare.lines_of([])


def test_arms_without_a_common_seed_or_with_other_rows_are_refused():
    arms = compare.arms_of([made(1), made(2, mixture__policy="msft")])
    with pytest.raises(ConfigError, match=r"no seed in common .*, expected seeds 1, got seeds 2"):
        compare.lines_of(arms)
    arms = compare.arms_of([made(1), made(1, rows={"a": 4}, mixture__policy="msft")])
    with pytest.raises(ConfigError, match=r"scored on other rows .*expected a 3 tokens, got a 4 tokens"):
        compare.lines_of(arms)


def test_what_a_run_does_not_say_has_no_mean():
    arm = compare.arms_of([made(1), replace(made(2), gross=None)])[0]
    assert (arm.mean("gross"), arm.mean("net")) == (None, 1.0)
    found = compare.as_json(compare.lines_of([arm]))[0]
    assert (found["flops_gross"], found["difference"], len(found["runs"])) == (None, None, 2)
    alone = compare.as_json(compare.lines_of(compare.arms_of([made(1)])))
    assert alone[0]["score"] == {"mean": 0.5, "half_width": None}
