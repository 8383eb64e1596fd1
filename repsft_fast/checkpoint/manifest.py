"""The manifest of a generation, written last, and LATEST, which points at a branch of generations.

    gen-00000012/
        state-00000-of-00002.safetensors   one per rank: this rank's rows of every tensor it writes
        values-00000-of-00002.json         one per rank
        hf/                                what from_pretrained loads, when a model writer was given
        MANIFEST.json                      everything above with sizes and hashes; hashed itself
    LATEST, LATEST.backup                  {"generation": 12, "branch": [11, 7, …]}, hashed; two copies, one
                                           may be damaged

A number is given in the order of writing and never twice. After a revert the next generation's parent is the
one the run went back to, so the highest number of all may lie on an abandoned branch: only LATEST says where
the run is.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from repsft_fast.checkpoint.files import hash_bytes, parse_json, read_small
from repsft_fast.checkpoint.shards import DTYPES
from repsft_fast.errors import CheckpointError, describe
from repsft_fast.files import replace_file

FORMAT = 1
MANIFEST = "MANIFEST.json"
LATEST = "LATEST"
BACKUP = "LATEST.backup"
MANIFEST_LIMIT_BYTES = 1 << 28
_NAME = re.compile(r"gen-(\d{8})")


def folder_name(generation: int) -> str:
    return f"gen-{generation:08d}"


def number_of(name: str) -> int | None:
    """The generation a folder's name stands for, or None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def generations(folder: str | os.PathLike) -> list[int]:
    """Numbers of the generation folders there are, ascending; whole or not. Links are not generations."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = [(number_of(p.name), p) for p in folder.iterdir()]
    return sorted(n for n, p in found if n is not None and p.is_dir() and not p.is_symlink())


@dataclass(frozen=True)
class ShardEntry:
    """Rows of one tensor in one file."""

    file: str
    start: int
    rows: int
    hash: str  # 16 hex digits: csrc_triton.state_hash.checksum of the bytes


@dataclass(frozen=True)
class TensorEntry:
    dtype: str  # safetensors' name
    shape: tuple[int, ...]  # of the whole tensor
    shards: tuple[ShardEntry, ...]  # by start, covering every row once
    nonfinite: int = 0  # elements that are NaN or infinite

    def shard_shape(self, shard: ShardEntry) -> tuple[int, ...]:
        return (shard.rows, *self.shape[1:]) if self.shape else ()


@dataclass(frozen=True)
class FileEntry:
    bytes: int
    hash: str = ""  # blake2b; empty for shards, whose tensors are hashed one by one


@dataclass(frozen=True)
class Manifest:
    generation: int
    parent: int | None
    world_size: int
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]
    # what must match to resume: model, vocabulary, recipe …
    identity: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)  # of the software that wrote it; information only
    score: float | None = None  # for keep-best
    format: int = FORMAT

    @property
    def nonfinite(self) -> list[str]:
        return [name for name, entry in self.tensors.items() if entry.nonfinite]

    def encode(self) -> bytes:
        return _sealed(asdict(self))


def values_file(rank: int, world_size: int) -> str:
    return f"values-{rank:05d}-of-{world_size:05d}.json"


def shard_file(rank: int, world_size: int) -> str:
    return f"state-{rank:05d}-of-{world_size:05d}.safetensors"


def _sealed(body: Mapping[str, Any]) -> bytes:
    """JSON with a hash over the rest of it, so that one flipped bit anywhere is noticed."""
    text = json.dumps(body, separators=(",", ":"))
    return json.dumps({**body, "hash": hash_bytes(text.encode())}, separators=(",", ":")).encode() + b"\n"


def _unsealed(data: bytes, where: str) -> dict[str, Any]:
    body = parse_json(data, where)
    if not isinstance(body, dict):
        raise CheckpointError(describe(where, "is no table"))
    claimed = body.pop("hash", None)
    if type(body.get("format")) is int and body["format"] > FORMAT:
        raise CheckpointError(
            describe(
                where,
                "was written by a newer version",
                expected=f"format {FORMAT}",
                got=body["format"],
                todo="upgrade repsft-fast",
            )
        )
    if claimed is None or _sealed(body) != data:
        raise CheckpointError(describe(where, "is damaged: its contents do not match its own hash"))
    return body


def read_manifest(folder: str | os.PathLike) -> Manifest:
    """The manifest of one generation folder. Raises CheckpointError naming what is wrong with it."""
    folder = Path(folder)
    where = f"{folder.name}/{MANIFEST}"
    body = _unsealed(read_small(folder, MANIFEST, MANIFEST_LIMIT_BYTES), where)
    try:
        manifest = _manifest(body)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            describe(where, "is malformed", got=f"{type(error).__name__}: {error}")
        ) from error
    if folder.name != folder_name(manifest.generation):
        raise CheckpointError(
            describe(where, "belongs to another generation", expected=folder.name, got=manifest.generation)
        )
    return manifest


def _manifest(body: dict[str, Any]) -> Manifest:
    if body["format"] != FORMAT:
        raise ValueError(f"format {body['format']!r}")
    tensors = {name: _tensor_entry(name, entry) for name, entry in body["tensors"].items()}
    files = {
        name: FileEntry(_count(entry["bytes"]), str(entry["hash"])) for name, entry in body["files"].items()
    }
    unknown = {shard.file for entry in tensors.values() for shard in entry.shards} - files.keys()
    if unknown:
        raise ValueError(f"tensors in files that are not listed: {sorted(unknown)}")
    parent = body["parent"] if body["parent"] is None else _count(body["parent"])
    score = None if body["score"] is None else float(body["score"])
    identity, versions = dict(body["identity"]), dict(body["versions"])
    return Manifest(
        _count(body["generation"]),
        parent,
        _count(body["world_size"]),
        tensors,
        files,
        identity,
        versions,
        score,
    )


def _tensor_entry(name: str, entry: dict[str, Any]) -> TensorEntry:
    shards = tuple(
        ShardEntry(s["file"], _count(s["start"]), _count(s["rows"]), s["hash"]) for s in entry["shards"]
    )
    result = TensorEntry(
        entry["dtype"], tuple(map(_count, entry["shape"])), shards, _count(entry["nonfinite"])
    )
    check_cover(name, result)
    if result.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {result.dtype!r}")
    return result


def check_cover(name: str, entry: TensorEntry) -> None:
    """Raises ValueError unless the shards are all rows of the tensor, each once, in order."""
    at = 0
    for shard in entry.shards:
        if shard.start != at or shard.rows < 1:
            raise ValueError(f"{name} has rows missing or twice at {at}")
        at += shard.rows
    rows = entry.shape[0] if entry.shape else 1  # a scalar is one row
    if 0 in entry.shape:
        rows = 0  # an empty tensor has no shard
    if at != rows:
        raise ValueError(f"{name} has {at} of {rows} rows")


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


@dataclass(frozen=True)
class Latest:
    """Where the run is: a generation and, newest first, the generations it came from."""

    generation: int
    branch: tuple[int, ...] = ()


def read_latest(folder: str | os.PathLike) -> tuple[Latest | None, list[str]]:
    """(LATEST or its backup, what was wrong). (None, []) in a folder that never had one."""
    folder = Path(folder)
    problems, missing = [], 0
    for name in (LATEST, BACKUP):
        if not (folder / name).exists() and not (folder / name).is_symlink():
            missing += 1
            problems.append(f"{name} is missing")
            continue
        try:
            body = _unsealed(read_small(folder, name, 1 << 20), name)
            return Latest(_count(body["generation"]), tuple(map(_count, body["branch"]))), problems
        except CheckpointError as error:
            problems.append(str(error))
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"{name} is malformed: {type(error).__name__}: {error}")
    return None, problems if missing < 2 or generations(folder) else []


def move_latest(folder: str | os.PathLike, generation: int) -> None:
    """Points LATEST, atomically, at a generation and the branch that leads to it; its backup goes first.

    To be called after a revert too, when the run goes on from an earlier generation. Raises CheckpointError
    for a generation that is not there, OSError when the folder cannot be written.
    """
    folder = Path(folder)
    branch: list[int] = []
    manifest = read_manifest(folder / folder_name(generation))
    while manifest.parent is not None and manifest.parent not in branch and manifest.parent != generation:
        branch.append(manifest.parent)
        try:
            manifest = read_manifest(folder / folder_name(manifest.parent))
        except CheckpointError:  # deleted since, or damaged: what is older than it is no use without it
            break
    text = _sealed({"format": FORMAT, "generation": generation, "branch": branch})
    replace_file(folder / BACKUP, text, BACKUP)
    replace_file(folder / LATEST, text, LATEST)
