"""How long a row may get where batch.row_tokens is auto: decided once for a run, from the table of sizes and
what a GPU has free.

Longer rows are fewer passes of the same update (law 2), so the longest that fits beside the state and the
snapshots is taken, up to what an update needs and to LONGEST; and never less than the longest sample of any
split needs. The setting's default stays a
number: what is free differs from machine to machine, and rows decide how sums are rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from repsft_fast.config import Config
from repsft_fast.config.sections import ROW_TOKENS
from repsft_fast.distributed import World, broadcast_from_main, min_over_hosts
from repsft_fast.errors import ConfigError, describe
from repsft_fast.models.loss import row_limit
from repsft_fast.training.parts import Data, Parts
from repsft_fast.training.policy import device_snapshot_bytes
from repsft_fast.training.row_lengths import longest_of, plan_of
from repsft_fast.training.samples import apart_of
from repsft_fast.training.sizes import Sizes, shards_of, sizes_of

NAME, SETTING = "row_tokens", "batch.row_tokens"
LONGEST = 32_768
STEP = 128  # what the kernels of attention and products are tiled by


@dataclass(frozen=True)
class Choice:
    """Tokens of a row; why, or None where the settings say so."""

    tokens: int
    why: str | None = None


def decide(config: Config, world: World, data: Data, shape: Callable[[], Any]) -> Choice:
    """The same on every rank. All ranks call it, once the data is where it stays. shape: the model on meta,
    asked for only where something is to be decided."""
    if isinstance(config.batch.row_tokens, int):
        return Choice(config.batch.row_tokens)
    free = free_bytes(world.device)
    (room,) = min_over_hosts(world, -1 if free is None else free)
    choice = _decided(config, world, data, shape, room) if world.is_main else Choice(0)
    tokens, why = broadcast_from_main(world, [choice.tokens, choice.why])
    return Choice(tokens, why)


def _decided(config: Config, world: World, data: Data, shape: Callable[[], Any], room: int) -> Choice:
    step = STEP
    if isinstance(config.batch.bucket_tokens, int):
        step = math.lcm(STEP, config.batch.bucket_tokens)
    longest = longest_of(data)
    least = max(longest, step)
    default = _up(max(ROW_TOKENS, longest), step)
    if apart_of(config).alone_above == 0:
        return Choice(default, "every sample has a row of its own, as long as it is")
    if room < 0:
        return Choice(default, "there is no GPU whose memory could say more")
    model = shape()
    sizes = sizes_of(config, model)
    if sizes.saved is None:
        return Choice(default, f"what a row of this model takes cannot be counted ({sizes.why})")
    shards = shards_of(config, world.size)
    apart = device_snapshot_bytes(config, sizes.model, tasks=len(data.task_names), shards=shards, room=room)
    fits = _longest_that_fits(config, shards, sizes, room - apart)
    needed = _up(_most_of_an_update(config, world, data), step)
    limit = row_limit(model.config)
    beside = f" beside {apart / 1e9:.1f} GB of snapshots" if apart else ""
    bounds = {
        f"what {room / 1e9:.1f} GB of free memory hold{beside}": fits // step * step,
        "all that a rank has of an update": needed,
        "the longest that is proposed": LONGEST // step * step or step,
    }
    if limit is not None:
        bounds["the longest this architecture takes"] = _down(limit, config.batch.bucket_tokens)
    why, tokens = min(bounds.items(), key=lambda bound: bound[1])
    if tokens >= least:
        return Choice(tokens, why)
    why = f"the longest sample needs it, and {why} is {tokens:,}"
    if fits < longest:
        why += ": memory may run out (model.activation_checkpointing: full, optim.name: adamw8bit or a lower"
        why += " data.max_tokens take less)"
    return Choice(_up(longest, step), why)


def free_bytes(device: torch.device) -> int | None:
    """Memory of a GPU that is free, in the allocator's pool or not; None: no GPU, or none here."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    free = torch.cuda.mem_get_info(device)[0]
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def _longest_that_fits(config: Config, shards: int, sizes: Sizes, room: int) -> int:
    assert sizes.saved is not None
    return sizes.model.longest_row(
        room,
        config.optim.name,
        shards,
        sizes.saved,
        config.model.activation_checkpointing,
    )


def _most_of_an_update(config: Config, world: World, data: Data) -> int:
    """Tokens that one rank has of the longest update there can be."""
    lengths = data.train.index.lengths
    longest = int(lengths.max())
    if config.batch.samples is not None:
        most = int(np.sort(lengths)[-config.batch.samples :].sum())
    else:
        most = (config.batch.tokens or 0) + longest
    return min(most, most // world.size + longest)


def _up(tokens: int, step: int) -> int:
    return -(-tokens // step) * step


def _down(tokens: int, bucket: int | str) -> int:
    """In whole buckets where they are a number: run.yaml is held to that when it is read again."""
    return tokens // bucket * bucket if isinstance(bucket, int) else tokens


# As an item of `training.decided` -------------------------------------------------------------------------


def now(parts: Parts) -> int:
    """What rows began with; after memory ran out they may be shorter (`Lasting.row_tokens`)."""
    return parts.row_tokens


def use(parts: Parts, value: int) -> None:
    longest = longest_of(parts.data)
    if value < longest:
        wrong = f"the run began with rows of {value}, and a sample is longer"
        raise ConfigError(describe(SETTING, wrong, got=longest, todo=f"set it to {_up(longest, STEP)}"))
    parts.row_tokens, index = value, parts.data.train.index
    parts.plan = plan_of(parts.config, index, parts.world, longest=longest, row_tokens=value)
    parts.row_lengths = parts.plan.row_lengths
    parts.make_scorers()


def words(value: int) -> str:
    return f"{value:,} tokens"


def before(parts: Parts) -> int | None:
    """Its settings said it, which a resumption's are compared with."""
    return parts.row_tokens


def written(value: int) -> int:
    return value
