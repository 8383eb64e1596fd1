import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repsft_fast.data.plan import Cursor, Plan, SampleIndex, denominator, summary
from repsft_fast.errors import ConfigError, DataError

FIXED_ORDER = [2, 6, 0, 5, 3, 7, 1, 8, 4, 9]


def make_index(lengths, tasks=None, trained=None, weights=None, names=None) -> SampleIndex:
    lengths = np.asarray(lengths, dtype=np.int64)
    tasks = np.zeros(len(lengths), dtype=np.int32) if tasks is None else np.asarray(tasks, dtype=np.int32)
    trained = np.maximum(lengths // 2, 1) if trained is None else np.asarray(trained, dtype=np.int64)
    weights = np.ones(len(lengths)) if weights is None else np.asarray(weights, dtype=np.float64)
    count = int(tasks.max(initial=-1)) + 1
    return SampleIndex(lengths, trained, tasks, weights, names or tuple(f"task{i}" for i in range(count)))


def make_plan(index=None, **changes) -> Plan:
    settings = {"seed": 7, "row_tokens": 64, "bucket_tokens": 8, "batch_samples": 4} | changes
    return Plan(
        make_index(range(1, 31), tasks=[i % 3 for i in range(30)]) if index is None else index, **settings
    )


class TestUpdates:
    def test_the_last_update_may_be_smaller_and_has_its_own_denominator(self):
        epoch = make_plan(batch_samples=8).epoch(0, 0)
        assert [len(update.samples) for update in epoch] == [8, 8, 8, 6]
        assert [update.denominator for update in epoch] == [8.0, 8.0, 8.0, 6.0]

    def test_an_update_knows_its_cursor(self):
        epoch = make_plan().epoch(2, 5)
        assert [update.cursor for update in epoch] == [Cursor(2, 5, i) for i in range(len(epoch))]

    def test_rows_hold_exactly_the_samples_of_the_update(self):
        for update in make_plan(ranks=2).epoch(0, 0):
            packed = np.concatenate([row.samples for rows in update.ranks for row in rows])
            assert sorted(packed) == sorted(update.samples)

    def test_rows_count_their_tokens(self):
        plan = make_plan(ranks=3)
        for update in plan.epoch(0, 0):
            for row in (row for rows in update.ranks for row in rows):
                assert row.real_tokens == plan.index.lengths[row.samples].sum()
                assert row.padded_tokens % 8 == 0
                assert max(row.real_tokens, 1) <= row.padded_tokens <= max(row.real_tokens, 1) + 7

    def test_batch_tokens_takes_as_many_samples_as_fit(self):
        plan = make_plan(batch_samples=None, batch_tokens=50)
        epoch = plan.epoch(0, 0)
        lengths = plan.index.lengths[epoch.order]
        start = 0
        for update in epoch:
            n = len(update.samples)
            assert update.samples.tolist() == epoch.order[start : start + n].tolist()
            assert lengths[start : start + n].sum() <= 50
            assert start + n == 30 or lengths[start : start + n + 1].sum() > 50
            start += n
        assert start == 30

    def test_a_sample_longer_than_batch_tokens_is_an_update_of_its_own(self):
        epoch = make_plan(make_index([60, 60, 60]), batch_tokens=10).epoch(0, 0)
        assert [len(update.samples) for update in epoch] == [1, 1, 1]

    def test_batch_tokens_replaces_batch_samples(self):
        assert len(make_plan(batch_samples=1, batch_tokens=10_000).epoch(0, 0)) == 1

    def test_indexing(self):
        epoch = make_plan().epoch(0, 0)
        assert epoch[-1].cursor == epoch.update(len(epoch) - 1).cursor
        assert [update.cursor.update for update in epoch[2:5]] == [2, 3, 4]
        with pytest.raises(IndexError, match="update 8 of an epoch of 8"):
            epoch[8]

    def test_utilisation_is_real_over_computed(self):
        index = make_index([3, 3, 5])
        assert make_plan(index, batch_samples=1, bucket_tokens=8).epoch(0, 0).utilisation() == pytest.approx(
            11 / 24
        )
        assert make_plan(index, batch_samples=3, bucket_tokens=1).epoch(0, 0).utilisation() == 1.0


class TestOrder:
    def test_key_parts_all_change_the_order(self):
        def order(seed=7, stage=0, epoch=0):
            return tuple(make_plan(seed=seed).epoch(stage, epoch).order.tolist())

        # (1, 23) and (12, 3) would meet if the key were the digits written together
        keys = [
            {},
            {"seed": 8},
            {"stage": 1},
            {"epoch": 1},
            {"stage": 1, "epoch": 23},
            {"stage": 12, "epoch": 3},
            {"epoch": -1},
        ]
        assert len({order(**key) for key in keys}) == len(keys)

    def test_numpy_integers_are_the_same_key(self):
        plan, same = make_plan(seed=7), make_plan(seed=np.int64(7))
        assert plan.epoch(1, 2).order.tolist() == same.epoch(np.int64(1), np.int32(2)).order.tolist()

    def test_the_order_is_fixed_for_ever(self):
        """A change here changes what every old checkpoint resumes to: bump the checkpoint format if it
        must."""
        assert make_plan(make_index([1] * 10)).epoch(0, 0).order.tolist() == FIXED_ORDER

    def test_every_place_is_equally_likely(self):
        plan = make_plan(make_index([1] * 4))
        places = np.array([plan.epoch(0, epoch).order for epoch in range(2000)])
        counts = np.array([[(places[:, place] == i).sum() for place in range(4)] for i in range(4)])
        # binomial(2000, 1/4): 500 ± 19.4; 5 standard deviations over 16 cells
        assert np.abs(counts - 500).max() < 97

    def test_what_stays_keeps_its_order_as_tasks_and_samples_leave(self):
        plan = make_plan()
        whole = plan.epoch(0, 3).order.tolist()
        tasks = plan.index.tasks
        assert plan.epoch(0, 3, active=[2, 0]).order.tolist() == [i for i in whole if tasks[i] != 1]
        assert plan.epoch(0, 3, skip={4, 9}).order.tolist() == [i for i in whole if i not in (4, 9)]

    @pytest.mark.parametrize("active", [[0, 2], (2, 0), {0, 2}, frozenset([2, 0]), np.array([0, 2])])
    def test_the_kind_of_collection_does_not_matter(self, active):
        plan = make_plan()
        assert (
            plan.epoch(1, 1, active=active).order.tolist() == plan.epoch(1, 1, active=[0, 2]).order.tolist()
        )


class TestTaskWeights:
    def test_the_number_of_samples_per_epoch_is_unchanged(self):
        plan = make_plan()
        assert plan.epoch(0, 0, task_weights={0: 5, 1: 1, 2: 0.1}).num_samples == 30
        assert plan.epoch(0, 0, active=[0, 1], task_weights={0: 5, 1: 1}, skip=[0]).num_samples == 19

    def test_shares_follow_the_weights(self):
        index = make_index([1] * 3000, tasks=np.arange(3000) % 3)
        order = make_plan(index).epoch(0, 0, task_weights={0: 6.0, 1: 3.0, 2: 1.0}).order
        counts = np.bincount(index.tasks[order], minlength=3)
        # binomial standard deviations are 27, 25 and 16; five of them
        assert np.abs(counts - [1800, 900, 300]).max() < 135

    @given(
        st.lists(st.integers(0, 4), min_size=1, max_size=60),
        st.lists(st.floats(0.01, 10), min_size=5, max_size=5),
    )
    def test_within_a_task_every_sample_comes_once_before_any_comes_again(self, tasks, weights):
        index = make_index([1] * len(tasks), tasks=tasks, names=tuple("abcde"))
        order = make_plan(index).epoch(0, 0, task_weights=dict(enumerate(weights))).order
        for task in set(tasks):
            members = set(np.flatnonzero(index.tasks == task).tolist())
            drawn = [i for i in order.tolist() if index.tasks[i] == task]
            for start in range(0, len(drawn), len(members)):
                a_round = drawn[start : start + len(members)]
                assert len(set(a_round)) == len(a_round)
                assert set(a_round) <= members

    def test_rounds_are_reshuffled(self):
        index = make_index([1] * 40, tasks=[0] * 10 + [1] * 30)
        order = make_plan(index).epoch(0, 0, task_weights={0: 1.0, 1: 0.0}).order.tolist()
        rounds = {tuple(order[start : start + 10]) for start in range(0, 40, 10)}
        assert len(rounds) == 4

    def test_tasks_of_equal_size_are_shuffled_each_their_own_way(self):
        index = make_index([1] * 60, tasks=[0] * 30 + [1] * 30)
        order = make_plan(index).epoch(0, 0, task_weights={0: 1.0, 1: 1.0}).order
        first, second = (order[index.tasks[order] == task][:25] - 30 * task for task in (0, 1))
        assert first.tolist() != second.tolist()

    def test_a_task_of_weight_zero_is_left_out(self):
        plan = make_plan()
        order = plan.epoch(0, 0, task_weights={0: 1, 1: 0, 2: 1}).order
        assert 1 not in plan.index.tasks[order]

    def test_one_task_with_one_row_among_others(self):
        index = make_index([1] * 9, tasks=[0] + [1] * 8)
        order = make_plan(index).epoch(0, 0, task_weights={0: 100.0, 1: 1.0}).order
        assert (order == 0).sum() >= 5

    def test_a_task_whose_samples_are_all_skipped_is_not_drawn(self):
        index = make_index([1] * 4, tasks=[0, 0, 1, 1])
        order = make_plan(index).epoch(0, 0, task_weights={0: 100.0, 1: 1.0}, skip=[0, 1]).order
        assert sorted(order.tolist()) == [2, 3]

    def test_the_same_weights_draw_the_same_samples(self):
        plan = make_plan()
        draws = [
            plan.epoch(1, 2, task_weights=weights).order.tolist()
            for weights in ({0: 1, 1: 2, 2: 3}, {2: 3.0, 0: 1.0, 1: 2.0})
        ]
        assert draws[0] == draws[1]
        assert draws[0] != plan.epoch(1, 3, task_weights={0: 1, 1: 2, 2: 3}).order.tolist()

    @pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
    def test_a_weight_that_is_none_is_named(self, bad):
        with pytest.raises(ConfigError, match=r"task_weights\[task1\]: is not a weight"):
            make_plan().epoch(0, 0, task_weights={0: 1.0, 1: bad, 2: 1.0})

    def test_weights_that_sum_to_zero(self):
        with pytest.raises(ConfigError, match="task_weights: sum to 0"):
            make_plan().epoch(0, 0, task_weights={0: 0.0, 1: 0.0, 2: 0.0})

    def test_all_weight_on_an_inactive_task(self):
        with pytest.raises(ConfigError, match="sum to 0"):
            make_plan().epoch(0, 0, active=[0, 1], task_weights={0: 0.0, 1: 0.0, 2: 1.0})

    def test_weights_whose_sum_overflows_are_still_shares(self):
        plan = make_plan()
        huge = plan.epoch(0, 0, task_weights={0: 1.7e308, 1: 1.7e308, 2: 0.0}).order
        assert huge.tolist() == plan.epoch(0, 0, task_weights={0: 1.0, 1: 1.0, 2: 0.0}).order.tolist()

    def test_a_task_without_a_weight_is_named(self):
        with pytest.raises(ConfigError, match=r"task_weights\[task2\]: is active and has no weight"):
            make_plan().epoch(0, 0, task_weights={0: 1.0, 1: 1.0})


class TestBadSettings:
    def test_every_problem_is_reported_at_once(self):
        with pytest.raises(ConfigError) as caught:
            make_plan(row_tokens=0, bucket_tokens=0, ranks=0, batch_samples=0, average="mean")
        assert [problem.split(":")[0] for problem in caught.value.problems] == [
            "batch.row_tokens",
            "batch.bucket_tokens",
            "ranks",
            "batch.samples",
            "loss.average",
        ]

    def test_no_batch_setting(self):
        with pytest.raises(ConfigError, match=r"batch\.samples: is not set"):
            make_plan(batch_samples=None)

    def test_no_samples(self):
        with pytest.raises(ConfigError, match="data: has no samples"):
            make_plan(make_index([]))

    def test_more_ranks_than_samples_in_an_update(self):
        with pytest.raises(
            ConfigError, match=r"batch\.samples: gives fewer samples per update than there are ranks"
        ):
            make_plan(ranks=5, batch_samples=4)
        assert len(make_plan(ranks=4, batch_samples=4).epoch(0, 0)) == 8

    def test_more_ranks_than_samples_in_the_data(self):
        with pytest.raises(ConfigError, match=r"data\.samples: gives fewer samples"):
            make_plan(make_index([3]), ranks=2)

    def test_more_ranks_than_batch_tokens_can_feed(self):
        with pytest.raises(ConfigError, match=r"batch\.tokens: gives fewer samples"):
            make_plan(ranks=4, batch_tokens=40)

    def test_a_sample_longer_than_a_row_is_named(self):
        with pytest.raises(
            DataError, match="sample 1: is longer than a row, expected at most 64 positions, got 65"
        ):
            make_plan(make_index([64, 65, 63]))

    @pytest.mark.parametrize("bad", [-0.5, float("nan"), float("inf")])
    def test_a_sample_weight_that_is_none_is_named(self, bad):
        with pytest.raises(DataError, match="sample 1: has no usable weight"):
            make_plan(make_index([1, 1], weights=[1.0, bad]))

    @pytest.mark.parametrize("active", [[3], [-1, 0]])
    def test_unknown_tasks(self, active):
        with pytest.raises(ConfigError, match="active: names a task that is not there"):
            make_plan().epoch(0, 0, active=active)

    def test_no_active_task(self):
        with pytest.raises(ConfigError, match="active: names no task"):
            make_plan().epoch(0, 0, active=[])

    @pytest.mark.parametrize("skip", [[30], [-1]])
    def test_unknown_samples_to_skip(self, skip):
        with pytest.raises(ConfigError, match="skip: names a sample that is not there"):
            make_plan().epoch(0, 0, skip=skip)

    @pytest.mark.parametrize("batch", [{"batch_samples": 4}, {"batch_tokens": 50}])
    @pytest.mark.parametrize("weights", [None, {0: 1.0, 1: 1.0, 2: 1.0}])
    def test_an_epoch_with_everything_skipped_has_no_updates(self, batch, weights):
        epoch = make_plan(**batch).epoch(0, 0, skip=range(30), task_weights=weights)
        assert (len(epoch), epoch.num_samples, epoch.utilisation()) == (0, 0, 1.0)


class TestDenominator:
    INDEX = make_index([4, 8, 9], trained=[2, 5, 0], weights=[1.0, 0.5, 3.0])

    def test_sample_average_counts_the_weights_of_samples_that_train_anything(self):
        assert denominator(self.INDEX, np.array([0, 1, 2]), "sample") == 1.5

    def test_token_average_counts_weighted_trained_tokens(self):
        assert denominator(self.INDEX, np.array([0, 1, 2]), "token") == 4.5

    def test_nothing_trained_is_zero(self):
        assert denominator(self.INDEX, np.array([2]), "sample") == 0.0

    def test_an_update_carries_it(self):
        weights = [0.1, 0.2, 0.3, 0.7, 1e16, 1.0, 1 / 3, 1e-9] * 5
        for average in ("sample", "token"):
            plan = make_plan(
                make_index([5] * 40, trained=range(1, 41), weights=weights), batch_samples=7, average=average
            )
            for update in plan.epoch(0, 0):
                assert update.denominator == denominator(plan.index, update.samples, average)

    @given(st.permutations(range(12)))
    def test_the_order_of_samples_does_not_change_a_bit(self, order):
        weights = [0.1, 1e16, 0.3, 1.0, 7e-9, 0.1, 0.2, 1e8, 3.3, 0.7, 2.0, 1 / 3]
        index = make_index([5] * 12, trained=range(1, 13), weights=weights)
        for average in ("sample", "token"):
            assert denominator(index, np.array(order), average) == denominator(index, np.arange(12), average)


class TestSummary:
    def test_figures(self):
        plan = make_plan(
            make_index([3, 3, 5, 7], trained=[1, 2, 3, 4]), batch_samples=2, bucket_tokens=8, row_tokens=16
        )
        figures = summary(plan, 10)
        assert (figures.samples, figures.epochs, figures.updates) == (4, 10, 20)
        assert (figures.rows, figures.real_tokens, figures.trained_tokens) == (20, 180, 100)
        assert figures.computed_tokens == 10 * sum(update.padded_tokens for update in plan.epoch(0, 0))
        assert figures.utilisation == pytest.approx(plan.epoch(0, 0).utilisation())
        assert figures.notes == ()

    def test_one_sample_per_update_is_said(self):
        (note,) = summary(make_plan(make_index([6, 6]), batch_samples=1), 1).notes
        assert note.startswith("one sample per update cannot be packed: 75% of the computed slots are real")

    def test_a_batch_larger_than_the_data_is_said(self):
        (note,) = summary(make_plan(make_index([6, 6]), batch_samples=64), 1).notes
        assert note == "an update of 64 samples was asked for, an epoch has 2"


def test_the_number_of_draws_is_what_was_asked_for():
    index = SampleIndex(
        lengths=np.full(30, 10), trained=np.full(30, 5), tasks=np.repeat([0, 1, 2], 10).astype(np.int32), weights=np.ones(30),
        task_names=("a", "b", "c"),
    )  # fmt: skip
    plan = Plan(index, seed=3, row_tokens=64, bucket_tokens=1, batch_samples=4)
    shares = {0: 0.9, 1: 0.05, 2: 0.05}
    assert plan.epoch(0, 0, task_weights=shares, draws=11).num_samples == 11
    assert plan.epoch(0, 0, task_weights=shares).num_samples == 30
