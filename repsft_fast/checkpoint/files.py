"""Files of a checkpoint, which may be damaged or hostile: opened without leaving their folder, read to a
bound. How they are written is `repsft_fast.files`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from repsft_fast.errors import CheckpointError, describe

READ_CHUNK_BYTES = 1 << 22
# no leading dot: neither "..", nor our temporary names
_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._\-+=@]{0,199}")


@contextmanager
def open_inside(folder: Path, relative: object) -> Iterator[int]:
    """A descriptor of a regular file below `folder`, whatever an index claims.

    Raises CheckpointError for absolute paths, `..`, odd names, links on the way, missing files and anything
    not a plain file.
    """
    # An index may claim anything, and long paths open many folders.
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
    # Folder by folder, each below the one that is open: a link put in on the way leads nowhere.
    opened: list[int] = []
    try:
        try:
            opened.append(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            for part in parts[:-1]:
                opened.append(
                    os.open(
                        part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=opened[-1]
                    )
                )
            # NONBLOCK: a named pipe must not hang us
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            opened.append(os.open(parts[-1], flags, dir_fd=opened[-1]))
        except OSError as error:
            raise CheckpointError(
                describe(f"{folder}/{relative}", "cannot be opened", got=error.strerror)
            ) from error
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
                describe(
                    where, "is truncated", expected=f"{offset + len(into):,} bytes", got=f"{offset + at:,}"
                )
            )
        at += got


def read_small(folder: Path, relative: str, limit_bytes: int) -> bytes:
    """A whole small file. Raises CheckpointError when it is larger than the limit."""
    with open_inside(folder, relative) as fd:
        size = os.fstat(fd).st_size
        if size > limit_bytes:
            raise CheckpointError(
                describe(
                    f"{folder}/{relative}",
                    "is too large",
                    expected=f"at most {limit_bytes:,} bytes",
                    got=size,
                )
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
    """JSON from a file that may be damaged or hostile. Raises CheckpointError: no traceback, no key twice, no
    pickle."""
    if data[:1] == b"\x80" or data[:2] == b"PK":
        raise CheckpointError(
            describe(where, "is a pickle or zip archive, which is never read", expected="JSON")
        )
    try:
        return json.loads(data, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(describe(where, "is not JSON", got=str(error))) from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result
