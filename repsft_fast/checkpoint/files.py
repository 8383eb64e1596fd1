"""Files that survive: written whole or not at all, synced before they are pointed at, opened without leaving their folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from repsft_fast.checkpoint.seconds import SaveSeconds
from repsft_fast.errors import CheckpointError, describe

READ_CHUNK_BYTES = 1 << 22
_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._\-+=@]{0,199}")  # no leading dot: neither "..", nor our temporary names

_hook: Callable[[str], None] | None = None


def set_crash_hook(hook: Callable[[str], None] | None) -> None:
    """Tests let `hook` see, and kill the process at, every named moment of a save. None, the default, costs nothing."""
    global _hook
    _hook = hook


def crash_point(name: str) -> None:
    """A named moment at which a crash is survived."""
    if _hook is not None:
        _hook(name)


def write_file(path: Path, chunks: Iterable[Any], what: str, seconds: SaveSeconds | None = None) -> int:
    """Writes a new file and syncs it; returns its bytes. Raises OSError, also where a file is: nothing is written over."""
    seconds = seconds or SaveSeconds()
    crash_point(f"{what}: before open")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        total = 0
        for chunk in chunks:
            data = memoryview(chunk).cast("B")
            at = 0
            with seconds.of("write"):
                while at < len(data):
                    at += os.write(fd, data[at:])
            total += len(data)
            crash_point(f"{what}: mid-write")
        crash_point(f"{what}: before fsync")
        with seconds.of("fsync"):
            os.fsync(fd)
        crash_point(f"{what}: after fsync")
        return total
    finally:
        os.close(fd)


def replace_file(path: Path, data: bytes, what: str) -> None:
    """Sets a small file's contents atomically: readers see the old or the new, also after a power cut. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        write_file(temporary, [data], what)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    crash_point(f"{what}: after rename")
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names inside a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """Syncs every file and folder below, for files that others wrote (an HF folder)."""
    for root, _, names in os.walk(folder):
        for name in names:
            fd = os.open(Path(root, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_folder(Path(root))


@contextmanager
def open_inside(folder: Path, relative: object) -> Iterator[int]:
    """A descriptor of a regular file below `folder`, whatever an index claims.

    Raises CheckpointError for absolute paths, `..`, odd names, links on the way, missing files and anything not a plain file.
    """
    parts = relative.split("/") if isinstance(relative, str) else []
    if not parts or not all(_COMPONENT.fullmatch(part) for part in parts) or len(parts) > 8:
        raise CheckpointError(
            describe(
                f"{folder}",
                "has an index that points outside or has an odd name",
                expected="a plain relative path",
                got=relative,
            )
        )
    opened: list[int] = []
    try:
        try:
            opened.append(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            for part in parts[:-1]:
                opened.append(os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=opened[-1]))
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # NONBLOCK: a named pipe must not hang us
            opened.append(os.open(parts[-1], flags, dir_fd=opened[-1]))
        except OSError as error:
            raise CheckpointError(describe(f"{folder}/{relative}", "cannot be opened", got=error.strerror)) from error
        if not stat.S_ISREG(os.fstat(opened[-1]).st_mode):
            raise CheckpointError(describe(f"{folder}/{relative}", "is not a regular file"))
        yield opened[-1]
    finally:
        for fd in reversed(opened):
            os.close(fd)


def read_exactly(fd: int, into: memoryview, offset: int, where: str) -> None:
    """Fills `into` from the file. Raises CheckpointError when the file ends early or cannot be read."""
    at = 0
    while at < len(into):
        try:
            got = os.preadv(fd, [into[at:]], offset + at)
        except OSError as error:
            raise CheckpointError(describe(where, "cannot be read", got=error.strerror)) from error
        if not got:
            raise CheckpointError(
                describe(where, "is truncated", expected=f"{offset + len(into):,} bytes", got=f"{offset + at:,}")
            )
        at += got


def read_small(folder: Path, relative: str, limit_bytes: int) -> bytes:
    """A whole small file. Raises CheckpointError when it is larger than the limit."""
    with open_inside(folder, relative) as fd:
        size = os.fstat(fd).st_size
        if size > limit_bytes:
            raise CheckpointError(
                describe(f"{folder}/{relative}", "is too large", expected=f"at most {limit_bytes:,} bytes", got=size)
            )
        data = bytearray(size)
        read_exactly(fd, memoryview(data), 0, f"{folder}/{relative}")
        return bytes(data)


def hash_bytes(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def hash_file(folder: Path, relative: str) -> str:
    """blake2b of a file, read in pieces."""
    digest = hashlib.blake2b(digest_size=16)
    with open_inside(folder, relative) as fd:
        offset = 0
        while chunk := os.pread(fd, READ_CHUNK_BYTES, offset):
            digest.update(chunk)
            offset += len(chunk)
    return digest.hexdigest()


def parse_json(data: bytes, where: str) -> Any:
    """JSON from a file that may be damaged or hostile. Raises CheckpointError: no traceback, no key twice, no pickle."""
    if data[:1] == b"\x80" or data[:2] == b"PK":
        raise CheckpointError(describe(where, "is a pickle or zip archive, which is never read", expected="JSON"))
    try:
        return json.loads(data, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(describe(where, "is not JSON", got=str(error))) from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result
