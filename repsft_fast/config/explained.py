"""pydantic's errors in the house's wording."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from repsft_fast.config.foreign_values import value_of
from repsft_fast.config.names import inner_section
from repsft_fast.config.sections import Section, Settings
from repsft_fast.errors import describe, did_you_mean

Key = tuple[str, ...]  # ("optim", "lr")


def explained(error: ValidationError) -> Iterator[tuple[Key, str]]:
    """(setting, what is wrong with it), one per setting: pydantic gives one error for each type a value may
    have."""
    by_key: dict[Key, list[Any]] = {}
    for item in error.errors(include_url=False):
        by_key.setdefault(_key_of(item["loc"]), []).append(item)
    for key, items in by_key.items():
        where = ".".join(key)
        refused = next((item for item in items if item["type"] == "refused"), None)
        if any(item["type"] == "missing" for item in items):
            yield key, describe(where, "is missing", todo=f"set it in the file or with --{where}")
        elif refused is not None:
            said = {name: refused["ctx"].get(name) for name in ("expected", "todo")}
            yield key, describe(where, refused["ctx"]["wrong"], **said)
        else:
            yield key, _cannot_be_used(key, items)


def _cannot_be_used(key: Key, items: list[Any]) -> str:
    """The sentence about a value that none of the setting's types takes; items: one error of each type."""
    where = ".".join(key)
    got = items[0]["input"]
    expected = " or ".join(dict.fromkeys(_expected(item) for item in items))
    meant = value_of(where, got)
    todo = f"here it is {meant}" if meant else _near_value(got, expected)
    # With one type, the place inside a list or mapping is known.
    inside = ".".join(str(step) for step in items[0]["loc"][len(key) :]) if len(items) == 1 else ""
    if inside:
        where += f" [{inside}]"
    return describe(where, "cannot be used", expected=expected, got=got, todo=todo)


def _near_value(value: Any, expected: str) -> str | None:
    """A slip of the pen in a word of a closed list, which pydantic's sentence names in quotes."""
    near = did_you_mean(value, re.findall(r"'(\w+)'", expected)) if isinstance(value, str) else None
    return f"did you mean {near}?" if near else None


def _key_of(loc: tuple[int | str, ...]) -> Key:
    """The setting's own key; below it pydantic names members of unions and items of lists."""
    section: type[Section] = Settings
    key: Key = ()
    for step in loc:
        key = (*key, str(step))
        info = section.model_fields.get(str(step))
        inner, _ = inner_section(info.annotation) if info else (None, False)
        if inner is None:
            break
        section = inner
    return key


def _expected(item: Mapping[str, Any]) -> str:
    message = str(item["msg"]).removeprefix("Value error, ")
    return message.removeprefix("Input should be ").split(", unable to ")[0]
