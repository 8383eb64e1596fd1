"""Batched greedy generation: a few answers to look at, and exact match for tasks whose reply holds a
rationale."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from repsft_fast.distributed import all_sum
from repsft_fast.evaluate.asked import Generation

# How far padding may move logits, in their own spread: rounding in fp32, and in half precision. Too strict
# costs time alone.
EXACT, ROUNDED = 1e-3, 0.05
PADDED = 5  # tokens of padding it is tried with


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

    Under FSDP every rank must call it with the same prompts. Raises ValueError on an empty prompt. A model
    that learned its positions one by one (`model.position_limit`) replies no further than they go. Where
    padding would change replies, a batch holds prompts of one length.
    """
    if any(len(p) == 0 for p in prompts):
        raise ValueError("prompts: expected at least one token in each, got an empty prompt")
    # Replies come back in the order asked, whatever order wastes least.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    replies: list[Generation | None] = [None] * len(prompts)
    limit = getattr(model, "position_limit", None)

    # Training goes on after this, in the mode it was in, also where a batch fails.
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(model, prompts, order, batch_size, pad_id):
            longest = max(len(prompts[i]) for i in batch)
            new_tokens = max_new_tokens if limit is None else min(max_new_tokens, limit - longest)
            if new_tokens < 1:
                found = [Generation([], False) for _ in batch]
            else:
                padded = _padded([prompts[i] for i in batch], pad_id)
                found = _generate_batch(model, *padded, end_ids, new_tokens, pad_id)
            for i, reply in zip(batch, found, strict=True):
                replies[i] = reply
    finally:
        model.train(was_training)
    return [reply for reply in replies if reply is not None]


def _padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, longest] int64 ids and mask, padded on the left, since replies go on at the right."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for line, prompt in enumerate(prompts):
        ids[line, longest - len(prompt) :] = torch.as_tensor(list(prompt), dtype=torch.int64)
        mask[line, longest - len(prompt) :] = 1
    return ids, mask


def _generate_batch(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    end_ids: Sequence[int],
    new_tokens: int,
    pad_id: int,
) -> list[Generation]:
    device = next(model.parameters()).device
    # Every new token is another length: compiled layers (static shapes) would be compiled anew for each.
    with torch.compiler.set_stance("force_eager"):
        out = model.generate(
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
    return [_until_end(line.tolist(), end_ids) for line in out[:, ids.shape[1] :]]


def _batches(
    model: nn.Module, prompts: Sequence[Sequence[int]], order: list[int], batch_size: int, pad_id: int
) -> Iterator[list[int]]:
    """`order` cut into batches."""
    lengths = [len(prompts[i]) for i in order]
    alike = (
        batch_size > 1
        and len(set(lengths)) > 1
        and _padding_changes(model, prompts[order[-1]], lengths[0] - lengths[-1], pad_id)
    )
    start = 0
    while start < len(order):
        stop = min(start + batch_size, len(order))
        while alike and lengths[stop - 1] != lengths[start]:
            stop -= 1
        yield order[start:stop]
        start = stop


def _padding_changes(model: Any, prompt: Sequence[int], most: int, pad_id: int) -> bool:
    """Whether this model replies otherwise behind padding: its rotary frequencies follow the length of the
    batch, or its layers carry a state on from token to token whatever the mask says (RWKV). The latter is
    tried with one new token."""
    text = model.config.get_text_config()
    rope = str(getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None))
    if "longrope" in rope or "dynamic" in rope:
        return True
    device = next(model.parameters()).device
    found = []
    for padding in (0, min(PADDED, most)):
        ids = torch.tensor([[pad_id] * padding + list(prompt)], device=device)
        mask = torch.ones_like(ids)
        mask[:, :padding] = 0
        with torch.compiler.set_stance("force_eager"):
            out = model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=1,
                pad_token_id=pad_id, output_logits=True, return_dict_in_generate=True, synced_gpus=False,
            )  # fmt: skip
        found.append(out.logits[0].double())
    alone, padded = found
    allowed = EXACT if next(model.parameters()).dtype in (torch.float32, torch.float64) else ROUNDED
    changed = not bool((alone - padded).abs().max() < allowed * alone.std())
    return bool(all_sum(torch.tensor([int(changed)])).item())  # all ranks make the same batches


def _until_end(ids: list[int], end_ids: Sequence[int]) -> Generation:
    for position, token in enumerate(ids):
        if token in end_ids:
            return Generation(ids[: position + 1], True)
    return Generation(ids, False)
