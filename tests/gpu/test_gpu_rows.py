"""Law 1 on the device, in the type that trains: a packed row gives the losses and gradients of its samples
alone."""

import pytest
import torch

from repsft_fast.models import load_model
from tests.gpu import small_runs
from tests.gpu.places import Law3, anywhere, poison_pool
from tests.helpers import tiny

ALONE = (5, 17, 1, 9, 64, 30, 100, 2)


def lengths(place):
    return ALONE * place.pick(1, 9)


def model_of(device, dtype):
    torch.manual_seed(1)
    return load_model(
        small_runs.MODEL, device=device, param_dtype=dtype, compute_dtype=dtype, layer_kernels="none"
    )


def row_of(place, samples, device=None, length=None):
    return tiny.row(samples, prompt=1, length=length, device=device or place.device)


def gradients(model, rows):
    """All of them in one vector, float64 on the CPU, added there row by row."""
    total = 0
    for row in rows:
        model.zero_grad(set_to_none=True)
        model.loss(row)[0].backward()
        total = total + torch.cat([p.grad.double().cpu().flatten() for p in model.parameters()])
    return total


@anywhere("train step", "attention", "head", dtype="bfloat16")
def test_a_packed_row_is_its_samples_alone(place):
    """Neither errs against float64 more than the other by law 3's bound: packing costs no precision."""
    samples = tiny.documents(lengths(place), vocabulary=1000)
    model, exact = model_of(place.device, torch.bfloat16), model_of("cpu", torch.float64)
    exact.load_state_dict({name: tensor.double().cpu() for name, tensor in model.state_dict().items()})
    total = sum(lengths(place))
    with torch.no_grad():
        packed = model.loss(row_of(place, samples, length=total + 27))[1].loss.cpu()
        alone = torch.cat([model.loss(row_of(place, [sample]))[1].loss.cpu() for sample in samples])
        truth = exact.loss(row_of(place, samples, "cpu"))[1].loss
    law = Law3(at_least=place.pick(200, 1_500))
    law.add("losses", packed, alone, truth)
    law.add("losses alone", alone, packed, truth)
    law.hold()
    few = samples[: len(ALONE)]
    together = gradients(model, [row_of(place, few, length=256)])
    apart = gradients(model, [row_of(place, [sample]) for sample in few])
    law = Law3()
    for name, ours, theirs in (("gradients", together, apart), ("gradients alone", apart, together)):
        # one rounding to bf16
        law.add(name, ours, theirs, gradients(exact, [row_of(place, few, "cpu")]), floor=2.0**-9)
    law.hold()


@anywhere("train step", dtype="bfloat16")
def test_another_document_changes_no_loss_bit_for_bit(place):
    torch.use_deterministic_algorithms(True)
    samples = tiny.documents(ALONE, vocabulary=1000)
    changed = list(samples)
    changed[1] = [(token - 3 + 1) % 997 + 3 for token in samples[1]]
    model = model_of(place.device, torch.bfloat16)
    with torch.no_grad():
        before, after = (model.loss(row_of(place, given, length=256)) for given in (samples, changed))
    segments = row_of(place, samples, length=256).position_segments
    same = before[1].loss == after[1].loss
    assert same[segments != 1].all()
    assert not same[segments == 1].all()


@anywhere("train step", dtype="bfloat16")
@pytest.mark.parametrize("padding", [0, 29])
def test_memory_that_held_nan_changes_no_gradient(place, padding):
    """Padded or not: what lies beyond the samples and what a kernel leaves unwritten reaches no weight."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # the pool is what fresh memory holds
    try:
        samples = tiny.documents(ALONE, vocabulary=1000)
        model = model_of(place.device, torch.bfloat16)
        row = row_of(place, samples, length=sum(ALONE) + padding)
        assert int(row.cu_seqlens[-1]) == row.tokens.shape[1]
        before = gradients(model, [row])
        model.zero_grad(set_to_none=True)
        poison_pool(place.device)
        after = gradients(model, [row])
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    assert after.isfinite().all()
    assert torch.equal(before, after)
