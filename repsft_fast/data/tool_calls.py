"""Tools that a row offers and calls that its turns make, in the one form that chat templates read.

tools       [{"type": "function", "function": {"name", "description", "parameters": {…}}}, …]
tool_calls  [{"type": "function", "id"?, "function": {"name", "arguments": {…}}}, …]

Rows write both in several ways: flat ({"name", "arguments"}), as JSON text (because arrow wants one schema
for all rows), under older names. Whatever is neither read nor empty is refused: a call of which a part is
lost trains another call.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from repsft_fast.errors import DataError, describe

Item = TypeVar("Item")

LEVELS = 64  # of nesting: templates and json.dumps recurse
INT_BITS = 13_000  # Python writes no integer of more than 4,300 digits


def text_of(value: object, where: str) -> str:
    """A string that UTF-8 can hold."""
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise DataError(
            describe(where, "is not text", expected="a string", got=kind, todo="write it as a string")
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        got = f"U+{ord(value[error.start]):04X} at character {error.start}"
        todo = "replace the character"
        raise DataError(
            describe(where, "holds half a surrogate pair", expected="valid Unicode", got=got, todo=todo)
        ) from None
    return value


def is_empty(value: object) -> bool:
    """Null, "", [] and {}: the field is there and says nothing. (0 and false say something.)"""
    return value is None or (isinstance(value, str | list | tuple | Mapping) and not value)


def shown(value: object) -> str:
    """For an error's `got`: an endless number or a bottomless list must not become an error of its own."""
    try:
        return repr(value)
    except (ValueError, RecursionError):
        return type(value).__name__


