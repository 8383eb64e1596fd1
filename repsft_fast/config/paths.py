"""Paths as people write them: `~/x`, `$SCRATCH/x`, a `Path` object. What a Config holds is written out.

A shell fills in `--run.folder ~/x` but not `--run.folder=~/x`, and never a settings file: unread, such a path
makes a folder that is named `~` or `$SCRATCH`. So `~` is always filled in, and a variable is unless a file of
that very name is there.
"""

import os
import re
from collections.abc import Callable
from typing import Any

from pydantic_core import PydanticCustomError

_VARIABLE = re.compile(r"\$(?:(?P<plain>[A-Za-z_][A-Za-z0-9_]*)|\{(?P<braced>[^{}]*)\}|\([^()]*\))")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # one slash: `Path` drops the second
_ON_THE_HUB = re.compile(
    r"(?:hf:/+|https?:/+(?:www\.)?(?:huggingface\.co|hf\.co)/)(?:datasets/)?([\w.-]+/[\w.-]+)"
)
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_JINJA = ("{{", "{%", "{#", "\n")
# prefixes of sources and models that are made or installed, and lie in no folder
NO_PATHS = ("reasoning-gym:", "package:")


def refused(wrong: str, **more: Any) -> PydanticCustomError:
    """An error whose words are told as they are; more: `expected` or `todo`, as in `errors.describe`."""
    return PydanticCustomError("refused", "{wrong}", {"wrong": wrong, **more})


def as_folder(value: Any) -> Any:
    """A folder or file of this machine."""
    if not isinstance(value, str | os.PathLike):
        return value
    return _filled(_text(value), _a_folder)


def as_folder_or_hub_id(value: Any) -> Any:
    """A folder, or a name on the hub, which holds neither `~` nor `$`."""
    if not isinstance(value, str | os.PathLike):
        return value
    text = _text(value)
    if text.startswith(NO_PATHS):
        return text
    return _filled(text, _no_url)


def as_source(value: Any) -> Any:
    """One source of rows. Other URLs than a file's are `data.sources`' to tell: it knows data sets of the hub
    by theirs."""
    if not isinstance(value, str | os.PathLike):
        return value
    text = _text(value)
    if text.startswith(NO_PATHS) or (_URL.match(text) and not text.lower().startswith("file:")):
        return text
    return as_folder_or_hub_id(text)


def as_template(value: Any) -> Any:
    """A chat template's text, as it is, or the path of a file with one."""
    if not isinstance(value, str | os.PathLike):
        return value
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    return text if isinstance(text, str) and any(mark in text for mark in _JINJA) else as_folder(value)


def expand(path: str) -> str:
    """The path with `~`, `~user`, `$NAME` and `${NAME}` filled in. Raises PydanticCustomError where that
    cannot be done.

    The `$` of a name that is there as it is written belongs to it.
    """
    filled = _home(path)
    if _VARIABLE.search(filled) and not os.path.lexists(filled):
        filled = _VARIABLE.sub(lambda found: _variable(path, found), filled)
        if _VARIABLE.search(filled) or filled.startswith("~"):
            raise refused(f"holds a variable whose value holds another: {filled}", todo="write the path out")
    return filled if filled == path else _text(filled)


def _filled(text: str, check: Callable[[str], None]) -> str:
    """The path filled in, and held to the rules of its kind before and after: a variable may hold a URL."""
    check(text)
    filled = expand(text)
    check(filled)
    return filled


def _a_folder(text: str) -> None:
    if _URL.match(text):
        raise refused(f"is a URL, no folder of this machine, got {text}", todo=_instead_of(text))
    if _WINDOWS.match(text) and os.sep == "/":
        raise refused(f"is a path of Windows, got {text}", todo="write it as this machine does")
    if text != text.strip() and not os.path.lexists(text):
        raise refused(f"begins or ends with a space, got {text!r}", todo="write it without")


def _no_url(text: str) -> None:
    if _URL.match(text):
        raise refused(f"is a URL, which is not fetched, got {text}", todo=_instead_of(text))


def _text(value: "str | os.PathLike[Any]") -> str:
    text = os.fspath(value)
    if not isinstance(text, str):
        raise refused("is a path of bytes", todo="write it as text")
    if odd := next((sign for sign in text if ord(sign) < 32 or ord(sign) == 127), None):
        raise refused(f"holds a control character ({odd!r}), got {text!r}", todo="write the path without it")
    return text


def _home(path: str) -> str:
    if not path.startswith("~"):
        return path
    user = path[1:].partition("/")[0]
    filled = os.path.expanduser(path)
    if filled.startswith("~") or not os.path.isabs(filled):
        wrong = (
            f"names the home folder of {user}, who is not known on this machine"
            if user
            else "names an unknown home folder"
        )
        raise refused(
            f"{wrong}, got {path}", todo="write the path out" if user else "set HOME, or write the path out"
        )
    if not user and os.environ.get("HOME") == "":  # Python reads it as /
        raise refused(
            f"names the home folder, and HOME is empty, got {path}", todo="set HOME, or write the path out"
        )
    return filled


def _variable(path: str, found: "re.Match[str]") -> str:
    name = found["plain"] or found["braced"] or ""
    if not name.isidentifier():
        raise refused(f"holds {found[0]}, which is no plain variable, got {path}", todo="write the path out")
    value = os.environ.get(name)
    if not value:
        said = "empty" if value == "" else "not set"
        raise refused(
            f"holds {found[0]}, and the variable is {said}, got {path}", todo="set it, or write the path out"
        )
    return value


def _instead_of(url: str) -> str:
    if url.lower().startswith("file:"):
        return f"write the path: /{url[5:].lstrip('/')}"
    hub = _ON_THE_HUB.match(url)
    return (
        f"write the hub id: {hub[1]}"
        if hub
        else "give a folder of this machine, where it is mounted or fetched to"
    )
