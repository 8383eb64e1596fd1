"""Chats of many turns, masked in time linear in their length."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

from repsft_fast.data.kept import check_turn
from repsft_fast.data.renders import Renders, Span, thinking_of

MANY_TURNS = 32  # past so many trained turns not every prefix is rendered: that would be quadratic
EXAMPLES = 24  # of them by prefixes, at most


def long_chat_spans(
    renders: Renders, turns: list[int], exact: Callable[[Renders, int], Span]
) -> dict[int, Span]:
    """Linear in the number of turns: examples of every kind by prefixes, the rest by what stands around
    those.

    A mark behind every message's text shows where it lies in W. Between the text before a turn and the turn's
    trained text, and between that and the text behind it, stands what the template writes for turns of this
    kind: it must be the same as in the examples, else the turn goes by prefixes, too.
    """
    messages, whole = renders.messages, renders.whole
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for turn in turns:
        kinds.setdefault(_kind(messages, turn), []).append(turn)
    # The first and the last of each kind: templates treat the ends of a chat in their own way.
    examples = {
        turns[0],
        turns[-1],
        *(turn for members in kinds.values() for turn in (members[0], members[-1])),
    }
    examples |= set(random.Random(0).sample(turns, 8))  # at no regular distance: templates count, too
    places = _places(renders) if len(examples) <= EXAMPLES else None
    if places is None:
        return {turn: exact(renders, turn) for turn in turns}
    spans = {turn: exact(renders, turn) for turn in sorted(examples)}
    # What stands around the examples, without the white space of the messages themselves.
    frames: dict[tuple[Any, ...], set[tuple[str, str]]] = {}
    for turn, (start, end) in spans.items():
        if turn - 1 in places and turn + 1 in places:
            trailing, leading = _outer_space(messages, turn)
            before, behind = whole[places[turn - 1][1] : start], whole[end : places[turn + 1][0]]
            frame = before.removeprefix(trailing), behind.removesuffix(leading)
            frames.setdefault(_kind(messages, turn), set()).add(frame)
    for turn in turns:
        if turn not in spans:
            framed = _framed(renders, turn, places, frames.get(_kind(messages, turn), set()))
            spans[turn] = framed or exact(renders, turn)
    return spans


def _kind(messages: list[dict[str, Any]], turn: int) -> tuple[Any, ...]:
    message = messages[turn]
    said = message.get("content") or ""
    around = [messages[n]["role"] if 0 <= n < len(messages) else "" for n in (turn - 1, turn + 1)]
    fields = (
        bool(said.strip()),
        "</think>" in said,
        bool(message.get("reasoning_content")),
        bool(message.get("tool_calls")),
    )
    return (*around, *fields)


def _places(renders: Renders) -> dict[int, Span] | None:
    """message → where its text, white space off, lies in W. None when marks change what the template
    writes."""
    left, right = "\U0001fffe", "\U0001ffff"  # noncharacters
    if left in renders.whole or right in renders.whole:
        return None
    said = {
        number: (message.get("content") or "").rstrip() for number, message in enumerate(renders.messages)
    }
    marked = [
        {
            **message,
            "content": f"{said[number]}{left}{number}{right}{message['content'][len(said[number]) :]}",
        }
        if said[number].strip()
        else message
        for number, message in enumerate(renders.messages)
    ]
    text = renders.render(marked)[0]
    places: dict[int, Span] = {}
    taken, end = 0, 0
    for found in re.finditer(f"{left}([0-9]+){right}", text):
        end, taken, number = found.start() - taken, taken + len(found[0]), int(found[1])
        core = said[number].lstrip()
        if number in places or not renders.whole.startswith(core, end - len(core)):
            return None
        places[number] = (end - len(core), end)
    return places if re.sub(f"{left}[0-9]+{right}", "", text) == renders.whole else None


def _outer_space(messages: list[dict[str, Any]], turn: int) -> tuple[str, str]:
    """White space at the end of the text before a turn and at the start of the one behind it: kept by some
    templates."""
    previous, following = messages[turn - 1]["content"], messages[turn + 1]["content"]
    return previous[len(previous.rstrip()) :], following[: len(following) - len(following.lstrip())]


def _framed(
    renders: Renders, turn: int, places: dict[int, Span], frames: set[tuple[str, str]]
) -> Span | None:
    if len(frames) != 1 or turn - 1 not in places or turn + 1 not in places:
        return None
    whole, (before, behind) = renders.whole, next(iter(frames))
    trailing, leading = _outer_space(renders.messages, turn)
    first, last = places[turn - 1][1], places[turn + 1][0]
    start = next(
        (first + len(text) for text in (before, trailing + before) if whole.startswith(text, first)), None
    )
    end = next(
        (last - len(text) for text in (behind, behind + leading) if whole.endswith(text, 0, last)), None
    )
    if start is None or end is None or start >= end:
        return None
    check_turn(
        renders.messages[turn], thinking_of(whole[:start][-80:]) + whole[start:end], renders.place(turn)
    )
    return start, end
