"""Attention scores with what SDPA does not know by itself: windows, soft-caps and attention sinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repsft_fast.errors import ModelError, describe


@dataclass(frozen=True)
class Rule:
    """How one layer weighs the keys it may see."""

    scale: float
    window: int | None = None  # keys seen, the query's own included; None = all before it
    softcap: float | None = None
    dropout: float = 0.0
    sinks: Tensor | None = None  # [A] score of each head's sink, not scaled and not capped


def refuse(backend: str, **unsupported: float | None) -> None:
    for name, value in unsupported.items():
        if value:
            wrong = f"{backend} does not compute attention with {name} {value}"
            raise ModelError(describe("model.attention", wrong, todo="choose sdpa"))


def refuse_sinks(backend: str, rule: Rule) -> None:
    """Whatever the package: one that takes sinks is not known to give their gradient."""
    if rule.sinks is not None:
        wrong = f"{backend} does not compute attention sinks (s_aux)"
        raise ModelError(
            describe("model.attention", wrong, expected="auto, sdpa, segments or mask", todo="choose auto")
        )


# [A] in the type of the scores
def sinks_of(module: nn.Module, sinks: Tensor | None, query: Tensor) -> Tensor | None:
    """ModelError where they are not one number a head, which a broadcast would take for something else."""
    if sinks is None:
        return None
    heads = query.shape[1]
    if sinks.numel() != heads:
        wrong = f"{type(module).__name__} passes attention sinks (s_aux) of another shape"
        raise ModelError(
            describe("attention", wrong, expected=f"({heads},), one for each head", got=tuple(sinks.shape))
        )
    return sinks.reshape(heads).to(query.dtype)


# [B, A, T, D_v]
def unpacked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule, *, causal: bool) -> Tensor:
    """Sinks and soft-caps for plain forward calls and generation, B sequences and a cache, under
    transformers' own mask [B, 1, T, T_kv]; None = causal, windows being in the mask, or everything for a
    single query or without `causal`.
    """
    if mask is None:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        mask = seen.tril() if causal and q.shape[2] > 1 else seen
    return masked(q, k, v, mask, rule)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: Rule) -> Tensor:
    return sdpa(q, k, v, mask, rule) if rule.softcap is None else _capped(q, k, v, mask, rule, rule.softcap)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
    """Causal when there is no mask.

    With sinks: one more key of zeros, whose score a bias makes the head's sink, and one more value of zeros.
    The bias [1, A, n, n + 1] is held for the backward, with its gradient: 4·A·n² bytes in half precision, of
    the longest segment (row, by mask), a layer at a time under activation checkpointing.
    """
    if rule.sinks is not None:
        mask = _sink_bias(rule.sinks, band(q.shape[2], None, q.device) if mask is None else mask)
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    options: dict[str, Any] = {
        "scale": rule.scale,
        "dropout_p": rule.dropout,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, **options)


def _sink_bias(sinks: Tensor, mask: Tensor) -> Tensor:  # [A], [(B, 1,) n, m] bool or added → [B, A, n, m + 1]
    """Added to the scores: 0 where a key is seen, −inf where not, the head's sink in the last column."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=sinks.dtype).masked_fill(~mask, float("-inf"))
    batch = mask.shape[0] if mask.ndim == 4 else 1
    length, keys = mask.shape[-2:]
    column = sinks[:, None, None].expand(batch, len(sinks), length, 1)
    return torch.cat([mask.to(sinks.dtype).expand(batch, len(sinks), length, keys), column], dim=-1)


def band(length: int, window: int | None, device: torch.device) -> Tensor:  # [T, T] bool
    """Key j is seen by query i: j ≤ i, and i − j < window where there is one."""
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: Rule, cap: float) -> Tensor:
    """Scores squashed to cap · tanh(score / cap) (Gemma 2), which no SDPA kernel computes."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.tanh((q @ k.transpose(-1, -2)) * (rule.scale / cap)) * cap
    # not -inf: padding sees nothing, and NaN there would be what the next layer's values are multiplied by 0
    lowest = torch.finfo(scores.dtype).min
    scores = torch.where(mask, scores, lowest) if mask.dtype == torch.bool else scores + mask
    if rule.sinks is not None:
        scores = torch.cat([scores, rule.sinks[:, None, None].expand(*scores.shape[:-1], 1)], dim=-1)
    probabilities = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32))[
        ..., : k.shape[2]
    ]
    return F.dropout(probabilities.to(q.dtype), rule.dropout) @ v
