"""Finding the newest whole generation, verifying it, and loading it into live tensors: all of it or
nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from repsft_fast.checkpoint.files import hash_bytes, hash_file, open_inside, parse_json, read_small
from repsft_fast.checkpoint.manifest import (
    Manifest,
    ShardEntry,
    TensorEntry,
    folder_name,
    generations,
    read_latest,
    read_manifest,
    values_file,
)
from repsft_fast.checkpoint.pieces import Piece, piece_of
from repsft_fast.checkpoint.shards import DTYPE_NAMES, DTYPES, Stretch, read_header, read_summed
from repsft_fast.errors import CheckpointError, describe
from repsft_fast.state import JSON

VALUES_LIMIT_BYTES = 1 << 30
READERS = 2  # each reads and sums


class ForeignCheckpoint(CheckpointError):
    """Whole, but of another model, recipe or dtype: older generations would not help, other settings
    would."""

    exit_code = 2


@dataclass(frozen=True)
class Generation:
    """A generation that may be loaded."""

    path: Path
    manifest: Manifest
    problems: tuple[str, ...] = ()  # what was wrong with LATEST and the generations passed over, in words

    @property
    def number(self) -> int:
        return self.manifest.generation


@dataclass(frozen=True)
class Resumed:
    """What a load gave, beside the tensors."""

    # of this rank; of rank (rank mod saved world size) when the number of ranks changed
    values: dict[str, JSON]
    generation: Generation
    resharded: bool = False  # the number of ranks changed: per-rank streams must be drawn anew
    problems: tuple[str, ...] = field(default=())


class _Shards:
    """Tensors of one generation read from its shard files, each file's header read and checked once."""

    def __init__(self, folder: Path, tensors: Mapping[str, TensorEntry]):
        self._folder, self._tensors = folder, tensors
        self._headers: dict[str, dict[str, Stretch]] = {}

    def read(self, name: str, shard: ShardEntry, into: Tensor | None = None) -> None:
        """One shard into host memory [rows, ...], or past it (None), its hash verified. Raises
        CheckpointError naming both."""
        entry = self._tensors[name]
        where = f"{self._folder.name}/{shard.file}: {name}"
        with open_inside(self._folder, shard.file) as fd:
            if shard.file not in self._headers:
                self._headers[shard.file] = read_header(fd, f"{self._folder.name}/{shard.file}")
            stretch = self._headers[shard.file].get(name)
            expected = (entry.dtype, entry.shard_shape(shard))
            if stretch is None or (stretch.dtype, stretch.shape) != expected:
                raise CheckpointError(
                    describe(where, "is not what the manifest says", expected=expected, got=stretch)
                )
            if read_summed(fd, stretch, where, into) != shard.hash:
                raise CheckpointError(describe(where, "is damaged: its contents do not match their hash"))

    def check(self, name: str, start: int, rows: int) -> None:
        """That every shard these rows lie in is whole; nothing is kept."""
        for shard in self._tensors[name].shards:
            if max(start, shard.start) < min(start + rows, shard.start + shard.rows):
                self.read(name, shard)

    def rows(self, name: str, start: int, into: Tensor) -> None:
        """Rows start … of a tensor into host memory [rows, ...], put together from the shards they lie in."""
        entry = self._tensors[name]
        stop = start + (into.shape[0] if entry.shape else 1)
        for shard in entry.shards:
            first, last = max(start, shard.start), min(stop, shard.start + shard.rows)
            if first >= last:
                continue
            place = into[first - start : last - start] if entry.shape else into
            if last - first == shard.rows:
                self.read(name, shard, place)
                continue
            whole = torch.empty(entry.shard_shape(shard), dtype=DTYPES[entry.dtype])
            self.read(name, shard, whole)
            place.copy_(whole[first - shard.start : last - shard.start])


class WholeTensors(Mapping[str, Tensor]):
    """A generation's tensors by name, each read whole when asked for: what a model writer needs on any number
    of ranks."""

    def __init__(self, folder: Path, tensors: Mapping[str, TensorEntry]):
        self._shards, self._tensors = _Shards(folder, tensors), tensors

    def __getitem__(self, name: str) -> Tensor:
        entry = self._tensors[name]
        whole = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        self._shards.rows(name, 0, whole)
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def candidates(folder: str | os.PathLike) -> tuple[list[Path], list[str]]:
    """(generation folders in the order to try, what was wrong with LATEST).

    First where LATEST points, then back along its branch, then every other by number, highest first.
    """
    folder = Path(folder)
    there = generations(folder)
    latest, problems = read_latest(folder)
    order = [latest.generation, *latest.branch] if latest is not None else []
    if latest is not None and latest.generation not in there:
        problems.append(f"LATEST points to {folder_name(latest.generation)}, which is not there")
    order = list(dict.fromkeys([n for n in order if n in there] + there[::-1]))
    return [folder / folder_name(n) for n in order], problems


