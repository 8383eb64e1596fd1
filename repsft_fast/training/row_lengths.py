"""The few shapes rows take, decided once for a run: a graph is made for each, and packing follows them.

Where rows take few lengths (`batch.row_lengths`) they are chosen from the plan before the first update
(`data.choose_lengths`): a pure function of data, settings and ranks, the same on every rank. They stand in
run.yaml and, with the most samples a row takes, in every checkpoint; a resumption takes them from there.
After memory ran out rows are halved, and take lengths of their own, chosen in the same way.
"""

from __future__ import annotations

from typing import Any

import torch

from repsft_fast.config import Config
from repsft_fast.data.choose_lengths import choose_lengths
from repsft_fast.data.plan import Plan, SampleIndex
from repsft_fast.data.row_lengths import RowLengths
from repsft_fast.distributed import World
from repsft_fast.errors import ConfigError, describe
from repsft_fast.training.parts import Data, Parts
from repsft_fast.training.samples import build_plan

NAME = "row_lengths"
SETTING = "batch.row_lengths"
_SAID_OF = 64  # updates


def are_few(config: Config, device: torch.device) -> bool:
    """Whether rows take few lengths: as asked; else where graphs are made for each, on a GPU and in compiled
    layers."""
    batch = config.batch
    if batch.row_lengths != "auto" or not batch.pack or isinstance(batch.bucket_tokens, int):
        return isinstance(batch.row_lengths, list)
    return device.type == "cuda" or config.model.compile is True


def plan_of(
    config: Config,
    index: SampleIndex,
    world: World,
    *,
    longest: int | None = None,
    row_tokens: int | None = None,
) -> Plan:
    """The plan, its rows' shapes chosen.

    longest: positions of the longest sample of any split, None = of the index. row_tokens: of a row, None =
    by the settings; where it is shorter than the lengths that the settings name, lengths are chosen anew.
    ConfigError for named lengths that do not hold the longest sample.
    """
    plain = build_plan(config, index, world, row_tokens=row_tokens)
    if not are_few(config, world.device):
        return plain
    named = config.batch.row_lengths
    holds = isinstance(named, list) and (row_tokens is None or row_tokens >= max(named))
    lengths = tuple(named) if isinstance(named, list) and holds else None
    return _with(config, world, plain, _shapes(plain, lengths, longest or int(index.lengths.max())))


def longest_of(data: Data) -> int:
    """Positions of the longest sample of any split."""
    stores = (data.train, data.validation, data.test)
    return max(int(store.index.lengths.max()) for store in stores if store is not None)


def now(parts: Parts) -> dict[str, Any] | None:
    """What this run began with, as asked or as it was chosen; None: rows are padded to a bucket."""
    return None if parts.row_lengths is None else parts.row_lengths.to_json()


def use(parts: Parts, value: Any) -> None:
    """Take what the run before used: `now`'s value, or the lengths alone, as run.yaml has them. ConfigError
    where the longest sample does not fit."""
    config, world, longest = parts.config, parts.world, longest_of(parts.data)
    plain = build_plan(config, parts.data.train.index, world, row_tokens=parts.row_tokens)
    if value is None:
        shapes = None
    elif isinstance(value, list):
        shapes = _shapes(plain, tuple(value), longest)
    else:
        shapes = RowLengths.of_json(value)
        _check(shapes.lengths, longest)
    parts.row_lengths = shapes
    parts.plan = plain if shapes is None else _with(config, world, plain, shapes)
    parts.make_scorers()


def words(value: Any) -> str:
    if value is None:
        return "multiples of a bucket"
    if isinstance(value, list):
        named = "length" if len(value) == 1 else "lengths"
        return f"{len(value)} {named} ({', '.join(f'{length:,}' for length in value)})"
    return f"{words(value['lengths'])} of at most {value['documents']:,} samples"


def before(parts: Parts) -> Any:
    """Versions without it padded to a bucket; what is chosen now holds from here on."""
    return None


def written(value: Any) -> Any:
    return None if value is None else value["lengths"]


def said(plan: Plan) -> str | None:
    """The rows' shapes and what of the slots is padding, from the first planned updates; None: no shapes were
    chosen."""
    shapes = plan.row_lengths
    if shapes is None:
        return None
    epoch, real, slots = plan.epoch(0, 0), 0, 0
    for n in range(min(len(epoch), _SAID_OF)):
        update = epoch.update(n)
        real, slots = real + update.real_tokens, slots + update.padded_tokens
    return f"rows take {words(shapes.to_json())}; {1 - real / slots:.1%} of their slots are padding"


def _shapes(plain: Plan, lengths: tuple[int, ...] | None, longest: int) -> RowLengths:
    if lengths is not None:
        _check(lengths, longest)
    return choose_lengths(plain, longest=longest, lengths=lengths)


def _check(lengths: tuple[int, ...], longest: int) -> None:
    if lengths[-1] < longest:
        wrong, todo = (
            "hold no sample that long",
            "name a longer one, set it to auto, or lower data.max_tokens",
        )
        raise ConfigError(
            describe(SETTING, wrong, expected=f"one of at least {longest}", got=list(lengths), todo=todo)
        )


def _with(config: Config, world: World, plain: Plan, shapes: RowLengths) -> Plan:
    return build_plan(config, plain.index, world, row_tokens=plain.row_tokens, row_lengths=shapes)
