"""load(sources, tokenizer, settings) → samples: read, parse, render, tokenise, check; cached; every loss
counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from repsft_fast.data import cache
from repsft_fast.data.columns import unused_line
from repsft_fast.data.sample import Loaded
from repsft_fast.data.sample_builder import SampleBuilder
from repsft_fast.data.settings import DataSettings
from repsft_fast.data.source import Source
from repsft_fast.data.sources import SourceSpec, list_sources, open_rows, without_copies
from repsft_fast.data.splits import Splits, carve, nested_subset, overlap_warnings
from repsft_fast.errors import DataError, describe

__all__ = ["DataSettings", "Loaded", "load", "load_splits"]

_DEFAULTS = DataSettings()


def load(
    sources: SourceSpec,  # path(s), {task: path(s)}, or hub ids ("owner/name" or "owner/name:subset")
    tokenizer: Any,  # a transformers tokenizer; None is enough for input_ids rows
    settings: DataSettings = _DEFAULTS,
    *,
    vocab_size: int | None = None,  # of the model; None = the tokenizer's
    first_rows: int | None = None,  # of every source, read past the cache: a look at large data. None = all
) -> Loaded:
    """Every usable sample of the sources (or the nested subset of `settings.samples`), in their order.

    Raises DataError (exit 2) naming the source, row and field for what cannot be read, and for a source
    without a usable row. Rows that are legal but hold nothing to train on are dropped and counted in
    `dropped`.
    """
    loaded = _load(
        list_sources(sources, settings.split), sources, tokenizer, settings, vocab_size, first_rows
    )
    loaded.warnings += unused_line(loaded.columns_unused)
    return loaded


def _load(
    listed: list[Source],
    sources: SourceSpec,
    tokenizer: Any,
    settings: DataSettings,
    vocab_size: int | None,
    first_rows: int | None = None,
) -> Loaded:
    """Without the line about the columns that were not used."""
    if isinstance(sources, dict) and settings.task_column is not None:
        raise DataError(describe("data.task_column", "contradicts {task: path}", todo="use one of the two"))
    opened = [(source, *open_rows(source, settings.split)) for source in listed]
    without_copies(opened)
    build = SampleBuilder(tokenizer, settings, vocab_size)
    if settings.cache_folder is None or first_rows is not None:
        loaded = build([(source, islice(rows, first_rows)) for source, rows, _ in opened])
    else:
        loaded = _cached(Path(settings.cache_folder).expanduser(), build, opened)
    loaded.warnings += dict.fromkeys(note for source in listed for note in source.notes)
    loaded.samples = nested_subset(loaded.samples, settings.samples, settings.seed)
    return loaded


def _cached(
    folder: Path, build: SampleBuilder, opened: list[tuple[Source, Iterator[tuple[Any, str]], str]]
) -> Loaded:
    """What the cache has of these sources under these settings, else built and kept there. opened: (source,
    rows, hash of the content)."""
    content = [(source.name, source.task, digest) for source, _, digest in opened]
    key = cache.cache_key(build.description() | {"content": content})
    loaded, damage = cache.read(folder, key)
    if loaded is not None:
        return loaded
    loaded = build([(source, rows) for source, rows, _ in opened])
    trouble = [f"cache: {damage}; rebuilt"] if damage else []
    # A cache that cannot be written costs the next run time, and this one nothing.
    try:
        cache.write(folder, key, loaded)
    except OSError as error:
        trouble.append(f"cache: {folder} cannot be written ({error.strerror}); tokenised again next time")
    loaded.warnings += trouble
    return loaded


def load_splits(
    sources: SourceSpec,
    tokenizer: Any,
    settings: DataSettings = _DEFAULTS,
    *,
    # a source of its own, or a size carved out of `sources` (splits.carve)
    validation: SourceSpec | float = 0,
    test: SourceSpec | float = 0,
    vocab_size: int | None = None,
) -> tuple[Splits, Loaded]:
    """Train, validation and test, and the account of loading. `settings.samples` is drawn from what is left
    for training.

    Validation and test are held out *before* the subset is drawn, so 200 and 400 samples share one validation
    set.
    """
    whole = replace(settings, samples=None)
    listed = list_sources(sources, settings.split)
    loaded = _load(listed, sources, tokenizer, whole, vocab_size)
    sizes = [size if isinstance(size, int | float) else 0 for size in (validation, test)]
    splits = carve(loaded.samples, validation=sizes[0], test=sizes[1], seed=settings.seed)
    for name, given in (("validation", validation), ("test", test)):
        if not isinstance(given, int | float):
            held_out = replace(whole, split=name)
            other = _load(list_sources(given, name, listed), given, tokenizer, held_out, vocab_size)
            setattr(splits, name, other.samples)
            _add_account(loaded, other, name)
    splits.train = nested_subset(splits.train, settings.samples, settings.seed)
    splits.warnings += overlap_warnings(splits.train, splits.validation, splits.test)
    loaded.warnings += [*splits.warnings, *unused_line(loaded.columns_unused)]
    return splits, loaded


def _add_account(loaded: Loaded, other: Loaded, name: str) -> None:
    """Adds the account of the split `name`, read from sources of its own, to that of the training data."""
    for column, rows in other.columns_unused.items():
        loaded.columns_unused[column] = loaded.columns_unused.get(column, 0) + rows
    for column, rows in other.columns_used.items():
        loaded.columns_used[column] = loaded.columns_used.get(column, 0) + rows
    # A split's own name in front: the same reason or file may be there for several.
    loaded.files |= {f"{name}: {file}": rows for file, rows in other.files.items()}
    dropped = {f"{name}: {reason}": rows for reason, rows in other.dropped.items()}
    loaded.dropped = Counter(loaded.dropped) + Counter(dropped)
    loaded.warnings += [f"{name}: {text}" for text in other.warnings]
