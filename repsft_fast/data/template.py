"""Conversation + chat template → pieces of text, trained or not.

`spans` finds what is trained, `kept` sees to it that nothing the row says is lost, `placeholders` keeps text
that looks like a special token from becoming one. Here the template is rendered, in transformers' sandbox,
and the row is spelled in the way this template reads: templates differ in the name of the reasoning, in
whether a call's arguments are an object or JSON text, and in what stands in a turn that only calls a tool.
The first spelling in which everything is kept is taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from repsft_fast.data.formats import Conversation, check_kwargs
from repsft_fast.data.kept import (
    CLOSED,
    check_context,
    says_something,
    split_thinking,
    squeeze,
    turns_whose_thinking_stands,
)
from repsft_fast.data.placeholders import Piece, Placeholders, special_strings, without_placeholders
from repsft_fast.data.renders import ANYBODY, Question, Renders, Span, closing_tokens
from repsft_fast.data.spans import turn_spans
from repsft_fast.errors import DataError, describe, open_plain

MAX_TEMPLATE_BYTES = 2**24  # of a file; the longest public ones have 2**16


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


NOTE_SPECIAL = (
    "rows hold special-token strings, kept as text (tokenizer.special_tokens: parse makes them tokens)"
)
NOTE_TOOLS = "rows have tools that the chat template ignores"
NOTE_KWARGS = "rows have chat_template_kwargs that the chat template does not read"
NOTE_NAMES = "rows name the speakers of turns, and the chat template does not write the names"
NOTE_MARKED = "rows have turns marked as trained that are not, since data.train_on is last"
NOTE_ENDLESS = "turns end without a special token in the chat template: the model will not learn to stop"


def find_template(tokenizer: Any, override: str | None) -> str | None:
    """The template's text: the override (text, or a file's path), else the tokenizer's own, else None."""
    if override is not None and "{" not in override:
        try:
            with open_plain(override) as stream:
                text = stream.read(MAX_TEMPLATE_BYTES + 1)
            if len(text) > MAX_TEMPLATE_BYTES:
                raise ValueError(f"larger than {MAX_TEMPLATE_BYTES} bytes")
            return text.decode("utf-8")
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


@dataclass(frozen=True)
class Spelling:
    """How messages are handed to a template."""

    # Where reasoning stands. "": in the row's way, the field under both names that templates read; fields:
    # that of the text, too; a field's name: there alone; content: in the text, as <think>…</think>.
    reasoning: str = ""
    arguments_as_text: bool = False  # a call's arguments as JSON text
    null_content: bool = False  # None in place of the empty content of a turn that only calls tools

    def __call__(self, message: dict[str, Any]) -> dict[str, Any]:
        spelled = dict(message)
        thought, answer = (
            split_thinking(message) if message["role"] == "assistant" else ("", message["content"])
        )
        if not self.reasoning and thought and thought == message.get("reasoning_content"):
            spelled["thinking"] = thought
        # an empty thinking in the text says nothing
        elif self.reasoning and (thought or answer != message["content"]):
            spelled.pop("reasoning_content", None)
            if self.reasoning == "content":
                spelled["content"] = f"<think>\n{thought}\n</think>\n\n{answer}"
            else:
                names = ("reasoning_content", "thinking") if self.reasoning == "fields" else (self.reasoning,)
                spelled |= {"content": answer, **(dict.fromkeys(names, thought) if thought.strip() else {})}
        if self.arguments_as_text and spelled.get("tool_calls"):
            spelled["tool_calls"] = [
                {
                    **call,
                    "function": {
                        **call["function"],
                        "arguments": _as_text(call["function"].get("arguments")),
                    },
                }
                for call in spelled["tool_calls"]
            ]
        if self.null_content and spelled.get("tool_calls") and not spelled["content"].strip():
            spelled["content"] = None
        return spelled


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


