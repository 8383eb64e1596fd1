from collections import Counter

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from repsft_fast.data.sample import Sample
from repsft_fast.data.splits import carve, nested_subset, overlap, overlap_warnings
from repsft_fast.errors import DataError


def samples(count, tasks=("a",)):
    return [
        Sample([n, n + 1], [False, True], tasks[n % len(tasks)], source=f"f:{n + 1}") for n in range(count)
    ]


@given(st.integers(1, 60), st.integers(0, 2**40), st.data())
def test_subsets_of_one_seed_are_nested_and_have_their_size(count, seed, data):
    everything = samples(count)
    large = data.draw(st.integers(1, count))
    small = data.draw(st.integers(1, large))
    first, second = (nested_subset(everything, n, seed) for n in (small, large))
    assert second[:small] == first
    assert len({sample.source for sample in second}) == large


def test_seeds_draw_differently_and_none_is_all():
    everything = samples(100)
    assert nested_subset(everything, None, 1) == everything
    assert nested_subset(everything, 10, 1) != nested_subset(everything, 10, 2)
    assert nested_subset(everything, 100, 1) != everything


def test_the_draw_is_the_same_on_every_machine():
    """A recorded draw: a change of it would silently give every user other subsets for the same seed."""
    assert [sample.ids[0] for sample in nested_subset(samples(1000), 5, 42)] == [772, 479, 383, 774, 481]


@given(st.integers(4, 60), st.integers(1, 3), st.floats(0, 0.3), st.integers(0, 9))
def test_carving_is_a_partition_task_by_task_in_order(per_task, tasks, validation, seed):
    everything = samples(per_task * tasks, "abc"[:tasks])
    asked = validation if round(validation * per_task) else 0
    splits = carve(everything, validation=asked, test=2, seed=seed)
    parts = (splits.train, splits.validation, splits.test)
    assert sorted(s.ids[0] for part in parts for s in part) == list(range(len(everything)))
    for part, size in zip(parts[1:], (round(asked * per_task), 2)):
        assert Counter(s.task for s in part) == ({name: size for name in "abc"[:tasks]} if size else {})
        assert [s.ids[0] for s in part] == sorted(s.ids[0] for s in part)


def test_the_test_split_does_not_move_with_the_validation_split():
    everything = samples(50, "ab")
    assert carve(everything, validation=3, test=5).test == carve(everything, validation=0.4, test=5).test
    assert carve(everything, test=5, seed=1).test != carve(everything, test=5, seed=2).test


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"validation": 5}, "task 'a': leaves nothing to train on, got 5 validation . 0 test of 5"),
        ({"validation": 0.5, "test": 3}, "leaves nothing to train on"),
        ({"validation": 0.01}, "task 'a', validation: would be empty"),
        ({"test": -1}, "data.test: is not a size"),
        ({"test": 1.5}, "data.test: is not a size"),
        ({"validation": float("nan")}, "data.validation: is not a size"),
    ],
)
def test_sizes_that_cannot_be(sizes, words):
    with pytest.raises(DataError, match=words):
        carve(samples(5), **sizes)


def test_shared_samples_are_counted():
    everything = samples(10)
    other = [
        Sample([3, 4], [False, True], "b"),
        Sample([3, 4, 5], [False, True, True]),
        Sample([3, 4], [False, True]),
    ]
    assert overlap(everything, other) == 2
    assert overlap_warnings(everything, other, []) == [
        "2 of 3 validation samples are also in train, token for token"
    ]
    assert overlap_warnings(everything, [], other[:1]) == [
        "1 of 1 test samples are also in train, token for token"
    ]
    assert overlap_warnings([], other, other[:1]) == [
        "1 of 1 test samples are also in validation, token for token"
    ]


@given(st.lists(st.integers(0, 12), min_size=8, max_size=40), st.integers(1, 3), st.integers(0, 9))
def test_carved_splits_share_no_sample_however_many_copies_there_are(ids, tasks, seed):
    everything = [Sample([n], [True], "abc"[i % tasks], source=str(i)) for i, n in enumerate(ids)]
    try:
        splits = carve(everything, validation=1, test=1, seed=seed)
    except DataError:
        reject()  # too few, or nothing but copies
    parts = (splits.train, splits.validation, splits.test)
    assert sorted(int(s.source) for part in parts for s in part) == list(range(len(ids)))
    assert overlap_warnings(*parts) == []
    for part in parts[1:]:
        assert Counter(s.task for s in part) == Counter("abc"[:tasks])
    assert splits.warnings == []


def test_copies_go_the_same_way_and_a_split_that_they_leave_short_says_so():
    doubled = [*samples(10), *samples(10)]
    splits = carve(doubled, validation=6, test=4)
    assert (len(splits.validation), len(splits.test), splits.warnings) == (6, 4, [])
    short = carve(doubled, validation=5)
    assert len(short.validation) == 4
    assert short.warnings == [
        "task 'a': 4 validation samples where 5 were asked for, because copies of a sample stay together"
    ]
    assert overlap(short.train, short.validation) == 0


def test_copies_in_another_task_go_the_same_way():
    twice = [Sample([n], [True], task) for task in "ab" for n in range(10)]
    splits = carve(twice, validation=3)
    assert Counter(s.task for s in splits.validation) == {"a": 3, "b": 3}
    assert len({s.ids[0] for s in splits.validation}) == 3


def test_nothing_but_copies_cannot_be_carved():
    with pytest.raises(
        DataError, match="task 'a', validation: would be empty: its samples are copies; remove copies"
    ):
        carve([Sample([1, 2], [False, True], "a")] * 8, validation=0.25)


def test_the_carve_is_the_same_on_every_machine():
    """A recorded draw: without copies a change of it would silently move everybody's validation samples."""
    splits = carve(samples(40), validation=3, test=4, seed=42)
    assert [s.ids[0] for s in splits.validation] == [3, 6, 19]
    assert [s.ids[0] for s in splits.test] == [0, 13, 26, 28]
