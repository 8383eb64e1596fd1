"""The few error classes and their wording: where: what is wrong, what was expected, what came; what to do."""

import difflib
from collections.abc import Iterable


class RepsftError(Exception):
    """Base of every error this package raises on purpose. `exit_code` is what the command line returns."""

    exit_code = 1


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
    """A checkpoint that is damaged, foreign or could not be written whole."""


class TrainingError(RepsftError, RuntimeError):
    """The run cannot go on: non-finite numbers, out of memory, a lost rank."""


def describe(where: str, wrong: str, *, expected: object = None, got: object = None, todo: str | None = None) -> str:
    """The house's wording of an error, in one line.

    >>> describe("batch.samples", "is too small", expected="at least 1", got=0, todo="raise it")
    'batch.samples: is too small, expected at least 1, got 0; raise it'
    """
    text = f"{where}: {wrong}"
    if expected is not None:
        text += f", expected {expected}"
    if got is not None:
        text += f", got {_short(got)}"
    if todo is not None:
        text += f"; {todo}"
    return text


def did_you_mean(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known word nearest to `word`, or None when nothing is near; cutoff: least likeness, 1 = equal."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def _short(value: object, limit: int = 200) -> str:
    try:
        text = value if isinstance(value, str) else repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} nested too deep to show"
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
