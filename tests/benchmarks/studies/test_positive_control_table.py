"""The arithmetic of head-room, choice and verdict."""

from statistics import fmean

import pytest

from benchmarks.studies import positive_control_table as table

ARMS = {0.0: "tested", 0.1: "tested 0.1"}


def record(arm, seed, test, mixture="A", curve=None):
    return {
        "mixture": mixture, "arm": arm, "seed": seed, "test_macro": test, "tasks": ["a", "b"],
        "curve": curve or [[str(i), 0, i / 2, 1 - i / 10, i / 10] for i in range(11)],
        "tokens": 100, "discarded_tokens": 10, "exclusions": [],
    }  # fmt: skip


def test_smoothing_takes_five_looks_and_what_there_is_at_the_ends():
    assert table.smooth([0, 0, 5, 0, 0, 0]) == pytest.approx([5 / 3, 5 / 4, 1, 1, 5 / 4, 0])


def test_head_room_is_what_one_common_moment_gives_up():
    # One falls as the other rises: a common moment has .5 of each, their own best ones 0.9 (three looks' mean).
    assert table.head_room_of(record("sft", 0, 0.5)) == pytest.approx(0.4)
    level = [[str(i), 0, i / 2, i / 10, i / 10] for i in range(11)]
    assert table.head_room_of(record("sft", 0, 0.5, curve=level)) == pytest.approx(0)
    assert table.own_best_epochs(record("sft", 0, 0.5)) == {"a": 0.0, "b": 5.0}


def test_interval_is_students():
    mean, half = table.interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert table.interval([1.0]) == (1.0, float("inf"))


def test_differences_are_paired_by_seed():
    records = [
        record("sft", 1, 0.5),
        record("sft", 2, 0.7),
        record("tested", 2, 0.8),
        record("tested", 3, 1.0),
    ]
    assert table.paired(records, "A", "tested") == pytest.approx([0.1])


def test_the_choice_is_the_highest_gain_and_the_smaller_at_a_tie():
    records = [record("sft", 0, 0.5), record("tested", 0, 0.6), record("tested 0.1", 0, 0.6)]
    assert table.chosen_rehearsal(records, ARMS) == 0.0
    assert table.chosen_rehearsal([*records[:2], record("tested 0.1", 0, 0.7)], ARMS) == 0.1


@pytest.mark.parametrize(
    ("gains", "room", "passed"),
    [
        ([0.05, 0.06, 0.07], [0.1, 0.11, 0.12], True),
        ([-0.05, 0.06, 0.17], [0.1, 0.11, 0.12], False),  # its interval holds 0
        ([0.01, 0.011, 0.012], [0.1, 0.11, 0.12], False),  # less than a third of what could be won
        ([0.03, 0.03, 0.03], [0.1, 0.11, 0.12], True),  # a third of the lower bound, 0.085
    ],
)
def test_the_verdict(gains, room, passed):
    assert table.verdict(gains, room) is passed


def test_tables_name_head_room_arms_and_verdict():
    records = [
        record(arm, seed, test + seed / 1000, mixture)
        for mixture in "AB"
        for arm, test in (("sft", 0.5), ("tested", 0.6), ("tested 0.1", 0.8))
        for seed in range(3)
    ]
    found = table.tables(records, ARMS)
    assert "Mixture A: head-room 0.400 ± 0.000 over 3 seeds." in found
    assert "| tested 0.1 | 3 | 0.801 | +0.300 ± 0.000 | 100 | 10 | 0.0 |" in found
    assert "Verdict (tested 0.1 minus sft): passed." in found
    assert fmean(table.paired(records, "B", "tested")) == pytest.approx(0.1)


def test_while_b_has_plain_runs_alone_the_verdict_is_open():
    records = [record("sft", 0, 0.5, "A"), record("tested 0.1", 0, 0.7, "A"), record("sft", 100, 0.5, "B")]
    assert table.tables(records, ARMS).endswith("Verdict (tested 0.1 minus sft): open.")
