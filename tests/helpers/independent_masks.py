"""What must be trained of a conversation under a chat template, found without repsft_fast.data.template.

Every text of a conversation begins and ends with a word that occurs nowhere else (tests/helpers/marked_chats.py). In
the text that transformers renders from the whole conversation, these words show where each turn lies:

    …|end of the prompt in front of turn 3|zq003c00z some words zq003c01z<|end of turn|>…
                                           ^ start                                   ^ end

Start: the prompt in front (rendered with add_generation_prompt) where the whole text continues it; else what
that prompt says behind its last word, found behind the same word in the whole text. A {% generation %} block
may also start a span. End: behind the first end-of-turn token after the turn's last word. Whatever cannot be
found so must be refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise, product
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from repsft_fast.data.encode import Encoder
from repsft_fast.data.formats import Conversation
from repsft_fast.data.template import ChatTemplate
from repsft_fast.errors import DataError
from tests.helpers.marked_chats import (
    QUOTE,
    SHARED,
    WORD,
    Case,
    Message,
    answer,
    said,
    shared,
    tool,
    with_quotes,
)


@dataclass(frozen=True)
class Template:
    name: str
    text: str
    bos: str | None
    eos: str | None
    special: tuple[str, ...]
    added: tuple[str, ...] = ()  # added tokens that are not special
    kwargs: dict[str, Any] = field(default_factory=dict)
    ends: tuple[str, ...] | None = None  # the end-of-turn tokens; None: found by rendering

    def specials(self) -> list[str]:
        return sorted({*self.special, *(token for token in (self.bos, self.eos) if token)})

    def quotable(self) -> list[str]:
        """Special tokens that a text may quote. Marks of thinking in an answer are no quotes: templates look
        for them."""
        return [token for token in self.specials() if "think" not in token.lower()]

    @property
    def has_blocks(self) -> bool:
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.text) is not None

    def render(
        self, messages: list[Message], tools: list[Any] | None, prompt: bool = False
    ) -> tuple[str, list[Any]]:
        render: Any = render_jinja_template
        tokens = {
            "bos_token": self.bos or "",
            "eos_token": self.eos or "",
            "pad_token": self.eos or "",
            "unk_token": "",
        }
        texts, blocks = render(
            conversations=[messages],
            tools=tools,
            chat_template=self.text,
            return_assistant_tokens_mask=self.has_blocks and not prompt,
            add_generation_prompt=prompt,
            **(tokens | self.kwargs),
        )
        return texts[0], blocks[0] if blocks else []

    def tokenizer(self) -> Any:
        return _tokenizer(self.text, self.bos, self.eos, tuple(self.specials()), self.added)


@cache
def _tokenizer(
    text: str, bos: str | None, eos: str | None, special: tuple[str, ...], added: tuple[str, ...]
) -> Any:
    """256 bytes, no merges, and the template's own tokens: cutting a text anywhere gives the same tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token in added if token not in special]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos)
    tokenizer.chat_template = text
    return tokenizer


@cache
def _ends(
    text: str, bos: str | None, eos: str | None, special: tuple[str, ...], kwargs: str
) -> frozenset[str]:
    """Found by rendering: the special tokens behind the last answer that also stand there when a user goes
    on, the last of them (Phi 3's <|end|>, not its <|endoftext|>); where nothing stays, the last one. The same
    for a call that ends a chat.
    """
    template = Template("", text, bos, eos, special, kwargs=json.loads(kwargs))
    ends: set[str] = set()
    user, call = said("user"), {shared("k", 0): ""}
    for last in (answer(), answer(calls=(call,)), answer(empty=True, calls=(call,))):
        for tools, spelling in product((None, [tool(0)]), spellings(Case((user, last)).messages)):
            try:
                messages = [spelling(message) for message in Case((user, last, user)).messages]
                whole = template.render(messages[:2], tools)[0]
                word = _own(messages[1], 1, "crv")[-1]
                behind = _closing(whole[whole.index(word) + len(word) :], template.specials())
            except Exception:  # a template without tools, or one that loses the call
                continue
            try:
                on = template.render(messages, tools)[0]
                on_behind = _closing(
                    on[on.index(word) + len(word) : on.rindex("zq002c00z")], template.specials()
                )
            except Exception:
                on_behind = []
            stays = [token for token, other in zip(behind, on_behind) if token == other]
            if behind and not ends & set(behind):
                ends.add((stays if behind[: len(stays)] == stays and stays else behind)[-1])
    return frozenset(ends)


