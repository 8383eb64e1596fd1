"""Row dict → one of four parsed forms. Detection by keys; every error names the row and the field.

messages       [{"role", "content"}, …]                                → Conversation
conversations  ShareGPT, [{"from", "value"}, …]                        → Conversation
prompt         prompt + completion, strings → Pair, message lists      → Conversation
alpaca         instruction + input + output                            → Pair, asks for the chat template
query          query + response                                        → Pair, asks for the chat template
text           text                                                    → Text
input_ids      input_ids + labels (HF's: unshifted, -100 = untrained)  → Pretokenised
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from repsft_fast.errors import DataError, describe
from repsft_fast.row import IGNORE_INDEX


@dataclass(frozen=True)
class Conversation:
    messages: list[dict[str, Any]]  # role: system | user | assistant | tool; content is always a string
    tools: list[Any] | None = None
    only_last: bool = False  # prompt/completion message lists: what is in the prompt is never trained


@dataclass(frozen=True)
class Pair:
    prompt: str
    completion: str
    chat: bool  # True: alpaca and query/response, which go through the chat template where there is one


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Pretokenised:
    ids: list[int]
    trained: list[bool]


Parsed = Conversation | Pair | Text | Pretokenised

# Format → keys a row must have. Order is the order of detection.
FORMATS: dict[str, tuple[str, ...]] = {
    "input_ids": ("input_ids",),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "query": ("query", "response"),
    "text": ("text",),
}
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
# What may come before a turn of this role; None = the start.
_ORDER: dict[str, set[str | None]] = {
    "system": {None, "system"},
    "user": {None, "system", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}
_EXTRA = ("tool_calls", "tool_call_id", "name", "reasoning_content")


def detect(row: Mapping[str, Any], where: str) -> str:
    """The first format whose keys the row has and whose first key is not null."""
    for name, keys in FORMATS.items():
        if all(row.get(key) is not None for key in keys):
            return name
    for name, keys in FORMATS.items():
        missing = [key for key in keys if row.get(key) is None]
        if len(missing) < len(keys):
            state = "null" if missing[0] in row else "missing"
            raise DataError(describe(f"{where}, field {missing[0]!r}", f"is {state} in a {name!r} row", todo="add it"))
    raise DataError(
        describe(
            where,
            "has no format we know",
            expected=" or ".join("+".join(keys) for keys in FORMATS.values()),
            got=f"the keys {sorted(map(str, row))}",
            todo="rename the columns",
        )
    )


def parse(row: object, form: str, where: str) -> Parsed:
    """Read one row as `form` (a key of FORMATS). Raises DataError naming row and field."""
    if not isinstance(row, Mapping):
        raise DataError(describe(where, "is not a row", expected="an object with named fields", got=type(row).__name__))
    for key in FORMATS[form]:
        if row.get(key) is None:
            others = [name for name, keys in FORMATS.items() if name != form and all(row.get(k) is not None for k in keys)]
            todo = f"this row looks like {others[0]!r}; keep one format per source" if others else "add it or remove the row"
            state = "null" if key in row else "missing"
            raise DataError(describe(f"{where}, field {key!r}", f"is {state}, the source holds {form!r} rows", todo=todo))
    if form == "messages":
        return Conversation(_turns(row["messages"], "messages", "role", "content", where), _tools(row, where))
    if form == "conversations":
        turns = row["conversations"]
        sharegpt = isinstance(turns, list) and bool(turns) and isinstance(turns[0], Mapping) and "from" in turns[0]
        names = ("from", "value") if sharegpt else ("role", "content")
        messages = _turns(turns, "conversations", *names, where)
        if isinstance(row.get("system"), str) and row["system"] and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": _string(row["system"], f"{where}, field 'system'")}, *messages]
        return Conversation(messages, _tools(row, where))
    if form == "prompt":
        return _prompt_completion(row, where)
    if form == "alpaca":
        instruction = _string(row["instruction"], f"{where}, field 'instruction'")
        context = _string(row.get("input") or "", f"{where}, field 'input'")
        prompt = f"{instruction}\n\n{context}" if context.strip() else instruction
        return Pair(prompt, _string(row["output"], f"{where}, field 'output'"), chat=True)
    if form == "query":
        return Pair(*_texts(row, ("query", "response"), where), chat=True)
    if form == "text":
        return Text(_string(row["text"], f"{where}, field 'text'"))
    return _pretokenised(row, where)


def read_task(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(describe(f"{where}, field {column!r}", "is not a task", expected="a name", got=repr(value)))
    return _string(str(value), f"{where}, field {column!r}")


def read_weight(row: Mapping[str, Any], column: str, where: str) -> float:
    """The row's weight: finite and ≥ 0. A weight of 0 is a row that is dropped and counted by the caller."""
    value = row.get(column)
    good = isinstance(value, int | float) and not isinstance(value, bool) and _finite(value) and value >= 0
    if not good:
        raise DataError(describe(f"{where}, field {column!r}", "is not a weight", expected="a number ≥ 0", got=repr(value)))
    return float(value)  # type: ignore[arg-type]


