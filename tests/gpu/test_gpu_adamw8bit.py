"""The 8-bit AdamW kernel on the device: the bits of its plain torch truth, and where contraction makes them
others, how few."""

import pytest
import torch

from repsft_fast.optim import build_optimizer, state_tensors
from tests.gpu.places import anywhere, by_dtype, same_bits
from tests.helpers.adamw_sides import ODD, SHAPES, Sides, contraction, gradients

# numpy speaks up where the hardware computes inf and NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
WEIGHTS = (torch.bfloat16, torch.float32)
# The kernel moves bf16 as integers, so the interpreter truncates nothing.
here = by_dtype("adamw8bit", there=WEIGHTS, here=WEIGHTS, on="interpreter")


def shapes_of(place):
    return SHAPES if place.on_gpu else [(8, 512), (16, 80)]


def equal(sides: Sides) -> None:
    different = [name for name, ours, truth in sides.tensors() if not same_bits(ours, truth)]
    assert not different, f"bits differ in {', '.join(different)}"


@here
def test_every_bit_is_the_truths_without_contraction(place, dtype):
    """Weights rounded stochastically, both moments, their scales; clipped, one of the updates vetoed."""
    sides = Sides(shapes_of(place), dtype, place.device)
    with contraction(False):
        for step, veto in ((1, 0.0), (2, 0.0), (3, 1.0), (3, 0.0)):
            grads = gradients(shapes_of(place), dtype, step)
            before = [ours for _, ours, _ in sides.tensors()]
            launches = sides.kernel(step, grads, clip=0.7, veto=veto)
            sides.truth(step, grads, clip=0.7, veto=veto)
            equal(sides)
            changed = [
                not same_bits(ours, old) for old, (_, ours, _) in zip(before, sides.tensors(), strict=True)
            ]
            assert not any(changed) if veto else any(changed)
    assert launches == 2


@anywhere("adamw8bit", dtype="float32", on="interpreter")
def test_weights_written_with_their_masters(place):
    """The bf16 weight is the master rounded to the nearest; master and moments are those without one."""
    sides = Sides(shapes_of(place), torch.float32, place.device, copies=True)
    with contraction(False):
        for step in (1, 2):
            grads = gradients(shapes_of(place), torch.float32, step)
            sides.kernel(step, grads, clip=0.7)
            sides.truth(step, grads, clip=0.7)
            equal(sides)
    assert all(torch.equal(copy, w.bfloat16()) for copy, w in zip(sides.copies, sides.weights, strict=True))


@here
def test_as_it_is_run_few_bits_differ_and_by_one(place, dtype):
    """Every update starts from the truth, so that what differs is its own doing. With contraction a moment
    may be off by one rounding of fp32: its code changes where that crosses the one place in 2¹⁹ at which
    stochastic rounding turns."""
    shapes = shapes_of(place)
    sides = Sides(shapes, dtype, place.device)
    for step in (1, 2, 3):
        sides.start_from_truth()
        grads = gradients(shapes, dtype, step)
        before = {name: truth.clone() for name, _, truth in sides.tensors()}
        sides.kernel(step, grads, clip=0.7)
        sides.truth(step, grads, clip=0.7)
        for name, ours, truth in sides.tensors():
            if truth.dtype == torch.uint8:
                apart = (ours.int() - truth.int()).abs()
            elif truth.dtype == torch.bfloat16:
                apart = (ours.view(torch.int16).int() - truth.view(torch.int16).int()).abs()
            else:
                # a sum may cancel: its terms are what is rounded
                size = torch.maximum(truth.abs(), before[name].abs())
                off = float(((ours - truth).abs() / size.clamp(min=torch.finfo(torch.float32).tiny)).max())
                assert off <= 4 * torch.finfo(torch.float32).eps, (
                    f"{name}, update {step}: off by {off:.2g} of itself"
                )
                continue
            share = float((apart > 0).float().mean())
            assert int(apart.max()) <= 1, f"{name}, update {step}: off by {int(apart.max())} codes or steps"
            assert share <= 1e-3, f"{name}, update {step}: {share:.2%} differ"


@anywhere("adamw8bit", dtype="float32", on="interpreter")
def test_odd_sizes(place):
    """No multiple of 16 elements: the kernel without wide accesses, its masks at the end of the memory."""
    sides = Sides(ODD, torch.float32, place.device)
    with contraction(False):
        for step in (1, 2):
            grads = gradients(ODD, torch.float32, step)
            sides.kernel(step, grads)
            sides.truth(step, grads)
            equal(sides)


