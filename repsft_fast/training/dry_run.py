"""`--dry-run`: the resolved settings and what a run with them would do. Loads data and the model's shape, trains nothing."""

from __future__ import annotations

import torch

from repsft_fast.config import Config
from repsft_fast.data.ends import ends_in_words
from repsft_fast.data.plan import Plan, summary
from repsft_fast.distributed import World, place
from repsft_fast.errors import ConfigError, ModelError, RepsftError, describe
from repsft_fast.models.door import first_words
from repsft_fast.models.lora import lora_said
from repsft_fast.report.visible import escaping, one_line, visible
from repsft_fast.report.words import count, percent, rows_of, size
from repsft_fast.training.budget import budget_of
from repsft_fast.training.parts import Data, build_model, build_tokenizer, load_data, vocabulary_of
from repsft_fast.training.rehearsal import rehearse, saved_per_token
from repsft_fast.training.rows import build_plan, check_positions
from repsft_fast.training.sizing import ModelSize

UNEVEN_SHOWN = 3


def describe_run(config: Config, *, ranks: int | None = None) -> None:
    """Print settings, data, plan and a memory estimate.

    ranks: that many GPUs which are not here: the first update is rehearsed on them too. ConfigError for what would not run.
    """
    on_gpus = ranks is not None or torch.cuda.is_available()
    elsewhere = ranks is not None
    ranks = ranks or place()[1]
    device = torch.device("cuda" if on_gpus else "cpu")
    resolved, config = config, computed_in_bf16(config) if on_gpus else config
    escaping()
    print(visible(resolved.to_yaml(), "\n"))
    tokenizer = build_tokenizer(config)
    data = load_data(config, tokenizer, torch.device("cpu"), vocabulary_of(config, tokenizer))
    plan = build_plan(config, data.train.index, World(0, ranks, 0, device))
    shape = build_model(config, World(0, 1, 0, torch.device("meta")), tokenizer)
    data.warnings += [*getattr(tokenizer, "load_said", ()), *shape.load_said, *lora_said(shape)]
    data.warnings += check_positions(config, shape, (data.train, data.validation, data.test))
    budget = budget_of(config, plan)
    first = plan.epoch(0, 0)
    planned = summary(plan, 1, first=first)
    lines = {
        "samples": f"{count(len(data.train.index))} in {len(data.task_names)} task(s)"
        + (f", validation {count(len(data.validation.index))}" if data.validation else "")
        + (f", test {count(len(data.test.index))}" if data.test else ""),
        "read": rows_of(data.files) or "nothing",
        "dropped": ", ".join(f"{n} × {reason}" for reason, n in sorted(data.dropped.items())) or "nothing",
        "updates": f"{count(budget.updates)} ({budget.reason}), {count(budget.updates_per_epoch)} per epoch, "
        f"{budget.epochs:.4g} epochs, warm-up {budget.warmup_updates}",
        "rows": f"{count(planned.rows)} per epoch of at most {config.batch.row_tokens} tokens on {ranks} rank(s)",
        "utilisation": f"{percent(planned.utilisation, 1)} of the computed slots are real "
        f"({count(planned.real_tokens)} tokens, {count(planned.trained_tokens)} trained, per epoch)",
        "memory": memory_line(config, ranks, longest_row(plan)),
    }
    if elsewhere:
        try:
            lines |= rehearsal_lines(config, data, plan)
        except RepsftError:
            raise
        except Exception as error:  # an architecture whose layers read numbers (which expert has how many tokens) has none here
            lines["rehearsed"] = f"not possible with this architecture ({first_words(error)})"
    width = max(map(len, lines))
    for name, text in lines.items():
        print(f"{name:<{width}}  {one_line(text)}")
    for note in [*planned.notes, *data.warnings, *config.warnings, *ends_in_words(data.ends, tokenizer)]:
        print(f"{'note':<{width}}  {one_line(note)}")


