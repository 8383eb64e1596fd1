"""`rows` may name a row several times: it counts so often."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from repsft_fast.ops.linear_cross_entropy import linear_cross_entropy
from repsft_fast.ops.reference import linear_cross_entropy_reference

N, H, V = 9, 8, 40
TWICE = [4, 1, 4, 0, 8, 1, 4]
WEIGHTS = torch.linspace(0.2, 2.0, N)


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, head = torch.randn(N, H, dtype=torch.float64), torch.randn(V, H, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), torch.randint(V, (N,))


def plain(
    hidden: Tensor, head: Tensor, targets: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    hidden, head = (x.detach().double().requires_grad_() for x in (hidden, head))
    losses = F.cross_entropy(hidden[rows] @ head.T, targets[rows], reduction="none")
    loss = (losses * WEIGHTS.double()[rows]).sum()
    return loss, losses.detach(), torch.autograd.grad(loss, (hidden, head))


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("chunk_bytes", [None, 1])
@pytest.mark.parametrize("rows", [TWICE, [3, 3], [0, 1, 2], []])
def test_against_the_plain_formula(rows, chunk_bytes, compiled):
    hidden, head, targets = inputs(torch.float64)
    at = torch.tensor(rows, dtype=torch.int64)
    run = torch.compile(linear_cross_entropy, backend="eager") if compiled else linear_cross_entropy
    loss, stats = run(hidden, head, targets, WEIGHTS, at, chunk_bytes=chunk_bytes)
    loss.backward()
    expected, losses, gradients = plain(hidden, head, targets, at)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12, abs=0)
    torch.testing.assert_close(stats.loss, losses, rtol=1e-12, atol=1e-14)
    for got, truth in zip((hidden.grad, head.grad), gradients, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-13)
    reference = linear_cross_entropy_reference(hidden, head, targets, WEIGHTS, at)
    torch.testing.assert_close(reference[2], gradients[0], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("interpreted", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_half_precision_and_the_kernels(dtype, bound, interpreted, monkeypatch):
    if interpreted:
        pytest.importorskip("triton")
        from tests.helpers.interpreter import interpret

        interpret(monkeypatch, "csrc_triton.cross_entropy")
    hidden, head, targets = inputs(dtype)
    at = torch.tensor(TWICE)
    loss, stats = linear_cross_entropy(hidden, head, targets, WEIGHTS, at)
    loss.backward()
    expected, losses, gradients = plain(hidden, head, targets, at)
    assert stats.loss.shape == (len(TWICE),)
    assert error(stats.loss, losses) < bound
    assert torch.equal(stats.loss[0], stats.loss[2])
    assert torch.equal(stats.loss[0], stats.loss[6])
    assert error(loss.detach(), expected.detach()) < bound
    assert error(hidden.grad, gradients[0]) < bound
    assert error(head.grad, gradients[1]) < bound


def test_memorised_rows_left_out():
    """skip_below = 0.9997 leaves out what is certain enough, named once or twice."""
    hidden, head, targets = inputs(torch.float64)
    at = torch.tensor(TWICE)
    loss, stats = linear_cross_entropy(hidden, head, targets, WEIGHTS, at, skip_below=0.9997)
    loss.backward()
    kept = at[stats.log10_miss >= torch.tensor(0.9997).double().log10()]
    assert 0 < len(kept) < len(at)
    assert len(kept.unique()) < len(kept)
    torch.testing.assert_close(hidden.grad, plain(hidden, head, targets, kept)[2][0], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_distinct_rows_change_no_bit(dtype):
    """Beside the plain copy, and in whichever order: adding to zero rounds nothing."""
    gradients, rows = torch.randn(5, H, dtype=torch.float64).to(dtype), torch.tensor([7, 0, 3, 8, 2])
    copied = torch.zeros(N, H, dtype=dtype).index_copy_(0, rows, gradients)
    added = torch.zeros(N, H, dtype=dtype).index_add_(0, rows, gradients)
    assert torch.equal(copied, added)
    hidden, head, targets = inputs(dtype)
    linear_cross_entropy(hidden, head, targets, WEIGHTS, rows)[0].backward()
    alone = []
    for row in rows:
        again, same_head, _ = inputs(dtype)
        linear_cross_entropy(again, same_head, targets, WEIGHTS, row[None])[0].backward()
        alone.append(again.grad[row])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(hidden.grad[rows], torch.stack(alone), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("rows", "got"), [([0, -1], -1), ([N], N), ([1, 10**12], 10**12)])
def test_rows_that_are_not_there(rows, got, compiled):
    """Negative ones too: index_select would not count them from the end either."""
    hidden, head, targets = inputs(torch.float32)
    run = torch.compile(linear_cross_entropy, backend="aot_eager") if compiled else linear_cross_entropy
    with pytest.raises(
        IndexError, match=f"rows: has an index that hidden has no row for, expected 0 … 8, got {got}"
    ):
        run(hidden, head, targets, None, torch.tensor(rows))


def test_batches_of_hidden_states_are_flattened_by_the_caller():
    hidden, head, targets = inputs(torch.float32)
    with pytest.raises(
        ValueError, match=r"expected two dimensions, got \(3, 3, 8\); flatten it: hidden.flatten\(0, -2\)"
    ):
        linear_cross_entropy(hidden.view(3, 3, H), head, targets.view(3, 3))
