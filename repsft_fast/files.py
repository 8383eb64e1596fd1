"""The one way a file is written: whole or not at all, and on the disk before anything points at it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from uuid import uuid4

_LONGEST_STEM = 50  # characters of a name kept in its temporary one: in bytes, a name of 255 still fits

_hook: Callable[[str], None] | None = None


def set_crash_hook(hook: Callable[[str], None] | None) -> None:
    """Tests let `hook` see, and kill the process at, every named moment of a write. None, the default, costs
    nothing."""
    global _hook
    _hook = hook


def crash_point(name: str) -> None:
    """A named moment at which a crash is survived."""
    if _hook is not None:
        _hook(name)


def write_file(
    path: Path,
    chunks: Iterable[Any],
    what: str,
    timed: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> int:
    """Writes a new file and syncs it; returns its bytes. Raises OSError, also where a file is: nothing is
    written over.

    chunks  contiguous buffers (bytes, memoryview, an array's data)
    what    names the crash points
    timed   entered as timed("write") and timed("fsync") around what takes that time
    """
    crash_point(f"{what}: before open")
    # the mode is the umask's: a folder may be shared
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        total = 0
        for chunk in chunks:
            data = memoryview(chunk).cast("B")
            at = 0
            with timed("write"):
                while at < len(data):  # a full disk or a signal may take only a part
                    at += os.write(fd, data[at:])
            total += len(data)
            crash_point(f"{what}: mid-write")
        crash_point(f"{what}: before fsync")
        with timed("fsync"):
            os.fsync(fd)
        crash_point(f"{what}: after fsync")
        return total
    finally:
        os.close(fd)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new name beside `path`, for what is to take its place when the block ends; gone when the block fails.

    The names cannot be guessed: two processes, also of two hosts, may write the same file at once, and a link
    somebody put there is not followed. A kill leaves .NAME.<32 hex digits> behind.
    """
    new = path.with_name(f".{path.name.lstrip('.')[:_LONGEST_STEM]}.{uuid4().hex}")
    try:
        yield new
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def replace_file(
    path: Path,
    data: bytes,
    what: str,
    *,
    timed: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    durable: bool = True,
) -> None:
    """Sets a small file's contents atomically: readers see the old or the new, also after a power cut. Raises
    OSError.

    durable  the new contents are the ones a power cut leaves when this returns; False: it may leave the old
             ones, and an error always means that they are in place
    """
    with replacing(path) as new:
        write_file(new, [data], what, timed)
    crash_point(f"{what}: after rename")
    if durable:
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
