"""Which samples may share a row, and how long rows are: from the settings, the device and the model's configuration."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from repsft_fast.config import Config
from repsft_fast.data.packing import Apart
from repsft_fast.data.plan import Plan, SampleIndex
from repsft_fast.data.store import TokenStore
from repsft_fast.distributed import World
from repsft_fast.errors import DataError, describe
from repsft_fast.models import Lengths, config_of
from repsft_fast.models.loss import row_limit, too_long

CPU_BUCKET, GPU_BUCKET = 1, 128


def build_plan(config: Config, index: SampleIndex, world: World, *, row_tokens: int | None = None) -> Plan:
    return Plan(
        index,
        seed=config.run.seed,
        row_tokens=row_tokens or config.batch.row_tokens,
        bucket_tokens=row_bucket(config, world.device),
        ranks=world.size,
        batch_samples=config.batch.samples,
        batch_tokens=config.batch.tokens,
        average=config.loss.average,
        apart=apart_of(config),
    )


def row_bucket(config: Config, device: torch.device) -> int:
    """Rows are padded to a multiple of this many positions; with `batch.pack: false` not at all, the model gets a sample."""
    if not config.batch.pack:
        return 1
    bucket = config.batch.bucket_tokens
    if isinstance(bucket, int):
        return bucket
    # Compiled layers have static shapes: a graph for every length of a row.
    return GPU_BUCKET if device.type == "cuda" or config.model.compile else CPU_BUCKET


def apart_of(config: Config) -> Apart:
    """Samples that share no row: all of them with `batch.pack: false`, else those that this model would compute differently
    in one row than alone, because its rotary frequencies follow the longest document of a row.

    A row costs a forward and backward pass whatever its length: with samples of 12 tokens on a CPU and 2 layers of width 32,
    rows of one sample trained 7 times fewer tokens a second than rows of 16 samples (median of 5 runs each, in turn).
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
    """What is to be said of the samples' lengths; DataError where the model has no embedding for the end of one,
    ModelError for rows longer than it takes."""
    lengths = np.concatenate([store.index.lengths for store in stores if store is not None])
    longest, limit, made_for = int(lengths.max()), model.position_limit, lengths_of(config).made_for
    said = []
    if config.model.compile and not config.batch.pack:
        many = len(np.unique(lengths))
        said.append(f"model.compile with batch.pack: false compiles every layer once for each of {many} lengths of a sample")
    of_rows = row_limit(model.config) if config.batch.pack else None
    if of_rows is not None and config.batch.row_tokens > of_rows:
        raise too_long(type(model).__name__, of_rows, config.batch.row_tokens)
    if limit is not None and longest > limit:
        wrong = f"{int((lengths > limit).sum())} samples are longer than the {limit} positions the model has embeddings for"
        todo = f"set data.max_tokens: {limit} (data.overlong: drop, or truncate)"
        raise DataError(describe("data.max_tokens", wrong, expected=f"at most {limit}", got=longest, todo=todo))
    if made_for is None or longest <= made_for or lengths_of(config).alone_above is not None:
        return said
    many = int((lengths > made_for).sum())
    return [*said, f"{many} samples are longer than the {made_for} positions the model was made for (the longest: {longest})"]


@functools.lru_cache(maxsize=8)
def _of_path(path: str, gguf_file: str | None, trust_remote_code: bool) -> Lengths:
    return Lengths.of(config_of(path, gguf_file=gguf_file, trust_remote_code=trust_remote_code))
