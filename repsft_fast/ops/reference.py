"""Cross entropy of rows of logits, its statistics and its gradient in plain torch: the truth the other paths
are held to.

With M' = max over j ≠ t and S' = Σ_{j ≠ t} exp(x_j − M') the *others* of the target t weigh exp(L'), L' = M'
+ log S'. Everything follows from d = L' − x_t and from q, the softmax over the others alone:

    1 − p_t = sigmoid(d)            loss = log1p(exp(d))           log10(1 − p_t) = log sigmoid(d) / log 10
    ∂loss/∂x_t = −(1 − p_t)         ∂loss/∂x_j = (1 − p_t)·q_j      entropy = H₂(p_t) + (1 − p_t)·H(q)

No step subtracts two numbers near 1, so a memorised token (p_t → 1) keeps its full relative precision, and
the L1 norm of a row's gradient is exactly 2·(1 − p_t).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from repsft_fast.row import IGNORE_INDEX
from repsft_fast.stats import PositionStats


def cross_entropy_rows(
    logits: Tensor,  # [N, V] fp32 or fp64
    targets: Tensor,  # [N] int64; outside 0 … V-1 = NaN loss and NaN gradient
    weights: Tensor | None = None,  # [N]; None = 1
    *,
    softcap: float | None = None,  # logits become softcap · tanh(logits / softcap)
) -> tuple[Tensor, PositionStats, Tensor]:
    """[] Σ weight · loss, row statistics, and the [N, V] gradient of the sum with respect to the logits.

    Keeps several [N, V] tensors: for tests and small inputs.
    """
    # The target is set apart first: everything below is the others' softmax and its distance from them.
    n, vocabulary = logits.shape
    x = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    inside = (targets >= 0) & (targets < vocabulary)
    at = targets.clamp(0, vocabulary - 1)[:, None]
    target_logit = x.gather(1, at)[:, 0].masked_fill(~inside, math.nan)

    # d keeps its relative precision where the target's probability is 1 but for 1e-30.
    others = x.scatter(1, at, -math.inf)
    best, _ = others.max(dim=1)
    shift = best.masked_fill(best == -math.inf, 0.0)  # no other has any mass: keep −inf − (−inf) out
    exponentials = torch.exp(others - shift[:, None])
    total = exponentials.sum(dim=1)
    d = shift + torch.log(total) - target_logit
    d = d.masked_fill(target_logit == math.inf, math.nan)  # inf − inf, as in torch
    miss = torch.sigmoid(d)
    log_miss = F.logsigmoid(d)
    loss = -F.logsigmoid(-d)
    q = exponentials / total.clamp_min(torch.finfo(x.dtype).tiny)[:, None]

    # Each term is kept from being 0 · ∞; what is NaN in the loss is NaN in the entropy.
    x_log_x = torch.where(q > 0, q * (others - shift[:, None] - torch.log(total)[:, None]), 0.0)
    hit_term = torch.where(loss.isfinite(), torch.exp(-loss) * loss, 0.0)
    miss_term = torch.where(log_miss > -math.inf, miss * (log_miss + x_log_x.sum(dim=1)), 0.0)
    top = x.topk(min(2, vocabulary), dim=1).values
    stats = PositionStats(
        loss=loss,
        correct=(x.argmax(dim=1) == targets) & ~loss.isnan(),
        entropy=(hit_term - miss_term).masked_fill(loss.isnan(), math.nan),
        top1_probability=torch.softmax(x, dim=1).amax(dim=1),
        margin=top[:, 0] - top[:, -1],
        log10_miss=log_miss / math.log(10),
    )

    # By parts of d, not as softmax minus one-hot, which subtracts two numbers near 1.
    weights = torch.ones(n, dtype=x.dtype, device=x.device) if weights is None else weights.to(x.dtype)
    gradient = (weights * miss)[:, None] * q.scatter(1, at, -1.0)
    if softcap is not None:
        gradient = gradient * (1 - (x / softcap).square())
    return (weights * loss).sum(), stats, gradient


def linear_cross_entropy_reference(
    hidden: Tensor,  # [N, H]
    lm_head: Tensor,  # [V, H] same dtype
    targets: Tensor,  # [N] int64; IGNORE_INDEX = not trained on
    weights: Tensor | None = None,  # [N]
    rows: Tensor | None = None,  # [N'] int64; a row named twice counts twice
    *,
    softcap: float | None = None,
) -> tuple[Tensor, PositionStats, Tensor, Tensor]:  # weighted sum, statistics, [N, H] and [V, H] gradients
    """The fused head with full logits, in the dtype of `hidden`: what tests compare with, in float64."""
    rows = torch.nonzero(targets != IGNORE_INDEX)[:, 0] if rows is None else rows
    chosen = hidden.detach()[rows]
    head = lm_head.detach()
    row_weights = None if weights is None else weights[rows]
    loss, stats, gradient = cross_entropy_rows(chosen @ head.T, targets[rows], row_weights, softcap=softcap)
    grad_hidden = torch.zeros_like(hidden).index_add(0, rows, gradient @ head)
    return loss, stats, grad_hidden, gradient.T @ chosen
