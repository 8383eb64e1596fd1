"""An update's verdict by the kernels, in Triton's interpreter, against `training.spikes` in plain torch: the
same decisions, the same bits but where sums are added in another order."""

import math

import numpy as np
import pytest
import torch

from csrc_triton import judge
from repsft_fast.distributed import World
from repsft_fast.training import spikes
from repsft_fast.training.spikes import JUDGED, KNOWN, WINDOW, Spikes, verdict
from tests.helpers.interpreter import interpret

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
LENGTH = 72
# 128 logarithms added in another order; a variance is a difference of such sums, and what a spike enters as
# lies 18 deviations up
SUMS = 2e-13


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    interpret(monkeypatch, "csrc_triton.judge", "csrc_triton.tensor_table")
    monkeypatch.setattr(judge, "PROGRAMS", 2)  # so that a program walks over several tiles


def by_kernel(monkeypatch, world=ALONE, max_norm=1.0, **options):
    with monkeypatch.context() as patch:
        patch.setattr(spikes, "kernel_judges", lambda device: True)
        return Spikes(CPU, world, max_norm, **options)


def parameter_of(norm):
    """One whose gradient has this norm, in fp32."""
    found = torch.nn.Parameter(torch.zeros(1))
    found.grad = torch.tensor([norm], dtype=torch.float32)
    return found


