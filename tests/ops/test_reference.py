"""The truth itself: the reference in float64 against torch's own cross entropy, autograd and closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F

from repsft_fast.ops.reference import cross_entropy_rows, linear_cross_entropy_reference
from repsft_fast.row import IGNORE_INDEX

ROUNDING = 1e-13  # float64, a few hundred operations deep


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("vocabulary", [2, 3, 50, 1000])
def test_equals_torch_in_float64(vocabulary, softcap):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(40, vocabulary, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (40,), generator=generator)
    weights = torch.rand(40, generator=generator, dtype=torch.float64)
    total, stats, gradient = cross_entropy_rows(logits, targets, weights, softcap=softcap)

    leaf = logits.clone().requires_grad_()
    x = leaf if softcap is None else softcap * torch.tanh(leaf / softcap)
    loss = F.cross_entropy(x, targets, reduction="none")
    (loss * weights).sum().backward()
    x = x.detach()
    log_p = torch.log_softmax(x, 1)
    top = x.sort(dim=1, descending=True).values
    miss = -torch.expm1(-loss.detach())
    torch.testing.assert_close(total, (loss.detach() * weights).sum(), rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(gradient, leaf.grad, rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(stats.loss, loss.detach(), rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(stats.entropy, -(log_p.exp() * log_p).sum(1), rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(stats.top1_probability, log_p.exp().amax(1), rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(stats.margin, top[:, 0] - top[:, 1], rtol=ROUNDING, atol=ROUNDING)
    # 1 − p of the check is inexact
    torch.testing.assert_close(stats.log10_miss, torch.log10(miss), rtol=1e-10, atol=ROUNDING)
    assert torch.equal(stats.correct, x.argmax(1) == targets)


def test_memorised_rows_keep_their_relative_precision():
    """p = 1 / (1 + 2·exp(−lead)): for a lead of 200 the naive loss and gradient are 0."""
    leads = torch.tensor([20.0, 40.0, 90.0, 200.0], dtype=torch.float64)
    logits = torch.stack(
        [leads, torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)], dim=1
    )
    _, stats, gradient = cross_entropy_rows(logits, torch.zeros(4, dtype=torch.int64))
    for i, lead in enumerate(leads.tolist()):
        others = 2 * math.exp(-lead)
        assert stats.loss[i].item() == pytest.approx(math.log1p(others), rel=1e-14)
        assert gradient[i].tolist() == pytest.approx(
            [-others / (1 + others), *2 * [math.exp(-lead) / (1 + others)]], rel=1e-14
        )
        assert stats.log10_miss[i].item() == pytest.approx(math.log10(others / (1 + others)), rel=1e-14)
        entropy = math.log1p(others) / (1 + others) + others / (1 + others) * (lead + math.log1p(others))
        assert stats.entropy[i].item() == pytest.approx(entropy, rel=1e-13)


def test_ties_go_to_the_first_as_in_argmax():
    logits = torch.tensor([[1.0, 5.0, 5.0], [1.0, 5.0, 5.0], [0.0, 0.0, 0.0]])
    _, stats, _ = cross_entropy_rows(logits, torch.tensor([1, 2, 0]))
    assert stats.correct.tolist() == [True, False, True]
    assert stats.margin.tolist() == [0.0, 0.0, 0.0]


def test_minus_infinity_has_no_mass():
    logits = torch.tensor([[0.0, -math.inf, 1.0], [2.0, -math.inf, -math.inf]], dtype=torch.float64)
    _, stats, gradient = cross_entropy_rows(logits, torch.tensor([2, 0]))
    assert stats.loss[0].item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-14)
    assert stats.loss[1] == 0.0
    assert stats.log10_miss[1] == -math.inf
    assert stats.entropy[1] == 0.0
    assert gradient[:, 1].tolist() == [0.0, 0.0]
    assert gradient.isfinite().all()


@pytest.mark.parametrize("target", [-1, 3, IGNORE_INDEX, 2**40])
def test_a_target_out_of_range_is_nan(target):
    _, stats, gradient = cross_entropy_rows(torch.zeros(2, 3), torch.tensor([target, 1]))
    assert stats.loss.isnan().tolist() == [True, False]
    assert gradient.isnan().all(1).tolist() == [True, False]
    assert not stats.correct[0]


def test_the_head_reference_is_the_rows_reference_through_the_chain_rule():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([3, IGNORE_INDEX, 0, 10, IGNORE_INDEX, 5, 5, 1, 2])
    weights = torch.rand(9, generator=generator, dtype=torch.float64)
    loss, stats, grad_hidden, grad_head = linear_cross_entropy_reference(hidden, head, targets, weights)
    expected = (
        F.cross_entropy(hidden @ head.T, targets, reduction="none", ignore_index=IGNORE_INDEX) * weights
    ).sum()
    expected.backward()
    assert stats.loss.shape == (7,)
    torch.testing.assert_close(loss, expected.detach(), rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(grad_hidden, hidden.grad, rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(grad_head, head.grad, rtol=ROUNDING, atol=ROUNDING)