def describe_world(config: Config, ranks: int, *, dry_run: bool) -> None:
    """`--dry-run --world N`."""
    if not dry_run:
        raise ConfigError(describe("--world", "trains nothing", todo="add --dry-run; the launcher says how many GPUs train"))
    if ranks < 1:
        raise ConfigError(describe("--world", "is not a number of GPUs", expected="at least 1", got=ranks))
    describe_run(config, ranks=ranks)


def rehearsal_lines(config: Config, data: Data, plan: Plan) -> dict[str, str]:
    """What the first update would hold and send on the plan's ranks."""
    update = plan.epoch(0, 0)[0]
    first = rehearse(config, data, plan, update)
    rehearse(config, data, plan, update, rank=plan.ranks - 1)  # which holds least, perhaps nothing: it must run as well
    shards = shards_of(config, plan.ranks)
    copies = f"{plan.ranks // shards} copies over {shards} ranks each" if shards < plan.ranks else "one copy of the weights"
    sent: dict[str, list[float]] = {}
    for message, times in first.messages.items():
        total = sent.setdefault(message.operation, [0, 0.0])
        total[0] += times
        total[1] += times * message.wire_bytes
    shape = ModelSize.of(build_model(config, World(0, 1, 0, torch.device("meta"))))
    uneven = [
        f"{p.name} {list(p.shape)}" + (f", {empty} ranks hold none" if empty else "") for p, empty in shape.uneven(shards)
    ]
    more = f" and {len(uneven) - UNEVEN_SHOWN} more" if len(uneven) > UNEVEN_SHOWN else ""
    return {
        "rehearsed": f"{plan.ranks} ranks, {copies}; rank 0 holds weights {size(first.weights)}, gradients "
        f"{size(first.gradients)}, moments {size(first.moments)}",
        "messages": f"in an update of {first.rows} row(s) on a rank: "
        + ", ".join(f"{int(times)} {name} ({size(wire)} sent by a rank)" for name, (times, wire) in sent.items()),
        "uneven": (f"{len(uneven)} parameters do not divide by {shards}: " + "; ".join(uneven[:UNEVEN_SHOWN]) + more)
        if uneven
        else f"every parameter divides by {shards}",
    }


def shards_of(config: Config, ranks: int) -> int:
    """Ranks that share one copy of the weights."""
    return min(config.distributed.shard_ranks or ranks, ranks)


def computed_in_bf16(config: Config) -> Config:
    """The settings as a GPU reads them: compute_dtype auto is bf16 there."""
    if config.model.compute_dtype != "auto":
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"compute_dtype": "bfloat16"})})


def longest_row(plan: Plan) -> int:
    """Tokens of the longest row there can be: of one sample where none share a row."""
    return int(plan.index.lengths.max()) if plan.apart.alone_above == 0 else plan.row_tokens


def memory_line(config: Config, ranks: int, row_tokens: int) -> str:
    """An estimate per rank from the model's shape, by the formulas of `sizing`, with the longest row's activations."""
    try:
        model = build_model(config, World(0, ranks, 0, torch.device("meta")))
    except ModelError as error:
        return f"unknown: {error}"
    shape = ModelSize.of(model)
    held = shape.held(config.optim.name, shards_of(config, ranks), momentum=config.optim.betas[0] > 0)
    line = (
        f"about {size(held.state)} on a rank for {count(shape.count)} parameters: weights {size(held.weights)}, "
        f"gradients {size(held.gradients)}, moments {size(held.moments)}; {size(shape.head(0))} for the head's gradient; "
        f"a snapshot {size(held.snapshot)}"
    )
    if config.model.lora is not None:
        return line + "; activations come on top"
    try:
        saved = saved_per_token(model.config, compute_dtype=str(model.compute_dtype).removeprefix("torch."))
    except Exception:  # layers that read numbers (experts), that take no packed rows, or whose memory is not linear in them
        return line + "; activations come on top"
    row = shape.row(saved, config.model.activation_checkpointing) * row_tokens
    return line + f"; {size(row)} of activations in a row of {count(row_tokens)} tokens, plain layers"
