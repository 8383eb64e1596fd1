"""`adamw` on a GPU, as far as a CPU shows it: its state is torch's, its steps are the reference's and near torch's,
and the kernel is launched with what they need."""

import copy

import pytest
import torch
from torch import nn

from csrc_triton import adamw as kernels
from repsft_fast.optim import adamw, build_optimizer, state_tensors, torch_fused
from repsft_fast.optim.base import Hyperparameters, materialise
from repsft_fast.optim.masters import Masters
from repsft_fast.selftest.syncs import SyncCounter
from tests.helpers.fake_cuda import GPU, fake_cuda
from tests.helpers.interpreter import interpret

SHAPES = [(16, 256), (9, 512), (64,), (48,), (33, 65)]


def named(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {
        f"p{i}": nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for i, s in enumerate(SHAPES)
    }


def rule(parameters, kind=adamw.KernelAdamW, *, masters=None, weight_decay=0.1, decay="matrices"):
    hyperparameters = Hyperparameters(1e-2, (0.9, 0.999), 1e-8, 0.0, 0)
    made = kind("adamw", parameters, hyperparameters, weight_decay=weight_decay, decay=decay, masters=masters)
    materialise(made)
    return made


def beside(parameters):
    """bf16 weights, and masters of the given values."""
    held = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    weights = {name: nn.Parameter(p.detach().bfloat16()) for name, p in parameters.items()}
    return weights, Masters(weights, held, None)


def give(parameters, seed, skip=()):
    generator = torch.Generator().manual_seed(seed)
    for number, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.grad_dtype)
        parameter.grad = None if number in skip else gradient


def steps(made, updates=4, **options):
    for update in range(updates):
        give(made.names.values(), update, **options)
        made.step(1e-2 / (1 + update), torch.tensor(float(update == 2)), torch.tensor(0.3))


def through_the_kernel(made, monkeypatch):
    interpret(monkeypatch, "csrc_triton.adamw")
    made.inner._update_plain = made.inner._launch
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_that_of_torchs_own(dtype):
    ours, theirs = rule(named(dtype)), rule(named(dtype), torch_fused.FusedAdamW)
    states = [state_tensors(each) for each in (ours, theirs)]
    kinds = [{name: (t.dtype, t.shape) for name, t in state.items()} for state in states]
    assert kinds[0] == kinds[1]


@torch.no_grad()
def apart(a, b):
    return float((a - b).norm() / b.norm())


def test_steps_are_near_torchs_own_and_a_checkpoint_of_either_is_the_others():
    """Both in fp32, other orders of the same operations. Measured: weights 6e-8 and moments 6e-8 after four
    updates."""
    ours, theirs = rule(named()), rule(named(), torch_fused.FusedAdamW)
    steps(ours), steps(theirs)
    for _ in range(2):  # and on, each from the other's state
        for name, tensor in state_tensors(theirs).items():
            assert apart(state_tensors(ours)[name], tensor) < 2e-7, name
        for name, parameter in theirs.names.items():
            assert apart(ours.names[name], parameter) < 2e-7, name
        kept = [{n: t.clone() for n, t in state_tensors(each).items()} for each in (theirs, ours)]
        with torch.no_grad():
            for each, state in zip((ours, theirs), kept):
                for name, tensor in state_tensors(each).items():
                    tensor.copy_(state[name])
        steps(ours), steps(theirs)
    assert state_tensors(ours)["optim.step"].tolist() == [9.0] * 5  # one of every four was vetoed


@pytest.mark.parametrize("kind", ["plain", "masters", "bf16"])
def test_what_is_launched_is_what_it_computes_on_a_cpu(kind, monkeypatch):
    """One launch for all of a kind whatever its decay; clip, veto and counts stay on the device."""
    sides, launches = [], []
    for kernel in (True, False):
        parameters, masters = named(torch.bfloat16 if kind == "bf16" else torch.float32), None
        if kind == "masters":
            parameters, masters = beside(parameters)
        made = rule(parameters, masters=masters)
        sides.append(through_the_kernel(made, monkeypatch) if kernel else made)

    class Counting(kernels.Launcher):
        def __call__(self, parts, gradients, **options):
            launches.append((len(parts), super().__call__(parts, gradients, **options)))

    monkeypatch.setattr(kernels, "Launcher", Counting)
    for update in range(4):
        for made in sides:
            give(made.names.values(), update, skip=(1,) if update == 3 else ())
            with SyncCounter() as syncs:
                made.step(1e-2, torch.tensor(float(update == 2)), torch.tensor(0.3))
            assert update in (0, 3) or syncs.found == {}  # those build their tables, on the host
    assert launches == [(5, 4)] * 3 + [(4, 4)]  # counts and update, of whole 16s and of 33 × 65
    theirs = state_tensors(sides[1])
    for name, value in state_tensors(sides[0]).items():
        assert torch.equal(value, theirs[name]), name
    for name, weight in sides[1].names.items():
        assert torch.equal(sides[0].names[name], weight), name
        assert torch.equal(sides[0].held[name], sides[1].held[name]), name
    assert state_tensors(sides[0])["optim.step"].tolist() == [3.0, 2.0, 3.0, 3.0, 3.0]