def verify(path: str | os.PathLike, *, deep: bool = True) -> list[str]:
    """Everything wrong with one generation, in words; empty when it is whole.

    Shallow: the manifest, and that each file is there with its size. Deep: every byte is read and hashed too.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    problems = [
        f"{path.name}: {name} has {manifest.tensors[name].nonfinite} NaN or infinite elements"
        for name in manifest.nonfinite
    ]
    checks: list[Callable[[], object]] = [
        partial(_check_file, path, name, entry.bytes, entry.hash if deep else "")
        for name, entry in manifest.files.items()
    ]
    if deep:
        shards = _Shards(path, manifest.tensors)
        checks += [
            partial(shards.read, name, shard)
            for name, entry in manifest.tensors.items()
            for shard in entry.shards
        ]
    with ThreadPoolExecutor(READERS) as pool:
        return problems + [problem for found in pool.map(_problems, checks) for problem in found]


def _problems(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except CheckpointError as error:
        return [str(error)]
    return []


def _check_file(folder: Path, name: str, size: int, digest: str) -> None:
    where = f"{folder.name}/{name}"
    with open_inside(folder, name) as fd:
        got = os.fstat(fd).st_size
    if got != size:
        raise CheckpointError(
            describe(
                where, "has another size than the manifest says", expected=f"{size:,} bytes", got=f"{got:,}"
            )
        )
    if digest and hash_file(folder, name) != digest:
        raise CheckpointError(describe(where, "is damaged: its contents do not match their hash"))


def newest(folder: str | os.PathLike, *, deep: bool = True) -> Generation:
    """The newest whole generation of the branch LATEST names, with what was wrong with everything newer.

    Raises CheckpointError when no generation is whole, or there is none, naming all problems.
    """
    order, problems = candidates(folder)
    for path in order:
        found = verify(path, deep=deep)
        if not found:
            return Generation(path, read_manifest(path), tuple(problems))
        problems += found
    raise _nothing(folder, problems)


def _nothing(folder: str | os.PathLike, problems: list[str]) -> CheckpointError:
    todo = "copy a whole one back, or start the run anew in another folder"
    text = describe(str(folder), "holds no whole checkpoint", todo=todo)
    return CheckpointError(text, problems=problems or ["no generation at all"])


def resume(
    folder: str | os.PathLike,
    tensors: Mapping[str, Tensor | Piece],
    *,
    rank: int = 0,
    world_size: int = 1,
    ignore: Collection[str] = (),
) -> Resumed:
    """Loads the newest whole generation, verifying while it reads, and falls back along the branch on damage.

    `problems` of the answer names the damage. Raises ForeignCheckpoint at once for a generation of another
    model, and CheckpointError when none can be loaded; the tensors are as `load` leaves them then. On several
    ranks, agree on `newest` first and `load` that: ranks deciding alone could differ.
    """
    order, problems = candidates(folder)
    for path in order:
        try:
            loaded = load(path, tensors, rank=rank, world_size=world_size, ignore=ignore)
            return Resumed(loaded.values, loaded.generation, loaded.resharded, tuple(problems))
        except ForeignCheckpoint:
            raise
        except CheckpointError as error:
            problems.append(str(error))
    raise _nothing(folder, problems)


@torch.no_grad()
def load(
    generation: Generation | str | os.PathLike,
    tensors: Mapping[str, Tensor | Piece],
    *,
    rank: int = 0,
    world_size: int = 1,
    prefix: str = "",
    ignore: Collection[str] = (),
    may_lack: Collection[str] = (),
    looked_at: bool = False,
) -> Resumed:
    """Copies a generation into live tensors, written on any number of ranks, and returns this rank's values.

    prefix    what the saved names have in front of the live ones
    ignore    beginnings of saved names that are not asked for here (kept moments, beside the live state)
    may_lack  beginnings of live names that an older version did not save: where none of one's is there, those
              stay as they are
    looked_at `newest` has just verified this generation, and an error ends the run: it is not looked at a
    second time

    Every byte is read and verified before the first live one changes, and then read again, verified again,
    into its place: no second state stands on the host. Raises CheckpointError naming file and tensor on any
    damage (live tensors are changed only by damage that was done between the two), ForeignCheckpoint when
    names, shapes or dtypes are another run's.
    """
    # What is asked for must be what was saved, before anything is read.
    path = generation.path if isinstance(generation, Generation) else Path(generation)
    manifest = read_manifest(path)
    lacking = tuple(
        b for b in may_lack if not any(saved.startswith(prefix + b) for saved in manifest.tensors)
    )
    there = {name: t for name, t in tensors.items() if not lacking or not name.startswith(lacking)}
    pieces = {prefix + name: piece_of(name, t, rank) for name, t in there.items()}
    _check_names(path, manifest, pieces, prefix, ignore)
    bad = [name for name in pieces if manifest.tensors[name].nonfinite]
    if bad:
        raise CheckpointError(describe(path.name, "holds NaN or infinite elements", got=bad))
    table = values_file(rank % max(1, manifest.world_size), manifest.world_size)
    values = _read_values(path, manifest, table)
    # All is looked at before the first live tensor changes.
    shards = _Shards(path, manifest.tensors)
    wanted = {name: piece for name, piece in pieces.items() if piece.local.numel()}
    with ThreadPoolExecutor(READERS) as pool:
        if not looked_at:
            _all(pool, (partial(shards.check, name, *_span(piece)) for name, piece in wanted.items()))
        _all(pool, (partial(_fill, shards, name, piece) for name, piece in wanted.items()))
    found = generation if isinstance(generation, Generation) else Generation(path, manifest)
    return Resumed(values, found, manifest.world_size != world_size)


def _span(piece: Piece) -> tuple[int, int]:
    return piece.start, piece.local.shape[0] if piece.local.dim() else 1


def _fill(shards: _Shards, name: str, piece: Piece) -> None:
    """Read a tensor where it lies; by way of the host where it lies on a device, or in pieces."""
    local = piece.local.detach()
    direct = local.device.type == "cpu" and local.is_contiguous()
    room = local if direct else torch.empty(local.shape, dtype=local.dtype)
    shards.rows(name, piece.start, room)
    if not direct:
        local.copy_(room)


def _all(pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], None]]) -> None:
    coming = [pool.submit(task) for task in tasks]
    try:
        for future in coming:
            future.result()
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


def values_of(path: Path) -> dict[str, JSON]:
    """The main rank's values of a generation, tensors unread. Raises CheckpointError on damage."""
    manifest = read_manifest(path)
    return _read_values(path, manifest, values_file(0, manifest.world_size))


