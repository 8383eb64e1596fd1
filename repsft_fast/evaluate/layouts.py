"""Rows of task files: which layout a row has, and what of it is the question, the answer, the choices and the
group.

plain      prompt, or messages that end in the user's turn; answer          choices, group, id where there are
aime       problem or question; answer, a whole number of 0 to 999          id
math500    problem; answer, any expression                                  subject or level, unique_id or id
gsm8k      question; answer that ends in a line of #### and a number        id
gpqa       Question, Correct Answer, Incorrect Answer 1 …                   High-level domain or Subdomain,
                                                                            Record ID
mmlu       question; choices or A, B, C, D …; answer, a letter or an index  subject or category, id

Upper and lower case, blanks, hyphens and underscores of a column's name are not told apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from repsft_fast.data.columns import says_nothing
from repsft_fast.data.tool_calls import shown, text_of
from repsft_fast.data.turns import read_turns
from repsft_fast.errors import DataError, describe, did_you_mean
from repsft_fast.evaluate.answers import hashes, last_number
from repsft_fast.seeded import key_of, permutation

LETTERS = "ABCDEFGHIJ"  # a multiple choice has no more
# Columns that hold a part of the question, which no layout has a place for: without it another is asked.
HELD = (
    *("system", "system prompt", "tools", "functions", "history", "context", "passage"),
    *("image", "images", "audio", "video"),
)


@dataclass(frozen=True)
class Item:
    """One row, read."""

    question: str
    answer: str  # of a choice its letter
    choices: tuple[str, ...] = ()
    group: str = ""
    name: str = ""  # the row's own id; "": it has none
    before: tuple[dict[str, Any], ...] = ()  # the turns of a chat in front of the question


class Fields:
    """One row, its columns found by their names however they are spelled. Null is absent."""

    def __init__(self, row: object, where: str, *, merged: bool = False):
        """merged: the row went through a schema for all rows, as in parquet and CSV. DataError for what is no
        row, or names a column twice."""
        if not isinstance(row, Mapping):
            got, todo = type(row).__name__, "write it as an object with named fields"
            raise DataError(describe(where, "is not a row", expected="an object", got=got, todo=todo))
        self.where, self.merged = where, merged
        self.used: set[str] = set()
        self._written: dict[str, str] = {}
        self._values: dict[str, Any] = {}
        for name, value in row.items():
            if value is None:
                continue
            if (other := self._written.setdefault(_folded(str(name)), str(name))) != str(name):
                wrong = f"has the columns {other!r} and {str(name)!r}, which are read as one"
                raise DataError(describe(where, wrong, todo="keep the one that is meant"))
            self._values[_folded(str(name))] = value

    def has(self, *names: str) -> bool:
        """Whether the row has a column of one of these names."""
        return any(name in self._values for name in names)

    def get(self, *names: str) -> tuple[Any, str]:
        """(the value, its place for errors) of the first of these columns that the row has; None where it has
        none. It counts as used."""
        for name in names:
            if name in self._values:
                self.used.add(self._written[name])
                return self._values[name], self.place(name)
        return None, self.place(names[0])

    def place(self, name: str) -> str:
        """Where and which column, for errors."""
        return f"{self.where}, field {self._written.get(name, name)!r}"

    def text(self, *names: str) -> str:
        """A text or a number that says something, stripped. DataError for anything else."""
        return said(*self.get(*names))

    def label(self, *names: str) -> str:
        """The same; "" where the row has no such column."""
        return self.text(*names) if self.has(*names) else ""

    @property
    def columns(self) -> list[str]:
        """As the file writes them, those that are not null."""
        return list(self._written.values())


def said(value: object, place: str) -> str:
    """A text or a number as text, stripped: 12.0 is 12. DataError for null, true, a list, nothing …"""
    expected, todo = "text or a number", "write what the model should answer"
    if isinstance(value, str):
        text = text_of(value, place).strip()
        if not text:
            raise DataError(
                describe(place, "is empty", expected=expected, todo="write it, or remove the row")
            )
        return text
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        got = shown(value)
        raise DataError(
            describe(place, "is neither text nor a number", expected=expected, got=got, todo=todo)
        )
    whole = isinstance(value, int) or (value.is_integer() and abs(value) < 1e15)
    return str(int(value)) if whole else repr(value)


@dataclass(frozen=True)
class Layout:
    """How rows of one kind are read, asked and answered."""

    needed: tuple[tuple[str, ...], ...]  # columns, each under one of these names
    read: Callable[[Fields, int], Item]  # (row, seed)
    extractor: str  # of answers.EXTRACTORS
    style: str  # key of prompts.STYLES
    kind: str = "generate"  # what is done with it unless said otherwise


def detect(row: Fields) -> str:
    """The layout that these columns have. DataError, naming them, where it is none."""
    answered = row.has("answer")
    answer = row._values.get("answer")
    if all(row.has(*names) for names in LAYOUTS["gpqa"].needed):
        return "gpqa"
    if answered and row.has("prompt", "messages"):
        return "plain"
    if answered and row.has("question") and row.has("choices", "options", "a"):
        return "mmlu"
    if answered and row.has("question") and isinstance(answer, str) and "####" in answer:
        return "gsm8k"
    if answered and row.has("problem") and row.has("subject", "level", "unique id"):
        return "math500"
    if answered and row.has("problem", "question") and _aime_number(answer) is not None:
        return "aime"
    if answered and row.has("problem"):
        return "math500"
    raise DataError(
        describe(
            row.where,
            "has the columns of no layout",
            expected="prompt (or messages) and answer, or a layout of " + ", ".join(list(LAYOUTS)[1:]),
            got=", ".join(row.columns) or "no column",
            todo=_hint(row, ("prompt",), ("answer",)),
        )
    )


def check(row: Fields, layout: str) -> None:
    """DataError naming the first column that a row of this layout lacks, or that holds more of the question
    than it reads."""
    for held in HELD:
        if row.has(held) and not says_nothing(row._values[held]):
            todo = "write it into the prompt (a system prompt as a turn of messages), or remove the column"
            wrong = "holds a part of the question, and is not read"
            raise DataError(describe(row.place(held), wrong, got=shown(row._values[held]), todo=todo))
    for names in LAYOUTS[layout].needed:
        if not row.has(*names):
            expected = "|".join(names)
            got = ", ".join(row.columns) or "no column"
            wrong = f"lacks a column of the layout {layout}, or it is null"
            todo = _hint(row, names)
            raise DataError(describe(row.where, wrong, expected=expected, got=got, todo=todo))


def _hint(row: Fields, *wanted: tuple[str, ...]) -> str:
    """What to do about columns that are not there."""
    for names in wanted:
        if not row.has(*names):
            near = did_you_mean(names[0], map(_folded, row.columns), cutoff=0.7)
            if near is not None:
                return f"did you mean {row._written[near]!r} by {names[0]!r}? rename it"
    return "rename the columns, or write the rows in the plain format"


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.strip().lower())


def _plain(row: Fields, seed: int) -> Item:
    before: tuple[dict[str, Any], ...] = ()
    if row.has("messages"):
        if row.has("prompt"):
            wrong, todo = "holds a prompt and messages", "keep the one that is meant"
            raise DataError(describe(row.where, wrong, todo=todo))
        value, _ = row.get("messages")
        turns = read_turns(value, "messages", row.where, merged=row.merged)
        last = turns.messages[-1]
        if last["role"] != "user":
            todo = "end with the user's turn"
            if last["role"] == "assistant":
                todo = (
                    "remove the last turn: it is what the model is asked for (its answer goes into 'answer')"
                )
            wrong = f"ends with a turn of the {last['role']}"
            raise DataError(describe(row.place("messages"), wrong, expected="user", todo=todo))
        question, before = last["content"], tuple(turns.messages[:-1])
        if not question.strip():
            raise DataError(describe(row.place("messages"), "ends with an empty turn", todo="remove the row"))
    else:
        value, place = row.get("prompt")
        if not isinstance(value, str):
            todo = "write it as text, or turns as 'messages'"
            raise DataError(describe(place, "is not text", got=type(value).__name__, todo=todo))
        said(value, place)
        question = value  # as it is: white space may be meant
    choices = _choices(row) if row.has("choices") else ()
    answer = _choice(row, choices, by_text=True) if choices else row.text("answer")
    return Item(question, answer, choices, row.label("group"), row.label("id"), before)


def _aime(row: Fields, seed: int) -> Item:
    value, place = row.get("answer")
    number = _aime_number(value)
    if number is None:
        todo = "mend it, or name another layout (math500 takes any answer)"
        raise DataError(
            describe(
                place,
                "is no answer of AIME",
                expected="a whole number of 0 to 999",
                got=shown(value),
                todo=todo,
            )
        )
    return Item(row.text("problem", "question"), str(number), name=row.label("id"))


def _aime_number(value: object) -> int | None:
    text = str(value).strip() if isinstance(value, str | int | float) else ""
    return int(text.partition(".")[0]) if re.fullmatch(r"[0-9]{1,3}(\.0+)?", text) else None


def _math500(row: Fields, seed: int) -> Item:
    group = row.label("subject") or row.label("level")
    question = row.text("problem", "question")
    return Item(question, row.text("answer"), group=group, name=row.label("unique id", "id"))


def _gsm8k(row: Fields, seed: int) -> Item:
    answer, place = row.get("answer")
    number = (hashes(said(answer, place)) or "").strip("$ ")
    if not number or last_number(number) != number:
        todo = "end it with a line of #### and the number"
        raise DataError(
            describe(place, "ends in no number", expected="#### 42", got=shown(answer)[-80:], todo=todo)
        )
    return Item(row.text("question"), number, name=row.label("id"))


def _gpqa(row: Fields, seed: int) -> Item:
    question = row.text("question")
    names = [f"incorrect answer {n}" for n in range(1, len(LETTERS)) if row.has(f"incorrect answer {n}")]
    texts = [row.text("correct answer"), *(row.text(name) for name in names)]
    # By the question: the same order wherever the row stands and whatever stands beside it.
    order = permutation(key_of("order of choices", seed, question), len(texts)).tolist()
    choices = _checked([texts[n] for n in order], row.where)
    group = row.label("high level domain", "subdomain")
    return Item(question, LETTERS[order.index(0)], choices, group, row.label("record id", "id"))


def _mmlu(row: Fields, seed: int) -> Item:
    choices = _choices(row, alike=True)  # a benchmark is asked whole, and letters are judged
    group, name = row.label("subject", "category"), row.label("id", "question id")
    return Item(row.text("question"), _choice(row, choices, by_text=False), choices, group, name)


def _choices(row: Fields, *, alike: bool = False) -> tuple[str, ...]:
    """alike: whether two of them may have one text."""
    if not row.has("choices", "options"):
        names = [letter.lower() for letter in LETTERS if row.has(letter.lower())]
        if "".join(names) != LETTERS[: len(names)].lower():
            todo = "write A, B, C … without a gap"
            raise DataError(describe(row.where, "lacks a choice", got=", ".join(names), todo=todo))
        return _checked([row.text(name) for name in names], row.where, alike)
    value, place = row.get("choices", "options")
    if not isinstance(value, list | tuple):
        todo = "write them as a list of texts (in a .csv as columns A, B, C …)"
        raise DataError(describe(place, "is not a list of choices", got=shown(value), todo=todo))
    return _checked([said(item, f"{place}[{n}]") for n, item in enumerate(value)], place, alike)


def _checked(choices: list[str], place: str, alike: bool = False) -> tuple[str, ...]:
    if not 2 <= len(choices) <= len(LETTERS):
        wrong, expected = "is no multiple choice", f"2 to {len(LETTERS)} choices"
        todo = "mend the row" if len(choices) > 1 else "mend it, or ask the question without choices"
        raise DataError(describe(place, wrong, expected=expected, got=len(choices), todo=todo))
    twice = [text for n, text in enumerate(choices) if text in choices[:n]]
    if twice and not alike:
        wrong = "has two choices of one text: which of them is right cannot be said"
        raise DataError(describe(place, wrong, got=repr(twice[0]), todo="mend or remove the row"))
    return tuple(choices)


def _choice(row: Fields, choices: tuple[str, ...], *, by_text: bool) -> str:
    """The letter of the right choice, which may be written as its letter or its index from 0; by_text: as its
    text too. (MMLU has choices such as 1, 2, 3, 4, where only an index can be meant.)"""
    value, place = row.get("answer")
    text = said(value, place)
    meant = {n for n, choice in enumerate(choices) if by_text and choice == text}
    letters = LETTERS[: len(choices)]
    if isinstance(value, str) and len(text) == 1 and text.upper() in letters:
        meant.add(letters.index(text.upper()))
    if re.fullmatch(r"[0-9]", text) and int(text) < len(choices):
        meant.add(int(text))
    if len(meant) == 1:
        return LETTERS[meant.pop()]
    expected = f"one of {', '.join(letters)}, or 0 to {len(choices) - 1}" + ", or a choice's text" * by_text
    if meant:
        named = " and ".join(f"{letters[n]} ({choices[n]!r})" for n in sorted(meant))
        wrong, todo = f"could mean {named}", "write it in the way that can mean one alone"
        raise DataError(describe(place, wrong, got=shown(value), todo=todo))
    raise DataError(
        describe(place, "is none of the choices", expected=expected, got=shown(value), todo="mend it")
    )


LAYOUTS = {
    "plain": Layout((("prompt", "messages"), ("answer",)), _plain, "final", "plain"),
    "aime": Layout((("problem", "question"), ("answer",)), _aime, "boxed", "math"),
    "math500": Layout((("problem", "question"), ("answer",)), _math500, "boxed", "math"),
    "gsm8k": Layout((("question",), ("answer",)), _gsm8k, "last_number", "number"),
    "gpqa": Layout(
        (("question",), ("correct answer",), ("incorrect answer 1",)), _gpqa, "choice", "reasoned choice"
    ),
    "mmlu": Layout(
        (("question",), ("choices", "options", "a"), ("answer",)), _mmlu, "choice", "choice", kind="choice"
    ),
}
