"""Builds the parts of a run from its settings, in the order a person would check them: folder, data, model, plan, state."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import repsft_fast
from repsft_fast import distributed
from repsft_fast.config import Config
from repsft_fast.data.ends import Ends, cut_at, find_ends
from repsft_fast.data.gym import is_gym_source, write_gym_source
from repsft_fast.data.load import DataSettings, load_splits
from repsft_fast.data.plan import Plan, Update
from repsft_fast.data.sample import Loaded, Sample
from repsft_fast.data.splits import Splits
from repsft_fast.data.store import TokenStore
from repsft_fast.data.template import find_template
from repsft_fast.distributed import World
from repsft_fast.errors import DataError, describe
from repsft_fast.evaluate.answers import find_extractor
from repsft_fast.evaluate.teacher_forced import TeacherForced
from repsft_fast.metrics import Ledger, SampleStats
from repsft_fast.models import check_head, check_no_leak, load_model, load_tokenizer
from repsft_fast.models.lora import lora_said
from repsft_fast.models.vocabulary import tokens_of
from repsft_fast.optim import Optimizer, build_optimizer
from repsft_fast.row import Row
from repsft_fast.schedule import Schedule
from repsft_fast.throughput import ModelShape, Work, peak_flops
from repsft_fast.training import chunks
from repsft_fast.training.budget import Budget, budget_of
from repsft_fast.training.ends import learn_ends
from repsft_fast.training.identity import base_of
from repsft_fast.training.progress import Progress
from repsft_fast.training.rows import build_plan, check_positions, row_bucket
from repsft_fast.training.spikes import Spikes


@dataclass
class Data:
    """What was loaded: training samples resident, held-out ones beside them, and what was dropped."""

    train: TokenStore
    validation: TokenStore | None
    test: TokenStore | None
    task_names: tuple[str, ...]
    dropped: dict[str, int]
    warnings: list[str]
    seen: list[Sample]  # a few training samples whose prompts are answered at the end: memorised or not, one sees it
    held_out: list[Sample]  # a few held-out samples whose prompts are answered at evaluations and at the end
    digest: str  # of tokens and targets: ranks and resumed runs must agree on it
    ends: Ends = field(default_factory=Ends)  # which tokens end the trained turns
    files: dict[str, int] = field(default_factory=dict)  # what was read → rows


@dataclass
class Parts:
    """Everything the loop touches. What is mutable here is on the closed list of state or derived from it."""

    config: Config
    world: World
    folder: Path
    tokenizer: Any
    model: Any
    shape: ModelShape
    peak_flops: float | None
    data: Data
    plan: Plan
    budget: Budget
    optimizer: Optimizer
    schedule: Schedule
    ledger: Ledger
    spikes: Spikes = field(init=False)  # of the last updates
    base: dict[str, str] = field(default_factory=dict)  # digests of what the run begins with (identity.base_of)
    validation: TeacherForced | None = None
    probe: TeacherForced | None = None
    progress: Progress = field(default_factory=Progress)
    on_update: Callable[[Work], None] | None = None
    sample_stats: SampleStats | None = None  # made for policies that judge samples

    def __post_init__(self) -> None:
        self.spikes = Spikes(self.world.device, self.world, self.config.optim.max_norm)

    @property
    def num_tasks(self) -> int:
        return len(self.data.task_names)

    def scorer(self, store: TokenStore, samples: Sequence[int] | None = None) -> TeacherForced:
        """Forward-only evaluation of these samples of a store (None = all), in rows like the training's."""
        chosen = range(len(store.index)) if samples is None else samples
        batch, bucket = self.config.batch, row_bucket(self.config, self.world.device)
        return TeacherForced(
            store, chosen, row_tokens=batch.row_tokens, bucket_tokens=bucket, world=self.world, apart=self.plan.apart
        )

    def rows(self, update: Update) -> Iterator[Row]:
        """This rank's rows of the update, weights holding 1 / the update's one denominator."""
        for planned in update.ranks[self.world.rank]:
            row = self.data.train.row(planned, denominator=update.denominator, average=self.config.loss.average)
            yield replace(row, kept_share=self.progress.kept_guess)

    def work_of(self, update: Update) -> Work:
        """Host counts of one update, all ranks; from the plan, so they cost nothing on the device."""
        index, ids = self.data.train.index, update.samples
        lengths = index.lengths[ids]
        return Work(
            updates=1,
            samples=len(ids),
            slots=sum(row.padded_tokens for rows in update.ranks for row in rows),
            tokens=int(lengths.sum()),
            trained=int(index.trained[ids].sum()),
            sum_squared_lengths=int(np.dot(lengths, lengths)),
        )


