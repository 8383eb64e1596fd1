"""Conversation + chat template → pieces of text, trained or not.

    P_k = render(messages[:k], add_generation_prompt)   what the model is given before turn k
    F_k = render(messages[:k + 1])                      the same with turn k
    W   = render(messages)                              what is trained on

Turn k's trained text is F_k past P_k, up to and including its end-of-turn token; the white space after that token is
not trained. It is only taken when P_k is a prefix of F_k and F_k (up to there) a prefix of W, so that every trained
token has exactly the context it will have when generating. Templates that rewrite earlier turns (Qwen3 drops earlier
thinking) break the second check for all but the last turn. `{% generation %}` blocks, where a template has them and they
mark anything, take the place of P and F; the end-of-turn token right behind a block is added to it.

Text that looks like a special token stays text: before rendering, every special-token string inside messages and tools
is replaced by a placeholder of Unicode noncharacters. Afterwards the text between the template's own special tokens that
holds a placeholder gets its string back as a `raw` piece, which the tokenizer encodes with its special tokens off. Text
can thus neither end a turn nor open one. (Added tokens that are not special, such as Qwen3's <think>, stay tokens.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from repsft_fast.data.formats import Conversation
from repsft_fast.errors import DataError, describe

# Pairs of noncharacters: valid in UTF-8, never assigned, never in sane text. The first pair absent from a row is used.
_MARKS = [(chr(0xFDD0 + 2 * number), chr(0xFDD1 + 2 * number)) for number in range(16)]


@dataclass(frozen=True)
class Piece:
    text: str
    trained: bool
    raw: bool = False  # encode with special tokens off


@dataclass(frozen=True)
class Rendered:
    pieces: tuple[Piece, ...]
    notes: tuple[str, ...] = ()  # counted by the caller, as warnings
    plain: bool = False  # no template: the caller adds BOS and EOS

    def to_json(self) -> list[Any]:
        return [[[piece.text, piece.trained, piece.raw] for piece in self.pieces], list(self.notes)]

    @staticmethod
    def from_json(value: list[Any]) -> Rendered:
        return Rendered(tuple(Piece(*piece) for piece in value[0]), tuple(value[1]))


NOTE_SPECIAL = "rows hold special-token strings, kept as text"
NOTE_TOOLS = "rows have tools that the chat template ignores"
NOTE_ENDLESS = "turns end without a special token in the chat template: the model will not learn to stop"


def special_strings(tokenizer: Any) -> tuple[str, ...]:
    """The strings the tokenizer turns into one special token wherever they stand, longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    strings = {str(token) for token in added if token.special} | {str(token) for token in tokenizer.all_special_tokens}
    return tuple(sorted((text for text in strings if text), key=lambda text: (-len(text), text)))


def special_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Matches any of them; as one group, so that `split` keeps them."""
    strings = special_strings(tokenizer)
    return re.compile(f"({'|'.join(map(re.escape, strings))})") if strings else None


def find_template(tokenizer: Any, override: str | None) -> str | None:
    """The template's text: the override (text, or a file's path), else the tokenizer's own, else None."""
    if override is not None and "{" not in override:
        try:
            return Path(override).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            cause = getattr(error, "strerror", None) or error
            wrong = f"is neither a template nor a readable file ({cause})"
            raise DataError(describe("tokenizer.chat_template", wrong)) from None
    if override is not None:
        return override
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    return template


