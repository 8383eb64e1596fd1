"""Batched greedy generation: a few answers to look at, and exact match for tasks whose reply holds a rationale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Generation:
    """One reply. `finished` = it ended by itself, not by the length limit (paper A's termination)."""

    ids: list[int]  # generated tokens, the end token included when it came
    finished: bool


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    end_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int = 16,
    pad_id: int = 0,
) -> list[Generation]:
    """Greedy replies to token-id prompts, longest prompts first so that a batch wastes little padding.

    Under FSDP every rank must call it with the same prompts. Raises ValueError on an empty prompt. A model that learned its
    positions one by one (`model.position_limit`) replies no further than they go.
    """
    if any(len(p) == 0 for p in prompts):
        raise ValueError("prompts: expected at least one token in each, got an empty prompt")
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    replies: list[Generation | None] = [None] * len(prompts)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            longest = max(len(prompts[i]) for i in batch)
            ids = torch.full((len(batch), longest), pad_id, dtype=torch.int64)
            mask = torch.zeros(len(batch), longest, dtype=torch.int64)
            for line, i in enumerate(batch):
                prompt = torch.as_tensor(list(prompts[i]), dtype=torch.int64)
                ids[line, longest - len(prompt) :] = prompt
                mask[line, longest - len(prompt) :] = 1
            limit = getattr(model, "position_limit", None)
            new_tokens = max_new_tokens if limit is None else min(max_new_tokens, limit - longest)
            if new_tokens < 1:
                for i in batch:
                    replies[i] = Generation([], False)
                continue
            # Every new token is another length: compiled layers (static shapes) would be compiled anew for each of them.
            with torch.compiler.set_stance("force_eager"):
                out: Any = model.generate(  # type: ignore[operator]
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    do_sample=False,
                    num_beams=1,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    max_new_tokens=new_tokens,
                    eos_token_id=list(end_ids) or None,
                    pad_token_id=pad_id,
                    synced_gpus=False,
                )
            for line, i in enumerate(batch):
                replies[i] = _until_end(out[line, longest:].tolist(), end_ids)
    finally:
        model.train(was_training)
    return [reply for reply in replies if reply is not None]


def _until_end(ids: list[int], end_ids: Sequence[int]) -> Generation:
    for position, token in enumerate(ids):
        if token in end_ids:
            return Generation(ids[: position + 1], True)
    return Generation(ids, False)
