"""The fused head, all statistics included, beside full logits and torch's own, at the CPU shapes of the
README's table.

`pytest benchmarks/suites/test_head_bench.py --benchmark-enable --benchmark-only`. One thread: ratios are the
point.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness import cases, peers

SHAPES = {
    "512x256x8192": (512, 256, 8192),
    "1024x256x8192": (1024, 256, 8192),
    "256x576x49152": (256, 576, 49152),
}


def torch_default(hidden, head, targets):
    return F.linear_cross_entropy(hidden, head, targets, ignore_index=peers.IGNORE)


HEADS = {"ours": peers.ours, "full logits": lambda: peers.eager}
if hasattr(F, "linear_cross_entropy"):  # torch >= 2.13
    HEADS["torch linear_cross_entropy"] = lambda: torch_default


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("masked", [0.0, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", HEADS)
def test_forward_and_backward(benchmark, name, shape, masked):
    call = peers.step(HEADS[name](), *cases.head_operands(*SHAPES[shape], masked=masked))
    benchmark.pedantic(call, rounds=5, iterations=1, warmup_rounds=1)


@pytest.mark.parametrize("tau", [0.0, 2.0**-12, 2.0**-8])
def test_three_quarters_memorised(benchmark, tau):
    """Hidden states that point at their targets: 1 − p spreads over twelve orders of magnitude."""
    hidden, head, targets = cases.head_operands(512, 256, 8192)
    with torch.no_grad():
        hidden.mul_(0.1).add_(torch.linspace(0, 60, 512)[:, None] * F.normalize(head[targets], dim=1))
    benchmark.pedantic(
        peers.step(peers.ours(skip_below=tau), hidden, head, targets), rounds=5, iterations=1, warmup_rounds=1
    )
