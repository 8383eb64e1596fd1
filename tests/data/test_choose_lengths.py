"""Which lengths rows take: the least padding there can be, few, and long enough for every row of every stage."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repsft_fast.data.choose_lengths import choose_lengths, longest_row, quantised, summed
from repsft_fast.data.packing import Apart
from repsft_fast.data.plan import Plan, SampleIndex
from repsft_fast.data.row_lengths import MOST_LENGTHS


def index_of(lengths, tasks=None) -> SampleIndex:
    lengths = np.asarray(lengths, dtype=np.int64)
    tasks = np.zeros(len(lengths), np.int32) if tasks is None else np.asarray(tasks, np.int32)
    names = tuple(f"task{n}" for n in range(int(tasks.max()) + 1))
    return SampleIndex(lengths, np.ones_like(lengths), tasks, np.ones(len(lengths)), names)


def drawn(count: int, median: float, spread: float, longest: int) -> np.ndarray:
    lengths = np.random.default_rng(0).lognormal(np.log(median), spread, count)
    return np.clip(lengths, 2, longest).astype(np.int64)


def plan_of(lengths, row_tokens, **more) -> Plan:
    return Plan(index_of(lengths), seed=0, row_tokens=row_tokens, bucket_tokens=128, **more)


def with_lengths(lengths, row_tokens, chosen=None, **more) -> Plan:
    made = chosen or choose_lengths(plan_of(lengths, row_tokens, **more))
    return plan_of(lengths, row_tokens, row_lengths=made, **more)


def padding(plan: Plan, epochs=(0, 7)) -> float:
    updates = [update for number in epochs for update in plan.epoch(0, number)]
    return 1 - sum(u.real_tokens for u in updates) / sum(u.padded_tokens for u in updates)


@given(st.lists(st.integers(1, 80), min_size=1, max_size=30), st.integers(1, 4))
@settings(deadline=None)
def test_quantised_is_the_best_there_is(real, most):
    """Against every choice of places, at steps of 8 up to 80."""
    found = quantised(np.array(real), 80, most)
    assert found[-1] == 80
    assert len(found) <= most

    def slots(lengths):
        return sum(min(length for length in lengths if length >= n) for n in real)

    places = range(8, 80, 8)
    every = ((*some, 80) for count in range(most) for some in itertools.combinations(places, count))
    assert slots(found) == min(slots(lengths) for lengths in every)


def test_no_length_that_no_row_needs():
    assert quantised(np.array([100] * 5 + [160]), 160) == (104, 160)


def test_sums_of_two_meet_what_one_length_cannot():
    totals = np.arange(4_000, 6_000, 7)
    alone = quantised(totals, 8_192, 6)
    together = summed(totals, alone, 8_192, 64)
    sums = sorted(
        sum(some) for n in (1, 2, 3) for some in itertools.combinations_with_replacement(together, n)
    )

    def over(edges):
        edges = np.array(sorted(edges))
        return float((edges[np.searchsorted(edges, totals)] - totals).mean())

    assert len(together) <= len(alone)
    assert together[-1] == 8_192
    assert over(sums) < over(alone) / 2


# What the issue asks of usual data: (name, lengths, row_tokens, samples an update, most padding)
USUAL = {
    "short chats, 64": (drawn(3000, 256, 0.8, 8192), 8192, 64, 0.03),
    "short chats, 16": (drawn(3000, 256, 0.8, 4096), 4096, 16, 0.03),
    "long chats, 64": (drawn(3000, 1024, 0.8, 8192), 8192, 64, 0.03),
    "long chats, 16": (drawn(3000, 1024, 0.8, 8192), 8192, 16, 0.03),
    "long thoughts, 64": (drawn(400, 9500, 0.45, 16384), 16384, 64, 0.03),
    "long thoughts, 16, long rows": (drawn(400, 9500, 0.45, 16384), 32768, 16, 0.03),
    "very short, 64": (drawn(2000, 24, 0.5, 300), 4096, 64, 0.03),
    "long thoughts, one": (drawn(400, 9500, 0.45, 16384), 16384, 1, 0.12),
    "long thoughts, one, rows twice as long": (drawn(400, 9500, 0.45, 16384), 32768, 1, 0.12),
    "one task, one": (drawn(1000, 180, 0.25, 600), 4096, 1, 0.12),
    "short chats, one": (drawn(3000, 256, 0.8, 8192), 8192, 1, 0.12),
    "long chats, one": (drawn(3000, 1024, 0.8, 8192), 8192, 1, 0.12),
    "very short, 16": (drawn(2000, 24, 0.5, 300), 4096, 16, 0.03),
}


@pytest.mark.parametrize("name", USUAL)
def test_padding_is_little_on_usual_data(name):
    lengths, row_tokens, samples, most = USUAL[name]
    plan = with_lengths(lengths, row_tokens, batch_samples=samples)
    assert len(plan.row_lengths.lengths) <= MOST_LENGTHS
    assert padding(plan) <= most


@pytest.mark.parametrize(
    ("lengths", "row_tokens"), [(drawn(800, 180, 0.25, 600), 4096), (USUAL["short chats, 16"][0], 8192)]
)
def test_padding_is_little_on_four_ranks(lengths, row_tokens):
    """Rows of four samples, far shorter than the longest there can be: lengths lie where rows are."""
    assert padding(with_lengths(lengths, row_tokens, batch_samples=16, ranks=4)) <= 0.03


def test_sixteen_short_chats_are_about_one_row():
    plan = with_lengths(*USUAL["short chats, 16"][:1], 8192, batch_samples=16)
    updates = list(plan.epoch(0, 3))
    assert sum(len(update.ranks[0]) for update in updates) <= 1.2 * len(updates)


@pytest.mark.parametrize("name", ["short chats, 64", "long chats, 16", "very short, 64"])
def test_closing_rows_costs_next_to_nothing(name):
    lengths, row_tokens, samples, _ = USUAL[name]
    plan = with_lengths(lengths, row_tokens, batch_samples=samples)
    free = plan_of(
        lengths,
        row_tokens,
        batch_samples=samples,
        row_lengths=type(plan.row_lengths)(plan.row_lengths.lengths, samples, int(lengths.max())),
    )
    rows = [sum(len(rows) for u in p.epoch(0, 5) for rows in u.ranks) for p in (plan, free)]
    slots = [sum(u.padded_tokens for u in p.epoch(0, 5)) for p in (plan, free)]
    assert rows[0] <= rows[1] * 1.01
    assert slots[0] <= slots[1] * 1.01


def test_fewer_documents_where_few_rows_have_many():
    """Rows of 2,048 hold four samples of 500; one update in 40 has a row of 64 very short ones."""
    lengths = np.where(np.arange(4000) % 40 == 0, 4, 500)
    made = choose_lengths(plan_of(lengths, 2048, batch_tokens=40_000))
    assert made.documents == 8


def test_documents_come_in_steps_of_eight():
    """Rows of 2,048 hold ten samples of 200, so that nine are too few and ten would do; one update in 40 has a
    row of very short ones."""
    lengths = np.where(np.arange(4000) % 40 == 0, 4, 200)
    assert choose_lengths(plan_of(lengths, 2048, batch_tokens=40_000)).documents == 16


def test_room_for_the_documents_of_a_task_that_is_left_alone():
    """Rows of 4,096 hold a few of 1,000 and some of 20; once the long ones have left, a row holds 64 of 20."""
    lengths, tasks = np.array([1000] * 600 + [20] * 300), [0] * 600 + [1] * 300
    fixed = {"seed": 0, "row_tokens": 4096, "bucket_tokens": 128, "batch_samples": 64}
    together = choose_lengths(Plan(index_of(lengths), **fixed))
    apart = choose_lengths(Plan(index_of(lengths, tasks), **fixed))
    assert together.documents < 40 < 60 < apart.documents


class TestNoRowIsEverTooLong:
    """The longest length holds what any stage, epoch, set of tasks, weights or skipped samples can make."""

    @given(st.data())
    @settings(deadline=None, max_examples=60)
    def test_whatever_comes(self, data):
        lengths = data.draw(st.lists(st.integers(1, 200), min_size=3, max_size=60))
        tasks = [n % 3 for n in range(len(lengths))]
        ranks = data.draw(st.integers(1, 3))
        batch = data.draw(
            st.sampled_from(
                [{"batch_samples": n} for n in (1, 2, 7, 60)] + [{"batch_tokens": n} for n in (1, 90, 800)]
            )
        )
        if batch.get("batch_samples", 9) < ranks or "batch_tokens" in batch:
            ranks = 1
        fixed = {
            "seed": data.draw(st.integers(0, 99)),
            "row_tokens": max(lengths) + data.draw(st.integers(0, 300)),
            "bucket_tokens": 128,
            "ranks": ranks,
            "apart": data.draw(st.sampled_from([Apart(), Apart((50,)), Apart(alone_above=90)])),
            **batch,
        }
        index = index_of(lengths, tasks)
        made = choose_lengths(Plan(index, **fixed))
        plan = Plan(index, row_lengths=made, **fixed)
        assert made.capacity <= fixed["row_tokens"]
        stage, epoch = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
        active = data.draw(st.sets(st.integers(0, 2), min_size=1))
        weights = data.draw(
            st.none() | st.fixed_dictionaries({n: st.sampled_from([0.5, 3.0]) for n in active})
        )
        skip = data.draw(st.sets(st.integers(0, len(lengths) - 1), max_size=5))
        for update in plan.epoch(stage, epoch, active=active, task_weights=weights, skip=skip):
            rows = [row for of_rank in update.ranks for row in of_rank]
            assert sorted(int(i) for row in rows for i in row.samples) == sorted(update.samples.tolist())
            assert len({len(of_rank) for of_rank in update.ranks}) == 1
            for row in rows:
                assert row.padded_tokens in made.lengths
                assert row.real_tokens == index.lengths[row.samples].sum() <= row.padded_tokens
                assert len(row.samples) <= made.documents
                assert row.segments == made.documents + 1
                assert row.max_seqlen == made.max_seqlen(row.padded_tokens)

    def test_a_longer_sample_of_another_split(self):
        plan = plan_of([30, 40, 50], 4096, batch_samples=1)
        assert choose_lengths(plan).capacity == longest_row(plan, 50) == 56
        made = choose_lengths(plan, longest=1_001)
        assert (made.capacity, made.longest) == (1_008, 1_001)

    def test_no_longer_than_a_row(self):
        assert choose_lengths(plan_of([30, 40, 50], 55, batch_samples=16)).capacity == 55

    def test_drawn_samples_may_come_again(self):
        """Three samples an update, and weights draw the longest of two three times."""
        plan = plan_of([10, 100], 4096, batch_samples=3)
        assert choose_lengths(plan).capacity >= 300


def test_the_same_answer_again_and_for_the_lengths_it_gave():
    plan = plan_of(drawn(500, 200, 0.7, 2048), 2048, batch_samples=16)
    made = choose_lengths(plan)
    assert choose_lengths(plan) == made
    assert choose_lengths(plan, lengths=made.lengths) == made


def test_the_global_random_state_decides_nothing():
    plan = plan_of(drawn(500, 200, 0.7, 2048), 2048, batch_samples=16)
    made = choose_lengths(plan)
    np.random.seed(5)
    assert choose_lengths(plan) == made


@pytest.mark.parametrize("most", [1, 2, 12])
def test_as_many_as_asked(most):
    lengths = drawn(500, 200, 0.7, 2048)
    plan = plan_of(lengths, 2048, batch_samples=1)
    made = choose_lengths(plan, most=most)
    assert len(made.lengths) == most
    packed = choose_lengths(plan_of(lengths, 2048, batch_samples=16), most=most)
    assert len(packed.lengths) <= most


def test_rows_of_several_ranks_are_few_shapes_too():
    lengths = drawn(2000, 256, 0.8, 4096)
    plan = with_lengths(lengths, 4096, batch_samples=64, ranks=4)
    rows = [row for update in plan.epoch(0, 3) for of_rank in update.ranks for row in of_rank]
    assert len({row.padded_tokens for row in rows}) <= MOST_LENGTHS
    assert padding(plan) <= 0.03
