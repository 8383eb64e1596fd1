"""Conversations of marked words: every text begins and ends with a word that occurs nowhere else
("zq003c00z": turn 3, content, first), so that a rendered text shows where it comes from and what is missing.
For tests/helpers/independent_masks.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

WORD = re.compile(r"zq(\d{3})([crvkn])\d{2}z")  # content, reasoning, argument value, argument key, name
QUOTE = re.compile(r"zq(\d{3})sz")  # stands for a special-token string that a text quotes
SAYING = ("content", "reasoning_content", "tool_calls")
SHARED = 900  # the turn number of names and keys that tools and calls share

Message = dict[str, Any]
Maker = Callable[[int], Message]  # turn number → message


def words(turn: int, letter: str, body: str = " some words ", first: int = 0) -> str:
    return f"zq{turn:03}{letter}{first:02}z{body}zq{turn:03}{letter}{first + 1:02}z"


def shared(letter: str, number: int) -> str:
    return f"zq{SHARED:03}{letter}{number:02}z"


def said(role: str, body: str = " some words ", lead: str = "", trail: str = "") -> Maker:
    return lambda turn: {"role": role, "content": lead + words(turn, "c", body) + trail}


def result(call: int = 0, name: int = 0) -> Maker:
    """What a tool gave back to call number `call` of the turn before."""
    return lambda turn: {
        "role": "tool",
        "content": words(turn, "c"),
        "tool_call_id": f"id{turn - 1 - call:03}{call:04}",
        "name": shared("n", name),
    }


def answer(
    body: str = " some words ",
    lead: str = "",
    trail: str = "",
    *,
    empty: bool = False,
    reasoning: str | None = None,  # "field", or "think": written into the content
    # per call: the arguments, strings of which become words; None = a name of its own, {}
    calls: tuple[Any, ...] = (),
) -> Maker:
    def make(turn: int) -> Message:
        content = "" if empty else lead + words(turn, "c", body) + trail
        message: Message = {"role": "assistant", "content": content}
        if reasoning == "field":
            message["reasoning_content"] = words(turn, "r", " first\nthen ")
        elif reasoning == "think":
            message["content"] = f"<think>\n{words(turn, 'r', ' first then ')}\n</think>\n\n{content}"
        values = (f"zq{turn:03}v{number:02}z" for number in range(100))
        made = []
        for number, arguments in enumerate(calls):
            name = f"zq{turn:03}n{number:02}z" if arguments is None else shared("n", number)
            function = {"name": name, "arguments": _with_words(arguments or {}, values)}
            made.append({"type": "function", "id": f"id{turn:03}{number:04}", "function": function})
        if made:
            message["tool_calls"] = made
        return message

    return make


def _with_words(value: Any, values: Iterator[str]) -> Any:
    if isinstance(value, dict):
        return {key: _with_words(item, values) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_words(item, values) for item in value]
    return next(values) + value if isinstance(value, str) else value


def tool(number: int) -> dict[str, Any]:
    properties = {shared("k", key): {"type": "string", "description": "a key"} for key in range(3)}
    parameters = {"type": "object", "properties": properties, "required": [shared("k", 0)]}
    return {
        "type": "function",
        "function": {"name": shared("n", number), "description": "a tool", "parameters": parameters},
    }


@dataclass(frozen=True)
class Case:
    """A conversation and what is asked of it."""

    makers: tuple[Maker, ...]
    tools: int = 0  # how many are offered
    trainable: tuple[int, ...] | None = None
    train_on: str = "all"

    @property
    def messages(self) -> list[Message]:
        return [maker(number) for number, maker in enumerate(self.makers)]

    def asked(self) -> list[int]:
        """The assistant turns to be trained: those that the row allows and that say something."""
        says = [(message["role"], any(message.get(key) for key in SAYING)) for message in self.messages]
        turns = [number for number, (role, something) in enumerate(says) if role == "assistant" and something]
        turns = turns[-1:] if self.train_on == "last" else turns
        return turns if self.trainable is None else [turn for turn in turns if turn in self.trainable]


def quoted(number: int) -> str:
    """A place for the template's special token of that number, quoted in a text."""
    return f"zq{number:03}sz"


def with_quotes(value: Any, specials: list[str]) -> Any:
    if isinstance(value, str):
        return QUOTE.sub(lambda match: specials[int(match[1]) % len(specials)], value) if specials else value
    if isinstance(value, dict):
        return {key: with_quotes(item, specials) for key, item in value.items()}
    return [with_quotes(item, specials) for item in value] if isinstance(value, list) else value
