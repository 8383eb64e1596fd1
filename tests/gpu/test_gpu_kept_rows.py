"""Rows left out without asking how many: 0, 60 and 100 % memorised, capacity too small, right and too large.

The full products with zeros in the memorised rows are the yardstick: both against float64, law 3's bound.
"""

import math

import pytest
import torch

from repsft_fast.ops import products
from repsft_fast.ops.linear_cross_entropy import linear_cross_entropy
from tests.gpu.places import Law3, by_dtype

# numpy speaks up where the hardware computes inf and NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TAU = 2.0**-6


class Rows:
    def __init__(self, place, dtype, memorised):
        """Row i is memorised or not at random; its 1 − p is far from the threshold either way."""
        self.place = place
        self.count, width, self.vocabulary = place.pick((24, 24, 40), (1024, 64, 1000))
        generator = torch.Generator().manual_seed(0)
        head = torch.randn(self.vocabulary, width, generator=generator)
        self.targets = torch.randint(self.vocabulary, (self.count,), generator=generator)
        hidden = 0.1 * torch.randn(self.count, width, generator=generator)
        self.peaked = torch.rand(self.count, generator=generator) < memorised
        hidden[self.peaked] += (72.0 / width) * head[self.targets[self.peaked]]
        self.weights = torch.rand(self.count, generator=generator) + 0.5
        self.hidden, self.head = hidden.to(dtype), head.to(dtype)
        exact = self.hidden.double() @ self.head.double().T
        one_hot = torch.nn.functional.one_hot(self.targets, self.vocabulary)
        gradient = self.weights.double()[:, None] * (exact.softmax(1) - one_hot)
        gradient[self.peaked] = 0.0
        self.truth = gradient @ self.head.double(), gradient.T @ self.hidden.double()

    def run(self, share):
        there = self.place.device
        hidden, head = (x.to(there, copy=True).requires_grad_() for x in (self.hidden, self.head))
        head.grad_dtype = torch.float32
        rows = torch.arange(self.count, device=there)
        loss, stats = linear_cross_entropy(
            hidden,
            head,
            self.targets.to(there),
            self.weights.to(there),
            rows,
            skip_below=TAU,
            kept_share=share,
        )
        loss.backward()
        return loss.detach().cpu(), stats, hidden.grad.cpu(), head.grad.cpu()


@by_dtype("kept rows", there=[torch.bfloat16, torch.float32], here=[torch.float32], on="interpreter")
@pytest.mark.parametrize(
    ("memorised", "share"),
    [(0.0, 0.25), (0.6, 0.25), (0.6, 0.5), (0.6, 0.75), (1.0, 0.25)],
    ids=[
        "none, overflow",
        "60 %, overflow",
        "60 %, just room",
        "60 %, too much room",
        "all, room for a quarter",
    ],
)
def test_any_share_is_as_near_to_float64_as_the_full_products(place, dtype, memorised, share, monkeypatch):
    if not place.on_gpu:
        monkeypatch.setattr(products, "CAPACITY_STEP", 1)
    rows = Rows(place, dtype, memorised)
    assert products.capacity(rows.count, share) < rows.count
    ours, full = rows.run(share), rows.run(1.0)
    assert torch.equal(ours[1].log10_miss.cpu() < math.log10(TAU), rows.peaked)
    assert torch.equal(ours[0], full[0])
    assert torch.equal(ours[1].entropy, full[1].entropy)
    assert torch.equal((ours[2] != 0).any(1), ~rows.peaked), "the rows with a gradient are the others"
    law = Law3(at_least=place.pick(500, 10_000))
    for name, a, b, truth in zip(("hidden gradient", "head gradient"), ours[2:], full[2:], rows.truth):
        # In fp32 the products take other algorithms than the kernel: what is held is the rounding of a sum of
        # 1,000.
        law.add(name, a, b, truth, floor=2e-6 if dtype == torch.float32 else Law3.FLOOR)
    law.hold()
