"""Builds the parts of a run from its settings, in the order a person would check them: folder, data, model,
plan, state."""

from __future__ import annotations

import json
import os
import platform
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import repsft_fast
from repsft_fast import distributed
from repsft_fast.config import Config
from repsft_fast.data.ends import Ends, problems
from repsft_fast.data.template import find_template
from repsft_fast.distributed import World
from repsft_fast.errors import ConfigError, describe
from repsft_fast.evaluate.answers import find_extractor
from repsft_fast.evaluate.replies import Asked
from repsft_fast.metrics import SampleStats
from repsft_fast.models import check_head, check_no_leak, load_model, load_tokenizer, stop_at
from repsft_fast.models.layers import compiles
from repsft_fast.models.lora import lora_said
from repsft_fast.models.vocabulary import tokens_of
from repsft_fast.optim import Optimizer, build_optimizer, masters
from repsft_fast.policies import policy_class
from repsft_fast.rundir.identity import base_of
from repsft_fast.schedule import Schedule
from repsft_fast.suite.tasks import asked_of, digest, other_form, read_tasks
from repsft_fast.throughput import ModelShape, Work, peak_flops
from repsft_fast.training import attention, chunks, compiled, gathered, row_tokens
from repsft_fast.training.budget import Budget, budget_of
from repsft_fast.training.parts import Data, Parts
from repsft_fast.training.row_lengths import longest_of, plan_of
from repsft_fast.training.samples import check_positions, load_data, longest_row
from repsft_fast.training.sizes import sizes_of, told, with_row_tokens

# For tests and measurements: one rank by FSDP2 too, in a group of its own, as before there were masters.
ONE_RANK_FSDP = False


def seed_everything(config: Config) -> None:
    """Seeds of every library that draws; in deterministic mode kernels that would vary raise instead."""
    random.seed(config.run.seed)
    np.random.seed(config.run.seed % 2**32)
    torch.manual_seed(config.run.seed)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Poisoning belongs to tests. setattr, because it is a property of the module.
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010


def build(
    config: Config, *, world: World | None = None, on_update: Callable[[Work], None] | None = None
) -> Parts:
    """Every part of a run. Errors come before work is spent: data and settings are checked before the model
    is loaded.

    world: the ranks of the launch (`distributed.lifecycle`), which all build; None: this process alone.
    """
    world = world if world is not None else distributed.alone()
    tokenizer, data, asked = _read(config, world)
    # Ranks that were started from other files would train other models: seen before the weights are read.
    distributed.same_everywhere(world, "settings", json.dumps(config.to_dict(), sort_keys=True))
    distributed.same_everywhere(world, "data", data.digest)
    distributed.same_everywhere(world, "evaluate.tasks", digest(asked))
    distributed.same_everywhere(world, "code", f"{repsft_fast.__version__} {torch.__version__}")
    rows = row_tokens.decide(config, world, data, lambda: model_on_meta(config, tokenizer))
    if rows.why is not None:
        data.warnings.append(f"batch.row_tokens: auto is {rows.tokens:,}: {rows.why}")
    with distributed.raise_together(world):
        plan = plan_of(config, data.train.index, world, longest=longest_of(data), row_tokens=rows.tokens)
        budget = budget_of(config, plan)
        model = _load_model(config, world, tokenizer, data)
    # What the run begins with is told while rank 0 still holds all of it.
    base, shape = base_of(model, config, world), ModelShape.of(model)
    sizes = sizes_of(config, model) if world.device.type == "cuda" else None  # of a CPU nothing is decided
    _lay_out(model, config, world)
    backend, said = attention.decide(config, world, model)
    attention.set_attention(model, backend)
    data.warnings += said
    check_no_leak(model, longest=int(data.train.index.lengths.max()))
    optimizer = optimizer_of(config, model)
    # Not before: what weights, moments and gradients leave free decides it on a GPU.
    chunks.set_chunk_bytes(model, chunks.decide(with_row_tokens(config, rows.tokens), world, model))
    judges_samples = policy_class(config.mixture.policy).needs_losses
    parts = Parts(
        config=config,
        world=world,
        folder=Path(config.run.folder),
        tokenizer=tokenizer,
        model=model,
        shape=shape,
        peak_flops=peak_flops(world.device, config.log.peak_flops),
        data=data,
        plan=plan,
        budget=budget,
        optimizer=optimizer,
        schedule=build_schedule(config, budget),
        base=base,
        sizes=sizes,
        on_update=on_update,
        asked=asked,
        sample_stats=SampleStats(len(data.train.index), world.device) if judges_samples else None,
    )
    parts.make_scorers()
    _tell_sizes(parts)
    return parts