class ChatTemplate:
    """Renders conversations and finds their trained text. Meant to run under `bounded_map`: the template is untrusted."""

    def __init__(self, template: str, tokenizer: Any, *, train_on: str = "all", parse_special: bool = False):
        self.template = template
        self.train_on = train_on
        self.specials = special_strings(tokenizer)
        self.special_map = {f"{name}_token": "" for name in ("bos", "eos", "pad", "unk")}
        self.special_map |= {
            name: str(token) for name, token in tokenizer.special_tokens_map.items() if not isinstance(token, list)
        }
        self.pattern = None if parse_special else special_pattern(tokenizer)
        self.has_blocks = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None, prompt: bool = False) -> tuple[str, list[Any]]:
        """(text, the character spans of its generation blocks). In transformers' sandbox."""
        assert self._strict
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # its annotation says str, it returns (texts, spans)
        texts, spans = render(
            conversations=[messages],
            tools=tools,
            chat_template=self.template,
            return_assistant_tokens_mask=self.has_blocks and not prompt,
            add_generation_prompt=prompt,
            **self.special_map,
        )
        return texts[0], spans[0] if spans else []

    @cached_property
    def _strict(self) -> bool:
        """Makes the printing of an undefined variable an error: jinja prints nothing, and the sample would lose its text."""
        import jinja2
        from transformers.utils import chat_template_utils

        class Loud(jinja2.Undefined):
            def __str__(self) -> str:
                return self._fail_with_undefined_error()

        # Private to transformers: a version without it renders as before, only less strictly.
        compiled = getattr(chat_template_utils, "_compile_jinja_template", None)
        if compiled is not None:
            compiled(self.template).environment.undefined = Loud
        return True

    def __call__(self, conversation: Conversation, where: str) -> Rendered | None:
        """None when no turn can be trained. Raises DataError when the template loses or rewrites what should be trained."""
        count = max((n for n, message in enumerate(conversation.messages, 1) if message["role"] == "assistant"), default=0)
        messages, tools, marks = self._hide(conversation.messages[:count], conversation.tools, where)
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if self.train_on == "last" or conversation.only_last:
            turns = turns[-1:]
        turns = [number for number in turns if _says_something(messages[number], marks)]
        if not turns:
            return None
        text, blocks = self.render(messages, tools)
        notes = {NOTE_SPECIAL} if marks else set()
        spans = self._block_spans(text, blocks, messages, tools, turns) if blocks else []
        if spans:
            trained = "".join(text[start:end] for start, end in spans)
            for number in turns:
                _check_kept(messages[number], trained, where, number)
        else:
            spans = [self._turn_span(text, messages, tools, number, where) for number in turns]
        if not all(text[:end].endswith(self.specials) for _, end in spans):
            notes.add(NOTE_ENDLESS)
        if tools and not any(_squeeze(str(tool.get("function", tool).get("name", ""))) in _squeeze(text) for tool in tools):
            notes.add(NOTE_TOOLS)
        return Rendered(tuple(self._cut(text, spans, marks, where)), tuple(sorted(notes)))

    def _turn_span(
        self, text: str, messages: list[dict[str, Any]], tools: list[Any] | None, number: int, where: str
    ) -> tuple[int, int]:
        prompt = self.render(messages[:number], tools, prompt=True)[0]
        full = text if number == len(messages) - 1 else self.render(messages[: number + 1], tools)[0]
        place = f"{where}, turn {number + 1}"
        if not full.startswith(prompt):
            at = next((n for n, (a, b) in enumerate(zip(full, prompt)) if a != b), min(len(full), len(prompt)))
            raise DataError(
                describe(
                    place,
                    "the chat template does not continue its generation prompt with this turn",
                    expected=repr(prompt[at : at + 40]),
                    got=repr(full[at : at + 40]),
                    todo="set tokenizer.chat_template to one with {% generation %} marks, or put the reasoning into the text",
                )
            )
        end = self._end_of_turn(full, len(prompt))
        if not text.startswith(full[:end]):
            raise DataError(
                describe(
                    place,
                    "the chat template rewrites this turn once more turns follow",
                    todo="set data.train_on: last, or tokenizer.chat_template to one with {% generation %} marks",
                )
            )
        _check_kept(messages[number], full[len(prompt) : end], where, number)
        return len(prompt), end

    def _end_of_turn(self, text: str, start: int) -> int:
        """The white space behind a closing special token is not trained."""
        end = len(text.rstrip())
        return end if end > start and text[:end].endswith(self.specials) else len(text)

    def _block_spans(
        self, text: str, blocks: list[Any], messages: list[dict[str, Any]], tools: list[Any] | None, turns: list[int]
    ) -> list[tuple[int, int]]:
        spans = []
        for start, end in blocks:
            closing = next((special for special in self.specials if text.startswith(special, end)), "")
            end = self._end_of_turn(text[: end + len(closing)], start)
            if end > start:
                spans.append((start, end))
        assistants = sum(message["role"] == "assistant" for message in messages)
        if len(turns) == assistants or not spans:
            return spans
        if len(spans) == assistants:  # one block a turn: take those of the turns asked for
            order = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
            return [spans[order.index(number)] for number in turns]
        prompt = self.render(messages[:-1], tools, prompt=True)[0]
        return [span for span in spans if span[0] >= len(prompt)] if text.startswith(prompt) else spans[-1:]

    def _hide(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, where: str
    ) -> tuple[list[dict[str, Any]], list[Any] | None, tuple[str, str] | None]:
        if self.pattern is None or not any(self.pattern.search(text) for text in _strings([messages, tools])):
            return messages, tools, None
        pattern, numbers = self.pattern, {text: number for number, text in enumerate(self.specials)}
        everything = set().union(*_strings([messages, tools]))
        marks = next((pair for pair in _MARKS if not everything & set(pair)), None)
        if marks is None:
            raise DataError(describe(where, "holds every Unicode noncharacter U+FDD0 to U+FDEF", todo="remove the row"))
        left, right = marks

        def hide(value: Any) -> Any:
            if isinstance(value, str):
                return pattern.sub(lambda match: f"{left}{numbers[match[0]]}{right}", value)
            if isinstance(value, Mapping):
                return {hide(key): hide(item) for key, item in value.items()}
            return [hide(item) for item in value] if isinstance(value, list) else value

        return hide(messages), hide(tools), marks

    def _show(self, text: str, marks: tuple[str, str] | None, where: str) -> str:
        if marks is None:
            return text
        shown = re.sub(f"{marks[0]}([0-9]+){marks[1]}", lambda match: self.specials[int(match[1])], text)
        if marks[0] in shown or marks[1] in shown:
            todo = "remove special-token strings from the row"
            raise DataError(describe(where, "the chat template cuts a text that holds a special token", todo=todo))
        return shown

    def _cut(self, text: str, spans: list[tuple[int, int]], marks: tuple[str, str] | None, where: str) -> list[Piece]:
        pieces: list[Piece] = []
        borders = sorted({0, len(text), *(border for span in spans for border in span)})
        starts = {start: end for start, end in spans}
        last_end = -1
        for start, end in pairwise(borders):
            last_end = max(last_end, starts.get(start, -1))
            trained = end <= last_end
            for part in self.pattern.split(text[start:end]) if self.pattern and marks else [text[start:end]]:
                shown = self._show(part, marks, where)
                if shown != part:
                    pieces.append(Piece(shown, trained, raw=True))
                elif pieces and pieces[-1].trained == trained and not pieces[-1].raw:
                    pieces[-1] = Piece(pieces[-1].text + part, trained)
                elif part:
                    pieces.append(Piece(part, trained))
        return pieces


def _says_something(message: dict[str, Any], marks: tuple[str, str] | None) -> bool:
    """A turn of white space or special tokens only has nothing to learn."""
    content = re.sub(f"{marks[0]}[0-9]+{marks[1]}", "", message["content"]) if marks else message["content"]
    return bool(content.strip() or message.get("reasoning_content", "").strip() or message.get("tool_calls"))


def _check_kept(message: dict[str, Any], trained: str, where: str, number: int) -> None:
    squeezed = _squeeze(trained)
    for field in ("content", "reasoning_content"):
        if _squeeze(message.get(field, "")) not in squeezed:
            raise DataError(
                describe(
                    f"{where}, turn {number + 1}, field {field!r}",
                    "the chat template drops or changes the assistant's text",
                    expected=repr(message[field][:60]),
                    got=repr(trained[:60]),
                    todo="set tokenizer.chat_template to one that keeps it, or put it into content as <think>…</think>",
                )
            )


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for item in pair for text in _strings(item)]
    return [text for item in value for text in _strings(item)] if isinstance(value, list | tuple) else []
