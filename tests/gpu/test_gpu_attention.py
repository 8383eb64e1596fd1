"""Attention over packed rows on the device: grouped heads, windows, empty sequences at the end, padding;
forward and backward.

Truth is the document mask in float64 on the CPU; the yardstick is attention as one would write it, in the
same dtype. On a CPU the back end is `segments`, on a GPU torch's varlen (FlashAttention).
"""

import pytest
import torch
from torch import nn

from repsft_fast.ops import attention, flash
from repsft_fast.ops.attention import Packed, packed_attention
from repsft_fast.ops.attention_choice import why_not
from tests.gpu.places import Law3, anywhere, by_dtype, poison_pool

HALF = [torch.bfloat16, torch.float16]
everywhere = by_dtype("attention", there=HALF, here=[torch.float32])
one_type = by_dtype("attention", there=[torch.bfloat16], here=[torch.float32])
# shorter and longer than a tile and than the window; the last is the padding
LENGTHS = (1, 7, 300, 64, 129, 2, 33)
HEADS, DIM = 4, 64
WINDOW = 37


class Layer(nn.Module):
    is_causal = True


class Case:
    """Queries, keys and values of one row in `dtype`; output and gradients in float64 as truth."""

    def __init__(self, place, dtype, kv_heads, window=None, seed=0):
        draw = torch.Generator().manual_seed(seed)
        self.place, self.window, total = place, window, sum(LENGTHS)
        self.tensors = [
            torch.randn(1, heads, total, DIM, generator=draw).to(dtype)
            for heads in (HEADS, kv_heads, kv_heads)
        ]
        self.up = torch.randn(1, total, HEADS, DIM, generator=draw).to(dtype)

    def packed(self, backend, *, tail=2, max_seqlen=512):
        borders = [sum(LENGTHS[:i]) for i in range(len(LENGTHS) + 1)]
        assert borders[-1] == self.up.shape[1], "the last border is T: no row lies beyond"
        cu = torch.tensor(borders + [borders[-1]] * tail, dtype=torch.int32, device=self.place.device)
        return Packed(cu, LENGTHS, max_seqlen, backend)

    def run(self, backend=None, **options):
        """[output, gradients of q, k and v], by the back end that trains here."""
        tensors = [x.to(self.place.device, copy=True).requires_grad_() for x in self.tensors]
        where = self.packed(backend or self.place.pick("segments", "varlen"), **options)
        output = packed_attention(Layer(), *tensors, None, packed=where, sliding_window=self.window)[0]
        return [output.detach(), *torch.autograd.grad(output, tensors, self.up.to(self.place.device))]

    def written_out(self, dtype, device):
        """The same by scores, mask and softmax (in fp32 at least), every product in `dtype`."""
        q, k, v = (x.to(device, dtype).requires_grad_() for x in self.tensors)
        wide_k, wide_v = (x.repeat_interleave(HEADS // x.shape[1], dim=1) for x in (k, v))
        at = torch.arange(q.shape[2], device=device)
        document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).to(device)
        distance = at[:, None] - at[None, :]
        seen = (
            (document[:, None] == document[None, :])
            & (distance >= 0)
            & (distance < (self.window or q.shape[2]))
        )
        scores = ((q @ wide_k.transpose(-1, -2)) * DIM**-0.5).masked_fill(~seen, float("-inf"))
        output = (
            scores.softmax(-1, dtype=torch.promote_types(dtype, torch.float32)).to(dtype) @ wide_v
        ).transpose(1, 2)
        return [output.detach(), *torch.autograd.grad(output, (q, k, v), self.up.to(device, dtype))]

    def held(self, found, factor=1.5):
        """Law 3 for the output and every gradient."""
        law = Law3()
        truth, plain = (
            self.written_out(torch.float64, "cpu"),
            self.written_out(self.up.dtype, self.place.device),
        )
        for name, ours, theirs, exact in zip(("output", "dq", "dk", "dv"), found, plain, truth, strict=True):
            law.add(name, ours.cpu(), theirs.cpu(), exact, factor, floor=1e-7)
        law.hold()


@anywhere("attention", dtype="bfloat16", on=None)
def test_the_trial_of_grouped_heads_finds_what_this_torch_does(place, monkeypatch):
    monkeypatch.setattr(attention, "_grouped", {})
    device = torch.device("cuda", torch.cuda.current_device())
    assert attention.takes_grouped_heads(device), (
        "every torch since 2.11 takes them: say why this one does not"
    )
    assert attention._grouped == {device.index: True}


@anywhere("attention", dtype="bfloat16", on=None)
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", flash.PACKAGES)
def test_a_package_that_is_here(place, name, kv_heads, window):
    """With a tail of empty documents, memory that held NaN, and in a fixed order twice the same."""
    if (why := why_not(name, place.device, DIM)) is not None:
        pytest.skip(why)
    case = Case(place, torch.bfloat16, kv_heads, window)
    poison_pool(place.device)
    case.held(case.run(name, tail=9))
    torch.use_deterministic_algorithms(True)
    try:
        first, again = case.run(name), case.run(name)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, first, again))


@everywhere
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_output_and_gradients(place, dtype, kv_heads, window):
    case = Case(place, dtype, kv_heads, window)
    case.held(case.run())


@one_type
@pytest.mark.parametrize("tail", [0, 1, 9])
def test_empty_sequences_at_the_end_change_nothing(place, dtype, tail):
    """Borders repeat T, so that their number takes few values. Each is a sequence of length zero, in backward
    too."""
    case = Case(place, dtype, 2, WINDOW)
    found = case.run(tail=tail)
    case.held(found)
    assert torch.equal(found[0], case.run(tail=2)[0])


@one_type
@pytest.mark.parametrize("window", [None, WINDOW])
def test_a_larger_bound_on_the_longest_changes_no_output(place, dtype, window):
    case = Case(place, dtype, 2, window)
    tight, loose = case.run(max_seqlen=max(LENGTHS)), case.run(max_seqlen=4096)
    assert torch.equal(tight[0], loose[0])
    case.held(loose)


@one_type
def test_memory_that_held_nan_reaches_no_output_and_no_gradient(place, dtype):
    """What a kernel does not write stays as the pool was; the padding's rows are written too, since it is a
    segment."""
    case = Case(place, dtype, 2)
    before = case.run()
    poison_pool(place.device)
    found = case.run()
    assert all(x.isfinite().all() for x in found)
    assert torch.equal(found[0], before[0])
    case.held(found)


@one_type
def test_no_document_sees_another_bit_for_bit(place, dtype):
    case, changed = Case(place, dtype, 2), Case(place, dtype, 2)
    first, end = 8, 308  # the third document
    for x in changed.tensors:
        x[:, :, :first] += 1
        x[:, :, end:] -= 1
    before, after = case.run()[0], changed.run()[0]
    assert torch.equal(before[:, first:end], after[:, first:end])
    assert not torch.equal(before[:, end:], after[:, end:])


@one_type
def test_deterministic_mode_repeats_every_gradient(place, dtype):
    """FlashAttention adds dQ by atomics otherwise: bit for bit holds on a GPU in deterministic mode alone."""
    torch.use_deterministic_algorithms(True)
    case = Case(place, dtype, 2)
    first = case.run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, case.run(), strict=True))
