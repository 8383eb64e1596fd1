"""One run per folder: a lock the kernel gives back however the process ends.

`flock` on `.lock` inside the folder; the file's text says who holds it, for the message only. After kill -9
the text is stale and the lock is free, so nobody has to delete anything.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import time
from pathlib import Path
from types import TracebackType

from repsft_fast.errors import ConfigError, TrainingError, describe
from repsft_fast.files import replacing

NAME = ".lock"
_BEGINS = b'{"pid": '
_HOW = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe is not waited for
_ELSEWHERE = "mend that, or choose another folder"
_TRIES = 20  # another start may fail, and take its own .lock away, between our opening it and our locking it


class FolderLost(TrainingError):
    """The folder is no longer this run's alone: nothing more is written to it."""


class RunLock:
    """Holds a run folder, which is made if it is not there. Use as a context manager, or `close`.

    message   set where the file system knows no locks: then nothing stops a second run, and the user should
              know
    created   whether `.lock` was not there before
    Raises ConfigError (a user's mistake, exit 2) naming process, host and time when another run holds the
    folder, and for a `.lock` that no run wrote: it is somebody's file.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.message = ""
        self.created = False
        self._fd = -1
        self._text = b""
        # a child must not keep the lock alive after its parent's death
        os.register_at_fork(after_in_child=self._forget)
        try:
            self._take()
        except OSError as error:
            self._forget()
            raise ConfigError(
                describe(self._where(), "cannot be written", got=error.strerror, todo=_ELSEWHERE)
            ) from error
        except BaseException:
            self._forget()
            raise

    def _take(self) -> None:
        for tried in range(_TRIES):
            self._open()
            self._lock()
            # Some network file systems number a file anew at every look: then no try would do, and a linked
            # one is good enough.
            if self._in_place() or (
                tried == _TRIES - 1 and self._fd >= 0 and os.fstat(self._fd).st_nlink > 0
            ):
                break
            self._forget()
        else:
            wrong = f"its {NAME} is gone as soon as it is made"
            raise ConfigError(describe(self._where(), wrong, todo="try again, or choose another folder"))
        if not _is_ours(os.pread(self._fd, 4096, 0)):
            wrong, todo = f"its {NAME} is no run's", "move that file away, or choose another folder"
            raise ConfigError(describe(self._where(), wrong, got=str(self.folder / NAME), todo=todo))
        if os.fstat(self._fd).st_nlink > 1:
            self._part_from_copies()
        now = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._text = json.dumps(now).encode()
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, self._text, 0)

    def check(self) -> None:
        """FolderLost when the folder is no longer this run's alone."""
        if (words := self.lost()) is not None:
            todo = (
                "nothing more is written; see what runs there, then --resume goes on from its last checkpoint"
            )
            raise FolderLost(describe(str(self.folder), words, todo=todo))

    def lost(self) -> str | None:
        """Words when `.lock` is no longer the file that this run holds: another may have begun here. One
        stat, as a rule."""
        path = self.folder / NAME
        what = "was replaced"
        try:
            if self._fd < 0 or self._in_place():
                return None
            with open(os.open(path, _HOW), "rb") as file:  # some network file systems number a file anew
                if file.read(len(self._text) + 1) == self._text:
                    return None
        except FileNotFoundError:
            what = "was removed"
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP, errno.EISDIR):
                return None  # the file system does not answer, which says nothing of the file
        todo = "see that no other run is in this folder, then go on with --resume"
        return describe(str(path), f"{what} while this run held the folder", todo=todo)

    def _where(self) -> str:
        return f"run folder {self.folder}"

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except ValueError as error:  # a NUL inside
            raise OSError(errno.EINVAL, str(error)) from error
        except FileExistsError as error:
            raise OSError(
                errno.ENOTDIR, "it is a link to nothing" if self.folder.is_symlink() else "it is no folder"
            ) from error
        path = self.folder / NAME
        try:
            self._fd, self.created = os.open(path, _HOW | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileNotFoundError:
            return  # the folder was taken away meanwhile: the next try makes it
        except FileExistsError:
            self.created = False
            try:
                self._fd = os.open(path, _HOW)
            except FileNotFoundError:
                return  # taken away meanwhile: the next try makes it
            except OSError as error:
                raise OSError(error.errno, f"{NAME} is {_kind(path)}: {error.strerror}") from error

    def _lock(self) -> None:
        if self._fd < 0:
            return
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            raise OSError(errno.EINVAL, f"{NAME} is {_kind(self.folder / NAME)}")
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                self.message = (
                    f"{self._where()}: its file system has no locks ({error.strerror}); do not start two runs"
                    " in it"
                )
                return
            todo = "wait for it or choose another folder"
            raise ConfigError(
                describe(self._where(), "is in use by another run", got=self._holder(), todo=todo)
            ) from None

    def _in_place(self) -> bool:
        """Whether the name leads to the file that is held: a failed start takes its own away, perhaps after
        we opened it."""
        if self._fd < 0:
            return False
        held, there = os.fstat(self._fd), self._there()
        return there is not None and (held.st_dev, held.st_ino) == (there.st_dev, there.st_ino)

    def _there(self) -> os.stat_result | None:
        try:
            return os.stat(self.folder / NAME, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def _part_from_copies(self) -> None:
        """`cp -al` gives a folder's files second names elsewhere: writing would change the copy, locking
        would lock both."""
        fd = -1
        try:
            with replacing(self.folder / NAME) as new:
                fd = os.open(new, _HOW | os.O_CREAT | os.O_EXCL, 0o666)
                if not self.message:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise
        self._forget()
        self._fd = fd

    def _holder(self) -> str:
        try:
            found = json.loads(os.pread(self._fd, 4096, 0))
            return f"process {found['pid']} on {found['host']} since {found['since']}"
        except (ValueError, KeyError, TypeError):
            return "a process that left no name"

    def _forget(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def close(self, *, remove: bool = False) -> None:
        """Gives the folder back at once, whatever children were forked meanwhile. remove: with it `.lock`,
        where it is ours."""
        if self._fd >= 0:
            if remove and self._in_place():
                (self.folder / NAME).unlink(missing_ok=True)
            if not self.message:
                fcntl.flock(self._fd, fcntl.LOCK_UN)
        self._forget()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_ours(text: bytes) -> bool:
    """What a run writes, or what a power cut leaves of it: a part, zeros or nothing."""
    return text.startswith(_BEGINS) or _BEGINS.startswith(text.strip(b"\0"))


def _kind(path: Path) -> str:
    mode = os.lstat(path).st_mode
    kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFREG: "a file", stat.S_IFIFO: "a pipe"}
    return kinds.get(stat.S_IFMT(mode), "no file")
