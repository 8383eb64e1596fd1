"""The next token of every reply: the most likely, or one drawn.

A draw is the inverse of the cumulative distribution at a number that follows from (seed, draw, step) alone.
It is cumulated in the order of the vocabulary, so that probabilities that change places by rounding change no
reply.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from repsft_fast.seeded import key_of, words

CANDIDATES = 256  # most likely tokens that are looked at first: seldom has a nucleus more


def uniforms(seed: int, draw: int, count: int) -> np.ndarray:
    """[count] float64 in [0, 1), number `step` of it for token `step` of this reply. seed: sampling.seed plus
    the prompt's number. A longer count begins with the same numbers."""
    return (words(key_of("reply", seed, draw), count) >> np.uint64(12)) * 2.0**-52


def entropies(logits: Tensor) -> Tensor:
    """[B] nats of logits [B, V], fp32 or fp64; a token that cannot come (-inf) adds nothing. NaN where a
    logit is NaN or +inf."""
    return torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)


def choose(logits: Tensor, temperature: float, top_p: float, uniform: Tensor) -> Tensor:
    """[B] int64 tokens of logits [B, V], fp32 or fp64, finite or -inf.

    temperature 0: the most likely, the first of equals. Else one of the smallest set of most likely tokens
    whose probability under logits / temperature is at least top_p (of equals the first), at uniform [B]
    float64 in [0, 1).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    mass = (logits / temperature).softmax(dim=-1)
    ids = None
    if top_p < 1:
        ids, mass = _nucleus(mass, top_p, min(CANDIDATES, mass.shape[-1]))
    cumulated = mass.double().cumsum(dim=-1)
    # What has no mass is never the first whose cumulated mass is larger; there is none where logits are NaN.
    place = (cumulated <= uniform[:, None] * cumulated[:, -1:]).sum(dim=-1).clamp(max=mass.shape[-1] - 1)
    return place if ids is None else ids.gather(-1, place[:, None])[:, 0]


def _nucleus(probabilities: Tensor, top_p: float, count: int) -> tuple[Tensor, Tensor]:
    """Ids of so many tokens a row, or of all, ascending, and their probabilities, 0 outside the nucleus."""
    if count < probabilities.shape[-1]:
        mass, ids = probabilities.topk(count)
        # Which of equals are among the candidates is not known: the nucleus must end before the last of them.
        sure = torch.where(mass > mass[:, -1:], mass, 0).sum(dim=-1, dtype=torch.float64)
        if bool((sure < top_p).any()):
            return _nucleus(probabilities, top_p, probabilities.shape[-1])
        ids, order = ids.sort(dim=-1)
        mass, order = mass.gather(-1, order).sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(-1, order)
    else:
        mass, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    before = mass.double().cumsum(dim=-1) - mass
    mass = torch.where(before < top_p, mass, 0)
    ids, order = ids.sort(dim=-1)
    return ids, mass.gather(-1, order)