def _closing(text: str, specials: list[str]) -> list[str]:
    """The special tokens with only white space between them: those that stand first in a text without other
    words, else those that it ends with (behind a call's brackets)."""
    pattern = "|".join(re.escape(token) for token in sorted(specials, key=len, reverse=True))
    if not pattern:
        return []
    run = re.match(rf"(?:\s*(?:{pattern}))+", text) or re.search(rf"(?:\s*(?:{pattern}))+\s*\Z", text)
    return re.findall(pattern, run[0]) if run else []


def end_tokens(template: Template) -> frozenset[str]:
    """What a turn can end in, after an answer and after a call."""
    if template.ends is not None:
        return frozenset(template.ends)
    kwargs = json.dumps(template.kwargs, sort_keys=True)
    return _ends(template.text, template.bos, template.eos, tuple(template.specials()), kwargs)


def spellings(messages: list[Message]) -> Iterator[Callable[[Message], Message]]:
    """The ways of saying the same to a template: where reasoning stands, arguments as JSON text, no content
    as null."""
    thinks = any(
        "reasoning_content" in message or message["content"].startswith("<think>") for message in messages
    )
    calls = any(message.get("tool_calls") for message in messages)
    silent = any(message.get("tool_calls") and not message["content"] for message in messages)
    fields = ("", "reasoning_content", "thinking", "reasoning", "content") if thinks else ("",)
    for name, text, null in product(
        fields, (False, True) if calls else (False,), (False, True) if silent else (False,)
    ):
        yield partial(_spelled, name, text, null)


def _spelled(name: str, text: bool, null: bool, message: Message) -> Message:
    spelled = dict(message)
    thought = spelled.pop("reasoning_content", None) if name else None
    if name and thought is None and spelled["content"].startswith("<think>"):
        thought, text_behind = spelled["content"].removeprefix("<think>").split("</think>")
        thought, spelled["content"] = thought.strip("\n"), text_behind.lstrip("\n")
    if thought is not None and name == "content":
        spelled["content"] = f"<think>\n{thought}\n</think>\n\n{spelled['content']}"
    elif thought is not None:
        spelled[name] = thought
    if spelled.get("tool_calls") and text:
        spelled["tool_calls"] = [
            call
            | {
                "function": call["function"]
                | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}
            }
            for call in spelled["tool_calls"]
        ]
    if spelled.get("tool_calls") and null and not spelled["content"]:
        spelled["content"] = None
    return spelled


class Unclear(Exception):
    """The whole text does not show where the turn lies, or has lost a part of it: it must not be trained."""


@dataclass(frozen=True)
class Span:
    starts: tuple[int, ...]  # more than one where a generation block and the prompt in front differ
    # more than one where no token ends the turn: with or without the white space behind
    ends: tuple[int, ...]


@dataclass(frozen=True)
class Masks:
    text: str  # with places for quoted special tokens
    spans: tuple[Span, ...]


def masks(template: Template, case: Case, cut: int, spelling: Callable[[Message], Message] = dict) -> Masks:
    """The spans of the turns asked for in the text of messages[:cut]. Raises Unclear, or what the template
    raises."""
    messages = case.messages
    spelled = [spelling(message) for message in messages]
    tools = [tool(number) for number in range(case.tools)] or None
    whole, blocks = template.render(spelled[:cut], tools)
    places: dict[int, list[tuple[int, int]]] = {}
    for match in WORD.finditer(whole):
        if match[2] in "crv" or (match[2] == "n" and int(match[1]) != SHARED):
            places.setdefault(int(match[1]), []).append(match.span())
    asked = case.asked()
    for turn, message in enumerate(messages[: asked[-1]]):
        if any(word not in whole for word in _own({"content": message["content"]}, turn, "c")):
            raise Unclear(f"turn {turn + 1}: its content is lost")
    spans: list[Span] = []
    for turn in asked:
        first, last = _extent(whole, messages[turn], turn, places)
        others = [(other, place) for other in places for place in places[other]]
        later = min(
            (start for other, (start, _) in others if other > turn and start > last), default=len(whole)
        )
        before = max((end for other, (_, end) in others if other < turn and end < first), default=0)
        ends = _end(template, whole, spelled[: turn + 1], tools, last, later)
        given = _start(template, whole, spelled[:turn], tools, before, first)
        starts = {given}
        starts |= {start for start, end in blocks if max(before, given or 0) <= start <= first < end}
        found = sorted(start for start in starts if start is not None)
        if not found:
            raise Unclear(f"turn {turn + 1}: no start")
        _check_said(messages[turn], turn, whole[found[0] : ends[-1]])
        spans.append(Span(tuple(found), ends))
    if any(left.ends[-1] > right.starts[0] for left, right in pairwise(spans)):
        raise Unclear("turns overlap or stand in another order")
    return Masks(whole, tuple(spans))


def _own(message: Message, turn: int, letters: str) -> list[str]:
    text = json.dumps(message, ensure_ascii=False)
    return [match[0] for match in WORD.finditer(text) if int(match[1]) == turn and match[2] in letters]