def sequence(seed, length):
    """Losses and norms whose squares fp32 holds exactly: quiet ones, spikes, a new level, and what is not finite."""
    draw = np.random.default_rng(seed)
    pairs = np.exp(draw.normal([0.5, -0.2], [0.05, 0.3], (length, 2)))
    pairs[length // 2 : length // 2 + 12, 0] *= 50.0
    pairs[length * 3 // 4 :: 8] *= 1e6
    for value in (math.nan, math.inf, -math.inf, 0.0, 1e-3):
        for _ in range(3):
            pairs[draw.integers(length), draw.integers(2)] = value
    norms = torch.tensor(pairs[:, 1]).bfloat16().tolist()
    return list(zip(pairs[:, 0].tolist(), norms, strict=True))


def fill(state, count):
    """The window as after so many quiet updates."""
    draw = np.random.default_rng(9).normal([0.5, -0.2], [0.05, 0.3], (count, 2))
    state.tensors()["window"][-count:] = torch.tensor(draw)
    state.tensors()["count"].fill_(count)


def close(a, b, bound):
    return torch.allclose(a, b, rtol=bound, atol=bound, equal_nan=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("max_norm", "veto_spikes"), [(1.0, False), (0.3, True), (None, True)])
def test_it_decides_as_plain_torch(max_norm, veto_spikes, monkeypatch):
    ours = by_kernel(monkeypatch, max_norm=max_norm, veto_spikes=veto_spikes)
    plain = Spikes(CPU, ALONE, max_norm, veto_spikes=veto_spikes)
    found = {"spikes": 0, "vetoes": 0, "clipped": 0}
    for state in (ours, plain):
        fill(state, 100)
    for number, (loss, norm) in enumerate(sequence(1, LENGTH)):
        value = torch.tensor(loss, dtype=torch.float64)
        a = ours.judge_gradients(value, [parameter_of(norm)])
        b = plain.judge(value, torch.tensor(abs(norm), dtype=torch.float64))
        assert torch.equal(a.numbers[:3].nan_to_num(-1.0), b.numbers[:3].nan_to_num(-1.0)), number
        assert close(a.numbers[3:], b.numbers[3:], SUMS), (number, a.numbers, b.numbers)
        assert torch.equal(a.veto, b.veto)
        assert torch.equal(a.applied, b.applied)
        assert int(a.applied) == 1 - int(a.veto)
        assert (a.clip is None) == (max_norm is None)
        if a.clip is not None:
            assert torch.equal(a.clip.nan_to_num(-1.0), b.clip.nan_to_num(-1.0))
            found["clipped"] += bool(a.clip < 1.0)
        found["spikes"] += verdict(a.numbers[2:].tolist()) is not None
        found["vetoes"] += int(a.veto)
        if number % 7:  # an update that was judged and not made leaves the window
            ours.enter()
            plain.enter()
        assert close(ours.tensors()["window"], plain.tensors()["window"], SUMS)
        assert torch.equal(ours.tensors()["count"], plain.tensors()["count"])
    assert found["spikes"] >= 3
    assert found["vetoes"] >= 3 + 3 * veto_spikes
    assert max_norm is None or 0 < found["clipped"] < LENGTH
    assert float(a.numbers[3]) != 0.0
    assert float(ours.tensors()["count"]) == WINDOW
    assert a.numbers.shape == (2 + JUDGED,)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_ranks_sent_each_other_is_read_as_plain_torch_reads_it(monkeypatch):
    """The message of several ranks, here made by one that says it is one of two; its sum is itself."""
    world = World(0, 2, 0, CPU)
    ours, plain = by_kernel(monkeypatch, world), Spikes(CPU, world, 1.0)
    fill(ours, KNOWN - 8)
    fill(plain, KNOWN - 8)
    for loss, norm in sequence(2, LENGTH // 2):
        value = torch.tensor(loss, dtype=torch.float64)
        a = ours.judge_gradients(value, [parameter_of(norm)])
        b = plain.judge(value, torch.tensor(abs(norm), dtype=torch.float64))
        assert torch.equal(a.numbers[:3].nan_to_num(-1.0), b.numbers[:3].nan_to_num(-1.0))
        assert close(a.numbers[3:], b.numbers[3:], SUMS)
        assert (float(a.veto), int(a.applied)) == (float(b.veto), int(b.applied))
        ours.enter()
        plain.enter()


def gradients(shapes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * 0.01).to(dtype) for shape in shapes]


SHAPES = [(48, 512), (33, 65), (1,), (0,), (judge.TILE,), (3 * judge.TILE + 16,), (100, 100)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_err_no_more_than_torchs(dtype):
    """Law 3, of a number: beside fp64, where torch's norms are rounded to fp32 one by one."""
    given = gradients(SHAPES, dtype)
    truth = math.sqrt(sum(float(g.double().square().sum()) for g in given))
    plain = float(torch.stack(torch._foreach_norm(given)).double().square().sum().sqrt())
    squares = judge.Squares()
    ours = float(squares(given).sum().sqrt())
    assert abs(ours - truth) <= 1.5 * abs(plain - truth) + 1e-7 * truth
    assert float(squares([g * 2 for g in given]).sum().sqrt()) == pytest.approx(2 * ours, rel=1e-12)


def test_squares_of_both_types_and_of_odd_sizes_stand_side_by_side():
    given = [*gradients(SHAPES, torch.float32), *gradients(SHAPES, torch.bfloat16, 1)]
    partial = judge.Squares()(given)
    assert partial.shape == (8,)  # whole 16s or not, of both
    truth = sum(float(g.double().square().sum()) for g in given)
    assert float(partial.sum()) == pytest.approx(truth, rel=1e-6)


def test_memory_beside_a_gradient_is_not_read():
    arenas = [torch.full((n + 128,), math.nan) for n in (48, 33, judge.TILE + 16)]
    given = [arena[64:-64].fill_(0.5) for arena in arenas]
    assert float(judge.Squares()(given).sum()) == sum(g.numel() for g in given) / 4


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_what_is_not_finite_makes_a_veto(value, monkeypatch):
    """1e30 too: its square is beyond fp32, in torch as here."""
    found, parameters = (
        by_kernel(monkeypatch),
        [torch.nn.Parameter(g) for g in gradients(SHAPES, torch.float32)],
    )
    for parameter in parameters:
        parameter.grad = parameter.detach().clone()
    parameters[5].grad[-1] = value
    assert float(found.judge_gradients(torch.ones((), dtype=torch.float64), parameters).veto) == 1.0
    assert not torch.stack(torch._foreach_norm([p.grad for p in parameters])).isfinite().all()


def test_what_is_written_stays_where_it_is_and_gradients_may_move(monkeypatch):
    found, loss = by_kernel(monkeypatch), torch.ones((), dtype=torch.float64)
    first = found.judge_gradients(loss, [parameter_of(3.0), parameter_of(4.0)])
    assert (float(first.norm), float(first.clip)) == (5.0, pytest.approx(0.2))
    second = found.judge_gradients(loss, [parameter_of(6.0), parameter_of(8.0)])
    assert float(second.norm) == 10.0
    assert all(a is b for a, b in zip(first, second, strict=True))


def test_gradients_it_does_not_take_go_the_plain_way(monkeypatch):
    found, loss = by_kernel(monkeypatch), torch.ones((), dtype=torch.float64)
    wide = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    assert float(found.judge_gradients(loss, [wide]).norm) == 0.0  # none is there
    wide.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert float(found.judge_gradients(loss, [wide]).norm) == 5.0
    strided = torch.nn.Parameter(torch.zeros(3, 2))
    strided.grad = torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 4.0]]).t()
    assert float(found.judge_gradients(loss, [strided]).norm) == 5.0
    with pytest.raises(ValueError, match="contiguous"):
        judge.Squares()([strided.grad])
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        judge.Squares()([wide.grad])


@pytest.mark.parametrize("count", [KNOWN - 1, KNOWN])
def test_a_spike_needs_as_many_known_as_in_plain_torch(count, monkeypatch):
    ours, plain = by_kernel(monkeypatch), Spikes(CPU, ALONE, 1.0)
    for state in (ours, plain):
        fill(state, count)
    loud = torch.tensor(1e4, dtype=torch.float64)
    a, b = ours.judge_gradients(loud, [parameter_of(2.0)]), plain.judge(loud, torch.tensor(2.0).double())
    assert a.numbers[2] == b.numbers[2] == float(count == KNOWN)
    for state in (ours, plain):
        state.enter()
    newest = ours.tensors()["window"][-1]
    assert close(newest, plain.tensors()["window"][-1], SUMS), "what is no spike enters whole"
