"""Where rows come from: files, arrow folders, hub ids. Yields (row, "file:row") and never trusts a byte.

JSON is read here, line by line and bounded; parquet, arrow and the hub go through `datasets`.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repsft_fast.errors import DataError, describe, did_you_mean

MAX_LINE_BYTES = 64 * 2**20  # a longer JSONL line is a mistake (64 MiB of text is ~16M tokens), and must not fill the memory
MAX_JSON_BYTES = 2 * 2**30  # .json is read whole
JSON_LINES = (".jsonl", ".ndjson")
SUFFIXES = (*JSON_LINES, ".json", ".parquet")

SourceSpec = str | Path | Sequence[str | Path] | Mapping[str, "str | Path | Sequence[str | Path]"]


@dataclass(frozen=True)
class Source:
    name: str  # as the user wrote it, in errors
    kind: str  # jsonl | json | parquet | arrow | hub
    path: Path | None  # None for the hub
    task: str | None  # the key of {task: path}


def list_sources(sources: SourceSpec) -> list[Source]:
    """Every file, arrow folder or hub id named, in order. Raises DataError for one that is not there."""
    named: list[tuple[str | None, str | Path]] = []
    pairs = sources.items() if isinstance(sources, Mapping) else [(None, sources)]
    for task, value in pairs:
        values = [value] if isinstance(value, str | Path) else list(value)
        named += [(task, item) for item in values]
    if not named:
        raise DataError(describe("data", "names no source", expected="a path, a list of paths, {task: path} or a hub id"))
    return [source for task, value in named for source in _expand(value, task)]


def _expand(value: object, task: str | None) -> list[Source]:
    if not isinstance(value, str | Path) or str(value) == "":
        raise DataError(describe("data", "is not a source", expected="a path or a hub id", got=repr(value)))
    name, path = str(value), Path(value).expanduser()
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError):  # name too long, NUL inside
        is_folder = is_file = False
    if is_folder:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return [Source(name, "arrow", path, task)]
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not files:
            expected = f"a save_to_disk folder or files ending in {', '.join(SUFFIXES)}"
            raise DataError(describe(name, "is a folder without data", expected=expected))
        return [Source(f"{name.rstrip('/')}/{file.name}", _kind(file), file, task) for file in files]
    if is_file:
        if path.suffix not in SUFFIXES:
            raise DataError(describe(name, "is a kind of file we do not read", expected=" ".join(SUFFIXES), got=path.suffix))
        return [Source(name, _kind(path), path, task)]
    # A hub id without an owner has no dot in it: rows.jsonll is a slip of the pen, and asking the hub takes half a minute.
    dotted = "/" not in name and "." in name.partition(":")[0]
    looks_like_path = dotted or path.suffix in SUFFIXES or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", name):
        try:
            near = did_you_mean(path.name, [file.name for file in path.parent.iterdir()])
        except (OSError, ValueError):
            near = None
        raise DataError(describe(name, "does not exist", todo=f"did you mean {near}?" if near else "check the path"))
    return [Source(name, "hub", None, task)]


def _kind(file: Path) -> str:
    return "jsonl" if file.suffix in JSON_LINES else file.suffix[1:]


def open_rows(source: Source, split: str) -> tuple[Iterator[tuple[Any, str]], str]:
    """(rows with their places, hash of the content). Row numbers are 1-based; in JSONL they are lines."""
    if source.kind in ("arrow", "hub", "parquet"):
        dataset = _dataset(source, split)
        digest = _hash_files(source.path) if source.path else str(dataset._fingerprint)
        return ((row, f"{source.name}:{number}") for number, row in enumerate(dataset, 1)), digest
    assert source.path is not None
    return (_json_lines(source) if source.kind == "jsonl" else _json_rows(source)), _hash_files(source.path)


def _hash_files(path: Path) -> str:
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    total = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise DataError(describe(str(file), f"cannot be read ({error.strerror})")) from None
    return total.hexdigest()


def _dataset(source: Source, split: str) -> Any:
    import datasets

    folder = _arrow_folder(source, split) if source.kind == "arrow" else None
    silenced = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if silenced:
        datasets.disable_progress_bars()
    try:
        if source.kind == "parquet":
            return datasets.Dataset.from_parquet(str(source.path))
        if source.kind == "arrow":
            return datasets.load_from_disk(str(folder)) if folder is not None else []
        name, _, subset = source.name.partition(":")
        return datasets.load_dataset(name, subset or None, split=split)
    except Exception as error:
        # `datasets` has no common base class for what it raises, and a hostile file can raise nearly anything.
        cause = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if source.kind == "hub":
            wrong = f"is not a file here and could not be had from the hub ({cause})"
            todo = "check the path, the dataset's name and split, and the network (HF_HUB_OFFLINE)"
            raise DataError(describe(source.name, wrong, todo=todo)) from error
        raise DataError(describe(source.name, f"cannot be read as {source.kind} ({cause})", todo="write it again")) from error
    finally:
        if silenced:
            datasets.enable_progress_bars()


def _arrow_folder(source: Source, split: str) -> Path | None:
    """The folder of one saved Dataset, or None when it holds no rows (which `datasets` cannot load)."""
    assert source.path is not None
    folder = source.path
    if (folder / "dataset_dict.json").is_file():
        splits = _index(folder / "dataset_dict.json", "splits", source)
        if split not in splits:
            expected = " | ".join(splits)
            raise DataError(describe(source.name, "has no such split", expected=expected, got=split, todo="set data.split"))
        folder = folder / split
    files = _index(folder / "state.json", "_data_files", source)
    return folder if files else None


def _index(path: Path, key: str, source: Source) -> list[str]:
    """File or folder names listed by an index file; none of them may lead out of its folder."""
    try:
        items = json.loads(path.read_bytes())[key]
        names = [item["filename"] if isinstance(item, dict) else item for item in items]
        if all(isinstance(name, str) and Path(name).name == name for name in names):
            return names
        wrong = f"{path.name} points outside its folder"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        wrong = f"{path.name} is damaged ({type(error).__name__})"
    raise DataError(describe(source.name, f"cannot be read as arrow: {wrong}", todo="write it again"))


def _json_lines(source: Source) -> Iterator[tuple[Any, str]]:
    assert source.path is not None
    with source.path.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{source.name}:{number}"
            if len(line) > MAX_LINE_BYTES:
                todo = "is this JSONL, one object per line?"
                raise DataError(describe(where, "is too long a line", expected=f"at most {MAX_LINE_BYTES} bytes", todo=todo))
            if number == 1:
                line = _without_mark(line, where)
            if line.strip(b" \t\r\n"):
                yield _decode(line, where, torn=not line.endswith(b"\n")), where


def _without_mark(data: bytes, where: str) -> bytes:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(describe(where, "is UTF-16", expected="UTF-8", todo="convert the file"))
    return data.removeprefix(codecs.BOM_UTF8)


def _decode(data: bytes, where: str, torn: bool = False) -> Any:
    if b"\0" in data:
        todo = "the file was torn by a crash or is not text; remove the line"
        raise DataError(describe(where, f"holds a NUL byte at byte {data.index(0)}", todo=todo))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        got = f"0x{data[error.start]:02x} at byte {error.start}"
        raise DataError(describe(where, "is not UTF-8", expected="UTF-8", got=got, todo="convert the file")) from None
    try:
        return json.loads(text)
    except RecursionError:
        raise DataError(describe(where, "is nested too deeply", expected="a row of text fields")) from None
    except ValueError as error:
        wrong = f"is torn: the file ends in the middle of a row ({error})" if torn else f"is not JSON ({error})"
        raise DataError(describe(where, wrong, todo="repair or remove the line")) from None


def _json_rows(source: Source) -> Iterator[tuple[Any, str]]:
    """A .json file: an array of rows, an object that holds one such array, or JSON lines under another name."""
    assert source.path is not None
    if (size := source.path.stat().st_size) > MAX_JSON_BYTES:
        todo = "write it as .jsonl, which is read line by line"
        raise DataError(describe(source.name, "is too large", expected=f"{MAX_JSON_BYTES} bytes", got=size, todo=todo))
    data = _without_mark(source.path.read_bytes(), source.name)
    if not data.strip():
        return
    first, _, rest = data.strip().partition(b"\n")
    if first.rstrip().endswith(b"}") and rest.lstrip().startswith(b"{"):
        yield from _json_lines(source)
        return
    value = _decode(data, source.name)
    if isinstance(value, dict):
        arrays = [item for item in value.values() if isinstance(item, list) and item and isinstance(item[0], dict)]
        is_row = any(key in value for key in ("messages", "conversations"))
        value = arrays[0] if len(arrays) == 1 and not is_row else [value]
    if not isinstance(value, list):
        raise DataError(describe(source.name, "holds no rows", expected="an array of objects", got=type(value).__name__))
    yield from ((row, f"{source.name}:{number}") for number, row in enumerate(value, 1))
