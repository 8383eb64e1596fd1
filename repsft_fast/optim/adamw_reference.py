"""AdamW in plain torch, operation by operation as `csrc_triton/adamw.py` computes it: the truth of its tests.

Per element, with the gradient g, t updates of this parameter done, and b1, b2 the betas:

    g ← clip·g                       m ← m + (1 − b1)·(g − m)     v ← b2·v + (1 − b2)·g²
    w ← w − lr·decay·w               w ← w − lr / (1 − b1ᵗ) · m / (√v / √(1 − b2ᵗ) + eps)

in fp32, every operation rounded by itself. The powers are made by squaring in fp64 and corrections rounded
to fp32 once: `pow` and `expm1` differ between devices in their last bit, products do not. m is in the form
that torch takes: b1 and 1 − b1 in fp32 do not add up to 1, and b1·m + (1 − b1)·g errs 2.5 times as much after
20 updates. Where w is a master, the model's bf16 weight is w rounded to the nearest, ties to even. A bf16
weight without a master has moments in bf16, rounded likewise after the update has used them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_NAN = 0x7FC00000  # every NaN is stored as this one
_COUNT_BITS = 25  # an fp32 counts to 2²⁴


@dataclass(frozen=True)
class Scalars:
    """What every element of an update shares. Tensors are [] fp32, 0 or 1 the veto; 1 = nothing changes."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip: Tensor
    veto: Tensor


def power(base: float, exponent: Tensor) -> Tensor:
    """base^exponent as fp64 by squaring. exponent: int32 ≥ 0."""
    result = torch.ones(exponent.shape, dtype=torch.float64, device=exponent.device)
    square = torch.full_like(result, base)
    for bit in range(_COUNT_BITS):
        result = torch.where(((exponent >> bit) & 1) == 1, result * square, result)
        square = square * square
    return result


def corrections(beta1: float, beta2: float, count: Tensor) -> tuple[Tensor, Tensor]:
    """1 / (1 - beta1^t) and 1 / √(1 - beta2^t), fp32. count: fp32 ≥ 0; at 0 (a first update vetoed) any
    finite number."""
    exponent = count.to(torch.int32).clamp(min=1)
    first = 1.0 / (1.0 - power(beta1, exponent))
    second = 1.0 / (1.0 - power(beta2, exponent)).sqrt()
    return first.float(), second.float()


def nearest_bf16(value: Tensor) -> Tensor:
    """fp32 → bf16, ties to even, every NaN the same one."""
    bits = value.view(torch.int32)
    bits = bits + 0x7FFF + ((bits >> 16) & 1)
    bits = torch.where(value.isnan(), _NAN, bits)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def update_(
    weight: Tensor,  # fp32 | bf16, changed in place: the master where there is one
    grad: Tensor,  # fp32 | bf16, of any shape that the weight has
    exp_avg: Tensor,  # in the weight's dtype, changed in place
    exp_avg_sq: Tensor,
    count: Tensor,  # [] fp32, updates made, changed in place
    s: Scalars,
    copy: Tensor | None = None,  # bf16, changed in place: the weight that a master is of
) -> None:
    """One parameter's update, its count included. Peak extra memory: a few fp32 tensors of its size."""
    count += (s.veto == 0).float()
    correction1, correction2 = corrections(s.beta1, s.beta2, count)
    lr = torch.tensor(s.lr, dtype=torch.float32, device=count.device)
    decay = lr * torch.tensor(s.weight_decay, dtype=torch.float32, device=count.device)
    g = grad.float() * s.clip
    m = exp_avg.float()
    m = m + (1 - s.beta1) * (g - m)
    v = s.beta2 * exp_avg_sq.float() + (1 - s.beta2) * (g * g)
    w = weight.float()
    w = w - decay * w
    root = v.double().sqrt().float()  # correctly rounded; torch's fp32 sqrt on CPU can be one unit off
    w = w - (lr * correction1) * (m / (root * correction2 + s.eps))
    # A vetoed update writes what is there already: asking whether it is vetoed would be a host read.
    keep = s.veto != 0
    for old, value in ((weight, w), (exp_avg, m), (exp_avg_sq, v), *([] if copy is None else [(copy, w)])):
        rounded = nearest_bf16(value) if old.dtype == torch.bfloat16 else value
        old.copy_(torch.where(keep, old, rounded))
