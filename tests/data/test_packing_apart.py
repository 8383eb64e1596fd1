"""Samples that may not share a row: those on different sides of a length, those longer than one, or all of
them."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from repsft_fast.data.packing import TOGETHER, Apart, pack

CALM = hypothesis_settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])


def rows(lengths, apart, **options):
    lengths = np.array(lengths)
    return [row for of_rank in pack(lengths, 64, apart=apart, **options) for row in of_rank if len(row)]


def sizes(lengths, apart, **options):
    return sorted(sorted(lengths[i] for i in row) for row in rows(lengths, apart, **options))


def test_sides_of_a_length_do_not_meet():
    assert sizes([3, 8, 9, 20], TOGETHER) == [[3, 8, 9, 20]]
    assert sizes([3, 8, 9, 20], Apart((8,))) == [[3, 8], [9, 20]]
    assert sizes([3, 8, 9, 20], Apart((8, 9))) == [[3, 8], [9], [20]]
    assert sizes([3, 8, 9, 20], Apart((99,))) == [[3, 8, 9, 20]]


def test_longer_ones_are_alone():
    assert sizes([3, 8, 9, 20, 21], Apart(alone_above=8)) == [[3, 8], [9], [20], [21]]
    assert sizes([3, 8, 9], Apart(alone_above=0)) == [[3], [8], [9]]
    assert sizes([3, 5, 8, 9, 9], Apart((4,), 8)) == [[3], [5, 8], [9], [9]]


@CALM
@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=80),
    st.lists(st.integers(1, 64), max_size=3),
    st.none() | st.integers(0, 64),
    st.integers(1, 3),
    st.sampled_from([1, 8]),
)
def test_every_sample_once_and_none_where_it_may_not_be(lengths, borders, alone, ranks, bucket):
    apart = Apart(tuple(borders), alone)
    found = rows(lengths, apart, ranks=ranks, bucket=bucket)
    assert sorted(i for row in found for i in row) == list(range(len(lengths)))
    for row in found:
        mine = [lengths[i] for i in row]
        assert sum(mine) <= 64
        assert all((min(mine) > border) == (max(mine) > border) for border in borders)
        assert alone is None or len(row) == 1 or max(mine) <= alone


@pytest.mark.parametrize("apart", [Apart((8,)), Apart(alone_above=0)])
def test_ranks_still_have_equally_many_rows(apart):
    dealt = pack(np.array([3, 8, 9, 20, 21]), 64, ranks=2, apart=apart)
    assert len({len(of_rank) for of_rank in dealt}) == 1
