"""Nothing a row says may be lost: what stands in a message must stand in the text the chat template made of
it.

White space is not compared (templates trim and add it). Text may also stand there as JSON writes it, since
some templates put tool results and arguments through `tojson`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from repsft_fast.errors import DataError, describe


def squeeze(text: str) -> str:
    """Without white space."""
    return "".join(text.split())


def split_thinking(message: Mapping[str, Any]) -> tuple[str, str]:
    """(reasoning, answer) of an assistant's turn, whichever way it is written: the field, or <think>…</think>
    in the text."""
    said = message.get("content") or ""
    if message.get("reasoning_content") or not said.lstrip().startswith("<think>") or "</think>" not in said:
        return message.get("reasoning_content") or "", said
    thought, _, answer = said.lstrip().removeprefix("<think>").partition("</think>")
    return thought.strip("\n"), answer.lstrip("\n")


def check_turn(message: dict[str, Any], text: str, place: str) -> None:
    """A trained turn: its text, its reasoning, every tool's name and every argument. DataError naming what is
    lost."""
    thought, answer = split_thinking(message)
    # Reasoning that stands in the text may be written in another way by the template, as long as both parts
    # are there.
    apart = answer != (message.get("content") or "") and not _stands(message["content"], text)
    said = {"content": answer, "reasoning_content": thought} if apart else message
    for field in ("content", "reasoning_content"):
        if said.get(field) and not _stands(said[field], text):
            raise DataError(
                describe(
                    f"{place}, field {field if field in message else 'content'!r}",
                    "the chat template drops or changes the assistant's text",
                    expected=repr(said[field][:60]),
                    got=repr(text[:60]),
                    todo=_WAY_OUT[field],
                )
            )
    if thought.strip() and _ENDED_BEFORE.search(squeeze(text).partition(squeeze(thought))[0]):
        wrong = "the chat template closes the thinking before the row's reasoning"
        todo = (
            "set tokenizer.chat_template to one that writes it once, tokenizer.template_kwargs, or"
            " data.on_bad_row: drop"
        )
        raise DataError(describe(place, wrong, got=repr(text[:60]), todo=todo))
    # Templates that look for </think> anywhere would make the first half of an answer that mentions it the
    # reasoning.
    mentions = "</think>" in answer and "<think>" not in answer and not CLOSED.search(answer)
    if mentions and not thought and answer.strip() not in text:
        wrong = "the chat template takes the text in front of </think> for reasoning"
        todo = "write <think> in front of it where it is, or data.on_bad_row: drop"
        raise DataError(
            describe(place, wrong, expected=repr(answer.strip()[:60]), got=repr(text[:60]), todo=todo)
        )
    for number, call in enumerate(message.get("tool_calls") or ()):
        _check_call(call["function"], text, squeeze(text), f"{place}, field 'tool_calls[{number}]'")


# on a line of its own: a thinking's end, not the word for one
CLOSED = re.compile(r"^\s*</think>\s*$", re.MULTILINE)
_ENDED_BEFORE = re.compile(r"</think(ing)?>|\[/THINK\]", re.IGNORECASE)
_WAY_OUT = {
    "content": "set tokenizer.chat_template to one that keeps it, or data.on_bad_row: drop",
    "reasoning_content": (
        "set data.train_on: last, set tokenizer.chat_template to one that keeps it, put it into content as"
        " <think>…</think> where the template has no place for it, or data.on_bad_row: drop"
    ),
}


def _check_call(function: Mapping[str, Any], text: str, squeezed: str, place: str) -> None:
    # The name and every value must stand somewhere, in whatever form the template writes a call.
    arguments = function.get("arguments")
    lost = [("name", function["name"])] if not _stands(str(function["name"]), text) else []
    lost += [
        ("argument", leaf)
        for leaf in _leaves(arguments)
        if not any(squeeze(form) in squeezed for form in _forms(leaf))
    ]
    if lost:
        kind, value = lost[0]
        wrong = f"the chat template drops the tool call's {kind}"
        todo = "set tokenizer.chat_template to one that writes tool calls, or data.on_bad_row: drop"
        raise DataError(describe(place, wrong, expected=_short(value), got=repr(text[:60]), todo=todo))
    # A form that no parser of calls reads would be trained: Python's quotes, bare text, quotes in quotes.
    if isinstance(arguments, Mapping) and arguments:
        written = json.dumps(arguments, ensure_ascii=False)
        if squeeze(str(arguments)) in squeezed and squeeze(written) not in squeezed:
            raise DataError(
                describe(
                    place, "the chat template writes the arguments in Python's form", expected=written[:80]
                )
            )
    if isinstance(arguments, str) and _is_bare(arguments, squeezed):
        wrong = "the chat template writes arguments that are not JSON into the JSON of its call"
        todo = "write the arguments as an object, set tokenizer.chat_template, or data.on_bad_row: drop"
        raise DataError(describe(place, wrong, got=_short(arguments), todo=todo))
    # Text that is an object already, written as a string, is escaped twice.
    if (
        isinstance(arguments, str)
        and arguments[:1] == "{"
        and squeeze(json.dumps(arguments, ensure_ascii=False)) in squeezed
    ):
        raise DataError(
            describe(place, "the chat template encodes the arguments twice", expected=arguments[:80])
        )


def _is_bare(arguments: str, squeezed: str) -> bool:
    """Does text that is not JSON stand without quotes where JSON has a value?"""
    bare = squeeze(arguments)
    if not any(f'"{key}":{bare}' in squeezed for key in ("arguments", "parameters")):
        return False
    try:
        json.loads(arguments)
    except (ValueError, RecursionError):
        return True
    return False


def check_context(messages: list[dict[str, Any]], text: str, where: str) -> None:
    """What comes before a trained turn: the text and the calls of every message. Earlier reasoning may go:
    templates drop it on purpose."""
    squeezed = squeeze(text) if any(message.get("tool_calls") for message in messages) else ""
    for number, message in enumerate(messages):
        said = message.get("content") or ""
        if message["role"] == "assistant":
            said = said.rpartition("</think>")[2]
        if not _stands(said, text):
            raise DataError(
                describe(
                    f"{where}, turn {number + 1}, field 'content'",
                    f"the chat template drops or changes the {message['role']}'s text",
                    expected=repr(said.strip()[:60]),
                    todo=(
                        "set tokenizer.chat_template to one that keeps it, remove the turn, or"
                        " data.on_bad_row: drop"
                    ),
                )
            )
        for position, call in enumerate(message.get("tool_calls") or ()):
            _check_call(
                call["function"],
                text,
                squeezed,
                f"{where}, turn {number + 1}, field 'tool_calls[{position}]'",
            )


def turns_whose_thinking_stands(messages: list[dict[str, Any]], text: str) -> set[int]:
    thoughts = {
        n: split_thinking(message)[0] for n, message in enumerate(messages) if message["role"] == "assistant"
    }
    return {number for number, thought in thoughts.items() if thought and _stands(thought, text)}


def says_something(message: Mapping[str, Any], content: str) -> bool:
    """A turn of white space or special tokens only has nothing to learn. content: without placeholders."""
    return bool(
        content.strip() or (message.get("reasoning_content") or "").strip() or message.get("tool_calls")
    )


def _stands(said: str, text: str) -> bool:
    if said.strip() in text:  # nearly always
        return True
    squeezed = squeeze(text)
    return squeeze(said) in squeezed or any(squeeze(form) in squeezed for form in _json_forms(said))


def _json_forms(text: str) -> Iterator[str]:
    for ascii_only in (False, True):
        yield json.dumps(text, ensure_ascii=ascii_only)[1:-1]
    # A text that is JSON itself may be read and written again by the template.
    if text[:1] in ("{", "["):
        try:
            yield json.dumps(json.loads(text), ensure_ascii=False)
        except (ValueError, RecursionError):
            return


def _forms(leaf: Any) -> Iterator[str]:
    if isinstance(leaf, str):
        yield leaf
        yield from _json_forms(leaf)
        yield repr(leaf)[1:-1]
    else:
        yield json.dumps(leaf)
        yield str(leaf)


def _leaves(value: Any) -> Iterator[Any]:
    """Every key and every value of a call's arguments that is not itself an object or a list."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif value is not None:
        yield value


def _short(value: Any) -> str:
    return repr(value)[:80]
