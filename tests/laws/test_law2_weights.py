"""Law 2, on the host: an update's denominator and token weights do not know how it is cut into rows or spread
over ranks."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repsft_fast.data.plan import Plan
from repsft_fast.data.sample import Sample
from repsft_fast.data.store import TokenStore

LONGEST = 40


@st.composite
def data_sets(draw):
    samples = []
    for _ in range(draw(st.integers(4, 30))):
        n = draw(st.integers(1, LONGEST))
        trained = [False, *draw(st.lists(st.booleans(), min_size=n, max_size=n))]
        samples.append(Sample([1] * (n + 1), trained, weight=draw(st.floats(1e-3, 1e3))))
    return samples


def token_weights(store: TokenStore, epoch, average: str, scale: float = 1.0):
    """Per update its denominator and, by (sample, position), every token weight: float64 and as the rows have
    it in fp32."""
    updates = []
    for update in epoch:
        exact, rounded = {}, {}
        for planned in (row for rows in update.ranks for row in rows):
            row = store.row(planned, denominator=update.denominator, average=average, scale=scale)
            weights = store.token_weights(
                planned.samples, denominator=update.denominator, average=average, scale=scale
            )
            for at in range(planned.padded_tokens):
                if at not in row.trained_positions.tolist():
                    assert row.weights[at] == 0.0
            for at, segment in zip(row.trained_positions.tolist(), row.position_segments.tolist()):
                token = (row.samples[segment], int(row.positions[0, at]))
                assert token not in exact
                exact[token] = weights[segment]
                rounded[token] = row.weights[at].item()
        updates.append((update.denominator, exact, rounded))
    return updates


@settings(deadline=None, max_examples=30)
@given(data_sets(), st.integers(4, 16), st.sampled_from(["sample", "token"]), st.data())
def test_no_split_changes_a_bit_of_them(samples, batch_samples, average, data):
    store = TokenStore(samples, "cpu")

    def split(row_tokens, bucket_tokens, ranks):
        plan = Plan(
            store.index,
            seed=3,
            row_tokens=row_tokens,
            bucket_tokens=bucket_tokens,
            ranks=ranks,
            batch_samples=batch_samples,
            average=average,
        )
        return token_weights(store, plan.epoch(0, 0), average)

    one_row_each = split(LONGEST * 40, 1, 1)
    ranks, row_tokens, bucket = (
        data.draw(st.integers(1, 4)),
        data.draw(st.integers(LONGEST, 200)),
        data.draw(st.integers(1, 64)),
    )
    assert split(row_tokens, bucket, ranks) == one_row_each


@settings(deadline=None, max_examples=30)
@given(data_sets(), st.sampled_from(["sample", "token"]))
def test_they_are_what_the_average_says(samples, average):
    """In exact fractions: an update's loss is the weighted mean over samples, or over tokens."""
    store = TokenStore(samples, "cpu")
    epoch = Plan(store.index, seed=1, row_tokens=64, bucket_tokens=8, batch_samples=5, average=average).epoch(
        0, 0
    )
    for update, (denominator, exact, _) in zip(epoch, token_weights(store, epoch, average)):
        members = [samples[i] for i in update.samples.tolist()]
        trains = [
            sample.num_trained if average == "token" else min(sample.num_trained, 1) for sample in members
        ]
        total = sum(Fraction(sample.weight) * n for sample, n in zip(members, trains))
        assert denominator == pytest.approx(float(total), rel=1e-15)
        for (i, _), weight in exact.items():
            shared = samples[i].num_trained if average == "sample" else 1
            assert weight == pytest.approx(float(Fraction(samples[i].weight) / total / shared), rel=1e-15)


@settings(deadline=None, max_examples=30)
@given(data_sets(), st.sampled_from(["sample", "token"]))
def test_the_weights_of_an_update_sum_to_one_so_a_constant_loss_is_itself(samples, average):
    store = TokenStore(samples, "cpu")
    epoch = Plan(
        store.index, seed=1, row_tokens=64, bucket_tokens=8, batch_samples=5, ranks=2, average=average
    ).epoch(0, 0)
    for denominator, exact, _ in token_weights(store, epoch, average):
        assert math.fsum(exact.values()) == pytest.approx(1.0 if denominator else 0.0, rel=1e-14)


@pytest.mark.parametrize("average", ["sample", "token"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_scaling_by_the_world_size_is_exactly_undone_by_the_mean_over_ranks(average, ranks):
    """FSDP2 averages gradients over ranks, so the weights carry the world size; a power of two costs no
    rounding."""
    samples = [Sample([1] * (n + 1), [False] + [True] * n, weight=1 + n / 7) for n in range(1, 30)]
    store = TokenStore(samples, "cpu")
    plan = Plan(store.index, seed=0, row_tokens=64, bucket_tokens=8, ranks=ranks, average=average)
    plain = token_weights(store, plan.epoch(0, 0), average)
    scaled = token_weights(store, plan.epoch(0, 0), average, scale=float(ranks))
    for (_, _, one), (_, _, times) in zip(plain, scaled):
        assert {token: np.float32(weight) / np.float32(ranks) for token, weight in times.items()} == one
