"""One run per folder: a lock the kernel gives back however the process ends.

`flock` on `.lock` inside the folder; the file's text says who holds it, for the message only. After kill -9 the text is
stale and the lock is free, so nobody has to delete anything.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from repsft_fast.errors import ConfigError, describe

NAME = ".lock"


class RunLock:
    """Holds a run folder. Use as a context manager, or `close`.

    message   set where the file system knows no locks: then nothing stops a second run, and the user should know
    Raises ConfigError (a user's mistake, exit 2) naming process, host and time when another run holds the folder.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.message = ""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise ConfigError(describe(f"run folder {self.folder}", "cannot be written", got=error.strerror)) from error
        os.register_at_fork(after_in_child=self._forget)  # a child must not keep the lock alive after its parent's death
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                self.message = (
                    f"run folder {self.folder}: its file system has no locks ({error.strerror}); do not start two runs in it"
                )
                return
            holder = self._holder()
            self._forget()
            raise ConfigError(
                describe(
                    f"run folder {self.folder}",
                    "is in use by another run",
                    got=holder,
                    todo="wait for it or choose another folder",
                )
            ) from None
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text.encode(), 0)

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

    def close(self) -> None:
        """Gives the folder back at once, whatever children were forked meanwhile."""
        if self._fd >= 0 and not self.message:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        self._forget()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
