"""The fused head under autocast: it computes what F.linear would there, and an fp32 head's gradient is not
rounded."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from repsft_fast.ops.linear_cross_entropy import linear_cross_entropy

N, H, V = 24, 16, 300
HALF = [torch.bfloat16, torch.float16]


def inputs(hidden_dtype: torch.dtype, head_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, head = torch.randn(N, H), torch.randn(V, H)
    return (
        hidden.to(hidden_dtype).requires_grad_(),
        head.to(head_dtype).requires_grad_(),
        torch.randint(V, (N,)),
    )


def rounded_truth(hidden: Tensor, head: Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """fp64 loss and gradients of what is left of both after F.linear's cast."""
    hidden, head = (x.detach().to(dtype).double().requires_grad_() for x in (hidden, head))
    loss = F.cross_entropy(hidden @ head.T, targets, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss, (hidden, head))


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).abs().max() / expected.abs().max())


@pytest.fixture(params=["eager", "compiled"])
def run(request):
    if request.param == "eager":
        return linear_cross_entropy
    torch._dynamo.reset()
    return torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_half_hidden_states_beside_an_fp32_head(run, dtype, autocast):
    hidden, head, targets = inputs(dtype, torch.float32)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        loss, _ = run(hidden, head, targets, None, torch.arange(N))
    loss.backward()
    truth = rounded_truth(hidden, head, targets, dtype)
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == dtype
    assert head.grad.dtype == torch.float32
    assert error(loss.detach(), truth[0]) < 1e-6
    assert error(hidden.grad, truth[1]) < torch.finfo(dtype).eps
    assert error(head.grad, truth[2]) < 1e-5  # a gradient rounded to bf16 is off by 2e-3


@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
def test_fp32_hidden_states_are_cast_as_linear_casts_them(run, head_dtype):
    hidden, head, targets = inputs(torch.float32, head_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = run(hidden, head, targets, None, torch.arange(N))
    loss.backward()
    truth = rounded_truth(hidden, head, targets, torch.bfloat16)
    assert error(loss.detach(), truth[0]) < 1e-6
    assert hidden.grad.dtype == torch.float32
    assert error(hidden.grad, truth[1]) < 2**-7
    assert head.grad.dtype == head_dtype
    assert error(head.grad, truth[2]) < (1e-5 if head_dtype == torch.float32 else 2**-7)


def test_fp64_is_not_cast(run):
    hidden, head, targets = inputs(torch.float64, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = run(hidden, head, targets, None, torch.arange(N))
    assert error(loss.detach(), rounded_truth(hidden, head, targets, torch.float64)[0]) < 1e-14


@pytest.mark.parametrize("skip_below", [0.0, 0.5])
@pytest.mark.parametrize("chunk_bytes", [None, 1])
def test_autocast_changes_no_bit_of_equal_types(chunk_bytes, skip_below):
    """Off inside: else the product behind skip_below, which has no `out`, would be rounded to bf16."""
    found = []
    for autocast in (False, True):
        hidden, head, targets = inputs(torch.bfloat16, torch.bfloat16)
        targets[:8] = (hidden[:8] @ head.T).argmax(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            options = {"chunk_bytes": chunk_bytes, "skip_below": skip_below}
            loss, _ = linear_cross_entropy(hidden, head, targets, rows=torch.arange(N), **options)
            loss.backward()
        found.append((loss.detach(), hidden.grad, head.grad))
    for plain, cast in zip(*found, strict=True):
        assert torch.equal(plain, cast)


def test_the_kernels_of_triton(monkeypatch):
    pytest.importorskip("triton")
    from tests.helpers.interpreter import interpret

    interpret(monkeypatch, "csrc_triton.cross_entropy")
    hidden, head, targets = inputs(torch.bfloat16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = linear_cross_entropy(hidden, head, targets, rows=torch.arange(N))
    loss.backward()
    truth = rounded_truth(hidden, head, targets, torch.bfloat16)
    assert head.grad.dtype == torch.float32
    assert not torch.equal(head.grad, head.grad.bfloat16().float())
    assert error(head.grad, truth[2]) < 0.02
    assert error(hidden.grad, truth[1]) < 0.02


@pytest.mark.parametrize(
    ("hidden_dtype", "head_dtype", "autocast", "words"),
    [
        (torch.bfloat16, torch.float16, None, "lm_head: has another dtype than hidden"),
        (torch.float16, torch.bfloat16, None, "lm_head: has another dtype than hidden"),
        (torch.float32, torch.bfloat16, None, "lm_head: has another dtype than hidden"),
        (torch.float64, torch.float32, torch.bfloat16, "lm_head: has another dtype than hidden"),
        (torch.float32, torch.float16, torch.bfloat16, "lm_head: has another dtype than hidden"),
        (
            torch.float16,
            torch.float32,
            torch.bfloat16,
            "hidden: has another half precision than the autocast in force",
        ),
        (
            torch.bfloat16,
            torch.bfloat16,
            torch.float16,
            "hidden: has another half precision than the autocast in force",
        ),
    ],
)
def test_mixtures_are_refused(hidden_dtype, head_dtype, autocast, words):
    hidden, head, targets = inputs(hidden_dtype, head_dtype)
    context = torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None)
    with context, pytest.raises(ValueError, match=words):
        linear_cross_entropy(hidden, head, targets)
