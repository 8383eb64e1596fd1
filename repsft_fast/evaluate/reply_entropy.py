"""The entropy of replies whose engine does not say it: one teacher-forced pass over prompt and reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from repsft_fast.data.packing import TOGETHER, Apart
from repsft_fast.data.sample import Sample
from repsft_fast.data.store import TokenStore
from repsft_fast.distributed import World
from repsft_fast.evaluate.teacher_forced import TeacherForced


def reply_entropies(
    model: Any,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    row_tokens: int,
    world: World,
    packed: bool = True,
) -> list[float | None]:
    """Mean over each reply's tokens of the entropy of the model's own distribution (nats), given all before
    it; None for an empty reply, or numbers that are not finite.

    texts: (prompt, reply) as token ids. row_tokens: of the rows they are packed into; the longest text has a
    row whatever it is. 2·N·H·V FLOPs in the head for N reply tokens. All ranks call it with the same texts,
    and each passes its share.
    """
    told = [number for number, (_, reply) in enumerate(texts) if reply]
    found: list[float | None] = [None] * len(texts)
    if not told:
        return found
    samples = [
        Sample([*texts[i][0], *texts[i][1]], [False] * len(texts[i][0]) + [True] * len(texts[i][1]))
        for i in told
    ]
    device = next(model.parameters()).device
    longest = max(sample.positions for sample in samples)
    scorer = TeacherForced(
        TokenStore(samples, device),
        range(len(samples)),
        row_tokens=max(row_tokens, longest) if packed else longest,
        bucket_tokens=1,
        world=world,
        apart=TOGETHER if packed else Apart(alone_above=0),
    )
    # Compiled layers (static shapes) would be compiled anew for every length.
    with torch.compiler.set_stance("force_eager"):
        means = scorer(model).stats.mean("entropy").tolist()
    for number, mean in zip(told, means, strict=True):
        found[number] = mean if mean == mean else None
    return found
