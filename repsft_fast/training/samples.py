"""From settings to samples and their plan: every split loaded and put where the loop reads it, and which
samples may share a row."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repsft_fast.config import Config
from repsft_fast.config.sections import ROW_TOKENS
from repsft_fast.data.ends import cut_at, find_ends
from repsft_fast.data.gym import is_gym_source, write_gym_source
from repsft_fast.data.load import DataSettings, load_splits
from repsft_fast.data.packing import Apart
from repsft_fast.data.plan import Plan, SampleIndex
from repsft_fast.data.row_lengths import RowLengths
from repsft_fast.data.sample import Loaded, Sample
from repsft_fast.data.splits import Splits
from repsft_fast.data.store import TokenStore
from repsft_fast.distributed import World
from repsft_fast.errors import DataError, describe
from repsft_fast.models import Lengths, config_of
from repsft_fast.models.loss import row_limit, too_long
from repsft_fast.training.parts import Data

FORMS_SEEN = 200  # training samples that tasks' prompts are compared with
CPU_BUCKET, GPU_BUCKET = 1, 128


def load_samples(config: Config, tokenizer: Any, vocabulary: int | None) -> tuple[Splits, Loaded]:
    """Read and tokenise (or take from the cache) every split. DataError names source, row and way out."""
    data = config.data
    return load_splits(
        written_out(data.train, config),
        tokenizer,
        _data_settings(config),
        validation=written_out(data.validation, config)
        if data.validation is not None
        else data.validation_fraction,
        test=written_out(data.test, config) if data.test is not None else data.test_fraction,
        vocab_size=vocabulary,
    )


def load_data(config: Config, tokenizer: Any, device: torch.device, vocabulary: int | None) -> Data:
    """Every split, loaded and put where the loop reads it."""
    splits, loaded = load_samples(config, tokenizer, vocabulary)
    held = {name: samples for name in ("validation", "test") if (samples := getattr(splits, name))}
    data = resident(config, splits.train, held, dict(loaded.dropped), loaded.warnings, device)
    ends = find_ends(splits.train, tokenizer, cut_at=cut_at(_data_settings(config)))
    before = [sample.ids[: sample.trained.index(True)][-16:] for sample in splits.train[:FORMS_SEEN]]
    return replace(data, ends=ends, files=loaded.files, before_replies=before)


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
    # A task that is only validated has a score and never a gradient: a typo in a name, as a rule.
    strangers = sorted({s.task for samples in held.values() for s in samples} - set(names))
    if strangers:
        raise DataError(
            describe(
                "data.validation",
                "has tasks the training data has not",
                expected=", ".join(names),
                got=strangers,
            )
        )
    limit = token_limit(config, device)
    stores = {
        split: TokenStore(samples, device, limit, task_names=names)
        for split, samples in {"train": train, **held}.items()
    }
    warnings = [*warnings, *dict.fromkeys(note for store in stores.values() for note in store.notes)]
    # Content and not paths: moved data is the same run, and other data under the same name is not.
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
    """Bytes of device memory the tokens may take: as set, else a quarter of what is free. None on a CPU: one
    memory."""
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
        # in positions
        max_tokens=data.max_tokens - 1 if data.max_tokens is not None else rows_asked(config),
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


def build_plan(
    config: Config,
    index: SampleIndex,
    world: World,
    *,
    row_tokens: int | None = None,
    row_lengths: RowLengths | None = None,
) -> Plan:
    """The plan by settings. row_lengths: the few shapes its rows take (`training.row_lengths` chooses them),
    in place of multiples of a bucket."""
    return Plan(
        index,
        seed=config.run.seed,
        row_tokens=row_tokens or rows_asked(config),
        bucket_tokens=row_bucket(config, world.device),
        ranks=world.size,
        batch_samples=config.batch.samples,
        batch_tokens=config.batch.tokens,
        average=config.loss.average,
        apart=apart_of(config),
        row_lengths=row_lengths,
    )


def rows_asked(config: Config) -> int:
    """Tokens of a row by the settings alone; auto counts as the default."""
    asked = config.batch.row_tokens
    return asked if isinstance(asked, int) else ROW_TOKENS


def longest_row(plan: Plan) -> int:
    """Tokens of the longest row there can be: of one sample where none share a row."""
    if plan.row_lengths is not None:
        return plan.row_lengths.capacity
    return int(plan.index.lengths.max()) if plan.apart.alone_above == 0 else plan.row_tokens


def row_bucket(config: Config, device: torch.device) -> int:
    """Rows are padded to a multiple of this many positions; with `batch.pack: false` not at all, the model
    gets a sample."""
    if not config.batch.pack:
        return 1
    bucket = config.batch.bucket_tokens
    if isinstance(bucket, int):
        return bucket
    # Compiled layers have static shapes: a graph for every length of a row.
    return GPU_BUCKET if device.type == "cuda" or config.model.compile is True else CPU_BUCKET


def apart_of(config: Config) -> Apart:
    """Samples that share no row: all of them with `batch.pack: false`, else those that this model would
    compute differently in one row than alone, because its rotary frequencies follow the longest document of a
    row.

    A row costs a forward and backward pass whatever its length: with samples of 12 tokens on a CPU and 2
    layers of width 32, rows of one sample trained 7 times fewer tokens a second than rows of 16 samples
    (median of 5 runs each, in turn).
    """
    if not config.batch.pack:
        return Apart(alone_above=0)
    lengths = lengths_of(config)
    return Apart(lengths.apart, lengths.alone_above)


def lengths_of(config: Config) -> Lengths:
    model = config.model
    if model.path is None:
        return Lengths.of(config_of(model.config or {}))
    return _of_path(model.path, model.gguf_file, model.trust_remote_code)


def check_positions(config: Config, model: Any, stores: Iterable[TokenStore | None]) -> list[str]:
    """What is to be said of the samples' lengths; DataError where the model has no embedding for the end of
    one, ModelError for rows longer than it takes."""
    lengths = np.concatenate([store.index.lengths for store in stores if store is not None])
    longest, limit, made_for = int(lengths.max()), model.position_limit, lengths_of(config).made_for
    said = []
    if config.model.compile is True and not config.batch.pack:
        many = len(np.unique(lengths))
        said.append(
            f"model.compile with batch.pack: false compiles every layer once for each of {many} lengths of a"
            " sample"
        )
    # Rows are documents end to end: a model that reads positions beyond its table would read garbage.
    of_rows = row_limit(model.config) if config.batch.pack else None
    asked = config.batch.row_tokens  # auto keeps within it
    if of_rows is not None and isinstance(asked, int) and asked > of_rows:
        raise too_long(type(model).__name__, of_rows, asked)
    if limit is not None and longest > limit:
        wrong = (
            f"{int((lengths > limit).sum())} samples are longer than the {limit} positions the model has"
            " embeddings for"
        )
        todo = f"set data.max_tokens: {limit} (data.overlong: drop, or truncate)"
        raise DataError(
            describe("data.max_tokens", wrong, expected=f"at most {limit}", got=longest, todo=todo)
        )
    # Beyond what the model was made for it computes, and less well: that is said, and left to the user.
    if made_for is None or longest <= made_for or lengths_of(config).alone_above is not None:
        return said
    many = int((lengths > made_for).sum())
    return [
        *said,
        (
            f"{many} samples are longer than the {made_for} positions the model was made for (the longest:"
            f" {longest})"
        ),
    ]


@functools.lru_cache(maxsize=8)
def _of_path(path: str, gguf_file: str | None, trust_remote_code: bool) -> Lengths:
    return Lengths.of(config_of(path, gguf_file=gguf_file, trust_remote_code=trust_remote_code))
