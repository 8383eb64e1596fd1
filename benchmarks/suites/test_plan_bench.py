"""Samples packed and planned per second, and what a row costs on the host. Speeds are `extra_info` beside the
times."""

import time

import numpy as np
import pytest
import torch

from repsft_fast.data.choose_lengths import choose_lengths
from repsft_fast.data.packing import pack, padded_length
from repsft_fast.data.plan import Plan, SampleIndex
from repsft_fast.data.sample import Sample
from repsft_fast.data.store import TokenStore


def long_tailed(count: int, median: int, longest: int, *, spread: float = 0.8) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.clip(rng.lognormal(np.log(median), spread, size=count), 1, longest).astype(np.int64)


def index_of(lengths: np.ndarray) -> SampleIndex:
    ones = np.ones(len(lengths), dtype=np.int64)
    return SampleIndex(
        lengths, ones, np.zeros(len(lengths), dtype=np.int32), ones.astype(np.float64), ("all",)
    )


def record_rate(benchmark, samples: int) -> None:
    benchmark.extra_info["samples"] = samples
    if benchmark.stats is not None:  # None when timing is disabled
        benchmark.extra_info["samples_per_s"] = samples / benchmark.stats.stats.median


@pytest.mark.parametrize("capacity", [1024, 8192, 32768])
def test_pack(benchmark, capacity):
    lengths = long_tailed(50_000, capacity // 4, capacity)
    (rows,) = benchmark(pack, lengths, capacity, bucket=128)
    computed = sum(padded_length(int(lengths[row].sum()), capacity, 128) for row in rows)
    benchmark.extra_info["real_fraction"] = float(lengths.sum() / computed)
    record_rate(benchmark, len(lengths))
    assert sum(map(len, rows)) == len(lengths)


@pytest.mark.parametrize(
    ("batch", "ranks"),
    [
        ({"batch_samples": 1}, 1),
        ({"batch_samples": 16}, 1),
        ({"batch_samples": 64}, 1),
        ({"batch_tokens": 65_536}, 1),
        ({"batch_samples": 64}, 8),
        ({"batch_tokens": 524_288}, 8),
    ],
    ids=str,
)
def test_plan_an_epoch(benchmark, batch, ranks):
    """Order, borders and every update packed."""
    plan = Plan(
        index_of(long_tailed(10_000, 1024, 8192)),
        seed=0,
        row_tokens=8192,
        bucket_tokens=128,
        ranks=ranks,
        **batch,
    )

    def whole_epoch():
        epoch = plan.epoch(0, 0)
        real = computed = 0
        for update in epoch:
            real += update.real_tokens
            computed += update.padded_tokens
        return real / computed

    benchmark.extra_info["real_fraction"] = benchmark(whole_epoch)
    record_rate(benchmark, 10_000)


@pytest.mark.parametrize(
    ("name", "lengths", "row_tokens"),
    [
        ("short chats", long_tailed(4_000, 256, 8192), 8192),
        ("long thoughts", long_tailed(400, 9_500, 16_384, spread=0.45), 16_384),
    ],
    ids=str,
)
@pytest.mark.parametrize("samples", [1, 16, 64])
def test_plan_an_epoch_in_few_lengths(benchmark, name, lengths, row_tokens, samples):
    """The same where rows take few lengths; beside the time which they are and what choosing them took."""
    fixed = {"seed": 0, "row_tokens": row_tokens, "bucket_tokens": 128, "batch_samples": samples}
    began = time.perf_counter()
    shapes = choose_lengths(Plan(index_of(lengths), **fixed))
    benchmark.extra_info["choosing_s"] = time.perf_counter() - began
    epoch = Plan(index_of(lengths), row_lengths=shapes, **fixed).epoch(0, 2)

    def whole_epoch():
        return sum(update.real_tokens for update in epoch) / sum(update.padded_tokens for update in epoch)

    benchmark.extra_info["real_fraction"] = benchmark(whole_epoch)
    benchmark.extra_info |= {"lengths": list(shapes.lengths), "documents": shapes.documents}
    record_rate(benchmark, 2 * len(lengths))


@pytest.mark.parametrize(("batch_samples", "row_tokens"), [(1, 1024), (16, 1024), (64, 8192)])
def test_rows_of_an_update(benchmark, batch_samples, row_tokens):
    """Host time to put the rows of one update together on the CPU."""
    lengths = long_tailed(batch_samples, 80, 1024)
    samples = [Sample([1] * (n + 1), [False] + [True] * n) for n in lengths.tolist()]
    store = TokenStore(samples, torch.device("cpu"))
    update = Plan(
        store.index, seed=0, row_tokens=row_tokens, bucket_tokens=1, batch_samples=batch_samples
    ).epoch(0, 0)[0]

    def rows():
        return [
            store.row(planned, denominator=update.denominator, average="sample")
            for planned in update.ranks[0]
        ]

    built = benchmark(rows)
    benchmark.extra_info["rows"] = len(built)
    record_rate(benchmark, batch_samples)
