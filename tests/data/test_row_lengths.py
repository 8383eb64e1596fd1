"""The shapes rows take, as values: slots, bounds and sums of lengths, against the plain way to get each."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repsft_fast.data.row_lengths import COUNTED_ROWS, RowLengths
from repsft_fast.errors import ConfigError

SHAPES = RowLengths((192, 512, 640, 2048), documents=7, longest=600)


@st.composite
def shapes(draw):
    lengths = draw(st.sets(st.integers(1, 400), min_size=1, max_size=6))
    return RowLengths(tuple(sorted(lengths)), draw(st.integers(1, 9)), draw(st.integers(1, 400)))


@given(shapes(), st.data())
def test_a_row_takes_the_least_length_that_holds_it(made, data):
    real = data.draw(st.integers(0, made.capacity))
    assert made.slots(real) == min(length for length in made.lengths if length >= real)


def test_a_row_longer_than_all_has_no_length():
    with pytest.raises(IndexError):
        SHAPES.slots(2049)


@given(shapes(), st.data())
def test_the_bound_holds_documents_and_padding_and_is_one_for_each_length(made, data):
    real = data.draw(st.integers(0, made.capacity))
    slots = made.slots(real)
    bound = made.max_seqlen(slots)
    assert min(made.longest, real) <= bound
    assert slots - real <= bound
    assert bound <= slots


def test_the_bound_is_no_looser_than_it_must_be():
    assert [SHAPES.max_seqlen(slots) for slots in SHAPES.lengths] == [192, 512, 600, 1407]
    assert RowLengths((64, 128), 1, 20).max_seqlen(128) == 63, "the padding behind 65 positions"


def test_one_number_of_borders():
    assert SHAPES.segments == 8


@given(shapes(), st.integers(1, COUNTED_ROWS), st.data())
def test_the_least_sums_of_up_to_three_rows(made, rows, data):
    total = data.draw(st.integers(1, rows * made.capacity))
    every = itertools.combinations_with_replacement(made.lengths, rows)
    least = min(sum(lengths) for lengths in every if sum(lengths) >= total)
    offered = list(made.sums(total, rows))
    assert sum(offered[0]) == least
    for lengths in offered:
        assert len(lengths) == rows
        assert sum(lengths) >= total
        assert list(lengths) == sorted(lengths, reverse=True)


@given(shapes(), st.integers(COUNTED_ROWS + 1, 20), st.data())
def test_sums_of_many_rows_hold_what_is_asked(made, rows, data):
    total = data.draw(st.integers(1, rows * made.capacity))
    offered = list(made.sums(total, rows))
    gaps = np.diff((0, *made.lengths))
    assert total <= sum(offered[0]) < total + max(gaps.max(), rows * made.lengths[0])
    assert all(len(lengths) == rows and set(lengths) <= set(made.lengths) for lengths in offered)
    assert not list(made.sums(rows * made.capacity + 1, rows))


@given(shapes())
def test_written_and_read_back(made):
    assert RowLengths.of_json(made.to_json()) == made


@pytest.mark.parametrize(
    "value",
    [
        {},
        [64],
        None,
        {"lengths": [], "documents": 1, "longest": 1},
        {"lengths": [64, 64], "documents": 1, "longest": 1},
        {"lengths": [64, 32], "documents": 1, "longest": 1},
        {"lengths": [0, 32], "documents": 1, "longest": 1},
        {"lengths": [64], "documents": 0, "longest": 1},
        {"lengths": [64], "documents": True, "longest": 1},
        {"lengths": [64.0], "documents": 1, "longest": 1},
        {"lengths": 64, "documents": 1, "longest": 1},
    ],
    ids=str,
)
def test_what_is_none_is_refused(value):
    with pytest.raises(ConfigError, match="row lengths: are none"):
        RowLengths.of_json(value)
