"""Law 9: every sample of an unweighted plan is seen exactly once per epoch, whatever the ranks, rows, kill or
revert."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repsft_fast.data.plan import Cursor, Plan, SampleIndex
from repsft_fast.data.row_lengths import RowLengths

ROOT = Path(__file__).parents[2]


def make_index(lengths, tasks) -> SampleIndex:
    lengths = np.array(lengths, dtype=np.int64)
    tasks = np.array(tasks, dtype=np.int32)
    names = tuple(f"task{i}" for i in range(int(tasks.max()) + 1))
    return SampleIndex(lengths, np.ones_like(lengths), tasks, np.ones(len(lengths)), names)


@st.composite
def few_lengths(draw, longest):
    """Row lengths that hold every sample, and rows that are closed when they hold a few."""
    shorter = draw(st.sets(st.integers(1, longest + 60), max_size=5))
    top = longest + draw(st.integers(61, 99))
    return RowLengths((*sorted(shorter), top), draw(st.integers(1, 12)), longest)


@st.composite
def plans(draw):
    n = draw(st.integers(1, 60))
    longest = draw(st.integers(1, 50))
    lengths = draw(st.lists(st.integers(1, longest), min_size=n, max_size=n))
    tasks = draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    batch_samples = draw(st.integers(1, 70))
    settings = {
        "seed": draw(st.integers(0, 2**63)),
        "row_tokens": longest + draw(st.integers(0, 100)),
        "bucket_tokens": draw(st.integers(1, 32)),
        "ranks": draw(st.integers(1, min(n, batch_samples, 5))),
        "batch_samples": batch_samples,
        "row_lengths": draw(st.none() | few_lengths(longest)),
    }
    return make_index(lengths, tasks), settings


def seen(updates) -> list[int]:
    """Sample ids as the ranks compute them, in any order."""
    return sorted(int(i) for update in updates for rows in update.ranks for row in rows for i in row.samples)


def spell(updates) -> list:
    """Everything an update is, as lists, so that two can be compared."""
    return [
        [
            (update.cursor.stage, update.cursor.epoch, update.cursor.update),
            update.samples.tolist(),
            update.denominator,
            [
                [[row.samples.tolist(), row.real_tokens, row.padded_tokens] for row in rows]
                for rows in update.ranks
            ],
        ]
        for update in updates
    ]


@given(plans(), st.integers(0, 3), st.integers(0, 300))
def test_every_sample_once_whatever_the_ranks_rows_and_batch(case, stage, epoch):
    index, settings = case
    assert seen(Plan(index, **settings).epoch(stage, epoch)) == list(range(len(index)))


@given(plans(), st.integers(1, 500))
def test_every_sample_once_with_batches_in_tokens(case, batch_tokens):
    index, settings = case
    plan = Plan(index, **(settings | {"ranks": 1, "batch_tokens": batch_tokens}))
    assert seen(plan.epoch(0, 0)) == list(range(len(index)))


@given(plans(), st.sets(st.integers(0, 4), min_size=1), st.data())
def test_every_active_sample_once_as_tasks_leave_and_samples_are_skipped(case, active, data):
    index, settings = case
    active = {task for task in active if task < len(index.task_names)} or {0}
    skip = data.draw(st.sets(st.integers(0, len(index) - 1)))
    expected = [i for i in range(len(index)) if index.tasks[i] in active and i not in skip]
    assert seen(Plan(index, **settings).epoch(0, 1, active=active, skip=skip)) == expected


@given(plans())
def test_which_samples_share_an_update_does_not_depend_on_ranks_or_rows(case):
    index, settings = case
    other = settings | {
        "ranks": 1,
        "row_tokens": settings["row_tokens"] + 77,
        "bucket_tokens": 1,
        "row_lengths": None,
    }
    one, two = Plan(index, **settings).epoch(0, 0), Plan(index, **other).epoch(0, 0)
    assert [(u.samples.tolist(), u.denominator) for u in one] == [
        (u.samples.tolist(), u.denominator) for u in two
    ]


@given(plans(), st.data())
def test_a_kill_at_any_cursor_leaves_the_same_remaining_updates(case, data):
    index, settings = case
    whole = Plan(index, **settings).epoch(1, 2)
    at = data.draw(st.integers(0, len(whole)))
    cursor = Cursor(1, 2, at)
    resumed = Plan(index, **settings).epoch(cursor.stage, cursor.epoch)
    assert spell(resumed[cursor.update :]) == spell(whole[at:])
    assert seen(whole[:at] + resumed[cursor.update :]) == list(range(len(index)))


@given(plans(), st.integers(0, 5))
def test_a_revert_and_rewind_takes_the_old_stage_key_again(case, epoch):
    index, settings = case
    plan = Plan(index, **settings)
    before = spell(plan.epoch(3, epoch))
    plan.epoch(4, 0, active=[0])  # the run goes on in a new stage, then comes back
    plan.epoch(4, 1, task_weights={task: 1.0 for task in range(len(index.task_names))})
    assert spell(plan.epoch(3, epoch)) == before


def test_a_new_stage_starts_another_epoch_than_the_old_ones():
    plan = Plan(make_index([3] * 50, [0] * 50), seed=1, row_tokens=16, bucket_tokens=1)
    orders = [tuple(plan.epoch(stage, epoch).order.tolist()) for stage in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16


def test_one_sample_at_256_epochs():
    plan = Plan(make_index([5], [0]), seed=0, row_tokens=8, bucket_tokens=8)
    for epoch in range(256):
        assert seen(plan.epoch(0, epoch)) == [0]


def test_more_tasks_than_samples_per_update():
    plan = Plan(make_index([4] * 40, range(40)), seed=0, row_tokens=16, bucket_tokens=1, batch_samples=3)
    assert len(plan.epoch(0, 0)) == 14
    assert seen(plan.epoch(0, 0)) == list(range(40))


def test_a_task_with_one_row_is_seen_once_per_epoch():
    plan = Plan(make_index([4] * 40, [1] + [0] * 39), seed=0, row_tokens=16, bucket_tokens=1)
    for epoch in range(5):
        assert seen(plan.epoch(0, epoch)).count(0) == 1
        assert seen(plan.epoch(0, epoch, active=[1])) == [0]


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_lengths_about_the_row_length(shift):
    lengths = [15, 16 + min(shift, 0), 1, 15, 1, 1]
    plan = Plan(make_index(lengths, [0] * 6), seed=0, row_tokens=16, bucket_tokens=4, ranks=2)
    assert seen(plan.epoch(0, 0)) == list(range(6))


IN_ANOTHER_PROCESS = """
import json
from tests.laws.test_law9_every_sample_once import make_index, spell
from repsft_fast.data.plan import Plan
plan = Plan(make_index(range(1, 41), [i % 3 for i in range(40)]), seed=5, row_tokens=64, bucket_tokens=8, ranks=2)
weighted = plan.epoch(1, 2, active={2, 0}, task_weights={2: 0.3, 0: 0.7}, skip={3, 39, 9})
print(json.dumps([spell(plan.epoch(1, 2)), spell(weighted)]))
"""


def test_other_processes_with_other_hash_seeds_plan_the_same():
    answers = []
    for seed in ("0", "1", "4242"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", IN_ANOTHER_PROCESS],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        answers.append(json.loads(done.stdout))
    plan = Plan(
        make_index(range(1, 41), [i % 3 for i in range(40)]), seed=5, row_tokens=64, bucket_tokens=8, ranks=2
    )
    weighted = plan.epoch(1, 2, active=[0, 2], task_weights={0: 0.7, 2: 0.3}, skip=[9, 39, 3])
    here = json.loads(json.dumps([spell(plan.epoch(1, 2)), spell(weighted)]))
    assert answers == [here, here, here]