def _tell_sizes(parts: Parts) -> None:
    """What a GPU will hold, and what several keep, before it is spent. All ranks call it."""
    kept = gathered.decide(parts)
    if kept is not None:
        parts.data.warnings.append(kept)
    if parts.sizes is not None:
        chunk, stay = parts.model.loss_settings.chunk_bytes, distributed.gathered_stay(parts.model)
        line = told(
            parts.config, parts.sizes, parts.world, longest_row(parts.plan), chunk_bytes=chunk, kept=stay
        )
        parts.data.warnings.append(f"memory: {line}")


def _read(config: Config, world: World) -> tuple[Any, Data, list[Asked]]:
    """(tokenizer, data, tasks), once everything that can be wrong and is cheap to see was looked at."""
    with distributed.raise_together(world):
        distributed.check_groups(world.size, config.distributed.shard_ranks)
        seed_everything(config)
        find_extractor(config.mixture.extractor, trusted=config.model.trust_remote_code)
        tokenizer = build_tokenizer(config)
        # Its shape alone: what is wrong with a folder is said before data is read for hours.
        if config.model.path is not None:
            model_on_meta(config, tokenizer)
        asked, said = _asked(config, tokenizer)
        data = load_data(config, tokenizer, world.device, vocabulary_of(config, tokenizer))
        data.warnings += [*said, *other_form(asked, data.before_replies, tokenizer)]
        return tokenizer, data, asked


def _asked(config: Config, tokenizer: Any) -> tuple[list[Asked], list[str]]:
    """The prompts of evaluate.tasks, and what is to be said of them. ConfigError for what only `repsft eval`
    can do."""
    if config.evaluate.tasks is None:
        return [], []
    if tokenizer is None:
        wrong = "are text, and there is no tokenizer"
        raise ConfigError(describe("evaluate.tasks", wrong, todo="set tokenizer.path"))
    if config.evaluate.engine == "vllm":
        todo = "use it on the saved model: repsft eval FOLDER --engine vllm"
        raise ConfigError(
            describe("evaluate.engine", "vllm reads a saved folder, and a run has none", todo=todo)
        )
    tasks = read_tasks(config)
    if tasks.harness:
        todo = "ask it of the saved model: repsft eval FOLDER"
        where = f"evaluate.tasks [{next(iter(tasks.harness))}]"
        raise ConfigError(describe(where, "is lm-eval's, which does not run inside a run", todo=todo))
    asked, said = asked_of(tasks, tokenizer, config)
    return asked, [*tasks.notes, *said]


def _load_model(config: Config, world: World, tokenizer: Any, data: Data) -> Any:
    """The model, checked against the data; what is to be said of both joins the data's warnings."""
    model = build_model(config, world, tokenizer)
    compiled.hold(model)
    data.warnings += [*getattr(tokenizer, "load_said", ()), *model.load_said]
    check_vocabulary(model, data)
    data.warnings += lora_said(model)
    data.warnings += check_positions(config, model, (data.train, data.validation, data.test))
    data.warnings += stop_at_ends(model, data.ends, tokenizer)
    return model


def stop_at_ends(model: Any, ends: Ends, tokenizer: Any) -> list[str]:
    """The ends of trained turns join the model's eos_token_id, for its answers during the run and for every
    folder. What is to be said of it."""
    joined = stop_at(model, list(ends.tokens), tokenizer)
    return ([joined] if joined is not None else []) + problems(ends, tokenizer)


def _lay_out(model: Any, config: Config, world: World) -> None:
    """Weights where they are trained: over the ranks by FSDP2; on one rank in the compute type, beside their
    masters."""
    if world.size == 1 and not ONE_RANK_FSDP:
        masters.beside(model)
        return
    several = world.size > 1
    mesh = distributed.mesh_of(world, config.distributed.shard_ranks) if several else None
    distributed.shard(model, world, mesh=mesh, arriving=several)
    if several:
        check_head(model, model.loss_settings.head)