def _extent(
    whole: str, message: Message, turn: int, places: dict[int, list[tuple[int, int]]]
) -> tuple[int, int]:
    """First and last character of the turn's own words."""
    own = _own(message, turn, "crv")
    if any(whole.count(word) != 1 for word in own):
        raise Unclear(f"turn {turn + 1}: a text is lost or doubled")
    # a name may stand in a header, too
    own = own or [word for word in _own(message, turn, "n") if word in whole]
    if not own:
        raise Unclear(f"turn {turn + 1}: a call is lost")
    first = min(whole.index(word) for word in own)
    last = max(whole.rindex(word) + len(word) for word in own)
    if any(first < start < last for other, spans in places.items() if other != turn for start, _ in spans):
        raise Unclear(f"turn {turn + 1}: mixed with another turn")
    return first, last


def _start(
    template: Template, whole: str, before: list[Message], tools: list[Any] | None, after: int, first: int
) -> int | None:
    """Behind the prompt in front of the turn: the whole one, else what it says behind its last word, else the
    bare opener."""
    try:
        prompt = template.render(before, tools, prompt=True)[0] if before else ""
    except Exception:  # not every beginning of a conversation is one
        return _behind_opener(template, whole, after, first)
    if prompt and whole.startswith(prompt) and after <= len(prompt) <= first:
        return len(prompt)
    anchors = [match for match in WORD.finditer(prompt) if match[2] in "crv" and whole.count(match[0]) == 1]
    if not anchors:
        return _behind_opener(template, whole, after, first)
    tail, at = prompt[anchors[-1].end() :], whole.index(anchors[-1][0]) + len(anchors[-1][0])
    for given in (tail, _header(tail)):  # a turn may think otherwise than the prompt: its header is given
        if given and whole.startswith(given, at) and after <= at + len(given) <= first:
            return at + len(given)
    return None


def _behind_opener(template: Template, whole: str, after: int, first: int) -> int | None:
    """Only for a turn that nothing stands before: the last opener between what comes before and the turn."""
    question = Case((said("user"),)).messages
    asked, prompted = template.render(question, None)[0], template.render(question, None, prompt=True)[0]
    opener = prompted[len(asked) :] if prompted.startswith(asked) else ""
    ends = [at + len(o) for o in (opener, _header(opener)) if o and (at := whole.rfind(o, after, first)) >= 0]
    return ends[0] if ends else None


def _header(prompt: str) -> str:
    return re.split(r"</?think", prompt)[0]


def _end(
    template: Template, whole: str, upto: list[Message], tools: list[Any] | None, last: int, later: int
) -> tuple[int, ...]:
    found = [(whole.find(token, last, later), -len(token)) for token in end_tokens(template)]
    closed = [(at, length) for at, length in found if at >= 0]
    # an empty answer may stand behind the thinking
    if closed and not upto[-1]["content"] and not upto[-1].get("tool_calls"):
        return tuple(sorted({at - length for at, length in (min(closed), max(closed))}))
    if closed:
        at, length = min(closed)
        return (at - length,)
    tail = template.render(upto, tools)[0]
    tail = tail[max(match.end() for match in WORD.finditer(tail)) :]
    if not whole.startswith(tail.rstrip(), last):
        raise Unclear("no end")
    ended = {tail, tail.rstrip()} if whole.startswith(tail, last) else {tail.rstrip()}
    return tuple(sorted(last + len(text) for text in ended))


def _check_said(message: Message, turn: int, trained: str) -> None:
    """Everything that the turn says stands in its trained text, and thinking is not over before it begins."""
    for letter, text in (
        ("c", message["content"]),
        ("r", message["content"]),
        ("r", message.get("reasoning_content", "")),
    ):
        own = [match for match in WORD.finditer(text) if match[2] == letter]
        if own and text[own[0].start() : own[-1].end()] not in trained:
            raise Unclear(f"turn {turn + 1}: a text is changed")
        if own and letter == "r" and "</think>" in trained[: trained.index(own[0][0])]:
            raise Unclear(f"turn {turn + 1}: </think> stands before the reasoning")
    for call in message.get("tool_calls", ()):
        for leaf in _leaves([call["function"]["name"], call["function"]["arguments"]]):
            if isinstance(leaf, str):
                kept = all(match[0] in trained for match in WORD.finditer(leaf))
            else:
                kept = any(form in trained for form in (json.dumps(leaf), str(leaf)))
            if not kept:
                raise Unclear(f"turn {turn + 1}: the call loses {leaf!r}")


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


