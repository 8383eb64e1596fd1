"""Where rows come from: files, folders, globs, hub ids. Yields (row, "file:row") and never trusts a byte.

JSON and CSV are read by ourselves (`text_rows`); parquet, arrow and the hub go through `datasets` (`arrow`).
Which files of a folder are meant is `folders`' business, and nothing that looks like a path is asked of the
hub (`hub`).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from repsft_fast.data.arrow import open_hub, open_saved, open_table
from repsft_fast.data.card import matcher
from repsft_fast.data.filetypes import (
    SUFFIXES,
    check_beginning,
    check_regular,
    kind_of,
    known_unread,
    refusal,
)
from repsft_fast.data.folder_walk import files_below
from repsft_fast.data.folders import beside_saved, choose_files
from repsft_fast.data.source import Source
from repsft_fast.data.text_rows import text_rows
from repsft_fast.errors import DataError, describe, open_plain
from repsft_fast.hub import near_path, why_local

# without slices (train[:10%]) and sums (train+test), which only the hub's library cuts
SPLIT_NAME = re.compile(r"[\w.-]+")

SourceSpec = str | Path | Sequence[str | Path] | Mapping[str, "str | Path | Sequence[str | Path]"]


def list_sources(
    sources: SourceSpec, split: str = "train", beside: Sequence[Source] | None = None
) -> list[Source]:
    """Every file, arrow folder or hub id named, in order; of a folder the files of `split`.

    beside: the training sources, when these are held out of training: no file may be one of them, and a
    source with a single split is read whatever that is called, unless it is a source of training too.
    Raises DataError for one that is not there, is there twice, or where it cannot be known what is meant.
    """
    named = _named(sources)
    if not named:
        raise DataError(
            describe("data", "names no source", expected="a path, a list of paths, {task: path} or a hub id")
        )
    held_out = beside is not None
    listed = [
        replace(source, task=task, held_out=held_out)
        for task, value in named
        for source in _expand(value, split, held_out)
    ]
    return _apart_from(_without_doubles(listed), beside or ())


def _named(sources: SourceSpec) -> list[tuple[str | None, Any]]:
    """(task or None, what was written as one source), in order. DataError for a task without a name or
    source."""
    named: list[tuple[str | None, Any]] = []
    pairs = sources.items() if isinstance(sources, Mapping) else [(None, sources)]
    for task, value in pairs:
        # A mapping's values may be lists too, and text is a sequence.
        values: list[Any] = [value]
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            values = list(value)
        if task is not None and not (str(task).strip() and values):
            lacks = "source" if str(task).strip() else "name"
            raise DataError(describe("data", f"task {task!r} has no {lacks}", todo="write one"))
        named += [(task, item) for item in values]
    return named


def _apart_from(sources: list[Source], training: Sequence[Source]) -> list[Source]:
    """Held-out sources share no rows with those of training; where both are one data set, only the split
    tells them apart."""
    # By what the names lead to: a link or another spelling is the same file.
    known = {_identity(source): source for source in training}
    apart = []
    for source in sources:
        if (first := known.get(_identity(source))) is not None:
            splits = source.path is None or (
                source.kind == "arrow" and (source.path / "dataset_dict.json").is_file()
            )
            if not splits:
                todo = "name other rows, or carve some off: data.validation_fraction, data.test_fraction"
                raise DataError(
                    describe(source.name, f"is held out and read for training too ({first.name})", todo=todo)
                )
            source = replace(source, held_out=False)
        apart.append(source)
    return apart


def _expand(value: object, split: str, held_out: bool) -> list[Source]:
    if not isinstance(value, str | Path) or str(value) == "":
        raise DataError(describe("data", "is not a source", expected="a path or a hub id", got=repr(value)))
    name = str(value)
    try:
        path = Path(value).expanduser()
        os.stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            check_regular(path, name)
        return _not_there(name, path, split, held_out)
    # Name too long, NUL inside, a loop of links, no such user, no permission.
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OSError) and (os.path.islink(path) or isinstance(error, PermissionError)):
            raise DataError(
                describe(name, f"cannot be read ({error.strerror})", todo="check the path")
            ) from None
        return _not_there(name, Path(name), split, held_out)
    if path.is_dir():
        return _folder(path, name, split, held_out)
    check_regular(path, name)
    kind = kind_of(path)
    if kind is None:
        raise refusal(path, name)
    _check_split_name(split, name)
    return [Source(name, kind, path, None)]


def _folder(path: Path, name: str, split: str, held_out: bool) -> list[Source]:
    _check_split_name(split, name)
    if any(os.path.lexists(path / index) for index in ("state.json", "dataset_dict.json")):
        return [Source(name, "arrow", path, None, notes=beside_saved(path, name, split, held_out))]
    files, notes = choose_files(path, name, split, held_out)
    listed = [Source(f"{name.rstrip('/')}/{file.inside}", file.kind, file.path, None) for file in files]
    return [replace(listed[0], notes=tuple(notes)), *listed[1:]]


def _check_split_name(split: str, name: str) -> None:
    if not SPLIT_NAME.fullmatch(split):
        todo = "write the name of a split, and see data.samples and data.validation_fraction for parts of it"
        raise DataError(describe("data.split", f"is not the name of a split of {name}", got=split, todo=todo))


def _not_there(name: str, path: Path, split: str, held_out: bool) -> list[Source]:
    """A glob, a hub id, or a slip of the pen."""
    # What people write for a source that is none, each with what would be one.
    if "://" in name:
        hub = re.match(r"(?:hf://|https?://(?:www\.)?huggingface\.co/)datasets/([\w.-]+/[\w.-]+)", name)
        todo = f"name the hub id: {hub[1]}" if hub else "download it and name the file, or name a hub id"
        todo = f"write the path: {name[7:]}" if name.startswith("file:///") else todo
        raise DataError(describe(name, "is a URL, which is not fetched", todo=todo))
    if any(sign in name for sign in "*?[") and "\0" not in name:
        return _glob(name, path, split, held_out)
    repository, _, subset = name.partition(":")
    # A hub id without an owner has no dot in it: rows.jsonll is a slip of the pen.
    dotted = "it looks like a file's name" if "/" not in repository and "." in repository else None
    no_subset = None if re.fullmatch(r"[\w.-]*", subset) else "it is no hub id"
    why = why_local(repository, SUFFIXES) or dotted or no_subset
    if why is None:
        return [Source(name, "hub", None, None)]
    # Asking the hub for a slip would take seconds and say nothing of the slip.
    near = near_path(path)
    todo = f"did you mean {near}?" if near else f"check the path ({why}: the hub is not asked)"
    if "$" in name:
        todo = "write the path out: variables are not filled in"
    raise DataError(describe(name, "does not exist", todo=todo))


def _glob(name: str, path: Path, split: str, held_out: bool) -> list[Source]:
    """The files that match, in the order of their names, whatever split they are of: the user named them."""
    # Errors and notes name files as the user wrote the folder: ~ and .. as they are.
    parts = path.parts
    first = next(number for number, part in enumerate(parts) if any(sign in part for sign in "*?["))
    base, pattern = Path(*parts[:first]), "/".join(parts[first:])
    shown = "/".join(Path(name).parts[: len(Path(name).parts) - len(parts) + first]).replace("//", "/")
    prefix = f"{shown}/".replace("//", "/") if shown else ""
    if not base.is_dir():
        raise DataError(describe(name, "matches no file", todo=f"there is no folder {base}"))
    matched = _matched(base, pattern, name)
    files = [(file, inside) for file, inside in matched if not file.is_dir() and kind_of(file) is not None]
    files = [(file, inside) for file, inside in files if not file.name.startswith((".", "_"))]
    others = [
        file for file, _ in matched if not file.is_dir() and kind_of(file) is None and known_unread(file)
    ]

    # Folders are meant only where no file is: beside files they are what the files lie among.
    folders = [(folder, inside) for folder, inside in matched if folder.is_dir()]
    if not files and folders:
        return [
            source
            for folder, inside in folders
            for source in _folder(folder, prefix + inside, split, held_out)
        ]
    if not files and others:
        raise refusal(others[0], name)
    if not files:
        bracket = "[ and ] are part of the pattern, a [ in a name is written [[]"
        todo = bracket if "[" in name else "check the pattern"
        raise DataError(describe(name, "matches no file", expected=" ".join(SUFFIXES), todo=todo))

    # What may have been meant and is not read is said, once.
    for file, inside in files:
        check_regular(file, prefix + inside)
    listed = [Source(prefix + inside, kind_of(file) or "", file, None) for file, inside in files]
    if others:
        more = " …" if len(others) > 5 else ""
        note = f"{name}: not read: {', '.join(other.name for other in others[:5])}{more}"
        listed[0] = replace(listed[0], notes=(note,))
    return listed


def _matched(base: Path, pattern: str, name: str) -> list[tuple[Path, str]]:
    """(file or folder, its place in `base`) of all that match, in order."""
    try:
        matches = matcher(pattern, name).fullmatch
        if "**" in pattern:
            found = [(file.path, file.inside) for file in files_below(base, str(base))]
            return [(path, inside) for path, inside in found if matches(inside)]
        return [(path, path.relative_to(base).as_posix()) for path in sorted(base.glob(pattern))]
    except (OSError, ValueError) as error:
        raise DataError(describe(name, f"cannot be looked up ({error})", todo="name the files")) from None


def _identity(source: Source) -> object:
    """Equal for two names of one file."""
    if source.path is None:
        return source.name
    status = source.path.stat()
    return status.st_dev, status.st_ino


def _without_doubles(listed: list[Source]) -> list[Source]:
    """The same rows twice are an error within a task and said between tasks."""
    seen: dict[object, Source] = {}
    for number, source in enumerate(listed):
        first = seen.setdefault(_identity(source), source)
        if first is source:
            continue
        if first.task == source.task:
            wrong = f"is named twice, as {first.name} too" if first.name != source.name else "is named twice"
            todo = "name it once; data.weight_column or mixture.weights make rows count more"
            raise DataError(describe(source.name, wrong, todo=todo))
        listed[number] = replace(
            source, notes=(*source.notes, f"{source.name} is in task {first.task} and in {source.task}")
        )
    return listed


def without_copies(opened: Sequence[tuple[Source, Any, str]]) -> None:
    """Files of one task with the same bytes are one file twice, as `_without_doubles` has it. opened:
    (source, …, hash)."""
    seen: dict[tuple[str | None, str], Source] = {}
    for source, _, digest in opened:
        first = seen.setdefault((source.task, digest), source)
        if first is not source and source.path is not None:
            todo = "name one of them; data.weight_column or mixture.weights make rows count more"
            raise DataError(describe(source.name, f"is a copy of {first.name}, byte for byte", todo=todo))


def open_rows(
    source: Source, split: str, *, columns: Sequence[str] | None = None
) -> tuple[Iterator[tuple[Any, str]], str]:
    """(rows with their places, hash of the content). Row numbers are 1-based; in JSONL and CSV they are
    lines. columns: of a CSV file without a header.

    A row may be a BadRow, which says what is wrong with it.
    """
    if source.path is None:
        dataset = open_hub(source.name, split, source.held_out)
        digest = str(dataset._fingerprint)
    else:
        digest = _hash_files(source.path)
        if source.kind in ("jsonl", "json", "csv", "tsv"):
            return text_rows(source, split, columns), digest
        if source.kind == "arrow":
            dataset = open_saved(source.path, source.name, split, source.held_out)
        else:
            _check_table(source)
            dataset = open_table(source.path, source.name, source.kind)
    return ((row, f"{source.name}:{number}") for number, row in enumerate(dataset, 1)), digest


def _hash_files(path: Path) -> str:
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    total = hashlib.sha256()
    for file in files:
        try:
            with open_plain(file) as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            wrong = f"cannot be read ({error.strerror})"
            raise DataError(describe(str(file), wrong, todo="check the file and its permissions")) from None
    return total.hexdigest()


def _check_table(source: Source) -> None:
    assert source.path is not None
    with open_plain(source.path) as stream:
        beginning = stream.read(32)
    if beginning.startswith(b"version https://git-lfs"):
        check_beginning(beginning, source.name)
