import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repsft_fast.data.packing import pack, padded_length
from repsft_fast.errors import ConfigError, DataError


@st.composite
def packing_problems(draw):
    capacity = draw(st.integers(1, 300))
    lengths = draw(st.lists(st.integers(1, capacity), max_size=80))
    return np.array(lengths, dtype=np.int64), capacity, draw(st.integers(1, 64)), draw(st.integers(1, 7))


def best_fit_by_hand(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing as the textbook says it: look at every open row."""
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [(free[r], r) for r in range(len(rows)) if free[r] >= lengths[i]]
        if fitting:
            _, r = min(fitting)
        else:
            r = len(rows)
            rows.append([])
            free.append(capacity)
        rows[r].append(i)
        free[r] -= lengths[i]
    return rows


class TestProperties:
    @given(packing_problems())
    def test_no_sample_is_lost_or_doubled(self, problem):
        lengths, capacity, bucket, ranks = problem
        dealt = pack(lengths, capacity, bucket=bucket, ranks=ranks)
        packed = np.concatenate([np.empty(0, dtype=np.int64), *(row for rows in dealt for row in rows)])
        assert sorted(packed.tolist()) == list(range(len(lengths)))

    @given(packing_problems())
    def test_no_row_is_over_full_and_every_rank_has_as_many(self, problem):
        lengths, capacity, bucket, ranks = problem
        dealt = pack(lengths, capacity, bucket=bucket, ranks=ranks)
        assert len(dealt) == ranks
        assert len({len(rows) for rows in dealt}) == 1
        assert all(lengths[row].sum() <= capacity for rows in dealt for row in rows)
        assert all(row.dtype == np.int64 for rows in dealt for row in rows)

    @given(packing_problems())
    def test_an_empty_row_comes_only_when_every_row_is_one_sample(self, problem):
        lengths, capacity, bucket, ranks = problem
        sizes = [len(row) for rows in pack(lengths, capacity, bucket=bucket, ranks=ranks) for row in rows]
        assert sizes.count(0) < ranks or len(lengths) == 0
        assert 0 not in sizes or max(sizes) == 1

    @given(packing_problems())
    def test_rows_fill_as_in_the_textbook(self, problem):
        lengths, capacity, _, _ = problem
        (rows,) = pack(lengths, capacity)
        # totals, not contents: among rows with equally little room any is a best fit
        ours = sorted(int(lengths[row].sum()) for row in rows)
        assert ours == sorted(int(lengths[row].sum()) for row in best_fit_by_hand(lengths, capacity))

    @given(st.lists(st.integers(1, 40), min_size=2, max_size=9), st.integers(40, 60))
    def test_few_samples_in_buckets_fill_every_row_as_full_as_any_subset_can(self, lengths, capacity):
        (rows,) = pack(np.array(lengths), capacity, bucket=8)
        left = set(range(len(lengths)))
        for row in rows:
            first = max(left, key=lambda i: (lengths[i], -i))
            others = sorted(left - {first})
            fullest = max(
                total
                for n in range(len(others) + 1)
                for chosen in itertools.combinations(others, n)
                if (total := lengths[first] + sum(lengths[i] for i in chosen)) <= capacity
            )
            assert first in row.tolist()
            assert sum(lengths[i] for i in row) == fullest
            left -= set(row.tolist())

    @given(packing_problems())
    def test_same_arguments_same_rows(self, problem):
        lengths, capacity, bucket, ranks = problem
        first = pack(lengths, capacity, bucket=bucket, ranks=ranks)
        second = pack(lengths.copy(), capacity, bucket=bucket, ranks=ranks)
        assert [[row.tolist() for row in rows] for rows in first] == [
            [row.tolist() for row in rows] for rows in second
        ]

    @given(st.integers(0, 10_000), st.integers(1, 500), st.integers(1, 300))
    def test_padded_length_is_the_next_bucket_within_the_capacity(self, real, bucket, spare):
        capacity = max(real, 1) + spare
        padded = padded_length(real, capacity, bucket)
        assert max(real, 1) <= padded <= capacity
        assert padded == capacity or padded % bucket == 0
        assert padded - max(real, 1) < bucket


class TestEdges:
    @pytest.mark.parametrize("count", [512, 513])
    @pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16])
    def test_both_ways_of_sorting_and_every_integer_type_give_the_same_rows(self, count, dtype):
        lengths = np.random.default_rng(0).integers(1, 65, size=count)
        (rows,) = pack(lengths.astype(dtype), 64)
        assert sorted(int(lengths[row].sum()) for row in rows) == sorted(
            int(lengths[row].sum()) for row in best_fit_by_hand(lengths, 64)
        )

    def test_lengths_of_exactly_the_capacity_one_less_and_one(self):
        (rows,) = pack(np.array([1, 8, 7, 8, 1]), 8)
        assert sorted(sorted(row.tolist()) for row in rows) == [[0, 2], [1], [3], [4]]

    def test_a_sample_one_past_the_capacity_is_named(self):
        with pytest.raises(
            DataError, match=r"sample 1: is longer than a row, expected at most 8 positions, got 9; raise"
        ):
            pack(np.array([8, 9]), 8)

    def test_a_sample_without_positions_is_named(self):
        with pytest.raises(DataError, match="sample 2: has no position"):
            pack(np.array([3, 1, 0]), 8)

    def test_a_single_sample_past_the_capacity_is_not_let_through(self):
        with pytest.raises(DataError, match="sample 0"):
            pack(np.array([9]), 8)

    def test_fractional_lengths_are_refused(self):
        with pytest.raises(DataError, match="whole numbers"):
            pack(np.array([1.5]), 8)

    @pytest.mark.parametrize("ranks", [1, 3])
    def test_nothing_to_pack(self, ranks):
        assert pack(np.array([], dtype=np.int64), 8, ranks=ranks) == [[] for _ in range(ranks)]

    def test_one_sample_on_three_ranks_pads_with_empty_rows(self):
        dealt = pack(np.array([5]), 8, ranks=3)
        assert [[row.tolist() for row in rows] for rows in dealt] == [[[0]], [[]], [[]]]

    def test_one_row_is_split_rather_than_leaving_a_rank_idle(self):
        dealt = pack(np.array([2, 2, 2, 2]), 8, ranks=2)
        assert [len(rows) for rows in dealt] == [1, 1]
        assert [len(rows[0]) for rows in dealt] == [2, 2]

    @pytest.mark.parametrize(
        ("name", "bad"),
        [("batch.row_tokens", (0, 1, 1)), ("batch.bucket_tokens", (8, 0, 1)), ("ranks", (8, 1, 0))],
    )
    def test_impossible_arguments_are_named(self, name, bad):
        capacity, bucket, ranks = bad
        with pytest.raises(ConfigError, match=name):
            pack(np.array([1]), capacity, bucket=bucket, ranks=ranks)


def long_tailed(rng: np.random.Generator, total: int, median: int, longest: int) -> np.ndarray:
    """Log-normal lengths, just `total` tokens or a sample more."""
    lengths = np.clip(rng.lognormal(np.log(median), 0.8, size=total), 1, longest).astype(np.int64)
    return lengths[: int(np.searchsorted(np.cumsum(lengths), total)) + 1]


class TestQuality:
    @pytest.mark.parametrize(
        ("capacity", "median", "least"),
        [(1024, 128, 0.98), (4096, 1024, 0.98), (8192, 1024, 0.98), (8192, 2048, 0.98), (1024, 256, 0.98)],
    )
    def test_computed_slots_are_real_at_8_rows_per_update(self, capacity, median, least):
        """The default bucket, 128. The last case has 26 samples for 9 rows, buckets of T/8: best-fit alone
        gives 97.5 %."""
        rng = np.random.default_rng(0)
        real = computed = 0
        for _ in range(40):
            lengths = long_tailed(rng, 8 * capacity, median, capacity)
            (rows,) = pack(lengths, capacity, bucket=128)
            real += int(lengths.sum())
            computed += sum(padded_length(int(lengths[row].sum()), capacity, 128) for row in rows)
        assert real / computed >= least

    def test_without_buckets_no_slot_is_padding(self):
        lengths = long_tailed(np.random.default_rng(1), 8192, 256, 1024)
        (rows,) = pack(lengths, 1024)
        assert sum(padded_length(int(lengths[row].sum()), 1024, 1) for row in rows) == lengths.sum()

    def test_many_samples_fill_the_rows_themselves(self):
        lengths = long_tailed(np.random.default_rng(2), 200 * 1024, 256, 1024)
        (rows,) = pack(lengths, 1024)
        assert lengths.sum() / (len(rows) * 1024) >= 0.99

    def test_ranks_are_balanced_in_tokens_and_in_squared_lengths(self):
        rng = np.random.default_rng(3)
        for _ in range(20):
            lengths = long_tailed(rng, 64 * 4096, 1024, 4096)
            dealt = pack(lengths, 4096, bucket=128, ranks=4)
            tokens = np.array([sum(int(lengths[row].sum()) for row in rows) for rows in dealt])
            squares = np.array([sum(int((lengths[row] ** 2).sum()) for row in rows) for rows in dealt])
            assert tokens.max() / tokens.mean() < 1.02
            assert squares.max() / squares.mean() < 1.15

    def test_rows_that_run_together_are_alike(self):
        """Ranks wait for each other at every microbatch: the n-th rows must not mix the costliest and the
        cheapest."""
        lengths = np.array([64] * 4 + [33] * 4 + [31] * 4)
        dealt = pack(lengths, 64, ranks=4)
        together = zip(*([int(lengths[row].sum()) for row in rows] for rows in dealt))
        assert all(max(sizes) - min(sizes) <= 2 for sizes in together)


@given(packing_problems())
def test_a_row_longer_than_all_samples_together_changes_nothing_and_costs_nothing(problem):
    lengths, _, bucket, ranks = problem
    rows = [
        [[row.tolist() for row in rows] for rows in pack(lengths, capacity, bucket=bucket, ranks=ranks)]
        for capacity in (bucket * (int(lengths.sum()) + 1), bucket * 10**15)
    ]
    assert rows[0] == rows[1]
    assert [sorted(row) for row in pack(lengths, bucket * 10**15, bucket=bucket)[0]] == [
        list(range(len(lengths)))
    ] * bool(len(lengths))