@anywhere("adamw8bit", dtype="float32", on="interpreter")
@pytest.mark.parametrize("size", [1e-39, 1e-20, 1e-12], ids=["subnormal", "square subnormal", "small"])
def test_subnormal_numbers_are_kept_as_the_truth_keeps_them(place, size):
    """A gradient of 1e-39 is subnormal itself, of 1e-20 its square. An operation that flushed them would move
    a code by one, or a 32-bit moment to zero. Weights and eps are small enough to show it."""
    shapes = [(16, 256), (48, 80)]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(shape, generator=generator) * 1e-30 for shape in shapes]
    sides = Sides(shapes, torch.float32, place.device, weights)
    with contraction(False):
        for step in (1, 2):
            grads = [gradient * size for gradient in gradients(shapes, torch.float32, 0)]
            sides.kernel(step, grads, betas=(0.5, 0.75), eps=1e-30, lr=1e-22)
            sides.truth(step, grads, betas=(0.5, 0.75), eps=1e-30, lr=1e-22)
            equal(sides)
    assert sides.moments[1]["exp_avg"].count_nonzero() > 3000
    assert size < 1e-30 or sides.moments[1]["exp_avg_sq"].count_nonzero() > 3000


@here
def test_no_nan_and_no_infinity_is_hidden(place, dtype):
    """GPUs make the NaN whose bits are all ones: adding random bits to it must not carry it into another
    number."""
    shapes = [(16, 256), (48, 80)]
    sides = Sides(shapes, dtype, place.device)
    grads = gradients(shapes, dtype, 1)
    for gradient in grads:
        gradient.view(-1)[6:8] = float("inf")
        size = dtype.itemsize
        gradient.view(-1).view(torch.uint8)[5 * size : 6 * size] = torch.tensor(
            [255] * (size - 1) + [127], dtype=torch.uint8
        )
    with contraction(False):
        sides.kernel(1, grads)
    sides.truth(1, grads)
    for name, ours, truth in sides.tensors():
        if name.startswith("weight"):
            assert torch.equal(ours.isfinite(), truth.isfinite()), name
            assert not ours.view(-1)[5:8].isfinite().any(), name
        elif name.startswith("exp_avg_scale") or name.startswith("exp_avg_sq_scale"):
            assert torch.equal(ours, truth), name


def as_built(device, dtype, seed=1):
    """Weights and state, on the CPU, after three updates, one of them vetoed, all of them clipped."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 512), (33, 65), (300,)]
    named = [
        (f"p{i}", torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)))
        for i, s in enumerate(shapes)
    ]
    optimizer = build_optimizer(named, "adamw8bit", lr=1e-2, weight_decay=0.1, seed=seed)
    for update in range(3):
        for _, parameter in named:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(device, dtype)
        veto, clip = torch.tensor(float(update == 1), device=device), torch.tensor(0.5, device=device)
        optimizer.step(1e-2, veto, clip)
    weights = {name: p.detach().float().cpu() for name, p in named}
    return weights, {name: t.cpu() for name, t in state_tensors(optimizer).items()}


def beside_the_truth(found, truth, dtype):
    """Contraction moves last bits, and over updates a few codes: so many weights and codes may differ, the
    rest must not."""
    unit = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-20
    for name, wanted in truth[0].items():
        apart = float(((wanted - found[0][name]).abs() > unit * wanted.abs().clamp(min=1e-2)).float().mean())
        assert apart <= 1e-3, f"{apart:.2%} of {name} differ from plain torch"
    assert found[1].keys() == truth[1].keys()
    for name, wanted in truth[1].items():
        wanted = wanted.float()
        apart = float(((wanted - found[1][name].float()).abs() > 1e-5 * wanted.abs() + 1e-9).float().mean())
        assert apart <= 1e-2, f"{apart:.2%} of {name} differ from plain torch"


@by_dtype("adamw8bit", there=WEIGHTS, here=WEIGHTS)
def test_the_optimizer_as_it_is_built(place, dtype):
    """Through `build_optimizer`: step count, corrections, groups and decay included."""
    beside_the_truth(as_built(place.device, dtype), as_built(torch.device("cpu"), dtype), dtype)


def test_an_optimizer_that_rounds_otherwise_is_seen():
    with pytest.raises(AssertionError, match="differ from plain torch"):
        beside_the_truth(
            *(as_built(torch.device("cpu"), torch.bfloat16, seed) for seed in (1, 2)), torch.bfloat16
        )
