"""One list of turns as rows hold it → messages in the one form that chat templates read, and which of them
may be trained.

role       system | user | assistant | tool      many names, two keys (role, from); the order is the
           template's to judge
content    a string                              also a list of text parts; "" where a turn only calls tools
reasoning_content                                one field, many names
tool_calls                                       see tool_calls.py
weight, train, loss_mask, …                      1 = trained, 0 = not trained; only assistant turns can be

Every field of a turn is used, or refused, or named to the caller as unused. Fields that look as if they said
something about the text or its training are never passed over: a row that is trained otherwise than it says
is the worst outcome.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from repsft_fast.data.tool_calls import is_empty, json_of, read_id, read_tool_calls, shown, text_of
from repsft_fast.data.turn_names import (
    CALL_ROLES,
    CALLING,
    CONTENT_KEYS,
    KNOWN,
    MARKING,
    MARKS,
    REASONING_KEYS,
    ROLE_KEYS,
    ROLES,
    TEXT_PARTS,
    THINKING,
    THINKING_PARTS,
    UNCLEAR_MARKS,
    Names,
    agreed,
    note_unused,
    refuse_role,
)
from repsft_fast.errors import DataError, describe


@dataclass(frozen=True)
class Turns:
    messages: list[dict[str, Any]]
    # assistant turns that may be trained; None: no turn is marked, all may
    trainable: tuple[int, ...] | None = None
    unknown: tuple[str, ...] = ()  # fields that were not used, such as "timestamp" or "content[].id"


def read_turns(
    turns: object,
    field: str,
    where: str,
    *,
    role_key: str = "role",
    content_key: str = "content",
    merged: bool = False,
    ignored: frozenset[str] = frozenset(),
) -> Turns:
    """The turns of `field` of the row at `where`.

    role_key, content_key: names read beside role and from, content and value. merged: the rows went through a
    merged schema (arrow), so nulls inside calls are no values. ignored: fields of a turn, as `unknown` spells
    them, that the user lets be passed over. Raises DataError naming row, turn and field.
    """
    if not isinstance(turns, list | tuple):
        got, todo = type(turns).__name__, "write the turns as a list"
        raise DataError(
            describe(f"{where}, field {field!r}", "is not a list", expected="turns", got=got, todo=todo)
        )
    if not turns:
        raise DataError(
            describe(
                f"{where}, field {field!r}", "is empty", expected="at least one turn", todo="remove the row"
            )
        )
    # The names of this kind of row go before those of others, so that errors name what the user wrote.
    role_keys, content_keys = (role_key, *ROLE_KEYS), (content_key, *CONTENT_KEYS)
    names = Names(field, tuple(dict.fromkeys(role_keys)), tuple(dict.fromkeys(content_keys)), ignored)
    messages: list[dict[str, Any]] = []
    marks: list[bool | None] = []
    unknown: dict[str, None] = {}
    for number, turn in enumerate(turns):
        # Nearly every turn of nearly every row: reading it with care would cost ten times as much.
        plain = _plain(turn, role_key, content_key) if type(turn) is dict and len(turn) == 2 else None
        if plain is not None and not ignored:
            messages.append(plain)
            marks.append(None)
            continue
        place = f"{where}, field '{field}[{number}]"
        if not isinstance(turn, Mapping):
            got, todo = type(turn).__name__, "write it as an object with role and content"
            raise DataError(describe(f"{place}'", "is not a turn", expected="an object", got=got, todo=todo))
        message, mark = _message(turn, place, names, merged, unknown)
        messages.append(message)
        marks.append(mark)
    # One mark is enough: turns without one are then trained as all are, unless theirs says no.
    trainable = None
    if any(mark is not None for mark in marks):
        trainable = tuple(
            n for n, mark in enumerate(marks) if messages[n]["role"] == "assistant" and mark is not False
        )
    return Turns(messages, trainable, tuple(unknown))


def _plain(turn: dict[Any, Any], role_key: str, content_key: str) -> dict[str, Any] | None:
    """Nearly every turn: a known role, and ASCII text. Anything else is read with care."""
    name, said = turn.get(role_key), turn.get(content_key)
    if (
        type(name) is str
        and name in ROLES
        and name not in CALL_ROLES
        and type(said) is str
        and said.isascii()
    ):
        return {"role": ROLES[name], "content": said}
    return None


def _message(
    turn: Mapping[Any, Any], place: str, names: Names, merged: bool, unknown: dict[str, None]
) -> tuple[dict[str, Any], bool | None]:
    """(the message, its mark or None)."""
    written = turn
    turn = {key: value for key, value in turn.items() if value is not None and key not in names.ignored}
    role, is_call = _role(turn, names.role, place)
    # Most turns hold a role and a content alone: what is not there is not looked for.
    calls: list[dict[str, Any]] = []
    if is_call or not CALLING.isdisjoint(turn):
        calls = _calls(turn, names.content if is_call else (), role, place, merged)
    content, thoughts = (None, {}) if is_call else _content(turn, names, place, unknown)
    reasoning = None
    if thoughts or not THINKING.isdisjoint(turn):
        reasoning = _reasoning(turn, thoughts, role, place)
    if reasoning and content:
        content, reasoning = _said_once(content, reasoning, place)
    mark = None if MARKING.isdisjoint(turn) else _mark(turn, role, place)
    # What nothing has read so far is noted or refused, never passed over.
    for key, value in turn.items():
        if key not in KNOWN and key not in names.role and key not in names.content:
            note_unused(key, value, "", place, names, unknown)
    if content is None:
        if not calls and not reasoning:
            key = next((key for key in names.content if key in written), names.content[0])
            wrong = "is empty" if key in turn else "is null or missing"
            todo = "write it, or remove the turn"
            raise DataError(
                describe(f"{place}.{key}'", wrong, expected="text (or a call of a tool)", todo=todo)
            )
        content = ""  # a turn that only calls a tool or only thinks says nothing
    # Only what says something: templates ask whether a field is there.
    message: dict[str, Any] = {"role": role, "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    if not is_empty(turn.get("tool_call_id")):
        message["tool_call_id"] = read_id(turn["tool_call_id"], f"{place}.tool_call_id'")
    if not is_empty(turn.get("name")):
        message["name"] = text_of(turn["name"], f"{place}.name'")
    return message, mark


def _role(turn: Mapping[str, Any], keys: tuple[str, ...], place: str) -> tuple[str, bool]:
    """(the role, whether the turn's content is the calls of tools)."""
    roles: dict[str, str] = {}
    is_call = False
    for key in [key for key in keys if key in turn] or keys[:1]:
        value = turn.get(key)
        name = re.sub(r"[\s-]+", "_", value.strip().lower()) if isinstance(value, str) else ""
        if name not in ROLES:
            expected, todo = " | ".join(ROLES), "rename it, or remove the turn"
            raise DataError(
                describe(f"{place}.{key}'", "is not a role", expected=expected, got=shown(value), todo=todo)
            )
        roles[key] = ROLES[name]
        is_call = is_call or name in CALL_ROLES
    return agreed(roles, place), is_call


def _content(
    turn: Mapping[str, Any], names: Names, place: str, unknown: dict[str, None]
) -> tuple[str | None, dict[str, str]]:
    """(the text, or None where there is none; the thoughts among its parts, by the name of their field)."""
    texts: dict[str, str] = {}
    thoughts: dict[str, str] = {}
    for key in names.content:
        value = turn.get(key)
        if isinstance(value, list | tuple):
            if value:
                texts[key], thought = _parts(value, f"{place}.{key}", names, unknown)
                if thought:
                    thoughts[f"{key}[]"] = thought
        elif key in turn:
            texts[key] = text_of(value, f"{place}.{key}'")
    return agreed(texts, place), thoughts


def _parts(
    parts: list[Any] | tuple[Any, ...], place: str, names: Names, unknown: dict[str, None]
) -> tuple[str, str]:
    """(text, thoughts) of a list of parts, each joined as they stand."""
    text, thought = "", ""
    for number, part in enumerate(parts):
        where = f"{place}[{number}]'"
        if isinstance(part, str):
            text += text_of(part, where)
            continue
        if not isinstance(part, Mapping):
            got, todo = type(part).__name__, 'write {"type": "text", "text": …}'
            raise DataError(
                describe(where, "is not a part of a content", expected="text", got=got, todo=todo)
            )
        # Parts of any other type hold what no model of text is trained on.
        kind = "text" if part.get("type") is None else part["type"]
        keys: tuple[str, ...] = ("type", "text")
        if kind in THINKING_PARTS:
            if text:  # templates write the thoughts first
                todo = "put it first, or in a turn of its own"
                raise DataError(describe(where, f"is {kind} behind the text of the turn", todo=todo))
            keys = (*keys, *THINKING_PARTS, "closed")
            thought += _thought_part(part, kind, f"{place}[{number}]")
        elif kind in TEXT_PARTS:
            text += text_of(part.get("text"), where)
        else:
            todo = (
                "write it as text (a call in tool_calls, a tool's result as the tool's turn), or remove"
                " the row"
            )
            raise DataError(
                describe(where, f"is of the type {shown(kind)}", expected=" | ".join(TEXT_PARTS), todo=todo)
            )
        for key, value in part.items():
            if value is not None and key not in keys:
                note_unused(key, value, "content[].", f"{place}[{number}]", names, unknown)
    return text, thought


def _thought_part(part: Mapping[Any, Any], kind: str, place: str) -> str:
    """The text of a part of thoughts. DataError for one cut short: it would be trained as a whole one."""
    where = f"{place}'"
    said = {
        key: _thought(part[key], where) for key in ("text", *THINKING_PARTS) if not is_empty(part.get(key))
    }
    found = agreed(said, place)
    if found is None or part.get("closed") is False:
        wrong = "is not closed" if found else "holds no text"
        raise DataError(describe(where, f"is {kind} that {wrong}", todo="write it as text, or remove it"))
    return found


def _thought(value: object, where: str) -> str:
    """Thoughts as text, or as a list of text parts."""
    if isinstance(value, list | tuple):
        return "".join(
            text_of(item.get("text") if isinstance(item, Mapping) else item, where) for item in value
        )
    return text_of(value, where)


def _reasoning(turn: Mapping[str, Any], thoughts: dict[str, str], role: str, place: str) -> str | None:
    found = {
        key: text_of(turn[key], f"{place}.{key}'") for key in REASONING_KEYS if not is_empty(turn.get(key))
    }
    reasoning = agreed({**found, **thoughts}, place)
    if reasoning and role != "assistant":
        key = next(iter({**found, **thoughts}))
        refuse_role(f"{place}.{key}'", "is reasoning", role)
    return reasoning


# Thinking in front of the text, in the marks of any family; its opening mark may stand in the prompt.
_THOUGHT = re.compile(
    r"\s*(?P<opened>[<\[◁]\|?(?:\w+:)?th(?:ink(?:ing)?|ought)\|?[>\]▷])?(?P<thought>.*?)"
    r"[<\[◁]\|?/(?:\w+:)?th(?:ink(?:ing)?|ought)\|?[>\]▷](?P<answer>.*)",
    re.IGNORECASE | re.DOTALL,
)


def _said_once(content: str, reasoning: str, place: str) -> tuple[str, str | None]:
    """(text, reasoning), one of them without the thinking that both say: as they are, it would be trained
    twice.

    <think> in the text can be handed to every template, whether it has a field or not; other marks to those
    that have one.
    """
    found = _THOUGHT.match(content)
    if found is None:
        return content, reasoning
    if "".join(found["thought"].split()) == "".join(reasoning.split()):
        return (content, None) if found["opened"] == "<think>" else (found["answer"].lstrip("\n"), reasoning)
    if found["opened"]:
        wrong = "thinks one thing in the text and another in its field"
        todo = "keep the one that is meant"
        raise DataError(
            describe(f"{place}'", wrong, expected=shown(reasoning[:60]), got=shown(content[:60]), todo=todo)
        )
    return content, reasoning


def _calls(
    turn: Mapping[str, Any], values: tuple[str, ...], role: str, place: str, merged: bool
) -> list[dict[str, Any]]:
    """The turn's calls, from whichever fields hold them: tool_calls, OpenAI's older function_call (one call,
    no list), and the `values` of ShareGPT's turns from function_call (one call or several, mostly as JSON
    text)."""
    found: dict[str, list[dict[str, Any]]] = {}
    for key in ("tool_calls", "function_call", *values):
        value, where, nulls = turn.get(key), f"{place}.{key}'", merged
        if key != "tool_calls" and isinstance(value, str) and value.strip():
            value, nulls = json_of(value, where), False
        if key != "tool_calls" and isinstance(value, Mapping):
            value = [value] if any(item is not None for item in value.values()) else None
        if calls := read_tool_calls(value, where, merged=nulls):
            found[key] = calls
    # The same calls twice is one thing said twice; only some of the forms have ids.
    agreed({key: [call["function"] for call in calls] for key, calls in found.items()}, place)
    if found and role != "assistant":
        refuse_role(f"{place}.{next(iter(found))}'", "calls a tool", role)
    return next(iter(found.values()), [])


def _mark(turn: Mapping[str, Any], role: str, place: str) -> bool | None:
    marks: dict[str, bool] = {}
    for key in UNCLEAR_MARKS:
        if key in turn:
            wrong = "could mean that the turn is trained or that it is not"
            todo = "write weight: 1 (trained) or weight: 0 (not trained)"
            raise DataError(describe(f"{place}.{key}'", wrong, got=shown(turn[key]), todo=todo))
    for key, trained in MARKS.items():
        if key in turn:
            value = turn[key]
            if not isinstance(value, bool | int | float) or value not in (0, 1):
                one, zero = ("trained", "not trained") if trained else ("not trained", "trained")
                expected = f"1 ({one}) or 0 ({zero})"
                todo = (
                    "a turn is trained wholly or not at all: round it (a row's weight goes into a column of"
                    " its own)"
                )
                raise DataError(
                    describe(f"{place}.{key}'", "is no mark", expected=expected, got=shown(value), todo=todo)
                )
            marks[key] = bool(value) == trained
    mark = agreed(marks, place)
    if mark and role != "assistant":
        refuse_role(f"{place}.{next(iter(marks))}'", "lets the turn be trained", role)
    return mark