def build_tokenizer(config: Config) -> Any:
    """The tokenizer beside the model or at tokenizer.path; None for pre-tokenised data without one."""
    path = config.tokenizer.path or config.model.path
    if path is None or (config.tokenizer.path is None and _folder_without_tokenizer(path)):
        return None
    gguf = config.model.gguf_file if config.tokenizer.path is None else None
    setting = "tokenizer.path" if config.tokenizer.path is not None else "model.path"
    tokenizer = load_tokenizer(
        path, gguf_file=gguf, trust_remote_code=config.model.trust_remote_code, setting=setting
    )
    if config.tokenizer.chat_template is not None:
        tokenizer.chat_template = find_template(tokenizer, config.tokenizer.chat_template)
    return tokenizer


def _folder_without_tokenizer(path: str) -> bool:
    """A model saved alone: enough for pre-tokenised rows, and the reader says so where text needs more."""
    folder = Path(path)
    named = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    return os.path.isfile(folder / "config.json") and not any(os.path.exists(folder / name) for name in named)


def build_model(config: Config, world: World, tokenizer: Any = None) -> Any:
    settings = config.model
    torch.manual_seed(config.run.seed)  # random weights and adapters do not depend on what was drawn before
    options: dict[str, Any] = {
        "device": world.device,
        "attention": settings.attention,
        "lora": settings.lora.model_dump() if settings.lora is not None else None,
        "activation_checkpointing": settings.activation_checkpointing,
        "compile": compiles(settings.compile, settings.layer_kernels, world.device, packed=config.batch.pack),
        "gguf_file": settings.gguf_file,
        "trust_remote_code": settings.trust_remote_code,
        "packed": config.batch.pack,
        "skip_below": config.loss.skip_below,
        "chunk_bytes": config.loss.chunk_bytes,
        "layer_kernels": settings.layer_kernels,
        "vocabulary": tokens_of(tokenizer) if settings.resize_vocabulary and tokenizer is not None else None,
        "random_weights": settings.init == "random" and settings.path is not None,
    }
    if world.size > 1 and world.device.type != "meta":  # rank 0 reads, the others are sent their part
        options["weights_on"] = "cpu" if world.is_main else "meta"
    if settings.param_dtype != "auto":
        options["param_dtype"] = settings.param_dtype
    if settings.compute_dtype != "auto":
        options["compute_dtype"] = settings.compute_dtype
    return load_model(settings.path or settings.config or {}, **options)


def model_on_meta(config: Config, tokenizer: Any) -> Any:
    """The model's shape, its vocabulary as the run's."""
    return build_model(config, World(0, 1, 0, torch.device("meta")), tokenizer)


def optimizer_of(config: Config, model: nn.Module) -> Optimizer:
    optim = config.optim
    return build_optimizer(
        model,
        optim.name,
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        momentum=optim.betas[0] if optim.name == "sgd" else 0.0,
        seed=config.run.seed,
        masters=getattr(model, "masters", None),
    )


def build_schedule(config: Config, budget: Budget) -> Schedule:
    return Schedule(
        config.schedule.name,
        config.optim.lr,
        warmup_updates=budget.warmup_updates,
        total_updates=budget.updates,
        decay_fraction=config.schedule.decay_fraction,
    )


def vocabulary_of(config: Config, tokenizer: Any) -> int | None:
    """Token ids below this can be embedded; checked on the host, before anything reaches the device."""
    if config.model.config is not None and not config.model.resize_vocabulary:
        return config.model.config.get("vocab_size")
    return None if tokenizer is None else tokens_of(tokenizer)


def check_vocabulary(model: nn.Module, data: Data) -> None:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    # some embed more tokens than their head gives
    size = min(end.weight.shape[0] for end in ends if end is not None)
    for store in (data.train, data.validation, data.test):
        if store is not None:
            store.check_vocabulary(size)


def versions(device: torch.device) -> dict[str, str]:
    import transformers

    return {
        "repsft_fast": repsft_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
    }
