"""Saving one generation: everything under a temporary name, synced, the manifest last, then one rename.

Ranks meet in the folder, not in a collective, so that a background thread may do all of this: every rank
leaves a part list when its shard is whole; rank 0 waits for all of them, writes the model and the manifest,
and renames.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repsft_fast.checkpoint.files import hash_bytes, hash_file, parse_json, read_small
from repsft_fast.checkpoint.hostsum import host_checksums
from repsft_fast.checkpoint.manifest import (
    MANIFEST,
    MANIFEST_LIMIT_BYTES,
    FileEntry,
    Manifest,
    ShardEntry,
    TensorEntry,
    check_cover,
    folder_name,
    generations,
    move_latest,
    read_latest,
    shard_file,
    values_file,
)
from repsft_fast.checkpoint.pieces import Piece, piece_of
from repsft_fast.checkpoint.seconds import SaveSeconds
from repsft_fast.checkpoint.shards import CHUNK_BYTES, DTYPE_NAMES, write_shard
from repsft_fast.errors import CheckpointError, describe
from repsft_fast.files import crash_point, replace_file, sync_folder, sync_tree, write_file
from repsft_fast.state import JSON, encode_values

WRITING = ".writing-"
POLL_SECONDS = 0.05
WriteModel = Callable[[Path, Mapping[str, Tensor]], None]


def next_generation(folder: str | os.PathLike) -> int:
    """A number no generation of this folder has."""
    return max(generations(Path(folder)), default=-1) + 1


def save(
    folder: str | os.PathLike,
    generation: int,
    tensors: Mapping[str, Tensor | Piece],
    values: Mapping[str, JSON],
    *,
    write_model: WriteModel | None = None,
    parent: int | None = None,
    score: float | None = None,
    identity: Mapping[str, JSON] | None = None,
    rank: int = 0,
    world_size: int = 1,
    attempt: str = "",
    timeout_s: float = 1800.0,
    seconds: SaveSeconds | None = None,
) -> Path:
    """Writes one generation and points LATEST at it; returns its folder. On ranks above 0 it returns with
    their part written.

    tensors       frozen: nothing may change them until this returns
    write_model   called on rank 0 as write_model(folder / "hf", tensors by name, whole, on the host, read as
                  asked for)
    parent        the generation this run came from: the last one saved or loaded, or reverted to
    score         higher is better, for keep-best
    identity      what a later run must share to resume from it (model, vocabulary …)
    attempt       the same fresh text on every rank, needed with several: parts of an earlier, dead attempt
                  must not be taken
    seconds       where the time goes is added up here, up to the failure of a save that fails

    Raises CheckpointError when anything fails, the disk being full among it: nothing temporary is left and
    what was whole before still is.
    """
    folder = Path(folder)
    seconds = seconds or SaveSeconds()
    target = folder / folder_name(generation)
    where = f"save of {target.name}"
    if world_size > 1 and not attempt:
        raise CheckpointError(describe(where, "needs an attempt name that all ranks share"))
    if target.exists():
        todo = "take next_generation()"
        raise CheckpointError(describe(where, "would write a generation twice", todo=todo))
    # Nothing below has a name that a reader takes for a generation until all of it is on the disk.
    temporary = writing_folder(folder, generation, attempt or uuid.uuid4().hex)
    try:
        temporary.mkdir(parents=True, exist_ok=world_size > 1)
        _write_part(temporary, tensors, values, rank, world_size, seconds)
        if rank == 0:
            facts = {"generation": generation, "parent": parent, "world_size": world_size, "score": score}
            _write_rest(temporary, facts, dict(identity or {}), write_model, timeout_s, seconds)
            with seconds.of("fsync"):
                _publish(temporary, target, generation)
    except BaseException as error:
        _abandon(temporary, rank, str(error))
        if isinstance(error, CheckpointError) or not isinstance(error, Exception):
            raise
        todo = "earlier generations are intact"
        raise CheckpointError(describe(where, "failed", got=_reason(error), todo=todo)) from error
    return target


def _abandon(temporary: Path, rank: int, reason: str) -> None:
    """Rank 0 takes the folder away; the others, for whose parts it waits there, leave word in it."""
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        leave_word(temporary, rank, reason)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}"


def _write_part(
    folder: Path,
    tensors: Mapping[str, Any],
    values: Mapping[str, JSON],
    rank: int,
    world_size: int,
    seconds: SaveSeconds,
) -> None:
    # Of what several ranks hold alike one writes; and an empty piece has no row to write.
    pieces = {name: piece_of(name, t, rank) for name, t in tensors.items()}
    mine = {name: p for name, p in pieces.items() if p.writes and p.local.numel()}
    shard, table = shard_file(rank, world_size), values_file(rank, world_size)
    # Summed before they are written, so that a disk that changes them is found out by the reader.
    with seconds.of("hash"):
        hashes = dict(zip(mine, host_checksums([p.local for p in mine.values()])))
    text = encode_values(values).encode()
    files = {
        shard: FileEntry(
            write_shard(folder / shard, {name: p.local for name, p in mine.items()}, "shard", seconds)
        ),
        table: FileEntry(write_file(folder / table, [text], "values", seconds.of), hash_bytes(text)),
    }
    # Every tensor is named, also those that others write: rank 0 sees where ranks disagree.
    part = {}
    for name, piece in pieces.items():
        shards = []
        if name in mine:
            shards = [ShardEntry(shard, piece.start, piece.rows, f"{hashes[name]:016x}")]
        with seconds.of("look"):
            nonfinite = _nonfinite(piece.local) if shards else 0
        entry = TensorEntry(DTYPE_NAMES[piece.local.dtype], piece.shape, tuple(shards), nonfinite)
        part[name] = asdict(entry)
    listed = json.dumps(
        {"tensors": part, "files": {name: asdict(entry) for name, entry in files.items()}}
    ).encode()
    # rank 0 waits for the name and reads at once; after a power cut nobody reads it
    replace_file(folder / f"part-{rank:05d}.json", listed, "part", timed=seconds.of, durable=False)


def _nonfinite(tensor: Tensor) -> int:
    """Elements that are NaN or infinite. A finite sum proves there are none, at the cost of one read."""
    if not tensor.is_floating_point() or tensor.element_size() == 1 or math.isfinite(tensor.sum().item()):
        return 0
    flat, step = tensor.reshape(-1), CHUNK_BYTES
    return sum(int((~torch.isfinite(flat[i : i + step])).sum()) for i in range(0, flat.numel(), step))


def writing_folder(folder: Path, generation: int, attempt: str) -> Path:
    return folder / f"{WRITING}{folder_name(generation)}-{attempt}"


def leave_word(temporary: Path, rank: int, reason: str) -> None:
    """Tells rank 0 not to wait for this one. Best effort: on a dead disk rank 0 finds out by its own writes
    or its clock."""
    try:
        write_file(temporary / f"failed-{rank:05d}.txt", [reason.encode()], "failure")
    except OSError:
        return


def _parts(temporary: Path, world_size: int, timeout_s: float) -> list[dict[str, Any]]:
    """The part lists of all ranks, in order. Raises CheckpointError naming a rank that failed or did not
    come."""
    deadline = time.monotonic() + timeout_s
    while True:
        missing = [r for r in range(world_size) if not (temporary / f"part-{r:05d}.json").exists()]
        for r in missing:
            word = temporary / f"failed-{r:05d}.txt"
            if word.exists():
                raise CheckpointError(
                    describe(f"rank {r}", "could not write its part", got=word.read_text(errors="replace"))
                )
        if not missing:
            break
        if time.monotonic() > deadline:
            raise CheckpointError(
                describe("save", f"waited {timeout_s:g} s for the parts of ranks {missing}")
            )
        time.sleep(POLL_SECONDS)
    names = [f"part-{r:05d}.json" for r in range(world_size)]
    return [parse_json(read_small(temporary, name, MANIFEST_LIMIT_BYTES), name) for name in names]


def _write_rest(
    temporary: Path,
    facts: dict[str, Any],
    identity: dict,
    write_model: WriteModel | None,
    timeout_s: float,
    seconds: SaveSeconds,
) -> None:
    # The list of what the manifest will name: nothing else is read later.
    with seconds.of("wait"):
        parts = _parts(temporary, facts["world_size"], timeout_s)
    tensors = _merge([part["tensors"] for part in parts])
    files = {name: FileEntry(**entry) for part in parts for name, entry in part["files"].items()}
    # A library writes the model by its own ways: what it wrote is synced and summed here.
    if write_model is not None:
        from repsft_fast.checkpoint.reader import WholeTensors

        model = temporary / "hf"
        model.mkdir()
        with seconds.of("model"):
            write_model(model, WholeTensors(temporary, tensors))
        crash_point("model: before fsync")
        with seconds.of("fsync"):
            sync_tree(model)
        for path in sorted(p for p in model.rglob("*") if p.is_file()):
            name = path.relative_to(temporary).as_posix()
            with seconds.of("hash"):
                files[name] = FileEntry(path.stat().st_size, hash_file(temporary, name))
    # Last, for a folder with a manifest is a whole one.
    for r in range(facts["world_size"]):
        (temporary / f"part-{r:05d}.json").unlink()
    versions = {
        "repsft_fast": _version(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    manifest = Manifest(**facts, tensors=tensors, files=files, identity=identity, versions=versions)
    write_file(temporary / MANIFEST, [manifest.encode()], "manifest", seconds.of)
    with seconds.of("fsync"):
        sync_folder(temporary)


def _version() -> str:
    try:
        return importlib.metadata.version("repsft-fast")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "source"


def _merge(parts: list[dict[str, Any]]) -> dict[str, TensorEntry]:
    """One entry per tensor from every rank's. Raises CheckpointError when ranks disagree or rows are
    missing."""
    merged: dict[str, TensorEntry] = {}
    for name, first in parts[0].items():
        entries: list[Any] = [part.get(name) for part in parts]
        if any(
            e is None or (e["dtype"], e["shape"]) != (first["dtype"], first["shape"]) for e in entries
        ) or any(part.keys() != parts[0].keys() for part in parts):
            raise CheckpointError(describe(f"state {name}", "differs between ranks", got=entries))
        shards = sorted((ShardEntry(**s) for e in entries for s in e["shards"]), key=lambda s: s.start)
        merged[name] = TensorEntry(
            first["dtype"], tuple(first["shape"]), tuple(shards), sum(e["nonfinite"] for e in entries)
        )
        try:
            check_cover(name, merged[name])
        except ValueError as error:
            raise CheckpointError(
                describe(f"state {name}", "is not whole over the ranks", got=str(error))
            ) from error
    return merged


def _publish(temporary: Path, target: Path, generation: int) -> None:
    crash_point("generation: before rename")
    os.rename(temporary, target)  # fails when the target exists: a generation is never written twice
    try:
        crash_point("generation: after rename")
        sync_folder(target.parent)
        crash_point("generation: after fsync")
        move_latest(target.parent, generation)
    except BaseException:
        latest, _ = read_latest(target.parent)
        if latest is None or latest.generation != generation:
            os.rename(target, temporary)  # reported failed means gone: the caller removes it
        raise


def leftovers(folder: Path) -> Iterator[Path]:
    """Temporary files and folders of saves and deletions that a crash cut short."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith((WRITING, ".trash-", ".LATEST")):
                yield path
