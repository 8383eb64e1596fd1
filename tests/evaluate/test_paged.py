"""The attention of continuous batching beside the plain one: each request sees its own keys, the last query all
of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers

from repsft_fast.errors import ModelError
from repsft_fast.evaluate.continuous import is_known
from repsft_fast.evaluate.paged import paged_attention


def test_the_releases_that_hand_the_cache_over_so_are_known():
    """Read from their sources: 5.17 does it otherwise, 5.19 to 5.23 so."""
    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    assert release == (5, 18) or is_known() == (release > (5, 18))


class Cache:
    """Keys and values as they are to be read."""

    def __init__(self, keys, values):
        self.held = keys, values

    def update(self, key_states, value_states, layer_idx, kwargs):
        return self.held


def call(query, keys, values, new, seen, **changes):
    module = torch.nn.Module()
    module.layer_idx = 0
    borders = [torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) for lengths in (new, seen)]
    given = {"cu_seq_lens_q": borders[0], "cu_seq_lens_k": borders[1], "max_length_q": max(new), **changes}
    mask = given.pop("attention_mask", None)
    cache = given.pop("cache", Cache(keys, values))
    return paged_attention(module, query, query, query, mask, cache=cache, max_length_k=max(seen), **given)[0]


def inputs(new, seen, heads=4, kept=2):
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads, sum(new), 8, generator=draw, dtype=torch.float64)
    keys, values = (torch.randn(1, kept, sum(seen), 8, generator=draw, dtype=torch.float64) for _ in range(2))
    return query, keys, values


@pytest.mark.parametrize(
    ("new", "seen"), [([3], [3]), ([1], [7]), ([3], [9]), ([1, 4, 2, 1], [5, 4, 6, 1])], ids=str
)
def test_each_request_is_computed_as_it_would_be_alone(new, seen):
    query, keys, values = inputs(new, seen)
    got = call(query, keys, values, new, seen)
    q0 = k0 = 0
    for n, m in zip(new, seen, strict=True):
        q, k, v = query[:, :, q0 : q0 + n], keys[:, :, k0 : k0 + m], values[:, :, k0 : k0 + m]
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        visible = torch.arange(m)[None] <= torch.arange(m - n, m)[:, None]
        wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2)
        torch.testing.assert_close(got[:, q0 : q0 + n], wanted, rtol=1e-12, atol=1e-12)
        q0, k0 = q0 + n, k0 + m
    assert (q0, k0) == (got.shape[1], keys.shape[2])  # all of it was looked at


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 4},
        {"softcap": 30.0},
        {"s_aux": torch.zeros(4)},
        {"position_bias": torch.zeros(1)},
        {"dropout": 0.1},
        {"cache": None},
        {"attention_mask": torch.zeros(1, 1, 3, 3)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_it_does_not_compute_is_refused(change):
    with pytest.raises(ModelError, match="engine batching: Module asks for what"):
        call(*inputs([3], [3]), [3], [3], **change)


@pytest.mark.gpu
def test_the_gpus_kernel_sees_what_the_loop_sees():
    """With the empty requests that padding leaves at the end, and bounds above the longest."""
    new, seen = [1, 4, 200, 1], [5, 4, 260, 700]
    query, keys, values = (x.to("cuda", torch.bfloat16) for x in inputs(new, seen))
    wanted = call(*(x.double().cpu() for x in (query, keys, values)), new, seen)
    query, keys, values = (F.pad(x, (0, 56)) for x in (query, keys, values))  # a width that the kernel takes
    borders = [torch.tensor([0, *n, 0, 0]).cumsum(0).to("cuda", torch.int32) for n in (new, seen)]
    got = call(
        query, keys, values, new, seen, cu_seq_lens_q=borders[0], cu_seq_lens_k=borders[1], scaling=8**-0.5
    )
    torch.testing.assert_close(got[..., :8].double().cpu(), wanted, rtol=0.02, atol=0.02)