def _read_values(path: Path, manifest: Manifest, table: str) -> dict[str, JSON]:
    where = f"{path.name}/{table}"
    if table not in manifest.files:
        raise CheckpointError(describe(where, "is not in the manifest"))
    data = read_small(path, table, VALUES_LIMIT_BYTES)
    if hash_bytes(data) != manifest.files[table].hash:
        raise CheckpointError(describe(where, "is damaged: its contents do not match their hash"))
    values = parse_json(data, where)
    if not isinstance(values, dict):
        raise CheckpointError(describe(where, "is no table"))
    return values


def _check_names(
    path: Path, manifest: Manifest, pieces: Mapping[str, Piece], prefix: str, ignore: Collection[str]
) -> None:
    # Both ways: one that is missing would stay as it was drawn, one that nobody asks for says another model.
    saved = {
        n
        for n in manifest.tensors
        if n in pieces or (n.startswith(prefix) and not n.startswith(tuple(ignore)))
    }
    missing, unknown = sorted(pieces.keys() - saved), sorted(saved - pieces.keys())
    if missing or unknown:
        raise ForeignCheckpoint(
            describe(
                path.name,
                f"holds other tensors than this run, lacks {missing[:5]}, has unknown {unknown[:5]}",
                expected=f"{len(pieces)} tensors",
                got=f"{len(saved)}",
            )
        )
    # A dtype is not converted: a resumed run has the bits of one that was not interrupted.
    for name, piece in pieces.items():
        entry = manifest.tensors[name]
        expected = (DTYPE_NAMES.get(piece.local.dtype), piece.shape)
        if (entry.dtype, entry.shape) != expected:
            raise ForeignCheckpoint(
                describe(
                    f"{path.name}: {name}",
                    "has another shape or dtype than this run's",
                    expected=expected,
                    got=(entry.dtype, entry.shape),
                    todo="is it another model, vocabulary or precision?",
                )
            )
