"""Rows made to fit few lengths: nothing is lost, limits hold, and it never costs more than it found."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from repsft_fast.data.fitting import FEW_SAMPLES, fit, fullest
from repsft_fast.data.packing import pack
from repsft_fast.data.row_lengths import ROW_SLOTS, RowLengths


@st.composite
def problems(draw):
    lengths = draw(st.sets(st.integers(1, 300), min_size=1, max_size=6))
    capacity = max(lengths)
    sizes = draw(st.lists(st.integers(1, capacity), min_size=1, max_size=80))
    to = RowLengths(tuple(sorted(lengths)), draw(st.integers(1, 30)), max(sizes))
    return sizes, to


def greedy(sizes: list[int], to: RowLengths) -> list[list[int]]:
    """Rows one after the other, longest sample first, each closed when the next does not fit."""
    rows: list[list[int]] = [[]]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        full = len(rows[-1]) == to.documents or sum(sizes[j] for j in rows[-1]) + sizes[i] > to.capacity
        if rows[-1] and full:
            rows.append([])
        rows[-1].append(i)
    return rows


def cost(rows, sizes, to):
    return sum(to.slots(sum(sizes[i] for i in row)) + ROW_SLOTS for row in rows)


@given(problems(), st.booleans())
def test_every_sample_once_within_the_limits_and_never_dearer(problem, as_many):
    sizes, to = problem
    before = greedy(sizes, to)
    after = fit([list(row) for row in before], sizes, to, as_many=as_many)
    assert sorted(itertools.chain(*after)) == list(range(len(sizes)))
    for row in after:
        assert 0 < len(row) <= to.documents
        assert sum(sizes[i] for i in row) <= to.capacity
        assert [sizes[i] for i in row] == sorted((sizes[i] for i in row), reverse=True)
    assert cost(after, sizes, to) <= cost(before, sizes, to)
    if as_many:
        assert len(after) == len(before)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 9), st.data())
def test_the_fullest_row(sizes, most, data):
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    free = data.draw(st.integers(sizes[order[0]], 120))
    row, rest = fullest(order, sizes, free, most)
    assert sorted(row + rest) == list(range(len(sizes)))
    assert row[0] == order[0]
    assert len(row) <= most
    assert sum(sizes[i] for i in row) <= free
    if most >= len(sizes):
        others = [sizes[i] for i in order[1:]]
        subsets = itertools.chain.from_iterable(
            itertools.combinations(others, n) for n in range(len(others) + 1)
        )
        best = max(sum(s) for s in subsets if sum(s) + sizes[order[0]] <= free)
        assert sum(sizes[i] for i in row) == best + sizes[order[0]]


def test_two_rows_choose_lengths_whose_sum_fits():
    """1,000 positions are one row of 1,024; with 400 and 608 there, two rows of 1,008 are dearer by a row and
    so are not taken; 1,500 of 2,048 are two rows."""
    sizes = [100] * 10
    near = RowLengths((400, 608, 1024), 48, 100)
    assert [len(row) for row in fit([list(range(10))], sizes, near)] == [10]
    sizes = [100] * 15
    far = RowLengths((600, 900, 2048), 48, 100)
    assert sorted(len(row) for row in fit([list(range(15))], sizes, far)) == [6, 9]


def test_many_samples_of_one_row_are_split_too():
    rng = np.random.default_rng(0)
    sizes = rng.integers(5, 60, 3 * FEW_SAMPLES).tolist()
    total = sum(sizes)
    to = RowLengths((total // 3 + 2, 2 * total // 3 + 3, 2 * total), 200, 60)
    rows = fit([sorted(range(len(sizes)), key=lambda i: -sizes[i])], sizes, to)
    assert len(rows) > 1
    assert sum(to.slots(sum(sizes[i] for i in row)) for row in rows) < total * 1.01


def test_what_stands_apart_stays_apart():
    from repsft_fast.data.packing import Apart

    sizes = np.array([50, 40, 30, 20, 10, 10])
    to = RowLengths((60, 110, 200), 8, 50)
    (rows,) = pack(sizes, 200, apart=Apart((25,)), to=to)
    assert all(len({size > 25 for size in sizes[row].tolist()}) == 1 for row in rows)
    rows = itertools.chain(*pack(sizes, 200, apart=Apart((25,)), to=to, ranks=3))
    assert all(len({size > 25 for size in sizes[row].tolist()}) == 1 for row in rows if len(row))


def test_rows_that_are_as_cheap_as_can_be_stay():
    to = RowLengths((50, 60, 110 + ROW_SLOTS), 8, 60)
    assert fit([[0], [1]], [60, 50], to) == [[0], [1]]


def test_no_row_is_longer_than_the_longest_length():
    to = RowLengths((32, 64), 8, 30)
    (rows,) = pack(np.array([30, 30, 30, 30]), 200, to=to)
    assert sorted(map(len, rows)) == [2, 2]