def test_weights_are_written_with_their_masters():
    weights, masters = beside(named())
    made = rule(weights, masters=masters)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    steps(made, 3)
    for name, weight in weights.items():
        assert torch.equal(weight, made.held[name].bfloat16())
        assert not torch.equal(weight, before[name])
    assert made.inner.copies.keys() == set(made.held.values())


def test_masters_move_as_fp32_weights_do():
    weights, masters = beside(named())
    made, plain = rule(weights, masters=masters), rule(named())
    steps(made), steps(plain)
    assert all(torch.equal(made.held[name], parameter) for name, parameter in plain.names.items())


def test_moments_that_were_replaced_are_seen(monkeypatch):
    """`load_state_dict` of torch's base class puts other tensors in the place of moments."""
    made, other = through_the_kernel(rule(named()), monkeypatch), rule(named())
    steps(made, 2), steps(other, 2)
    kept = copy.deepcopy(other.inner.state_dict())
    steps(made, 1), steps(other, 1)
    for each in (made, other):  # back to where they were: weights stay
        each.inner.load_state_dict(copy.deepcopy(kept))
    steps(made, 2), steps(other, 2)
    for name, parameter in other.names.items():
        assert torch.equal(made.names[name], parameter), name


def test_gradients_of_other_parameters_every_update(monkeypatch):
    """As many as before, and others: an expert that was not asked."""
    made, other = through_the_kernel(rule(named()), monkeypatch), rule(named())
    for missing in (0, 1, 3, 1):
        for each in (made, other):
            give(each.names.values(), missing, skip=(missing,))
            each.step(1e-2, None, None)
    for name, tensor in state_tensors(other).items():
        assert torch.equal(state_tensors(made)[name], tensor), name
    assert all(torch.equal(made.names[name], parameter) for name, parameter in other.names.items())
    assert state_tensors(made)["optim.step"].tolist() == [3.0, 2.0, 4.0, 3.0, 4.0]


def test_no_closure():
    with pytest.raises(ValueError, match="closure"):
        rule(named()).inner.step(lambda: 0.0)


class TestWhichIsTaken:
    def test_torchs_on_a_cpu(self):
        assert type(build_optimizer(named().items(), "adamw", lr=1e-2)) is torch_fused.FusedAdamW

    def test_ours_on_a_gpu_unless_it_is_measured_against_torchs(self, monkeypatch):
        with fake_cuda(monkeypatch):
            there = {n: nn.Parameter(torch.empty(p.shape, device=GPU)) for n, p in named().items()}
            assert type(build_optimizer(there.items(), "adamw", lr=1e-2)) is adamw.KernelAdamW
            with adamw.torchs_own():
                assert type(build_optimizer(there.items(), "adamw", lr=1e-2)) is torch_fused.FusedAdamW
            assert adamw.takes_kernel(there.values())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
    def test_torchs_for_types_the_kernel_does_not_know(self, dtype, monkeypatch):
        with fake_cuda(monkeypatch):
            weight = nn.Parameter(torch.empty(16, 256, dtype=dtype, device=GPU))
            assert not adamw.takes_kernel([weight])
            held = nn.Parameter(torch.empty(16, 256, dtype=dtype, device=GPU))
            half = nn.Parameter(torch.empty(16, 256, dtype=torch.bfloat16, device=GPU))
            assert not adamw.takes_kernel([half], Masters({"p": half}, {"p": held}, None))
            held = nn.Parameter(torch.empty(16, 256, device=GPU))
            assert adamw.takes_kernel([half], Masters({"p": half}, {"p": held}, None))

    def test_torchs_for_strided_weights(self, monkeypatch):
        with fake_cuda(monkeypatch):
            weight = nn.Parameter(torch.empty(16, 256, device=GPU).t())
            assert not adamw.takes_kernel([weight])

    def test_torchs_where_there_is_no_triton(self, monkeypatch):
        with fake_cuda(monkeypatch):
            weight = nn.Parameter(torch.empty(16, 256, device=GPU))
            monkeypatch.setattr(adamw.importlib.util, "find_spec", lambda name: None)
            assert not adamw.takes_kernel([weight])
