"""What a run will hold, told before it is spent: from shapes (`memory.model_size`) and what a row keeps
(`memory.activations`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from repsft_fast.config import Config
from repsft_fast.distributed import World
from repsft_fast.memory.activations import Saved, saved_per_token
from repsft_fast.memory.model_size import CHECKPOINTING, ModelSize, Peak
from repsft_fast.models.guards import first_words
from repsft_fast.ops.row_pass import default_chunk_bytes
from repsft_fast.report.format import count, size


@dataclass(frozen=True)
class Sizes:
    """A model's bytes. saved: None where they cannot be counted, and `why`."""

    model: ModelSize
    saved: Saved | None
    why: str = ""


def sizes_of(config: Config, model: Any) -> Sizes:
    """Of a model that is not sharded, on meta or any other device. Where a row's activations cannot be
    counted (layers that read numbers, as experts do; that take no packed rows) it says so and does not
    raise."""
    shape = ModelSize.of(model)
    lora = config.model.lora
    # whatever they go on from and become: as many, as wide
    chosen = {"rank", "alpha", "dropout", "target_modules"}
    adapters = None if lora is None else lora.model_dump(include=chosen)
    try:
        computed = str(model.compute_dtype).removeprefix("torch.")
        return Sizes(shape, saved_per_token(model.config, compute_dtype=computed, lora=adapters))
    except Exception as error:
        return Sizes(shape, None, first_words(error))


def shards_of(config: Config, ranks: int) -> int:
    """Ranks that share one copy of the weights."""
    return min(config.distributed.shard_ranks or ranks, ranks)


def fullest(
    config: Config,
    sizes: Sizes,
    ranks: int,
    row_tokens: int,
    *,
    chunk_bytes: int | None = None,
    kept: bool = False,
) -> Peak | None:
    """The fullest moment of an update on one of so many ranks, rows trained whole; None: not known."""
    if sizes.saved is None:
        return None
    return sizes.model.peak(
        config.optim.name,
        row_tokens,
        sizes.saved,
        config.model.activation_checkpointing,
        ranks=shards_of(config, ranks),
        kept=kept,
        chunk_bytes=chunk_bytes,
        momentum=config.optim.betas[0] > 0,
    )


def told(
    config: Config,
    sizes: Sizes,
    world: World,
    row_tokens: int,
    *,
    chunk_bytes: int | None = None,
    kept: bool = False,
) -> str:
    """One line for a rank of the world. chunk_bytes: of logits held at once; None: as the settings or shapes
    say."""
    model = sizes.model
    momentum = config.optim.betas[0] > 0
    held = model.held(config.optim.name, shards_of(config, world.size), momentum=momentum)
    masters = f", masters {size(held.masters)}" if held.masters else ""
    line = (
        f"about {size(held.state)} on a rank for {count(model.count)} parameters: weights"
        f" {size(held.weights)}{masters}, gradients {size(held.gradients)}, moments {size(held.moments)};"
        f" a snapshot {size(held.snapshot)}"
    )
    chunk = chunk_bytes or config.loss.chunk_bytes or _chunk_by_shape(model, world.device, row_tokens)
    peak = fullest(config, sizes, world.size, row_tokens, chunk_bytes=chunk, kept=kept)
    if sizes.saved is None or peak is None:
        return f"{line}; activations come on top and cannot be counted here ({sizes.why})"
    each = {name: size(int(model.row(sizes.saved, name) * row_tokens)) for name in CHECKPOINTING}
    mine = each.pop(config.model.activation_checkpointing)
    others = ", ".join(f"{name} {bytes_}" for name, bytes_ in each.items())
    positions = row_tokens * model.vocabulary * model.compute_bytes
    return (
        f"{line}; a row of {count(row_tokens)} tokens keeps {mine} (checkpointing"
        f" {config.model.activation_checkpointing}; {others}), {size(min(positions, chunk or positions))} of"
        f" logits at once; {size(peak.total)} at the fullest moment of an update, with plain layers"
    )


def _chunk_by_shape(model: ModelSize, device: torch.device, row_tokens: int) -> int | None:
    if device.type != "cpu":
        return None
    return default_chunk_bytes(row_tokens, model.vocabulary, max(4, model.compute_bytes), device)


def with_row_tokens(config: Config, row_tokens: int) -> Config:
    """The settings with a number where batch.row_tokens is auto."""
    return config.model_copy(update={"batch": config.batch.model_copy(update={"row_tokens": row_tokens})})
