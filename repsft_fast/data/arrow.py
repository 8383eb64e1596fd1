"""Rows that come through `datasets`: parquet, arrow, folders of save_to_disk, the hub."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from repsft_fast.data.filetypes import check_regular, once
from repsft_fast.data.split_names import choose_split
from repsft_fast.errors import DataError, describe, open_plain
from repsft_fast.hub import offline, why_not_reached

MAX_INDEX_BYTES = 2**26
IPC_FILE = b"ARROW1"  # how arrow's file form begins, as pyarrow and polars write it


def open_table(path: Path, name: str, kind: str) -> Any:
    """The `datasets.Dataset` of one parquet or arrow file. Raises DataError when it cannot be read."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    def read() -> Any:
        if kind == "parquet":  # one without rows `datasets` cannot read
            return datasets.Dataset.from_parquet(str(path)) if pq.read_metadata(path).num_rows else []
        with open_plain(path) as stream:
            is_stream = stream.read(len(IPC_FILE)) != IPC_FILE
        if is_stream:  # as `datasets` writes it
            return datasets.Dataset.from_file(str(path))
        batches = pa.ipc.open_file(pa.memory_map(str(path)))
        return (
            datasets.Dataset(datasets.table.InMemoryTable(batches.read_all()))
            if batches.num_record_batches
            else []
        )

    return _read(read, name, kind.split()[0])


def open_saved(path: Path, name: str, split: str, held_out: bool) -> Any:
    """A folder of save_to_disk: the Dataset, or the split of its DatasetDict; [] where it holds no rows."""
    import datasets

    folder = path
    if os.path.lexists(folder / "dataset_dict.json"):
        splits = _index(folder / "dataset_dict.json", "splits", name)
        chosen = choose_split(split, splits, held_out)
        if chosen is None:
            expected = " | ".join(splits)
            raise DataError(
                describe(name, "has no such split", expected=expected, got=split, todo="set data.split")
            )
        folder = folder / chosen
    if not (files := _index(folder / "state.json", "_data_files", name)):
        return []  # `datasets` cannot load it
    for file in (*files, "dataset_info.json"):  # which `datasets` opens by their names
        check_regular(folder / file, f"{name.rstrip('/')}/{file}")
    return _read(lambda: datasets.load_from_disk(str(folder)), name, "arrow")


def open_hub(name: str, split: str, held_out: bool) -> Any:
    """A data set of the hub, "owner/name" or "owner/name:subset". The hub is asked within `hub.SECONDS`
    whether it is there."""
    import datasets

    repository, _, subset = name.partition(":")
    if repository in getattr(datasets.packaged_modules, "_PACKAGED_DATASETS_MODULES", ()):
        wrong = (
            f"is not a file here ({Path(repository).absolute()}), and to `datasets` it is no data set but all"
            " files here"
        )
        raise DataError(describe(name, wrong, todo="name the files or their folder"))
    # Only what is asked for is fetched; which splits there are is asked where that one is not there.
    unreached = why_not_reached(repository, "dataset")
    try:
        with _quiet(), offline(unreached is not None):
            try:
                return datasets.load_dataset(repository, subset or None, split=split)
            except ValueError as error:
                if "split" not in str(error).lower():
                    raise
                splits = datasets.load_dataset(repository, subset or None)
    except Exception as error:  # no common base class
        cause = unreached or f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        wrong = (
            f"is not a file here ({Path(repository).absolute()}) and could not be had from the hub ({cause})"
        )
        todo = (
            "check the path, the data set's name and the network; HF_HUB_OFFLINE=1 reads the cache without"
            " asking"
        )
        raise DataError(describe(name, wrong, todo=todo)) from error
    # The same rules for names of splits as in folders.
    chosen = choose_split(split, list(splits), held_out)
    if chosen is None:
        raise DataError(
            describe(name, "has no such split", expected=" | ".join(splits), got=split, todo="set data.split")
        )
    return splits[chosen]


def _read(read: Any, name: str, kind: str) -> Any:
    try:
        with _quiet():
            return read()
    except Exception as error:
        # `datasets` has no common base class for what it raises, and a hostile file can raise nearly
        # anything.
        first = error.__cause__ or error  # `datasets` wraps what says more
        cause = f"{type(first).__name__}: {str(first).splitlines()[0] if str(first) else ''}"
        todo = "write it again, or its rows as .jsonl"
        raise DataError(describe(name, f"cannot be read as {kind} ({cause})", todo=todo)) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars in a log."""
    import datasets

    silenced = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if silenced:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if silenced:
            datasets.enable_progress_bars()


def _index(path: Path, key: str, name: str) -> list[str]:
    """File or folder names listed by an index file; none of them may lead out of its folder."""
    try:
        with open_plain(path) as stream:
            items = json.loads(stream.read(MAX_INDEX_BYTES), object_pairs_hook=once)[key]
        names = [item["filename"] if isinstance(item, dict) else item for item in items]
        if all(isinstance(item, str) and Path(item).name == item for item in names):
            return names
        wrong = f"{path.name} points outside its folder"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        wrong = f"{path.name} is damaged ({getattr(error, 'strerror', None) or type(error).__name__})"
    raise DataError(describe(name, f"cannot be read as arrow: {wrong}", todo="write it again"))
