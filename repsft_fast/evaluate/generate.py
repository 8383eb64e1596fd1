"""Greedy replies at once: a few answers to look at, and exact match of replies that hold a rationale."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from repsft_fast.evaluate.asked import Generation, Request, Sampling
from repsft_fast.evaluate.decode import Loop


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    end_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int = 16,
    pad_id: int = 0,
) -> list[Generation]:
    """Greedy replies to token-id prompts, in their order: `decode.Loop`, with its errors."""
    requests = [Request(number, 0, tuple(map(int, prompt))) for number, prompt in enumerate(prompts)]
    found: dict[int, Generation] = {}
    Loop(model, batch_size=batch_size, pad_id=pad_id).generate(
        requests,
        Sampling(max_new_tokens=max_new_tokens),
        end_ids=end_ids,
        on_reply=lambda request, reply: found.update({request.prompt: reply}),
    )
    return [found[number] for number in range(len(prompts))]
