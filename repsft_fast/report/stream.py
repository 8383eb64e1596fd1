"""Standard output and error as a run needs them: whatever becomes of the reader, the run goes on.

A pipe whose reader left (`| head`), a terminal that was closed, a full disk under `> log.txt`, a stream that
was closed before the program began, an encoding without the character: none of them is an error here. What
went wrong is kept in `trouble`.
"""

import errno
import io
import os
import select
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


class Stream(io.TextIOBase):
    """A text stream that cannot fail. What is not here (buffer, name, reconfigure, …) is the stream's own.

    stream: None where there is none (Python's, when the descriptor was closed at start).
    patience_s: how long one write may wait for a reader that does not read; then what does not fit is left
    out, and counted once it reads again. None = for ever, as files do. trouble: why nothing is written any
    more, "" while all is well; left: the reader closed its end, as `head` does.
    """

    def __init__(self, stream: Any, *, patience_s: float | None = None):
        self.inner: Any = stream.inner if isinstance(stream, Stream) else stream
        self.patience_s = patience_s
        self.trouble, self.left = "", False
        self._own = 0  # a descriptor of the same pipe or terminal on which a write never waits
        self._begun, self._left_out, self._behind = b"", 0, False

    def write(self, text: str) -> int:
        if self.inner is None or self.trouble:
            return len(text)
        try:
            if self.patience_s is None:
                self._give(text)
            else:
                self._give_patiently(text)
        # a stream that its owner made non-blocking: what it took in part it gets with the next
        except BlockingIOError:
            self._left_out += text.count("\n")
        except (OSError, ValueError) as error:
            self._broken(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:  # type: ignore[override]
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self.inner is not None and not self.trouble:
            try:
                self.inner.flush()
            except BlockingIOError:
                pass
            except (OSError, ValueError) as error:
                self._broken(error)

    def close(self) -> None:
        """Not ours to close."""

    def __del__(self) -> None:
        """Nor to flush when this is collected."""
        if getattr(self, "_own", 0):
            with suppress(Exception):
                os.close(self._own)

    def let_go(self) -> None:
        """The last flush. One that fails would be tried again by Python when it ends, which then exits with
        code 120."""
        with suppress(OSError, ValueError):
            if self.inner is not None:
                os.set_blocking(self.inner.fileno(), True)
                self.flush()
                if self.trouble:
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nowhere, self.inner.fileno())
                    os.close(nowhere)
                    self.inner.flush()

    def isatty(self) -> bool:
        try:
            return bool(self.inner.isatty())
        except (AttributeError, OSError, ValueError):
            return False

    def fileno(self) -> int:
        if self.inner is None:
            raise io.UnsupportedOperation("there is no stream")
        return int(self.inner.fileno())

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.inner, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return getattr(self.inner, "errors", None)

    @property
    def closed(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _give(self, text: str) -> None:
        try:
            self.inner.write(text)
        except UnicodeEncodeError:
            self.inner.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))

    def _give_patiently(self, text: str) -> None:
        self._own = self._own or _opened_again(self.inner)
        if not self._own:
            self._give(text)
            self.inner.flush()
            return
        self.inner.flush()
        if not self._push():  # what was begun comes first, whole: it may hold half a command to a terminal
            self._left_out += text.count("\n")
            return
        if self._left_out:
            text = f"\n… {self._left_out} lines are left out here, which nobody was reading\n{text}"
        self._left_out = 0
        self._begun = text.encode(self.encoding, "backslashreplace")
        self._push()

    def _push(self) -> bool:
        """Writes what was begun. Waits once, for `patience_s`; a reader that is known to be behind is not
        waited for again."""
        ends_at = time.monotonic() + (0.0 if self._behind else float(self.patience_s or 0.0))
        while self._begun:
            try:
                self._begun = self._begun[os.write(self._own, self._begun) :]
            except BlockingIOError:
                room = select.poll()
                room.register(self._own, select.POLLOUT)
                if not room.poll(max(0.0, ends_at - time.monotonic()) * 1e3) or time.monotonic() >= ends_at:
                    self._behind = True
                    return False
        self._behind = False
        return True

    def _broken(self, error: Exception) -> None:
        self.left = isinstance(error, OSError) and error.errno == errno.EPIPE
        words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        self.trouble = f"{self._name()} takes nothing any more ({words})"

    def _name(self) -> str:
        names = {"<stdout>": "standard output", "<stderr>": "standard error"}
        return names.get(str(getattr(self.inner, "name", "")), "the stream")


def _opened_again(stream: Any) -> int:
    """A pipe or terminal opened once more, so that not waiting is our own affair and not that of all who
    share it; else 0."""
    try:
        number = stream.fileno()
        if os.isatty(number) or stat.S_ISFIFO(os.fstat(number).st_mode):
            return os.open(
                f"/proc/self/fd/{number}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            )
    # not a file, not a system that has this, or another user's terminal
    except (AttributeError, OSError, ValueError):
        pass
    return 0


@contextmanager
def standing() -> Iterator[Stream]:
    """sys.stdout (which is given) and sys.stderr as Streams, let go at the end, so that the exit code is the
    program's own."""
    _fill_the_first_three()
    before = sys.stdout, sys.stderr
    out, err = Stream(sys.stdout), Stream(sys.stderr)
    sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
    try:
        yield out
    finally:
        sys.stdout, sys.stderr = before
        out.let_go()
        err.let_go()


def _fill_the_first_three() -> None:
    """Descriptors 0, 1 and 2 that were closed at start lead nowhere: else the next files opened would get
    their numbers, and whatever a library prints there would land in them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