@dataclass(frozen=True)
class Verdict:
    outcome: str  # trained | refused | dropped: nothing of it is asked for | WRONG
    reason: str = ""
    conversation: Any = None  # what was given, where the outcome is WRONG
    expected: Any = None
    got: Any = None


def judge(template: Template, case: Case) -> Verdict:
    """Render and encode the case with repsft_fast, and compare characters and ids with the independent
    masks."""
    specials = template.quotable()
    tools = [tool(number) for number in range(case.tools)] or None
    messages, asked = with_quotes(case.messages, specials), case.asked()
    conversation = Conversation(
        messages, tools, trainable=case.trainable, template_kwargs=dict(template.kwargs)
    )
    special = tuple(template.specials())
    render, encode = _ours(template.text, template.bos, template.eos, special, template.added, case.train_on)
    try:
        rendered = render(conversation, "row 1")
    except DataError as error:
        return Verdict("refused", str(error)[:300])
    except Exception as error:  # what the template raises: bounded_map makes a DataError of it
        return Verdict("refused", f"{type(error).__name__}: {error}"[:300])
    if rendered is None:
        return (
            Verdict("WRONG", "dropped, but turns are asked for", messages, asked)
            if asked
            else Verdict("dropped")
        )
    flags = [piece.trained for piece in rendered.pieces for _ in piece.text]
    text = "".join(piece.text for piece in rendered.pieces)
    if not asked:
        return Verdict("WRONG", "trained, but nothing is asked for", messages, None, shown(text, flags))
    wrong: Verdict | None = None
    assistants = [number for number, message in enumerate(messages, 1) if message["role"] == "assistant"]
    cuts = sorted({asked[-1] + 1, assistants[-1]})  # what follows the last turn asked for may be left away
    for spelling, cut in product(spellings(case.messages), cuts):
        try:
            expected = masks(template, case, cut, spelling)
        except Exception as error:
            reason = f"trained, but {type(error).__name__}: {error}"
            wrong = wrong or Verdict("WRONG", reason, messages, None, shown(text, flags))
            continue
        want, chosen = _flags(expected, specials, flags)
        if (text, flags) != (want[: len(text)], chosen[: len(text)]) or any(chosen[len(text) :]):
            if wrong is None or wrong.expected is None:
                wrong = Verdict(
                    "WRONG", "other characters are trained", messages, shown(want, chosen), shown(text, flags)
                )
            continue
        ids, trained = encode([rendered.pieces])[0]
        if (ids, trained) != _ids(template, expected, specials, len(text), chosen):
            return Verdict("WRONG", "the characters are right, the ids are not", messages, None, ids)
        return Verdict("trained")
    assert wrong is not None
    return wrong


@cache
def _ours(
    text: str,
    bos: str | None,
    eos: str | None,
    special: tuple[str, ...],
    added: tuple[str, ...],
    train_on: str,
) -> Any:
    tokenizer = _tokenizer(text, bos, eos, special, added)
    return ChatTemplate(text, tokenizer, train_on=train_on), Encoder(tokenizer)


def _flags(expected: Masks, specials: list[str], got: list[bool]) -> tuple[str, list[bool]]:
    """The text with its quotes in place, and per character whether it is trained; of two right borders the
    one taken."""
    text = with_quotes(expected.text, specials)
    flags = [False] * len(text)
    for span in expected.spans:
        starts = [len(with_quotes(expected.text[:at], specials)) for at in span.starts]
        ends = [len(with_quotes(expected.text[:at], specials)) for at in span.ends]
        start = starts[0] if got[starts[0] : starts[0] + 1] == [True] else starts[-1]
        end = ends[-1] if got[ends[-1] - 1 : ends[-1]] == [True] else ends[0]
        flags[start:end] = [True] * (end - start)
    return text, flags


def _ids(
    template: Template, expected: Masks, specials: list[str], length: int, flags: list[bool]
) -> tuple[list[int], list[bool]]:
    """The whole text's ids by offsets; what is quoted is spelled."""
    tokenizer, at = template.tokenizer(), 0
    ids: list[int] = []
    trained: list[bool] = []
    for number, part in enumerate(re.split(f"({QUOTE.pattern.replace('(', '(?:')})", expected.text)):
        text = with_quotes(part, specials)[: max(0, length - at)]
        made = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=bool(number % 2)
        )
        ids += made["input_ids"]
        trained += [flags[at + start] for start, _ in made["offset_mapping"]]
        at += len(text)
    return ids, trained


def shown(text: str, flags: list[bool]) -> str:
    """The text with ⟦what is trained⟧."""
    marks = [("⟦" if flag else "⟧") if flag != before else "" for flag, before in zip(flags, [False, *flags])]
    return "".join(mark + letter for mark, letter in zip(marks, text)) + ("⟧" if flags[-1:] == [True] else "")
