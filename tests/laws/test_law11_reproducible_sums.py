"""Law 11: equal row statistics give bit-equal segment sums in any row order; with fixed chunking a call is
bit-reproducible."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repsft_fast.ops.linear_cross_entropy import linear_cross_entropy
from repsft_fast.stats import CLAMP_BITS, COLUMNS, FRACTION_BITS, PositionStats, TokenStats

FIELDS = ("loss", "correct", "entropy", "top1_probability", "margin", "log10_miss")


def head_inputs(n=400, width=16, vocabulary=700, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width, generator=generator)
    head = torch.randn(vocabulary, width, generator=generator)
    return (
        hidden,
        head,
        torch.randint(vocabulary, (n,), generator=generator),
        torch.rand(n, generator=generator),
    )


def taken(stats: PositionStats, index: torch.Tensor) -> PositionStats:
    return PositionStats(**{name: getattr(stats, name)[index] for name in FIELDS})


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), segments=st.integers(1, 9))
def test_any_row_order_and_any_split_give_the_same_bits(seed, segments):
    _, stats = linear_cross_entropy(*head_inputs(seed=seed % 7))
    generator = torch.Generator().manual_seed(seed)
    owner = torch.randint(segments, (400,), generator=generator)
    whole = stats.sum_by(owner, segments)
    order = torch.randperm(400, generator=generator)
    assert torch.equal(taken(stats, order).sum_by(owner[order], segments).table, whole.table)
    cut = int(torch.randint(0, 401, (), generator=generator))
    parts = [taken(stats, part).sum_by(owner[part], segments) for part in (order[:cut], order[cut:])]
    assert torch.equal((parts[1] + parts[0]).table, whole.table)


def test_the_sums_are_those_of_exact_arithmetic():
    _, stats = linear_cross_entropy(*head_inputs())
    owner = torch.arange(400) % 3
    sums = stats.sum_by(owner, 3)
    for name, error in (
        ("loss", 2.0**-32),
        ("entropy", 2.0**-32),
        ("margin", 2.0**-24),
        ("log10_miss", 2.0**-32),
    ):
        for segment in range(3):
            exact = getattr(stats, name)[owner == segment].double().sum().item()
            # half a unit of fixed point a row
            assert abs(sums.column(name)[segment].item() - exact) <= 134 * error
    assert sums.total.tolist() == [134, 133, 133]
    assert sums.correct.tolist() == [int(stats.correct[owner == s].sum()) for s in range(3)]
    assert sums.correct.dtype == torch.int64


def column_by_column(stats: PositionStats, owner: torch.Tensor, count: int) -> torch.Tensor:
    """[count, K] int64: each statistic by itself, value by value, in Python's integers."""
    table = [[0] * len(COLUMNS) for _ in range(count)]
    for place, segment in enumerate(owner.tolist()):
        row = {name: float(getattr(stats, name)[place].double()) for name in FIELDS}
        line, good = table[segment], math.isfinite(row["loss"])
        line[0] += 1
        line[1] += int(row["correct"])
        line[2] += not good
        row["loss_squared"] = row["loss"] ** 2
        for name, bits in FRACTION_BITS.items():
            value, bound = row[name], 2.0 ** CLAMP_BITS[name]
            if good and not math.isnan(value):
                line[COLUMNS.index(name)] += round(min(max(value, -bound), bound) * 2.0**bits)
    return torch.tensor(table, dtype=torch.int64).reshape(count, len(COLUMNS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 60])
def test_each_column_is_clamped_scaled_and_rounded_by_itself(n, dtype):
    generator = torch.Generator().manual_seed(n)
    size = 10.0 ** torch.randint(-4, 8, (5, n), generator=generator)
    values = (torch.randn(5, n, generator=generator) * size).to(dtype)
    if n > 20:
        values[:, :4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
        values[1:, 4:8] = torch.tensor([math.nan, math.inf, -math.inf, 0.5])
    loss, entropy, top1, margin, miss = values
    stats = PositionStats(loss, loss > 0, entropy, top1, margin, miss)
    owner = torch.randint(3, (n,), generator=generator)
    kept = [getattr(stats, name).clone() for name in FIELDS]
    assert torch.equal(stats.sum_by(owner, 3).table, column_by_column(stats, owner, 3))
    for name, before in zip(FIELDS, kept, strict=True):
        assert torch.equal(getattr(stats, name).nan_to_num(), before.nan_to_num()), "they are only read"


def test_every_token_of_a_sample_correct():
    hidden, head, targets, weights = head_inputs()
    targets[::2] = (hidden @ head.T).argmax(1)[::2]
    _, stats = linear_cross_entropy(hidden, head, targets, weights)
    owner = torch.where(stats.correct, 0, 1)
    sums = stats.sum_by(owner, 3)
    assert sums.all_correct.tolist() == [True, False, False]
    assert torch.equal(sums.table + TokenStats.zeros(3).table, sums.table)


@pytest.mark.parametrize("chunk_bytes", [None, 700 * 4 * 50, 1])
def test_a_call_with_fixed_chunking_is_bit_reproducible(chunk_bytes):
    results = []
    for _ in range(2):
        hidden, head, targets, weights = head_inputs()
        hidden.requires_grad_()
        head.requires_grad_()
        loss, stats = linear_cross_entropy(hidden, head, targets, weights, chunk_bytes=chunk_bytes)
        loss.backward()
        results.append((loss.detach(), hidden.grad, head.grad, *(getattr(stats, name) for name in FIELDS)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_between_chunkings_only_rounding_differs():
    """fp32 GEMMs of other sizes add in another order: 1e-6 of the tensor's own size."""
    results = []
    for chunk_bytes in (None, 700 * 4 * 50):
        hidden, head, targets, weights = head_inputs()
        hidden.requires_grad_()
        head.requires_grad_()
        linear_cross_entropy(hidden, head, targets, weights, chunk_bytes=chunk_bytes)[0].backward()
        results.append((hidden.grad, head.grad))
    for a, b in zip(*results):
        assert (a - b).norm() <= 1e-6 * a.norm()
