"""The few error classes and their wording: where: what is wrong, what was expected, what came; what to do.

And the one way to open what a path leads to: nothing is waited for, and nothing is read without end.
"""

import difflib
import errno
import io
import os
import stat
from collections.abc import Iterable, Sequence

LONGEST, QUOTED = 5_000, 200  # characters of a part of an error, and of the value that it quotes
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


class RepsftError(Exception):
    """Base of every error this package raises on purpose.

    exit_code   what the command line returns
    every_rank  each rank that has it tells it: no other knows of it
    """

    exit_code = 1
    every_rank = False


class ConfigError(RepsftError, ValueError):
    """Settings that cannot be used. Carries every problem found, not only the first."""

    exit_code = 2

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(RepsftError, ValueError):
    """A source, row or template that cannot be trained on."""

    exit_code = 2


class ModelError(RepsftError, ValueError):
    """A model that cannot be loaded, or would train on something other than what was asked."""

    exit_code = 2


class SnapshotError(RepsftError, RuntimeError):
    """A snapshot that cannot be taken or put back."""


class CheckpointError(RepsftError, RuntimeError):
    """A checkpoint that is damaged, foreign or could not be written whole. problems: of each generation,
    where none is whole."""

    def __init__(self, message: str, *, problems: Sequence[str] = ()):
        super().__init__("\n  ".join([message, *problems]))
        self.problems = tuple(problems)


class TrainingError(RepsftError, RuntimeError):
    """The run cannot go on: non-finite numbers, out of memory, a lost rank. code: as result.json has it; None
    = that of any other error."""

    def __init__(self, message: str, *, code: str | None = None):
        super().__init__(message)
        self.code = code


def describe(
    where: str, wrong: str, *, expected: object = None, got: object = None, todo: str | None = None
) -> str:
    """The house's wording of an error, in one line. What it quotes may be a row, a name or a setting of any
    length: it is cut.

    >>> describe("batch.samples", "is too small", expected="at least 1", got=0, todo="raise it")
    'batch.samples: is too small, expected at least 1, got 0; raise it'
    """
    text = f"{_short(where, LONGEST)}: {_short(wrong, LONGEST)}"
    if expected is not None:
        text += f", expected {_short(str(expected), LONGEST)}"
    if got is not None:
        text += f", got {_short(got)}"
    if todo is not None:
        text += f"; {_short(todo, LONGEST)}"
    return text


def open_plain(path: str | os.PathLike[str]) -> io.BufferedReader:
    """The bytes of a regular file. OSError, in words, for what would be waited for or never end.

    That is a pipe, a device, a socket or a folder, a link to one, and a file of the kernel's own
    (/proc/kmsg): they call themselves regular and of no length. The check is made on what was opened, so
    nothing can be put in its place.
    """
    _refuse_special(os.stat(path).st_mode)  # before the open, which is an act of its own to some devices
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        status = os.fstat(number)
        _refuse_special(status.st_mode)
        if status.st_size == 0 and _holds_more(number):
            raise OSError(errno.EINVAL, "it is a file of the kernel, without a length")
        return open(number, "rb")
    except BaseException:
        os.close(number)
        raise


def kind_of_file(mode: int) -> str:
    """Of stat's st_mode: "a file", "a folder", "a named pipe", "a device", "a socket"."""
    return "a file" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no file")


def _refuse_special(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(
            errno.EINVAL, f"it is {kind_of_file(mode)}, which may never end: save it to a file first"
        )


def _holds_more(number: int) -> bool:
    try:
        return bool(os.read(number, 1))
    except BlockingIOError:
        return True


def did_you_mean(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known word nearest to `word`, or None when nothing is near; cutoff: least likeness, 1 = equal."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def spelled(text: str) -> str:
    r"""A name of others' making as one line: what cannot be seen is escaped, a new line as \n.

    >>> print(spelled("a\nb"))
    a\nb
    """
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def _short(value: object, limit: int = QUOTED) -> str:
    try:
        text = value if isinstance(value, str) else repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} nested too deep to show"
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