class ChatTemplate:
    """Renders conversations and finds their trained text. Meant to run under `bounded_map`: the template is
    untrusted."""

    def __init__(
        self,
        template: str,
        tokenizer: Any,
        *,
        train_on: str = "all",
        parse_special: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ):
        named = getattr(tokenizer, "chat_template", None)
        # Command R and others have a template of their own for chats with tools: transformers takes it there,
        # too.
        with_tools = (
            named.get("tool_use") if isinstance(named, dict) and named.get("default") == template else None
        )
        self.template, self.tool_template = template, with_tools or template
        self.train_on = train_on
        own = check_kwargs(template_kwargs or {}, "tokenizer.template_kwargs")
        self.specials = special_strings(tokenizer)
        self.variables: dict[str, Any] = {f"{name}_token": "" for name in ("bos", "eos", "pad", "unk")}
        tokens = tokenizer.special_tokens_map.items()
        self.variables |= {name: str(token) for name, token in tokens if not isinstance(token, list)} | own
        self._questions: dict[str, Question] = {}
        self._fields_only: dict[tuple[bool, str], bool] = {}
        self._templates: dict[str, tuple[Any, bool, Any]] = {}
        self.placeholders = Placeholders(() if parse_special else self.specials)

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        prompt: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[Span]]:
        """(text, the character spans of its generation blocks). In transformers' sandbox; messages and tools
        are plain JSON."""
        compiled, has_blocks, render_with_blocks = self._compiled(
            self.tool_template if tools else self.template
        )
        given = self.variables | dict(kwargs) if kwargs else self.variables
        if not has_blocks or prompt:
            return (
                compiled.render(
                    messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **given
                ),
                [],
            )
        text, spans = render_with_blocks(compiled, messages, tools, None, prompt, **given)
        return text, [(start, end) for start, end in spans]

    def _compiled(self, template: str) -> tuple[Any, bool, Any]:
        """The template compiled by transformers, so that its sandbox, filters and functions are those of
        generating.

        Printing a variable that nobody set is made an error: jinja prints nothing, and the sample would lose
        its text. (A field that a message does not have still prints nothing: templates rely on it, and `kept`
        looks after the text.) What is used here is private to transformers, whose public function copies and
        checks everything anew at every render.
        """
        if template not in self._templates:
            import jinja2
            from transformers.utils import chat_template_utils

            class Loud(jinja2.Undefined):
                def __str__(self) -> str:
                    named = self._undefined_obj is jinja2.utils.missing
                    return self._fail_with_undefined_error() if named else ""

            compiled = chat_template_utils._compile_jinja_template(template)
            compiled.environment.undefined = Loud
            has_blocks = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template) is not None
            self._templates[template] = (
                compiled,
                has_blocks,
                chat_template_utils._render_with_assistant_indices,
            )
        return self._templates[template]

    def __call__(self, conversation: Conversation, where: str) -> Rendered | None:
        """None when no turn can be trained. Raises DataError when the template loses or rewrites what should
        be trained."""
        messages, tools, marks = self.placeholders.hide(conversation.messages, conversation.tools, where)
        spoken = [
            number
            for number, message in enumerate(messages)
            if message["role"] == "assistant"
            and says_something(message, without_placeholders(message["content"], marks))
        ]
        turns, notes = self._asked(conversation, spoken)
        # Special tokens in the row's text stay text, so they are hidden before the template sees them.
        if not turns:
            return None
        messages = messages[: turns[-1] + 1]  # what follows the last trained turn is not part of the sample
        if marks:
            notes.add(NOTE_SPECIAL)
        text, spans = self._first_kept(messages, tools, turns, conversation.template_kwargs, where, notes)
        if not self.placeholders.specials:  # special tokens of the row are tokens
            self._check_ends(text, spans, where)
        if not all(text[:end].endswith(self.specials) for _, end in spans):
            notes.add(NOTE_ENDLESS)
        if tools and not any(
            squeeze(str(tool.get("function", tool).get("name", ""))) in squeeze(text) for tool in tools
        ):
            notes.add(NOTE_TOOLS)
        # A template that has no place for a part of the row is told of, once: the row is trained without it.
        speakers = {
            message["name"] for message in messages if message.get("name") and message["role"] != "tool"
        }
        if any(squeeze(name) not in squeeze(text) for name in speakers):
            notes.add(NOTE_NAMES)
        if not all(
            re.search(rf"\b{name}\b", self.template + self.tool_template)
            for name in conversation.template_kwargs
        ):
            notes.add(NOTE_KWARGS)
        return Rendered(tuple(self.placeholders.pieces(text, spans, marks, where)), tuple(sorted(notes)))

    def _check_ends(self, text: str, spans: list[tuple[int, int]], where: str) -> None:
        """A row's text that ends in the end of turn, which the template writes once more, would train two."""
        for start, end in spans:
            closing = [special for special, _ in closing_tokens(text[:end], self.specials, start)]
            if len(closing) > 1 and closing[0] == closing[1]:
                wrong = f"has a turn that ends in {closing[0]}, and the chat template writes it again"
                todo = "remove it from the turn's text, or set tokenizer.special_tokens: text"
                raise DataError(describe(where, wrong, got=repr(text[start:end][-60:]), todo=todo))

    def _asked(self, conversation: Conversation, spoken: list[int]) -> tuple[list[int], set[str]]:
        """Which turns are to be trained: those the row allows, of them the last one where only that is asked
        for."""
        allowed = conversation.trainable
        if self.train_on != "last":
            return [turn for turn in spoken if allowed is None or turn in allowed], set()
        turns = [turn for turn in spoken[-1:] if allowed is None or turn in allowed]
        left_out = allowed is not None and any(turn in allowed for turn in spoken[:-1])
        return turns, {NOTE_MARKED} if left_out else set()

    def _first_kept(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        turns: list[int],
        kwargs: Mapping[str, Any],
        where: str,
        notes: set[str],
    ) -> tuple[str, list[Span]]:
        """Text and trained spans in the first spelling of the row in which the template keeps everything.

        Reasoning before the trained turns may go where the template was handed it in the way it reads:
        templates drop it on purpose. In a spelling that it may not know it would go because nobody looked, so
        there all of it must stand.
        """
        first: Exception | None = None
        stood: set[int] = set()  # turns whose reasoning stood in a spelling that failed otherwise
        spoken = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        thoughts = {turn for turn in spoken if split_thinking(messages[turn])[0]}
        in_text = [turn for turn in spoken if "</think>" in messages[turn]["content"]]
        fields_only = bool(in_text) and self._reads_fields_only(tools, kwargs)
        if fields_only:
            self._check_thinking_begins(messages, in_text, where)

        # Our own spelling first; of its error the user learns the most, as it is the row as it was written.
        about = f"{bool(tools)} {sorted(kwargs.items())}" if tools or kwargs else ""
        for spelling in self._spellings(messages, bool(thoughts), bool(in_text), fields_only):
            renders = Renders(
                partial(self._render_spelled, spelling, tools, kwargs),
                messages,
                self.specials,
                lambda turn: f"{where}, turn {turn + 1}",
                self._questions,
                about,
            )
            try:
                spans = turn_spans(renders, turns)
                check_context(messages[: turns[-1]], renders.whole, where)
            except MemoryError:
                raise
            except Exception as error:  # a template may raise anything
                first = first or error
                if thoughts and renders.is_rendered:
                    stood |= turns_whose_thinking_stands(messages, renders.whole)
                continue
            # A spelling that the template may not know is taken only where all the reasoning stands in it.
            needed = stood if spelling.reasoning in ("", "fields", "content") else thoughts
            if not needed or needed <= turns_whose_thinking_stands(messages, renders.whole):
                notes |= renders.notes
                return renders.whole, sorted(span for of_turn in spans.values() for span in of_turn)
        assert first is not None
        raise first

    @staticmethod
    def _check_thinking_begins(messages: list[dict[str, Any]], in_text: list[int], where: str) -> None:
        """Thinking in the text that only ends cannot be put into a field: where it begins is not known."""
        for turn in in_text:
            content = messages[turn]["content"]
            if split_thinking(messages[turn])[1] == content and CLOSED.search(content):
                wrong = (
                    "closes a thinking that its text does not begin, and the chat template has another place"
                    " for it"
                )
                raise DataError(
                    describe(f"{where}, turn {turn + 1}", wrong, todo="write <think> in front of it")
                )

    def _render_spelled(
        self,
        spelling: Spelling,
        tools: list[Any] | None,
        kwargs: Mapping[str, Any],
        messages: list[dict[str, Any]],
        prompt: bool = False,
    ) -> tuple[str, list[Span]]:
        as_it_is = spelling == Spelling() and not any(
            message.get("reasoning_content") for message in messages
        )
        spelled = messages if as_it_is else [spelling(message) for message in messages]
        return self.render(spelled, tools, prompt, kwargs)

    def _reads_fields_only(self, tools: list[Any] | None, kwargs: Mapping[str, Any]) -> bool:
        """Does the template write a turn's reasoning in marks of its own, and know none in the text? Asked
        once a template.

        There <think>…</think> would be trained as a part of the answer (harmony's final channel), beside the
        template's own place for thinking.
        """
        template = self.tool_template if tools else self.template
        about = bool(tools), json.dumps(kwargs, sort_keys=True, default=str) if kwargs else ""
        if about not in self._fields_only:
            thought = "Nobody was there."
            answer = {"role": "assistant", "content": "I am.", "reasoning_content": thought}
            try:
                asked = [Spelling("fields")(message) for message in (ANYBODY, answer)]
                written = (
                    "</think>" not in template and thought in self.render(asked, tools, False, kwargs)[0]
                )
            except MemoryError:
                raise
            except Exception:  # a template may raise anything; it does not take this chat
                written = False
            self._fields_only[about] = written
        return self._fields_only[about]

    def _spellings(
        self, messages: list[dict[str, Any]], thinks: bool, in_text: bool, fields_only: bool
    ) -> list[Spelling]:
        """Those that can make a difference to these messages, our own first."""
        calls = [call for message in messages for call in message.get("tool_calls") or ()]
        objects = any(isinstance(call["function"].get("arguments"), Mapping) for call in calls)
        silent = any(message.get("tool_calls") and not message["content"].strip() for message in messages)
        names = [""]
        if thinks or in_text:
            # Thinking in the text may be moved to a field; where only fields are read, it must be.
            names = [] if fields_only else [""]
            names += ["fields"] if fields_only or in_text else []
            names += ["reasoning_content", "thinking", "reasoning"]
            if not fields_only and "think>" in self.template + self.tool_template:
                names.append("content")
        return [
            Spelling(reasoning, text, null)
            for reasoning, text, null in product(
                names, (False, True) if objects else (False,), (False, True) if silent else (False,)
            )
        ]
