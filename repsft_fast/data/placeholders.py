"""Text that looks like a special token stays text.

Before a chat template sees a row, every special-token string inside its messages and tools is replaced by a
placeholder of Unicode noncharacters. Afterwards the text between the template's own special tokens that holds
a placeholder gets its string back as a `raw` piece, which the tokenizer encodes with its special tokens off.
Text can thus neither end a turn nor open one. (Added tokens that are not special, such as Qwen3's <think>,
stay tokens; and so do the marks of reasoning in an assistant's own text where a tokenizer calls them special,
since the template looks for them there.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from repsft_fast.errors import DataError, describe

# Pairs of noncharacters: valid in UTF-8, never assigned, never in sane text. The first pair absent from a row
# is used.
_MARKS = [(chr(0xFDD0 + 2 * number), chr(0xFDD1 + 2 * number)) for number in range(16)]
_THINKING = re.compile(r"[<\[]/?\|?think(ing)?\|?[>\]]", re.IGNORECASE)

Marks = tuple[str, str]


@dataclass(frozen=True)
class Piece:
    text: str
    trained: bool
    raw: bool = False  # encode with special tokens off


def special_strings(tokenizer: Any) -> tuple[str, ...]:
    """The strings the tokenizer turns into one special token wherever they stand, longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    strings = {str(token) for token in added if token.special} | {
        str(token) for token in tokenizer.all_special_tokens
    }
    return tuple(sorted((text for text in strings if text), key=lambda text: (-len(text), text)))


def special_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Matches any of them; as one group, so that `split` keeps them."""
    return pattern_of(special_strings(tokenizer))


def pattern_of(strings: Iterable[str]) -> re.Pattern[str] | None:
    alternatives = "|".join(map(re.escape, strings))
    return re.compile(f"({alternatives})") if alternatives else None


class Placeholders:
    """Hides special-token strings of a row and cuts the rendered text into pieces with the strings put
    back."""

    def __init__(self, specials: tuple[str, ...]):
        self.specials = specials
        self.pattern = pattern_of(specials)
        self.outside_thinking = pattern_of(text for text in specials if not _THINKING.fullmatch(text))
        self.numbers = {text: number for number, text in enumerate(specials)}

    def hide(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, where: str
    ) -> tuple[list[dict[str, Any]], list[Any] | None, Marks | None]:
        """(messages, tools, the pair of marks), or the row as it is and None where it holds no such
        string."""
        pattern = self.pattern
        if pattern is None or not any(pattern.search(text) for text in _strings([messages, tools])):
            return messages, tools, None
        # Marks that stand in no text of the row, or a text of its own could be taken for one.
        everything = set().union(*_strings([messages, tools]))
        marks = next((pair for pair in _MARKS if not everything & set(pair)), None)
        if marks is None:
            raise DataError(
                describe(where, "holds every Unicode noncharacter U+FDD0 to U+FDEF", todo="remove the row")
            )
        hidden = [self._hidden_message(message, marks) for message in messages]
        return hidden, self._hidden(tools, pattern, marks), marks

    def _hidden_message(self, message: dict[str, Any], marks: Marks) -> dict[str, Any]:
        assert self.pattern is not None
        hidden: dict[str, Any] = self._hidden(message, self.pattern, marks)
        # A template looks for thinking in the answer, so there its marks stay.
        if message["role"] == "assistant":
            hidden["content"] = self._hidden(message["content"], self.outside_thinking, marks)
        return hidden

    def _hidden(self, value: Any, pattern: re.Pattern[str] | None, marks: Marks) -> Any:
        if pattern is None:
            return value
        if isinstance(value, str):
            return pattern.sub(lambda match: f"{marks[0]}{self.numbers[match[0]]}{marks[1]}", value)
        if isinstance(value, Mapping):
            return {
                self._hidden(key, pattern, marks): self._hidden(item, pattern, marks)
                for key, item in value.items()
            }
        return [self._hidden(item, pattern, marks) for item in value] if isinstance(value, list) else value

    def _shown(self, text: str, marks: Marks, where: str) -> str:
        shown = re.sub(f"{marks[0]}([0-9]+){marks[1]}", lambda match: self.specials[int(match[1])], text)
        if marks[0] in shown or marks[1] in shown:
            todo = "remove special-token strings from the row"
            raise DataError(
                describe(where, "the chat template cuts a text that holds a special token", todo=todo)
            )
        return shown

    def pieces(
        self, text: str, spans: Iterable[tuple[int, int]], marks: Marks | None, where: str
    ) -> list[Piece]:
        """The whole text in pieces, those inside `spans` trained, the hidden strings shown again."""
        starts = dict(spans)
        if marks is None:
            return _plain_pieces(text, sorted(starts.items()))
        pieces: list[Piece] = []
        borders = sorted({0, len(text), *starts, *starts.values()})
        # Spans may lie in each other; a piece is trained where any of them covers it.
        last_end = -1
        for start, end in pairwise(borders):
            last_end = max(last_end, starts.get(start, -1))
            trained = end <= last_end
            for part in self.pattern.split(text[start:end]) if self.pattern else [text[start:end]]:
                shown = self._shown(part, marks, where)
                if shown != part:
                    pieces.append(Piece(shown, trained, raw=True))
                elif pieces and pieces[-1].trained == trained and not pieces[-1].raw:
                    pieces[-1] = Piece(pieces[-1].text + part, trained)
                elif part:
                    pieces.append(Piece(part, trained))
        return pieces


def _plain_pieces(text: str, spans: list[tuple[int, int]]) -> list[Piece]:
    pieces, done = [], 0
    for start, end in spans:
        pieces += [Piece(text[done:start], False), Piece(text[start:end], True)]
        done = end
    return [piece for piece in [*pieces, Piece(text[done:], False)] if piece.text]


def without_placeholders(text: str, marks: Marks | None) -> str:
    return re.sub(f"{marks[0]}[0-9]+{marks[1]}", "", text) if marks else text


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for item in pair for text in _strings(item)]
    return [text for item in value for text in _strings(item)] if isinstance(value, list | tuple) else []
