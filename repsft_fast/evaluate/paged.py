"""The attention of continuous batching: the new tokens of many requests in one row, each request seeing its
own cache.

transformers takes for a flash kernel whatever attention has the word in its name: it then builds no mask,
which would grow with (new tokens) · (all cached tokens), and hands over the borders. On CUDA in half
precision the kernel is torch's own varlen attention, the one that training uses (unmeasured here: no GPU has
run it); on a CPU one SDPA a request.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from repsft_fast.errors import ModelError, describe
from repsft_fast.ops.attention import takes_grouped_heads
from repsft_fast.ops.scores import Rule, sdpa

NAME = "repsft_flash"
# What layers and the scheduler pass that leaves the scores alone, or is read here.
_UNDERSTOOD = {
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "read_index",
    "write_index",
    "logits_indices",
    "logits_processor_args",
    "block_table",
    "position_ids",
    "is_causal",
    "use_cache",
    "output_attentions",
    "output_router_logits",
}


def register() -> str:
    """Make it known to transformers. Repeatable. Returns its name."""
    AttentionInterface.register(NAME, paged_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    return NAME


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def paged_attention(
    module: nn.Module,
    query: Tensor,  # [1, A, N, D] of the new tokens of all requests
    key: Tensor,  # [1, A_kv, N, D]
    value: Tensor,  # [1, A_kv, N, D]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # [1, N, A, D]
    """What transformers calls in every layer. A request's last query sees all of its keys.

    ModelError for what would be computed wrongly: a call without the cache, and every keyword that may change
    the scores (windows, sinks, soft-caps, a bias).
    """
    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in _UNDERSTOOD)
    if cache is None or attention_mask is not None or unknown or dropout:
        wrong = f"{type(module).__name__} asks for what continuous batching does not compute"
        got = unknown or "a call without its cache"
        raise ModelError(describe("engine batching", wrong, got=got, todo="use our own loop"))
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    rule = Rule(scaling if scaling is not None else query.shape[-1] ** -0.5)
    if query.is_cuda:
        return _varlen(query, key, value, kwargs, rule).unsqueeze(0), None
    return _each(query, key, value, kwargs, rule), None


def _varlen(query: Tensor, key: Tensor, value: Tensor, borders: dict[str, Any], rule: Rule) -> Tensor:
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    groups = q.shape[1] // k.shape[1]
    options: dict[str, Any] = {}
    if groups > 1 and takes_grouped_heads(q.device):
        options["enable_gqa"] = True
    elif groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    output = varlen_attn(
        q.contiguous(), k.contiguous(), v.contiguous(), borders["cu_seq_lens_q"], borders["cu_seq_lens_k"],
        borders["max_length_q"], borders["max_length_k"],
        scale=rule.scale, window_size=(-1, 0), **options,
    )  # fmt: skip
    assert isinstance(output, Tensor)  # a tuple only when auxiliary outputs are asked for
    return output


def _each(query: Tensor, key: Tensor, value: Tensor, borders: dict[str, Any], rule: Rule) -> Tensor:
    output = torch.zeros_like(query)
    queries, keys = borders["cu_seq_lens_q"].tolist(), borders["cu_seq_lens_k"].tolist()
    for q0, q1, k0, k1 in zip(queries, queries[1:], keys, keys[1:], strict=False):
        new, seen = q1 - q0, k1 - k0
        # One query sees everything; several without a cache are plainly causal.
        mask = None if new == seen else torch.ones(new, seen, dtype=torch.bool).tril(seen - new)
        output[:, :, q0:q1] = sdpa(query[:, :, q0:q1], key[:, :, k0:k1], value[:, :, k0:k1], mask, rule)
    return output.transpose(1, 2)