def _finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int past the largest float
        return False


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise DataError(describe(where, "is not text", expected="a string", got=kind, todo="write it as a string"))
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        got = f"U+{ord(value[error.start]):04X} at character {error.start}"
        raise DataError(describe(where, "holds half a surrogate pair", expected="valid Unicode", got=got)) from None
    return value


def _texts(row: Mapping[str, Any], fields: tuple[str, str], where: str) -> tuple[str, str]:
    first, second = (_string(row[field], f"{where}, field {field!r}") for field in fields)
    return first, second


def _checked(value: object, where: str, depth: int = 0) -> object:
    """A nested value (tools, tool calls) whose strings are valid Unicode, at most 64 levels deep, without nulls in objects."""
    if depth > 64:
        raise DataError(describe(where, "is nested too deeply", expected="at most 64 levels"))
    if isinstance(value, str):
        return _string(value, where)
    if isinstance(value, Mapping):
        # Arrow gives every object the union of all keys: a null there means "not in this row".
        return {
            _string(key, where): _checked(item, f"{where}.{key}", depth + 1) for key, item in value.items() if item is not None
        }
    if isinstance(value, list | tuple):
        return [_checked(item, f"{where}[{number}]", depth + 1) for number, item in enumerate(value)]
    return value


def _tools(row: Mapping[str, Any], where: str) -> list[Any] | None:
    tools = row.get("tools")
    if not tools:
        return None
    if isinstance(tools, str):  # some datasets hold JSON text, because arrow wants one schema for all rows
        tools = _json(tools, f"{where}, field 'tools'")
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(describe(f"{where}, field 'tools'", "is not a list of tools", expected="a list of JSON schemas"))
    return [_checked(tool, f"{where}, field 'tools'") for tool in tools]


def _json(text: str, where: str) -> object:

    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(describe(where, f"is a string that is not JSON ({error})")) from None


def _turns(turns: object, field: str, role_key: str, content_key: str, where: str) -> list[dict[str, Any]]:
    if not isinstance(turns, list | tuple):
        raise DataError(describe(f"{where}, field {field!r}", "is not a list", expected="turns", got=type(turns).__name__))
    if not turns:
        raise DataError(describe(f"{where}, field {field!r}", "is empty", expected="at least one turn", todo="remove the row"))
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(turns):
        place = f"{where}, field '{field}[{number}]"
        if not isinstance(turn, Mapping):
            raise DataError(describe(f"{place}'", "is not a turn", expected="an object", got=type(turn).__name__))
        role = turn.get(role_key)
        known = ROLES.get(role) if isinstance(role, str) else None
        if known is None:
            missing = describe(f"{place}.{role_key}'", "is not a role", expected=" | ".join(ROLES), got=repr(role))
            raise DataError(missing)
        previous = messages[-1]["role"] if messages else None
        if previous not in _ORDER[known]:
            allowed = " or ".join(sorted(name or "the start" for name in _ORDER[known]))
            raise DataError(
                describe(
                    f"{place}.{role_key}'",
                    f"{known} comes after {previous or 'nothing'}",
                    expected=f"{known} after {allowed}",
                    todo="merge or remove the turn",
                )
            )
        message: dict[str, Any] = {"role": known}
        for key in _EXTRA:
            if turn.get(key) is not None:
                message[key] = _checked(turn[key], f"{place}.{key}'")
        content = turn.get(content_key)
        if content is None and message.get("tool_calls"):
            content = ""  # a turn that only calls a tool says nothing
        message["content"] = _string(content, f"{place}.{content_key}'")
        if "reasoning_content" in message:
            _string(message["reasoning_content"], f"{place}.reasoning_content'")
        messages.append(message)
    return messages


