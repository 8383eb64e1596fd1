"""Does an engine hold the weights it is thought to hold? The log-probabilities of fixed prompts, its own and
ours, side by side.

Engines were seen to generate from base weights without a word (TRL #5312, #5313, #5355): every one is asked
before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repsft_fast import seeded
from repsft_fast.errors import ModelError, describe
from repsft_fast.evaluate.untouched import left_as_it_was
from repsft_fast.row import IGNORE_INDEX, Row

PROMPTS, PROMPT_TOKENS = 8, 16
PROBED_TOKENS = 8  # generated after each prompt in this process, so that cached keys are read too


@dataclass(frozen=True)
class Bound:
    """How far log-probabilities may lie apart, in nats a token."""

    drift: float  # of the mean difference: rounding cancels in it, training does not
    scatter: float  # of the mean absolute difference: other weights of the same likelihood show here


EXACT, ROUNDED = Bound(1e-3, 1e-3), Bound(0.05, 0.2)


@dataclass(frozen=True)
class Scored:
    """Tokens and what an engine makes of the last of them."""

    ids: tuple[int, ...]  # a prompt, and what was generated after it, if anything
    logprobs: tuple[float, ...]  # of the last len(logprobs) of ids, each given all before it; nats


def probe_prompts(vocabulary: int, avoid: Collection[int] = ()) -> list[tuple[int, ...]]:
    """PROMPTS prompts of PROMPT_TOKENS ids below `vocabulary`, the same for every engine and machine.

    avoid: special ids, which an engine may treat apart. ValueError where fewer than two ids are left.
    """
    allowed = [i for i in range(vocabulary) if i not in set(avoid)]
    if len(allowed) < 2:
        raise ValueError(f"vocabulary: expected at least two ids that are not special, got {len(allowed)}")
    drawn = seeded.words(seeded.key_of("identity probe"), PROMPTS * PROMPT_TOKENS)
    ids = [allowed[int(word) % len(allowed)] for word in drawn]
    return [tuple(ids[n * PROMPT_TOKENS : (n + 1) * PROMPT_TOKENS]) for n in range(PROMPTS)]


@torch.no_grad()
def own_logprobs(
    model: Any, texts: Sequence[Sequence[int]], last: int | None = None
) -> list[tuple[float, ...]]:
    """Log-probabilities (nats) of the last `last` tokens of every text, None = all but the first, by
    `model.loss` as training computes it. The model is left as it was."""
    device = next(model.parameters()).device
    found = []
    with left_as_it_was(model), torch.compiler.set_stance("force_eager"):
        model.eval()
        for text in texts:
            _, stats = model.loss(_row(text, len(text) - 1 if last is None else last, device))
            found.append(tuple((-stats.loss.double()).tolist()))
    return found


def check_identity(
    engine: str, got: Sequence[Scored], own: Sequence[Sequence[float]], bound: Bound
) -> tuple[float, float]:
    """(drift, scatter), nats a token. ModelError with the numbers of both sides where either is above its
    bound, where one is not finite, or where nothing was compared."""
    pairs = [
        pair for text, ours in zip(got, own, strict=True) for pair in zip(text.logprobs, ours, strict=True)
    ]
    where = f"engine {engine}"
    if not pairs:
        raise ModelError(
            describe(where, "gave no log-probabilities for the probe", todo="use another engine")
        )
    theirs, ours = (math.fsum(side) / len(pairs) for side in zip(*pairs, strict=True))
    drift, scatter = abs(theirs - ours), math.fsum(abs(a - b) for a, b in pairs) / len(pairs)
    if not (drift <= bound.drift and scatter <= bound.scatter):  # NaN is above
        wrong = (
            f"does not compute with this model's weights: over {len(pairs)} fixed tokens the log-probability"
        )
        wrong += (
            f" is {theirs:.5f} there and {ours:.5f} here, the mean difference of a token {scatter:.3g} nats"
        )
        expected = f"at most {bound.drift:g} apart, and {bound.scatter:g} a token"
        todo = "save the model again and start the engine on that folder, or use another engine"
        raise ModelError(describe(where, wrong, expected=expected, todo=todo))
    return drift, scatter


def check_engine(engine: Any, model: Any, avoid: Collection[int] = ()) -> tuple[float, float]:
    """`check_identity` of an engine that answers `probe(prompts)`, on the weights of `model`."""
    got = engine.probe(probe_prompts(model.get_input_embeddings().weight.shape[0], avoid))
    own = own_logprobs(model, [text.ids for text in got], len(got[0].logprobs))
    return check_identity(engine.name, got, own, bound_of(model))


def bound_of(model: nn.Module) -> Bound:
    """Of the type it computes in."""
    dtype = getattr(model, "compute_dtype", None) or next(model.parameters()).dtype
    return EXACT if dtype in (torch.float32, torch.float64) else ROUNDED


def _row(ids: Sequence[int], scored: int, device: torch.device) -> Row:
    """One document whose last `scored` tokens are targets."""
    length = len(ids) - 1
    places = torch.arange(length, device=device)
    trained = places[length - scored :]
    targets = torch.tensor(ids[1:], dtype=torch.int64, device=device)
    targets[: length - scored] = IGNORE_INDEX
    weights = (targets != IGNORE_INDEX).float()
    nothing: Tensor = torch.zeros_like(trained)
    return Row(
        tokens=torch.tensor([ids[:-1]], dtype=torch.int64, device=device),
        positions=places[None],
        targets=targets,
        weights=weights,
        trained_positions=trained,
        position_tasks=nothing,
        position_segments=nothing,
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32, device=device),
        segment_lengths=(length,),
        max_seqlen=length,
        samples=(0,),
        real_tokens=length,
    )
