"""What fills a row behind its samples must not be able to make a NaN."""

import numpy as np
import pytest
import torch
from torch import nn

from repsft_fast.data.plan import PlannedRow
from repsft_fast.data.sample import Sample
from repsft_fast.data.store import TokenStore
from repsft_fast.row import IGNORE_INDEX


def store(first: int = 5) -> TokenStore:
    samples = [Sample([first, 6, 7], [False, True, True]), Sample([9, 8, 7, 6], [False, False, True, True])]
    return TokenStore(samples, "cpu")


def row(tokens: TokenStore, ids: list[int], slots: int):
    real = int(tokens.index.lengths[ids].sum())
    return tokens.row(
        PlannedRow(np.array(ids, dtype=np.int64), real, slots), denominator=1.0, average="sample"
    )


@pytest.mark.parametrize("ids", [[0], [1], [1, 0], []])
@pytest.mark.parametrize("resident", [False, True])
def test_padding_is_a_token_of_the_data_that_is_not_trained(ids, resident):
    tokens = store()
    if resident:
        tokens._resident = tokens._upload()
    made = row(tokens, ids, 9)
    real = made.real_tokens
    assert made.tokens[0, real:].tolist() == [5] * (9 - real)
    assert made.targets[real:].tolist() == [IGNORE_INDEX] * (9 - real)
    assert not made.weights[real:].any()
    assert not made.positions[0, real:].any(), (
        "they would run past learned positions, and choose a RoPE's frequencies"
    )


@pytest.mark.parametrize("ids", [[0, 1], []])
def test_an_embedding_of_zeros_and_a_norm_without_epsilon(ids):
    """The padding token's embedding is zero, and the root of its mean square has no derivative there (Gemma
    3n)."""
    torch.manual_seed(0)
    embedding = nn.Embedding(12, 4, padding_idx=0)
    made = row(store(), ids, 9)
    x = embedding(made.tokens[0])
    normed = x / x.square().mean(-1, keepdim=True).sqrt()
    (normed.sum(-1) * made.weights).sum().backward()
    assert embedding.weight.grad.isfinite().all()
    assert bool(embedding.weight.grad.any()) == bool(ids)