def _prompt_completion(row: Mapping[str, Any], where: str) -> Parsed:
    prompt, completion = row["prompt"], row["completion"]
    both = f"{where}, fields 'prompt' and 'completion'"
    got = f"{type(prompt).__name__} and {type(completion).__name__}"
    if isinstance(prompt, str) != isinstance(completion, str):
        raise DataError(describe(both, "are of two kinds", expected="both text or both turns", got=got))
    if isinstance(prompt, str):
        return Pair(*_texts(row, ("prompt", "completion"), where), chat=False)
    if not isinstance(prompt, list | tuple) or not isinstance(completion, list | tuple):
        raise DataError(describe(both, "are neither text nor turns", got=got))
    if len(completion) != 1:
        place = f"{where}, field 'completion'"
        raise DataError(describe(place, "is not one turn", expected="one assistant turn", got=f"{len(completion)} turns"))
    messages = _turns([*prompt, *completion], "prompt+completion", "role", "content", where)
    if messages[-1]["role"] != "assistant":
        got = messages[-1]["role"]
        raise DataError(describe(f"{where}, field 'completion'", "is not the assistant's", expected="assistant", got=got))
    return Conversation(messages, _tools(row, where), only_last=True)


def _pretokenised(row: Mapping[str, Any], where: str) -> Pretokenised:
    """ids and labels; positions an attention_mask hides are padding and go."""
    ids = _integers(row["input_ids"], f"{where}, field 'input_ids'")
    labels = _integers(row["labels"], f"{where}, field 'labels'") if row.get("labels") is not None else list(ids)
    mask = None
    if row.get("attention_mask") is not None:
        mask = _integers(row["attention_mask"], f"{where}, field 'attention_mask'")
    for name, values in (("labels", labels), ("attention_mask", mask)):
        if values is not None and len(values) != len(ids):
            place = f"{where}, field {name!r}"
            raise DataError(describe(place, "has another length than input_ids", expected=len(ids), got=len(values)))
    for number, (token, label) in enumerate(zip(ids, labels)):
        if token < 0:
            raise DataError(describe(f"{where}, field 'input_ids[{number}]'", "is negative", expected="a token id", got=token))
        if label not in (IGNORE_INDEX, token):
            expected = f"{IGNORE_INDEX} or the token {token} itself (labels are not shifted)"
            raise DataError(describe(f"{where}, field 'labels[{number}]'", "is not a target", expected=expected, got=label))
    trained = [label != IGNORE_INDEX for label in labels]
    if mask is not None:
        kept = [number for number, shown in enumerate(mask) if shown]
        if row.get("labels") is not None and any(trained[number] for number, shown in enumerate(mask) if not shown):
            raise DataError(describe(f"{where}, field 'labels'", "trains positions that attention_mask hides"))
        ids, trained = [ids[number] for number in kept], [trained[number] for number in kept]
    return Pretokenised(ids, trained)


def _integers(values: object, where: str) -> list[int]:
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise DataError(describe(where, "is not a list of integers", got=type(values).__name__))
    for number, value in enumerate(values):
        if type(value) is not int or not -(2**31) <= value < 2**31:
            raise DataError(describe(f"{where}[{number}]", "is not a token id", expected="a 32-bit integer", got=repr(value)))
    return list(values)
