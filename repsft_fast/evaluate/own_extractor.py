"""A function of the user's own that takes the answer out of a reply: found, never one of Python's own
library, tried before it is used."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

from repsft_fast.errors import ConfigError, TrainingError, describe

# What an own function is tried on at start: answers as people write them, and the reply of a model that said
# nothing.
_PROBES = ("Twice two is four. The answer is \\boxed{4}.", "2 + 2 = 4\n#### 4", "")


def own_function(name: str, where: str) -> Callable[[str], Any]:
    """The function, imported: not one of Python's own library, whose functions do more with a reply than read
    it."""
    module, _, function = name.partition(":")
    if not all(step.isidentifier() for step in (*module.split("."), function)):
        raise ConfigError(describe(where, "names no function", expected="package.module:function", got=name))
    if _is_of_python(module):
        raise ConfigError(_refusal(name, module, where))
    try:
        found = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # whatever the module's own lines raise
        cause = f"{type(error).__name__}: {(str(error) or 'no words').splitlines()[0]}"
        todo = (
            "its folder must be on PYTHONPATH, or its package installed"
            if isinstance(error, ModuleNotFoundError)
            else None
        )
        raise ConfigError(describe(where, f"cannot be imported ({cause})", got=name, todo=todo)) from error
    if not callable(found):
        raise ConfigError(describe(where, "is not a function", got=name))
    for home in _homes(found):
        if _is_of_python(home):
            raise ConfigError(_refusal(name, home, where))
    return found


def _is_of_python(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def _refusal(name: str, module: str, where: str) -> str:
    wrong = f"is of {module}, a module of Python's own library, which reads no answers"
    return describe(
        where,
        wrong,
        got=name,
        todo="write a function in a module of your own, under another name",
    )


def _homes(function: Any) -> list[str]:
    """The modules that it was really written in, however it is called where it was found."""
    found: list[str] = []
    while function is not None and len(found) < 10:
        bound = getattr(function, "__self__", None)
        written = (
            function if hasattr(function, "__module__") and hasattr(function, "__name__") else type(function)
        )
        found.append(
            str(
                getattr(written, "__module__", None)
                or getattr(bound, "__name__", None)
                or type(bound).__module__
            )
        )
        is_partial = isinstance(function, functools.partial)
        if is_partial:
            found.pop()  # it says nothing; what it calls does
        function = function.func if is_partial else getattr(function, "__wrapped__", None)
    return found


class Own:
    """A function of the user's own. Tried when it is made; what it does wrong later is said with the reply it
    was given."""

    def __init__(self, name: str, function: Callable[[str], Any], where: str):
        self._name, self._function, self._where = name, function, where
        for text in _PROBES:
            if wrong := self._try(text)[1]:
                todo = "let it take one text and return the answer as text, or None where there is none"
                raise ConfigError(describe(where, f"{name} {wrong} on {text!r}", todo=todo))

    def __call__(self, text: str) -> str | None:
        answer, wrong = self._try(text)
        if wrong:
            todo = "let it return None where there is no answer, and continue with --resume"
            raise TrainingError(
                describe(self._where, f"{self._name} {wrong} on a reply", got=text[-200:], todo=todo)
            )
        return answer

    def _try(self, text: str) -> tuple[str | None, str | None]:
        """(the answer, what it did wrong)"""
        try:
            answer = self._function(text)
        except (Exception, SystemExit) as error:
            return None, f"failed ({type(error).__name__}: {(str(error) or 'no words').splitlines()[0]})"
        if answer is not None and not isinstance(answer, str):
            return None, f"returned {type(answer).__name__}"
        return answer, None
