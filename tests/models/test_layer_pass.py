"""A row's way through the layers; what autograd does with a gradient is done alike. The whole of it is in
`test_compiled_stack.py`."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from repsft_fast.models.layer_pass import add_gradients


class Fixed(torch.autograd.Function):
    """Hands a weight the gradient it is told."""

    @staticmethod
    def forward(ctx, weight, gradient):
        ctx.gradient = gradient
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx, up):
        return ctx.gradient.clone(memory_format=torch.preserve_format), None


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("weight", "sums"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, None),
    ],
)
def test_gradients_are_added_up_as_autograd_does(weight, sums, turned):
    """Three rows: type, layout and bits of the sum."""
    torch.manual_seed(0)
    ours, plain = (nn.Parameter(torch.ones(4, 6, dtype=weight)) for _ in range(2))
    for one in (ours, plain):
        one.grad_dtype = sums
    for _ in range(3):
        gradient = torch.randn(6, 4).to(weight).t() if turned else torch.randn(4, 6).to(weight)
        Fixed.apply(plain, gradient).backward()
        pair = SimpleNamespace(weights=((ours, 1),), strides=(gradient.stride(),))
        add_gradients(pair, [None, gradient.clone(memory_format=torch.preserve_format)])
        assert ours.grad.dtype == plain.grad.dtype
        assert ours.grad.stride() == plain.grad.stride()
        assert torch.equal(ours.grad, plain.grad)