def json_of(text: str, where: str) -> object:
    """What a string of JSON text holds. Stricter than json.loads: no key twice, no NaN or Infinity."""
    try:
        return json.loads(text, object_pairs_hook=_each_key_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(
            describe(where, f"is a string that is not JSON ({error})", todo="correct it")
        ) from None


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def checked(value: object, where: str, merged: bool = False, depth: int = 0) -> Any:
    """A copy of a JSON value, at most 64 levels deep, its strings valid Unicode, its numbers finite.

    merged: nulls in objects are left out, for arrow gives every object the union of all rows' keys and null
    means "not in this row". Elsewhere a null is what the row says and stays.
    """
    if depth > LEVELS:
        raise DataError(
            describe(where, "is nested too deeply", expected=f"at most {LEVELS} levels", todo="flatten it")
        )
    if isinstance(value, str):
        return text_of(value, where)
    if isinstance(value, Mapping):
        return {
            text_of(key, where): checked(item, f"{where}.{key}", merged, depth + 1)
            for key, item in value.items()
            if not (merged and item is None)
        }
    if isinstance(value, list | tuple):
        return [checked(item, f"{where}[{number}]", merged, depth + 1) for number, item in enumerate(value)]
    # Numbers that Python reads and JSON cannot hold: a template would write what no parser reads.
    if isinstance(value, float) and not math.isfinite(value):
        todo = "write null or a string"
        raise DataError(
            describe(
                where, "is not a number of JSON", expected="a finite number", got=shown(value), todo=todo
            )
        )
    if isinstance(value, int) and value.bit_length() > INT_BITS:
        raise DataError(
            describe(
                where, "is too long a number", expected="at most 4,000 digits", todo="write it as a string"
            )
        )
    if value is None or isinstance(value, bool | int | float):
        return value
    todo = "write it as a string"
    raise DataError(describe(where, "is not a value of JSON", got=type(value).__name__, todo=todo))


def read_tools(value: object, where: str, *, merged: bool = False) -> list[Any] | None:
    """The tools of a row (column `tools`, or OpenAI's older `functions`), or None. `where` names row and
    field."""
    return _listed(value, where, "tools", _tool, merged) or None


def _listed(
    value: object, where: str, what: str, read: Callable[[object, str, bool], Item], merged: bool
) -> list[Item]:
    """Every item of a list, or of its JSON text; none of null, "" and []."""
    if isinstance(value, str):
        value, merged = json_of(value, where) if value.strip() else None, False
    if is_empty(value):
        return []
    if not isinstance(value, list | tuple):
        wrong, todo = f"is not a list of {what}", "put it in a list"
        raise DataError(describe(where, wrong, expected="a list", got=type(value).__name__, todo=todo))
    return [read(item, f"{where}[{number}]", merged) for number, item in enumerate(value)]


def _tool(tool: object, where: str, merged: bool) -> dict[str, Any]:
    found = _object(tool, where, merged)
    kind = found.get("type")
    if kind not in (None, "function"):
        todo = "describe it as a function, or remove it"
        raise DataError(
            describe(
                f"{where}.type", "is not a tool we know", expected="function", got=shown(kind), todo=todo
            )
        )
    if found.get("function") is not None:
        found["function"] = _object(found["function"], f"{where}.function", False)
    else:  # flat, as in the older `functions`
        found = {"function": {key: item for key, item in found.items() if key not in ("type", "function")}}
    # A template writes the name and the schema as they are.
    function = found["function"]
    _name(function.get("name"), f"{where}.name")
    if isinstance(function.get("parameters"), str):  # a schema as text would be rendered in quotes
        function["parameters"] = _object(function["parameters"] or "{}", f"{where}.parameters", False)
    return {"type": "function", **{key: item for key, item in found.items() if key != "type"}}


def read_tool_calls(value: object, where: str, *, merged: bool = False) -> list[dict[str, Any]]:
    """The calls of one turn; null, [] and "" are none. `where` names row and field."""
    return _listed(value, where, "calls", _call, merged)


def _call(call: object, where: str, merged: bool) -> dict[str, Any]:
    """{name, arguments} or {type, id, function: {name, arguments}}, or JSON text of one of them."""
    call = _object(call, where, merged)
    kind = call.pop("type", None)
    if kind not in (None, "function"):
        todo = "write it as a call of a function"
        raise DataError(
            describe(
                f"{where}.type", "is not a call we know", expected="function", got=shown(kind), todo=todo
            )
        )
    # Both forms that are in use, with what belongs to neither refused below.
    number = call.pop("id", None)
    # the call's place in a streamed answer: its place in the list says the same
    if isinstance(call.get("index"), int):
        del call["index"]
    nested = call.pop("function", None)
    inner = call if nested is None else _object(nested, f"{where}.function", False)
    name = _name(inner.pop("name", None), f"{where}.name")
    given = [
        _arguments(inner.pop(key), f"{where}.{key}")
        for key in ("arguments", "parameters")
        if inner.get(key) is not None
    ]
    if given[1:] and given[0] != given[1]:
        todo = "keep the one that is meant"
        raise DataError(describe(where, "says two things in arguments and parameters", todo=todo))
    # What is left would be dropped by every template.
    for key, item in [*call.items(), *inner.items()]:
        if not is_empty(item):
            expected = "type, id, function: {name, arguments}"
            todo = "rename it, or remove it"
            raise DataError(
                describe(
                    f"{where}.{key}", "is no part of a call", expected=expected, got=shown(item), todo=todo
                )
            )
    found: dict[str, Any] = {"type": "function"}
    if not is_empty(number):
        found["id"] = read_id(number, f"{where}.id")
    return {**found, "function": {"name": name, "arguments": given[0] if given else {}}}


def _arguments(value: Any, where: str) -> Any:
    """Text of a JSON object (OpenAI's form) is the object: rendered as text it would be encoded twice. Other
    text stays."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if not text:
        return {}
    # Python's own quotes or an object cut off would be trained as a string in quotes: refused
    if text.startswith("{"):
        return checked(json_of(text, where), where)
    if text.startswith('"'):
        try:
            inner = json.loads(text)
        except (ValueError, RecursionError):
            return value
        if inner.strip().startswith("{"):  # encoded twice already
            return _arguments(inner, where)
    return value


def read_id(value: object, where: str) -> str:
    """The id of a call: text, or a number as text."""
    return (
        str(checked(value, where))
        if isinstance(value, int) and not isinstance(value, bool)
        else text_of(value, where)
    )


def _object(value: object, where: str, merged: bool) -> dict[str, Any]:
    """An object, or the JSON text of one."""
    if isinstance(value, str):
        value, merged = json_of(value, where), False
    if not isinstance(value, Mapping):
        todo = "write it as an object with named fields"
        raise DataError(
            describe(where, "is not an object", expected="an object", got=type(value).__name__, todo=todo)
        )
    return checked(value, where, merged)


def _name(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        got = shown(value)
        raise DataError(
            describe(where, "is not a function's name", expected="a name", got=got, todo="name the function")
        )
    return text_of(value, where)
