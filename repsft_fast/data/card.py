"""README.md of a data set: the `configs` in its head say which files are which split (the hub's manual
configuration).

---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
---
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from repsft_fast.errors import DataError, describe, open_plain

MAX_HEAD_BYTES = 2**18  # of the YAML at the top; more is not a head
HEAD = re.compile(rb"\A(?:\xef\xbb\xbf)?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
# or harmless
_USED = {"config_name", "data_files", "data_dir", "default", "description", "version", "drop_labels"}


@dataclass(frozen=True)
class Card:
    """What the head says of files."""

    # {split: its files, of those there are}; None: the files' names say it
    splits: dict[str, set[str]] | None = None
    # {split: patterns that match none of the files}
    missing: dict[str, list[str]] = field(default_factory=dict)
    folder: str = ""  # where splits is None: the folder in which all the data lies, with a / at its end
    notes: tuple[str, ...] = ()  # what is to be said


def read_card(folder: Path, name: str, files: list[str]) -> Card:
    """What the card says of `files`. Raises DataError when it cannot be known what is meant."""
    card = folder / "README.md"
    where = f"{name.rstrip('/')}/README.md"
    if not os.path.lexists(card) or card.is_dir():
        return Card()
    try:
        with open_plain(card) as stream:
            head = HEAD.match(stream.read(MAX_HEAD_BYTES))
    except OSError as error:
        todo = "check its permissions, or name the files in place of the folder"
        raise DataError(describe(where, f"cannot be read ({error.strerror})", todo=todo)) from None
    if head is None or b"configs" not in head[1]:
        return Card()
    try:
        said = yaml.safe_load(head[1])
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        return Card(
            notes=(f"{where}: its head is no YAML ({str(error).splitlines()[0]}); split by the files' names",)
        )
    configs = said.get("configs") if isinstance(said, dict) else None
    if configs is None:
        return Card()
    # Only the files are taken from it: how to read them is decided here, and that is said.
    config = _the_one(configs, where)
    unused = sorted(map(str, config.keys() - _USED))
    notes = (f"{where}: how to read the files is not taken from it: {', '.join(unused)}",) if unused else ()
    # A pattern that matches nothing is kept apart: the split would be smaller than meant.
    splits: dict[str, set[str]] = {}
    missing: dict[str, list[str]] = {}
    for split, patterns in _patterns(config, where).items():
        found = {
            pattern: {file for file in files if matcher(pattern, where).fullmatch(file)}
            for pattern in patterns
        }
        splits[split] = set().union(*found.values())
        missing[split] = [pattern for pattern in patterns if not found[pattern]]
    if config.get("data_files") is None:  # a folder alone: what lies in it is split by its names
        return Card(folder=next(iter(_patterns(config, where).values()))[0].removesuffix("**"), notes=notes)
    return Card(splits, missing, notes=notes)


def matcher(pattern: str, where: str) -> re.Pattern[str]:
    """A glob over paths inside a folder: * and ? stay within a name, ** does not, [] is a class, {a,b} a
    choice."""
    parts = []
    for piece in re.findall(r"\*\*/|\*\*|\*|\?|\[!?\]?[^]]*\]|\{[^{}]*\}|[^*?]", pattern):
        if piece == "**/":
            parts.append("(?:.*/)?")
        elif piece == "**":
            parts.append(".*")
        elif piece == "*":
            parts.append("[^/]*")
        elif piece == "?":
            parts.append("[^/]")
        elif piece.startswith("[") and len(piece) > 2:
            sign, inner = ("^", piece[2:-1]) if piece[1] == "!" else ("", piece[1:-1])
            inner = inner.replace("\\", "\\\\").replace("[", "\\[").replace("^", "\\^")
            parts.append(f"(?!/)[{sign}{inner}]")
        elif piece.startswith("{") and len(piece) > 1:
            parts.append(f"(?:{'|'.join(map(re.escape, piece[1:-1].split(',')))})")
        else:
            parts.append(re.escape(piece))
    try:
        return re.compile("".join(parts), re.DOTALL)
    except re.error:
        raise DataError(
            describe(where, f"{pattern} is no pattern for files", todo="name the files")
        ) from None


def _the_one(configs: Any, where: str) -> dict[str, Any]:
    """The only subset, or the default one."""
    if (
        not isinstance(configs, list)
        or not configs
        or not all(isinstance(config, dict) for config in configs)
    ):
        raise DataError(
            describe(
                where, "its configs are no list of subsets", todo="name the files in place of the folder"
            )
        )
    names = [str(config.get("config_name", "default")) for config in configs]
    chosen = [
        config for config, name in zip(configs, names) if config.get("default") is True or name == "default"
    ]
    if len(configs) > 1 and len(chosen) != 1:
        todo = "name the files of one in place of the folder"
        raise DataError(
            describe(where, "describes several subsets and no default", expected=" | ".join(names), todo=todo)
        )
    return chosen[0] if len(configs) > 1 else configs[0]


def _patterns(config: dict[str, Any], where: str) -> dict[str, list[str]]:
    """{split: patterns}, from the forms the hub takes: a path, paths, or {split, path}s."""
    files = config.get("data_files")
    base = config.get("data_dir") or ""
    entries = files if isinstance(files, list) else [files if files is not None else "**"]
    if isinstance(files, dict):
        entries = [{"split": split, "path": path} for split, path in files.items()]
    splits: dict[str, list[str]] = {}
    # A pattern may name only what lies in the folder: anything else is not the data set.
    for entry in entries:
        entry = entry if isinstance(entry, dict) else {"split": "train", "path": entry}
        split, paths = entry.get("split", "train"), entry.get("path")
        paths = paths if isinstance(paths, list) else [paths]
        if (
            not isinstance(split, str)
            or not isinstance(base, str)
            or not all(isinstance(path, str) and path for path in paths)
        ):
            raise DataError(
                describe(where, "its data_files are no paths", todo="name the files in place of the folder")
            )
        for path in paths:
            pattern = "/".join(part for part in f"{base}/{path}".split("/") if part not in ("", "."))
            if ".." in pattern.split("/") or "://" in path or path.startswith("/"):
                raise DataError(
                    describe(
                        where, f"{path} leads out of the folder", todo="name the files in place of the folder"
                    )
                )
            splits.setdefault(split, []).append(pattern)
    if not splits:
        raise DataError(
            describe(where, "its data_files name none", todo="name the files in place of the folder")
        )
    return splits
