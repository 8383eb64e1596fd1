"""One conversation and its prefixes under a chat template, each rendered once; and how texts of templates
end."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from repsft_fast.errors import DataError, describe

Span = tuple[int, int]  # first character of the trained text, and the one behind its last

ANYBODY = {"role": "user", "content": "Anybody there?"}  # a turn that could follow, or come first

# Thinking that the generation prompt has begun, or begun and ended: "<think>\n", "[THINK]",
# "<think>\n\n</think>\n\n".
_THINKING = re.compile(r"(?:[<\[◁]\|?/?[\w:]*think\w*\|?[>\]▷]\s*)+$", re.IGNORECASE)


class Render(Protocol):
    def __call__(self, messages: list[dict[str, Any]], prompt: bool = False) -> tuple[str, list[Span]]: ...


class Question(NamedTuple):
    """What a chat of one question shows of a template."""

    opener: str = ""  # what the generation prompt adds
    opening: frozenset[str] = frozenset()  # the special tokens in front of the user's text
    # those that the chat ends in without a prompt, last first, if one of them opens a turn
    always: tuple[str, ...] = ()


@dataclass
class Renders:
    """One conversation and its prefixes, each rendered once."""

    render: Render
    messages: list[dict[str, Any]]
    specials: tuple[str, ...]
    place: Callable[[int], str]  # a turn's number → its name in errors
    # of one template, kept between its conversations
    questions: dict[str, Question] = field(default_factory=dict)
    about: str = ""  # what they depend on besides the template
    notes: set[str] = field(default_factory=set)
    _prefixes: dict[tuple[int, bool], str] = field(default_factory=dict)

    @cached_property
    def _whole(self) -> tuple[str, list[Span]]:
        return self.render(self.messages)

    @property
    def is_rendered(self) -> bool:
        return "_whole" in self.__dict__

    @property
    def whole(self) -> str:
        return self._whole[0]

    @property
    def blocks(self) -> list[Span]:
        return self._whole[1]

    def prefix(self, count: int, prompt: bool = False) -> str:
        if count == len(self.messages) and not prompt:
            return self.whole
        if (count, prompt) not in self._prefixes:
            self._prefixes[count, prompt] = self.render(self.messages[:count], prompt)[0]
        return self._prefixes[count, prompt]

    def prompt(self, turn: int) -> str:
        """P_turn. Many templates cannot render nothing: for a chat that begins with the assistant it is put
        together."""
        if turn:
            return self.prefix(turn, prompt=True)
        opener = self.opener
        at = self.prefix(1).find(opener) if opener else -1
        if at < 0:
            wrong = "begins the chat, and the chat template has no generation prompt that stands before it"
            raise DataError(describe(self.place(turn), wrong, todo="put a user's turn first"))
        return self.prefix(1)[: at + len(opener)]

    @property
    def opener(self) -> str:
        """What the generation prompt adds to a chat, as far as one can tell without this one."""
        return self.question.opener

    @property
    def question(self) -> Question:
        """A chat of one question; looked at once a template."""
        known = self.questions.get(self.about)
        if known is None:
            try:
                known = _asked(self.render([ANYBODY])[0], self.render([ANYBODY], True)[0], self.specials)
            except MemoryError:
                raise
            except Exception:  # a template may raise anything; it does not take a chat of one turn
                known = Question()
            self.questions[self.about] = known
        return known


def _asked(asked: str, prompted: str, specials: tuple[str, ...]) -> Question:
    before, _, behind = asked.partition(ANYBODY["content"])
    closing = [special for special, _ in closing_tokens(behind, specials)]
    # What closes the user's turn closes a system turn before it, too: it opens nothing.
    opening = {special for special, _ in closing_tokens(before, specials)} - set(closing[-1:])
    opener = prompted[len(asked) :] if prompted.startswith(asked) else ""
    return Question(opener, frozenset(opening), tuple(closing) if opening.intersection(closing) else ())


def closing_tokens(text: str, specials: tuple[str, ...], start: int = 0) -> list[tuple[str, int]]:
    """The special tokens that the text ends in, white space aside, last first: (token, where it begins)."""
    found: list[tuple[str, int]] = []
    end = len(text.rstrip())
    while text.endswith(specials, start, end):
        special = next(special for special in specials if text.endswith(special, start, end))
        found.append((special, end - len(special)))
        end = start + len(text[start : end - len(special)].rstrip())
    return found


def thinking_of(prompt: str) -> str:
    """The part of a turn's own text that its generation prompt holds already."""
    found = _THINKING.search(prompt[-80:])
    return found[0] if found else ""
