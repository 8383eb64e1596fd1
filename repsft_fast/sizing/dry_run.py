"""`--dry-run`: the resolved settings and what a run with them would do. Loads data and the model's shape,
trains nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from repsft_fast.config import Config
from repsft_fast.data.ends import ends_in_words
from repsft_fast.data.plan import Plan, PlanSummary, summary
from repsft_fast.distributed import World, rank_from_environment
from repsft_fast.errors import ConfigError, RepsftError, describe
from repsft_fast.memory.model_size import ModelSize
from repsft_fast.models.guards import first_words
from repsft_fast.models.lora import lora_said
from repsft_fast.report.format import count, percent, rows_of, size
from repsft_fast.report.visible import escaping, one_line, visible
from repsft_fast.sizing.rehearsal import Rehearsal, rehearse
from repsft_fast.training import row_tokens
from repsft_fast.training.budget import Budget, budget_of
from repsft_fast.training.build import build_tokenizer, model_on_meta, vocabulary_of
from repsft_fast.training.parts import Data
from repsft_fast.training.policy import said_at_start
from repsft_fast.training.row_lengths import longest_of, plan_of, said
from repsft_fast.training.samples import check_positions, load_data, longest_row
from repsft_fast.training.sizes import shards_of, sizes_of, told
from repsft_fast.training.trainer import settings_of

UNEVEN_SHOWN = 3


def dry_run(
    config: Config | Mapping[str, Any] | str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    ranks: int | None = None,
) -> None:
    """Print the resolved settings, the plan and a memory estimate; nothing is trained and nothing written.

    config: a Config, a nested dict, a YAML file or a recipe's name; overrides (nested or dotted) win.
    ranks: that many GPUs which are not here: the first update is rehearsed on them too. Raises ConfigError,
    DataError and ModelError for what `train` would refuse before any work is spent.
    """
    if ranks is not None and ranks < 1:
        raise ConfigError(describe("--world", "is not a number of GPUs", expected="at least 1", got=ranks))
    describe_run(settings_of(config, overrides), ranks=ranks)


def describe_run(config: Config, *, ranks: int | None = None) -> None:
    """`dry_run` of settings that are made, on ranks of which there is at least one."""
    # What a GPU would compute is told where there is none, if it is asked for.
    elsewhere = ranks is not None
    on_gpus = elsewhere or torch.cuda.is_available()
    ranks = ranks or rank_from_environment()[1]
    device = torch.device("cuda" if on_gpus else "cpu")
    resolved, config = config, computed_in_bf16(config) if on_gpus else config
    escaping()
    print(visible(resolved.to_yaml(), "\n"))

    # Built as for a run, the model's shape alone: what a run would refuse is refused here.
    tokenizer = build_tokenizer(config)
    data = load_data(config, tokenizer, torch.device("cpu"), vocabulary_of(config, tokenizer))
    world, shape = World(0, ranks, 0, device), model_on_meta(config, tokenizer)
    alone = dataclasses.replace(world, size=1)  # nobody is here to agree with
    rows = row_tokens.decide(config, alone, data, lambda: shape)
    if rows.why is not None:
        data.warnings.append(f"batch.row_tokens: auto is {rows.tokens:,}: {rows.why}")
    plan = plan_of(config, data.train.index, world, longest=longest_of(data), row_tokens=rows.tokens)
    data.warnings += [*getattr(tokenizer, "load_said", ()), *shape.load_said, *lora_said(shape)]
    data.warnings += check_positions(config, shape, (data.train, data.validation, data.test))

    planned = summary(plan, 1, first=plan.epoch(0, 0))
    lines = {
        **data_lines(data),
        **plan_lines(config, plan, planned, budget_of(config, plan)),
        "memory": told(config, sizes_of(config, shape), world, longest_row(plan)),
    }
    if elsewhere:
        try:
            lines |= rehearsal_lines(config, data, plan, shape, tokenizer)
        except RepsftError:
            raise
        # an architecture whose layers read numbers (which expert has how many tokens) has none here
        except Exception as error:
            lines["rehearsed"] = f"not possible with this architecture ({first_words(error)})"

    # In one column, the notes below the figures that they are about.
    width = max(map(len, lines))
    for name, text in lines.items():
        print(f"{name:<{width}}  {one_line(text)}")
    notes = [*planned.notes, *data.warnings, *config.warnings, *ends_in_words(data.ends, tokenizer)]
    for note in notes + said_at_start(config, data):
        print(f"{'note':<{width}}  {one_line(note)}")


def data_lines(data: Data) -> dict[str, str]:
    """How many samples there are, of which files, and what was left out."""
    samples = f"{count(len(data.train.index))} in {len(data.task_names)} task(s)"
    if data.validation:
        samples += f", validation {count(len(data.validation.index))}"
    if data.test:
        samples += f", test {count(len(data.test.index))}"
    return {
        "samples": samples,
        "read": rows_of(data.files) or "nothing",
        "dropped": ", ".join(f"{n} × {reason}" for reason, n in sorted(data.dropped.items())) or "nothing",
    }


def plan_lines(config: Config, plan: Plan, planned: PlanSummary, budget: Budget) -> dict[str, str]:
    """How long the run is, and how much of what it computes is real."""
    return {
        "updates": (
            f"{count(budget.updates)} ({budget.reason}), {count(budget.updates_per_epoch)} per epoch, "
            f"{budget.epochs:.4g} epochs, warm-up {budget.warmup_updates}"
        ),
        "rows": (
            f"{count(planned.rows)} per epoch of at most {plan.row_tokens} tokens on {plan.ranks} rank(s)"
            + (f"; {shapes}" if (shapes := said(plan)) is not None else "")
        ),
        "utilisation": (
            f"{percent(planned.utilisation, 1)} of the computed slots are real "
            f"({count(planned.real_tokens)} tokens, {count(planned.trained_tokens)} trained, per epoch)"
        ),
    }


def rehearsal_lines(
    config: Config, data: Data, plan: Plan, shape: Any, tokenizer: Any = None
) -> dict[str, str]:
    """What the first update would hold and send on the plan's ranks. shape: the model on meta; tokenizer: may
    have grown its vocabulary."""
    update = plan.epoch(0, 0)[0]
    first = rehearse(config, data, plan, update, tokenizer=tokenizer)
    # which holds least, perhaps nothing: it must run as well
    rehearse(config, data, plan, update, rank=plan.ranks - 1, tokenizer=tokenizer)
    shards = shards_of(config, plan.ranks)
    copies = "one copy of the weights"
    if shards < plan.ranks:
        copies = f"{plan.ranks // shards} copies over {shards} ranks each"
    return {
        "rehearsed": (
            f"{plan.ranks} ranks, {copies}; rank 0 holds weights {size(first.weights)}, gradients "
            f"{size(first.gradients)}, moments {size(first.moments)}"
        ),
        "messages": f"in an update of {first.rows} row(s) on a rank: {_sent(first)}",
        "uneven": _uneven(shape, shards),
    }


def _sent(first: Rehearsal) -> str:
    """The update's collectives by kind: how often, and the bytes a rank sends."""
    sent: dict[str, list[float]] = {}
    for message, times in first.messages.items():
        total = sent.setdefault(message.operation, [0, 0.0])
        total[0] += times
        total[1] += times * message.wire_bytes
    return ", ".join(
        f"{int(times)} {name} ({size(wire)} sent by a rank)" for name, (times, wire) in sent.items()
    )


def _uneven(shape: Any, shards: int) -> str:
    """The parameters whose rows do not divide by the ranks that share a copy."""
    uneven = [
        f"{p.name} {list(p.shape)}" + (f", {empty} ranks hold none" if empty else "")
        for p, empty in ModelSize.of(shape).uneven(shards)
    ]
    if not uneven:
        return f"every parameter divides by {shards}"
    more = f" and {len(uneven) - UNEVEN_SHOWN} more" if len(uneven) > UNEVEN_SHOWN else ""
    return f"{len(uneven)} parameters do not divide by {shards}: {'; '.join(uneven[:UNEVEN_SHOWN])}{more}"


def computed_in_bf16(config: Config) -> Config:
    """The settings as a GPU reads them: compute_dtype auto is bf16 there."""
    if config.model.compute_dtype != "auto":
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"compute_dtype": "bfloat16"})})
