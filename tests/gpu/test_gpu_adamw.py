"""The AdamW kernel on the device: every bit is its plain torch truth's, as it is run."""

import math

import pytest
import torch

from csrc_triton.adamw import Launcher
from repsft_fast.optim import adamw, build_optimizer, state_tensors
from repsft_fast.optim.base import Hyperparameters, materialise
from repsft_fast.optim.masters import Masters
from tests.gpu.places import anywhere, by_dtype, same_bits
from tests.helpers.adamw_pair import BETAS, KINDS, Both, gradients

# numpy speaks up where the hardware computes inf and NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
GRADIENTS = (torch.float32, torch.bfloat16)
# The kernel moves bf16 as integers, so the interpreter truncates nothing.
here = by_dtype("adamw", there=GRADIENTS, here=GRADIENTS, on="interpreter")


def shapes_of(place):
    return place.pick([(8, 512), (16, 80), (33, 65)], [(1024, 1024), (9, 512), (4096,), (33, 65), (1,), (0,)])


@here
@pytest.mark.parametrize(("weight", "copies"), KINDS)
def test_every_bit_is_the_truths(place, dtype, weight, copies):
    """Masters, moments, bf16 weights, counts; clipped, one of the updates vetoed, one neither."""
    shapes = shapes_of(place)
    both = Both(shapes, weight, copies=copies, device=place.device)
    for step, (clip, veto) in enumerate([(0.7, 0.0), (0.3, 1.0), (0.3, 0.0), (None, None)]):
        both.update(gradients(shapes, dtype, step), lr=1e-2 / (1 + step), clip=clip, veto=veto)
    assert both.kernel.counts.tolist() == [3] * len(shapes)


@anywhere("adamw", dtype="float32", on="interpreter")
@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.9, 0.95), (0.5, 0.999999)])
def test_corrections_of_any_count(place, betas):
    counts = torch.tensor([0.0, 1.0, 2.0, 9.0, 1000.0, 65535.0, 2.0**24 - 2])
    shapes = [(16,)] * counts.numel()
    both = Both(shapes, betas=betas, device=place.device)
    for side in (both.kernel, both.plain):
        side.counts.copy_(counts)
    both.update(gradients(shapes, torch.float32, 0))


@anywhere("adamw", dtype="float32", on="interpreter")
@pytest.mark.parametrize("size", [1e-39, 1e-20, 1e-12], ids=["subnormal", "square subnormal", "small"])
def test_subnormal_numbers_are_kept_as_the_truth_keeps_them(place, size):
    shapes = [(16, 256), (48, 80)]
    both = Both(shapes, copies=True, betas=(0.5, 0.75), device=place.device)
    for side in (both.kernel, both.plain):
        for weight in side.weights:
            weight.mul_(1e-30)
    for _ in range(2):
        grads = [gradient * size for gradient in gradients(shapes, torch.float32, 0)]
        both.update(grads, eps=1e-30, lr=1e-22)
    assert both.kernel.moments[1][0].count_nonzero() > 3000


@anywhere("adamw", dtype="float32", on="interpreter")
@pytest.mark.parametrize(("weight", "copies"), KINDS)
def test_no_nan_and_no_infinity_is_hidden(place, weight, copies):
    """GPUs make the NaN whose bits are all ones: rounding must not carry it into another number."""
    shapes = [(16, 256), (10,)]
    both = Both(shapes, weight, copies=copies, device=place.device)
    grads = gradients(shapes, torch.float32, 1)
    for gradient in grads:
        gradient[..., 5:7].view(torch.int32).fill_(0x7FFFFFFF)
        gradient[..., 7] = math.inf
    grads = [gradient.to(place.device) for gradient in grads]
    parts = [both.part(number) for number in range(2)]
    Launcher()(parts, grads, lr=1e-2, eps=1e-8, betas=BETAS, clip=None, veto=None)
    for _, tensor in list(both.kernel.tensors())[:-1]:
        assert not tensor[..., 5:8].isfinite().any()
        assert tensor[..., :5].isfinite().all()
        assert tensor[..., 8:].isfinite().all()


@anywhere("adamw", dtype="float32", on="interpreter")
def test_gradients_that_come_back_elsewhere(place):
    """As the allocator moves them: tables are followed on the device in the order of the launches."""
    shapes = [(64, 256), (48, 80), (16,)]
    both, kept = Both(shapes, copies=True, device=place.device), []
    for step in range(place.pick(3, 50)):
        kept.append(torch.empty(1 + step % 7, 1000, device=place.device))
        grads = [gradient.to(place.device) for gradient in gradients(shapes, torch.float32, step)]
        both.update(grads, check=False)
        kept.append(grads if step % 3 else None)
    both.check()
    assert both.launcher._tables.built == 1


def as_built(place, *, kernel: bool):
    """Weights and state, on the CPU, after three updates, one of them vetoed, all of them clipped."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 512), (33, 65), (300,)]
    values = {f"p{i}": torch.randn(s, generator=generator).to(place.device) for i, s in enumerate(shapes)}
    held = {name: torch.nn.Parameter(value) for name, value in values.items()}
    weights = {name: torch.nn.Parameter(value.bfloat16()) for name, value in values.items()}
    masters = Masters(weights, held, None)
    if kernel and place.on_gpu:
        optimizer = build_optimizer(weights.items(), "adamw", lr=1e-2, weight_decay=0.1, masters=masters)
        assert type(optimizer) is adamw.KernelAdamW
    else:
        given = Hyperparameters(1e-2, (0.9, 0.999), 1e-8, 0.0, 0)
        optimizer = adamw.KernelAdamW(
            "adamw", weights, given, weight_decay=0.1, decay="matrices", masters=masters
        )
        materialise(optimizer)
        if kernel:
            optimizer.inner._update_plain = optimizer.inner._launch
    for update in range(3):
        for weight in weights.values():
            weight.grad = torch.randn(weight.shape, generator=generator).to(place.device)
        veto = torch.tensor(float(update == 1), device=place.device)
        optimizer.step(1e-2, veto, torch.tensor(0.5, device=place.device))
    found = {**{f"weight.{n}": w for n, w in weights.items()}, **{f"master.{n}": h for n, h in held.items()}}
    return {name: t.detach().cpu() for name, t in {**found, **state_tensors(optimizer)}.items()}


@anywhere("adamw", dtype="float32", on="interpreter")
def test_the_optimizer_as_it_is_built(place):
    """Through `build_optimizer`: groups, decay and masters included, to the bit."""
    ours = as_built(place, kernel=True)
    truth = as_built(type(place)("cpu"), kernel=False)
    assert ours.keys() == truth.keys()
    assert not [name for name, value in truth.items() if not same_bits(ours[name], value)]
