"""Sums of statistics by the kernel, in Triton's interpreter: bit for bit what plain torch adds up."""

import pytest
import torch

from csrc_triton import token_sums
from repsft_fast import stats
from repsft_fast.stats import CLAMP_BITS, COLUMNS, FRACTION_BITS, K, PositionStats
from tests.helpers.interpreter import interpret


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    interpret(monkeypatch, "csrc_triton.token_sums")


def drawn(count, seed=0):
    """Statistics of positions, among them everything that is not finite or beyond a bound."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(5, count, generator=generator) * torch.tensor([3.0, 2.0, 0.5, 30.0, 4.0])[:, None]
    hostile = [
        float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 0.0, -0.0, 5e-324, 1e-40, 4096.0, 4097.0,
        2.0**-33, 3 * 2.0**-33, 2.0**-25, 3 * 2.0**-25, 1024.0, 1025.0,
    ]  # fmt: skip
    for line in draws:
        for value in hostile:
            line[torch.randint(count, (max(1, count // 64),), generator=generator)] = value
    correct = torch.rand(count, generator=generator) < 0.5
    loss, *others = draws.unbind()
    return PositionStats(loss, correct, *others)


@pytest.mark.parametrize("segments", ["one", "runs", "scattered"])
@pytest.mark.parametrize("count", [1, 255, 256, 257, 1500])
def test_the_same_integers_as_plain_torch(count, segments):
    found = drawn(count, count)
    generator = torch.Generator().manual_seed(1)
    owner = {
        "one": torch.full((count,), 3),
        "runs": torch.arange(count) * 5 // count,
        "scattered": torch.randint(5, (count,), generator=generator),
    }[segments]
    table = torch.arange(5 * K).view(5, K)  # what is there is added to
    expected = table.clone()
    found._add_plain(expected, owner)
    values = (found.loss, found.entropy, found.top1_probability, found.margin, found.log10_miss)
    token_sums.add_sums(table, values, found.correct, owner)
    assert torch.equal(table, expected)
    assert int(table[:, 0].sum()) == count + sum(range(0, 5 * K, K))
    owners, lines = torch.tensor([7, 2, 9, 2, 0]), torch.zeros(10, K, dtype=torch.int64)
    token_sums.add_sums(lines, values, found.correct, owner, owners)  # two segments of one sample
    found._add_plain(expected.resize_(10, K).zero_(), owners[owner])
    assert torch.equal(lines, expected)


def test_no_positions_are_no_launch():
    table = torch.ones(2, K, dtype=torch.int64)
    nothing = torch.empty(0)
    token_sums.add_sums(table, [nothing] * 5, nothing.bool(), nothing.long())
    assert bool((table == 1).all())


def test_its_columns_are_those_of_the_statistics():
    assert token_sums.COLUMNS == K
    assert tuple(CLAMP_BITS[name] for name in COLUMNS[3:]) == token_sums.CLAMP
    assert tuple(FRACTION_BITS[name] for name in COLUMNS[3:]) == token_sums.FRACTION
    assert list(FRACTION_BITS) == list(COLUMNS[3:])


def test_sum_by_takes_it_where_it_fits(monkeypatch):
    """fp32 that lies in one piece; anything else goes the plain way, with the same sums."""
    taken, add_sums = [], token_sums.add_sums
    monkeypatch.setattr(stats, "kernel_sums", lambda device_type: True)
    monkeypatch.setattr(token_sums, "add_sums", lambda *given: [taken.append(1), add_sums(*given)])
    found, owner = drawn(300), torch.arange(300) % 3
    table = found.sum_by(owner, 3).table
    assert len(taken) == 1
    double = PositionStats(*(t.double() if t.is_floating_point() else t for t in vars(found).values()))
    assert torch.equal(double.sum_by(owner, 3).table, table)
    apart = PositionStats(*(torch.stack((t, t), 1)[:, 0] for t in vars(found).values()))
    assert torch.equal(apart.sum_by(owner, 3).table, table)
    assert len(taken) == 1


def test_memory_beside_the_statistics_is_left_alone():
    found, owner = drawn(300), torch.arange(300) % 3
    values = [found.loss, found.entropy, found.top1_probability, found.margin, found.log10_miss]
    fenced = [torch.cat((torch.full((64,), 1.5), value, torch.full((64,), 1.5)))[64:-64] for value in values]
    correct = torch.cat((torch.ones(64), found.correct, torch.ones(64))).bool()[64:-64]
    arena = torch.full((5, K), -7)
    token_sums.add_sums(arena[1:4].zero_(), fenced, correct, owner)
    assert torch.equal(arena[1:4], found.sum_by(owner, 3).table)
    assert arena[0].tolist() == arena[4].tolist() == [-7] * K


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"table": torch.zeros(3, K)}, "int64 table"),
        ({"table": torch.zeros(3, K - 1, dtype=torch.int64)}, "9 columns"),
        ({"segments": torch.zeros(4, dtype=torch.int32)}, "int64 segments"),
        ({"segments": torch.zeros(5, dtype=torch.int64)}, "5 numbers"),
        ({"correct": torch.zeros(4)}, "bool"),
    ],
)
def test_what_it_does_not_take_is_refused(wrong, said):
    given = {
        "table": torch.zeros(3, K, dtype=torch.int64), "values": [torch.zeros(4)] * 5,
        "correct": torch.zeros(4, dtype=torch.bool), "segments": torch.zeros(4, dtype=torch.int64),
    }  # fmt: skip
    with pytest.raises(ValueError, match=said):
        token_sums.add_sums(**{**given, **wrong})