def seed_everything(config: Config) -> None:
    """Seeds of every library that draws; in deterministic mode kernels that would vary raise instead."""
    random.seed(config.run.seed)
    np.random.seed(config.run.seed % 2**32)
    torch.manual_seed(config.run.seed)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 (a module property); poisoning belongs to tests


def load_samples(config: Config, tokenizer: Any, vocabulary: int | None) -> tuple[Splits, Loaded]:
    """Read and tokenise (or take from the cache) every split. DataError names source, row and way out."""
    data = config.data
    return load_splits(
        written_out(data.train, config),
        tokenizer,
        _data_settings(config),
        validation=written_out(data.validation, config) if data.validation is not None else data.validation_fraction,
        test=written_out(data.test, config) if data.test is not None else data.test_fraction,
        vocab_size=vocabulary,
    )


def load_data(config: Config, tokenizer: Any, device: torch.device, vocabulary: int | None) -> Data:
    """Every split, loaded and put where the loop reads it."""
    splits, loaded = load_samples(config, tokenizer, vocabulary)
    held = {name: samples for name in ("validation", "test") if (samples := getattr(splits, name))}
    data = resident(config, splits.train, held, dict(loaded.dropped), loaded.warnings, device)
    ends = find_ends(splits.train, tokenizer, cut_at=cut_at(_data_settings(config)))
    return replace(data, ends=ends, files=loaded.files)


def resident(
    config: Config,
    train: list[Sample],
    held: dict[str, list[Sample]],
    dropped: dict[str, int],
    warnings: list[str],
    device: torch.device,
) -> Data:
    """Put samples where the loop reads them. Task ids are the same in every split."""
    names = tuple(sorted({s.task for s in train}))
    strangers = sorted({s.task for samples in held.values() for s in samples} - set(names))
    if strangers:
        raise DataError(
            describe("data.validation", "has tasks the training data has not", expected=", ".join(names), got=strangers)
        )
    limit = token_limit(config, device)
    stores = {
        split: TokenStore(samples, device, limit, task_names=names) for split, samples in {"train": train, **held}.items()
    }
    warnings = [*warnings, *dict.fromkeys(note for store in stores.values() for note in store.notes)]
    digest = hashlib.blake2b(digest_size=16)
    for split, samples in (("train", train), *sorted(held.items())):
        for sample in samples:
            digest.update(f"{split} {sample.task} {sample.weight!r} ".encode())
            digest.update(np.array(sample.ids, np.int32).tobytes() + bytes(sample.trained))
    shown = config.evaluate.generate_samples
    unseen = one_of_each_task(held.get("validation", []), shown)
    seen = one_of_each_task(train, shown)
    stores_of = (stores["train"], stores.get("validation"), stores.get("test"))
    return Data(*stores_of, names, dropped, warnings, seen, unseen, digest.hexdigest())


def token_limit(config: Config, device: torch.device) -> int | None:
    """Bytes of device memory the tokens may take: as set, else a quarter of what is free. None on a CPU: one memory."""
    if config.data.device_limit_bytes is not None:
        return int(config.data.device_limit_bytes)
    return torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else None


def one_of_each_task(samples: list[Sample], count: int) -> list[Sample]:
    """The first `count` samples when tasks take turns."""
    by_task: dict[str, list[Sample]] = {}
    for sample in samples:
        by_task.setdefault(sample.task, []).append(sample)
    rounds = itertools.zip_longest(*by_task.values())
    return [s for turn in rounds for s in turn if s is not None][:count]


def build(config: Config, *, on_update: Callable[[Work], None] | None = None) -> Parts:
    """Every part of a run. Errors come before work is spent: data and settings are checked before the model is loaded."""
    world = distributed.start()
    folder = Path(config.run.folder)
    with distributed.together():
        distributed.check_groups(world.size, config.distributed.shard_ranks)
        seed_everything(config)
        find_extractor(config.mixture.extractor, trusted=config.model.trust_remote_code)  # tried before data is read
        tokenizer = build_tokenizer(config)
        if config.model.path is not None:  # its shape alone: what is wrong with a folder is said before data is read for hours
            build_model(config, World(0, 1, 0, torch.device("meta")), tokenizer)
        data = load_data(config, tokenizer, world.device, vocabulary_of(config, tokenizer))
    distributed.same_everywhere("settings", json.dumps(config.to_dict(), sort_keys=True))
    distributed.same_everywhere("data", data.digest)
    distributed.same_everywhere("code", f"{repsft_fast.__version__} {torch.__version__}")
    with distributed.together():
        plan = build_plan(config, data.train.index, world)
        budget = budget_of(config, plan)
        model = build_model(config, world, tokenizer)
        data.warnings += [*getattr(tokenizer, "load_said", ()), *model.load_said]
        check_vocabulary(model, data)
        data.warnings += lora_said(model)
        data.warnings += check_positions(config, model, (data.train, data.validation, data.test))
        data.warnings += learn_ends(model, data.ends, tokenizer)
    base = base_of(model, config, world)
    shape = ModelShape.of(model)
    mesh = distributed.mesh_of(world, config.distributed.shard_ranks) if world.size > 1 else None
    distributed.shard(model, world, mesh=mesh, arriving=world.size > 1)
    if world.size > 1:
        check_head(model, model.loss_settings.head)
    check_no_leak(model, longest=int(data.train.index.lengths.max()))
    optimizer = optimizer_of(config, model)
    chunks.use(model, chunks.decide(config, world, model))
    parts = Parts(
        config=config,
        world=world,
        folder=folder,
        tokenizer=tokenizer,
        model=model,
        shape=shape,
        peak_flops=peak_flops(world.device, config.log.peak_flops),
        data=data,
        plan=plan,
        budget=budget,
        optimizer=optimizer,
        schedule=build_schedule(config, budget),
        ledger=Ledger(len(data.task_names), world.device, world),
        base=base,
        on_update=on_update,
        sample_stats=SampleStats(len(data.train.index), world.device) if config.mixture.policy == "ies" else None,
    )
    if data.validation is not None:
        parts.validation = parts.scorer(data.validation)
    if config.stop.probe_samples is not None:
        parts.probe = parts.scorer(data.train, range(min(config.stop.probe_samples, len(data.train.index))))
    return parts


def build_tokenizer(config: Config) -> Any:
    """The tokenizer beside the model or at tokenizer.path; None for pre-tokenised data without one."""
    path = config.tokenizer.path or config.model.path
    if path is None or (config.tokenizer.path is None and _folder_without_tokenizer(path)):
        return None
    gguf = config.model.gguf_file if config.tokenizer.path is None else None
    setting = "tokenizer.path" if config.tokenizer.path is not None else "model.path"
    tokenizer = load_tokenizer(path, gguf_file=gguf, trust_remote_code=config.model.trust_remote_code, setting=setting)
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
        "compile": settings.compile,
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
    size = min(end.weight.shape[0] for end in ends if end is not None)  # some embed more tokens than their head gives
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
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
    }


def _data_settings(config: Config) -> DataSettings:
    data = config.data
    return DataSettings(
        format=data.format,
        train_on=data.train_on,
        task_column=data.task_column,
        weight_column=data.weight_column,
        samples=data.samples,
        seed=config.run.seed,
        overlong=data.overlong,
        max_tokens=data.max_tokens - 1 if data.max_tokens is not None else config.batch.row_tokens,  # in positions
        cache_folder=cache_folder(config),
        split=data.split,
        special_tokens=config.tokenizer.special_tokens,
        template_kwargs=config.tokenizer.template_kwargs,
        on_bad_row=data.on_bad_row,
        ignore_columns=tuple(data.ignore_columns),
    )


def written_out(sources: Any, config: Config) -> Any:
    """Generated sources (`reasoning-gym:…`) as files under the cache, everything else as it is."""
    if isinstance(sources, dict):
        return {task: written_out(source, config) for task, source in sources.items()}
    if isinstance(sources, list):
        return [written_out(source, config) for source in sources]
    if not is_gym_source(sources):
        return sources
    return str(write_gym_source(sources, cache_folder(config) / "reasoning-gym"))


def cache_folder(config: Config) -> Path:
    """Where tokenised and generated data is kept between runs."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "repsft_fast"
    return user if config.data.cache_folder is None else Path(config.data.cache_folder)
