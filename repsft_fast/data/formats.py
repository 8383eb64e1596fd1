"""Row dict → one of five parsed forms. Detection by keys (columns.FORMATS); every error names the row and the
field.

input_ids      token ids, masks, packed rows                              → [Pretokenised, …]
messages       [{"role", "content"}, …]                                   → Conversation
conversations  ShareGPT, [{"from", "value"}, …], or turns like messages   → Conversation
prompt         prompt + completion: strings → Pair, lists of turns → Conversation that trains the completion's
               turns
alpaca         instruction + input + output                               → Pair, asks for the chat template
query          query + response, or question + answer                     → Pair, asks for the chat template
segments       [{"label", "text"}, …]                                     → Segments, as they stand
text           text                                                       → Text

Beside the turns a row may hold a system prompt, earlier question-answer pairs (history), tools and variables
for the chat template. Where a form has no place for such a column the row is refused (columns.py).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from repsft_fast.data.columns import FORMATS as FORMATS
from repsft_fast.data.columns import HISTORY, KWARGS, SYSTEM, TOOLS, Columns, says_nothing
from repsft_fast.data.pretokenised import Pretokenised, read_pretokenised
from repsft_fast.data.tool_calls import checked, json_of, read_tools, text_of
from repsft_fast.data.turns import Turns, read_turns
from repsft_fast.errors import DataError, describe

LONGEST_NAME = 1_000  # characters of a task's name: it is written into every report


@dataclass(frozen=True)
class Conversation:
    messages: list[dict[str, Any]]  # role: system | user | assistant | tool; content is always a string
    tools: list[Any] | None = None
    # indices of the assistant turns the row lets be trained; None = all of them
    trainable: tuple[int, ...] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # the row's, over the setting's


@dataclass(frozen=True)
class Pair:
    prompt: str
    completion: str
    chat: bool  # True: alpaca and query/response, which go through the chat template where there is one
    # what only a chat template can write
    chat_only: Conversation = field(default_factory=lambda: Conversation([]))

    def conversation(self) -> Conversation:
        """The same as turns: what comes before, the prompt, the completion."""
        turns = [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.completion}]
        before = self.chat_only
        return Conversation([*before.messages, *turns], before.tools, template_kwargs=before.template_kwargs)


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Segments:
    segments: tuple[tuple[str, bool], ...]  # (text, trained)


Parsed = Conversation | Pair | Text | Segments | list[Pretokenised]

# Variables that a row or a setting must not put in the place of what rendering itself gives.
RESERVED_KWARGS = frozenset((
    "messages", "conversation", "conversations", "tools", "documents", "chat_template",
    "add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask", "tokenize",
    "tokenizer_kwargs", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "raise_exception", "strftime_now", "range", "dict", "lipsum", "cycler", "joiner", "namespace",
))  # fmt: skip


def detect(row: Mapping[str, Any], where: str) -> str:
    """The first form of which the row has everything that is needed, null being absent."""
    for name, form in FORMATS.items():
        if form.missing(row) is None:
            return name
    for name, form in FORMATS.items():
        missing = form.missing(row)
        if any(row.get(key) is not None for names in form.needed for key in names):
            state = "null" if missing in row else "missing"
            todo = "add it, or rename the column that holds it"
            raise DataError(
                describe(f"{where}, field {missing!r}", f"is {state} in a {name!r} row", todo=todo)
            )
    expected = " or ".join("+".join("|".join(names) for names in form.needed) for form in FORMATS.values())
    got = f"the keys {sorted(map(str, row))}"
    raise DataError(
        describe(where, "has no format we know", expected=expected, got=got, todo="rename the columns")
    )


def parse(
    row: object, form: str, where: str, *, merged: bool = False, columns: Columns | None = None
) -> Parsed:
    """Read one row as `form` (a key of FORMATS), and count its columns. Raises DataError naming row and
    field.

    merged: the rows went through a merged schema (arrow), so that a null inside an object is no value.
    """
    if not isinstance(row, Mapping):
        todo = "write it as an object"
        raise DataError(
            describe(
                where,
                "is not a row",
                expected="an object with named fields",
                got=type(row).__name__,
                todo=todo,
            )
        )
    columns = columns if columns is not None else Columns(task=None, weight=None, ignored=())
    seen = columns.visible(row)
    # Without what its form needs a row is told what it looks like: sources of two kinds are common.
    missing = FORMATS[form].missing(seen)
    if missing is not None:
        others = [name for name, shape in FORMATS.items() if name != form and shape.missing(seen) is None]
        todo = (
            f"this row looks like {others[0]!r}; keep one format per source"
            if others
            else "add it or remove the row"
        )
        state = "null" if missing in row else "missing"
        raise DataError(
            describe(f"{where}, field {missing!r}", f"is {state}, the source holds {form!r} rows", todo=todo)
        )
    # Columns before texts: what the row means is settled before what it says.
    columns.check(row, form, where)
    parsed, unknown = _read(seen, form, where, merged, columns)
    columns.count(row, form, unknown)
    return parsed


def _read(
    row: Mapping[str, Any], form: str, where: str, merged: bool, columns: Columns
) -> tuple[Parsed, tuple[str, ...]]:
    """(the parsed row, the fields of its turns that are not used)."""
    if form == "input_ids":
        return read_pretokenised(row, where), ()
    if form == "text":
        return Text(text_of(row["text"], f"{where}, field 'text'")), ()
    if form == "segments":
        return _segments(row["segments"], where, columns.fields_of("segments"))
    if form == "prompt" and not isinstance(row["prompt"], str):
        return _prompt_completion_turns(row, where, merged, columns)
    if form in ("messages", "conversations"):
        column, value = _one_of(row, FORMATS[form].needed[0], where)
        turns = read_turns(value, column, where, merged=merged, ignored=columns.fields_of(column))
        return _with_system(row, turns.messages, turns.trainable, where, merged), _named(column, turns)
    needed = [_one_of(row, names, where) for names in FORMATS[form].needed]
    if form == "prompt" and not isinstance(needed[1][1], str):
        raise _two_kinds(row, where)
    prompt, completion = (text_of(value, f"{where}, field {name!r}") for name, value in needed)
    if form == "alpaca":
        name, context = _one_of(row, ("input", "context"), where)
        context = "" if context is None else text_of(context, f"{where}, field {name!r}")
        prompt = "\n\n".join(part for part in (prompt, context) if part.strip()) or prompt
    before = _with_system(row, _history(row, where) if form != "prompt" else [], None, where, merged)
    return Pair(prompt, completion, chat=form != "prompt", chat_only=before), ()


def _one_of(row: Mapping[str, Any], names: tuple[str, ...], where: str) -> tuple[str, Any]:
    """(name, value) of a thing that has several names. Two that are there must say the same."""
    found = [(name, row[name]) for name in names if row.get(name) is not None]
    full = [pair for pair in found if not says_nothing(pair[1])] or found
    if any(value != full[0][1] for _, value in full):
        place = f"{where}, fields {' and '.join(repr(name) for name, _ in full)}"
        todo = "keep the one that is meant, or name the other in data.ignore_columns"
        raise DataError(describe(place, "are one thing and say two", todo=todo))
    return full[0] if full else (names[0], None)


def _named(column: str, turns: Turns) -> tuple[str, ...]:
    return tuple(f"{column}[].{name}" for name in turns.unknown)


def _with_system(
    row: Mapping[str, Any],
    messages: list[dict[str, Any]],
    trainable: tuple[int, ...] | None,
    where: str,
    merged: bool,
) -> Conversation:
    """The conversation with what stands beside its turns: a system prompt, tools, variables of the chat
    template."""
    name, system = _one_of(row, SYSTEM, where)
    if not says_nothing(system):
        system = text_of(system, f"{where}, field {name!r}")
        first = messages[0] if messages else {}
        if first.get("role") != "system":
            messages = [{"role": "system", "content": system}, *messages]
            trainable = tuple(number + 1 for number in trainable) if trainable is not None else None
        elif first["content"].strip() != system.strip():
            wrong = "says another thing than the system turn"
            todo = f"keep one, or data.ignore_columns: [{name}]"
            raise DataError(describe(f"{where}, field {name!r}", wrong, got=repr(system), todo=todo))
    tools = [read_tools(row.get(name), f"{where}, field {name!r}", merged=merged) for name in TOOLS]
    if tools[0] and tools[1] and tools[0] != tools[1]:
        todo = "keep the one that is meant"
        raise DataError(
            describe(f"{where}, fields 'tools' and 'functions'", "are one thing and say two", todo=todo)
        )
    return Conversation(messages, tools[0] or tools[1], trainable, _kwargs(row, where, merged))


def _kwargs(row: Mapping[str, Any], where: str, merged: bool) -> dict[str, Any]:
    place = f"{where}, field {KWARGS[0]!r}"
    value = row.get(KWARGS[0])
    if isinstance(value, str):
        value, merged = json_of(value, place) if value.strip() else None, False
    return check_kwargs(value if value is not None else {}, place, merged=merged)


def check_kwargs(value: object, where: str, *, merged: bool = False) -> dict[str, Any]:
    """Variables for the chat template: an object of JSON values, none of them what rendering itself gives."""
    if not isinstance(value, Mapping):
        got, todo = type(value).__name__, "write it as {name: value}"
        raise DataError(
            describe(where, "is not an object", expected="variables of the chat template", got=got, todo=todo)
        )
    found = checked(value, where, merged)
    for name in found:
        place, text = f"{where}, {name!r}", found[name]
        if name in RESERVED_KWARGS or name.endswith("_token") or not name.isidentifier():
            wrong = "is not a variable to set" if name.isidentifier() else "is not a name of a variable"
            raise DataError(describe(place, wrong, todo="remove it: the conversation itself gives these"))
        # a template takes both for true
        if isinstance(text, str) and text.strip().lower() in ("true", "false"):
            todo = f"write {text.strip().lower()} without quotes"
            raise DataError(describe(place, "is text", expected="true or false", got=repr(text), todo=todo))
    return found


def _history(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """[[question, answer], …] before the row's own; the answers are the assistant's, like any other."""
    history = row.get(HISTORY[0])
    place = f"{where}, field 'history"
    if says_nothing(history):
        return []
    if not isinstance(history, list | tuple):
        got, todo = type(history).__name__, "write [[question, answer], …]"
        raise DataError(describe(f"{place}'", "is not a list", expected="pairs of texts", got=got, todo=todo))
    messages = []
    for number, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            todo = "write [question, answer], or the row as messages"
            raise DataError(
                describe(f"{place}[{number}]'", "is not a pair of texts", got=repr(pair), todo=todo)
            )
        for role, text in zip(("user", "assistant"), pair):
            messages.append({"role": role, "content": text_of(text, f"{place}[{number}]'")})
    return messages


def _two_kinds(row: Mapping[str, Any], where: str) -> DataError:
    kinds = [type(row[name]).__name__ for name in ("prompt", "completion")]
    mixed = (kinds[0] == "str") != (kinds[1] == "str")
    wrong = "are of two kinds" if mixed else "are neither text nor turns"
    todo = "write both as text, or both as lists of turns"
    return DataError(
        describe(f"{where}, fields 'prompt' and 'completion'", wrong, got=" and ".join(kinds), todo=todo)
    )


def _prompt_completion_turns(
    row: Mapping[str, Any], where: str, merged: bool, columns: Columns
) -> tuple[Conversation, tuple[str, ...]]:
    """What is in the prompt is never trained, whatever its turns say; of the completion every assistant turn
    is."""
    if not all(isinstance(row[name], list | tuple) for name in ("prompt", "completion")):
        raise _two_kinds(row, where)
    prompt, completion = (
        read_turns(row[name], name, where, merged=merged, ignored=columns.fields_of(name))
        for name in ("prompt", "completion")
    )
    answers = [number for number, message in enumerate(completion.messages) if message["role"] == "assistant"]
    if not answers:
        got, todo = completion.messages[-1]["role"], "move the assistant's turns into it"
        raise DataError(
            describe(
                f"{where}, field 'completion'",
                "is not the assistant's",
                expected="assistant",
                got=got,
                todo=todo,
            )
        )
    if completion.trainable is not None:
        answers = [number for number in answers if number in completion.trainable]
    trainable = tuple(len(prompt.messages) + number for number in answers)
    conversation = _with_system(row, [*prompt.messages, *completion.messages], trainable, where, merged)
    return conversation, (*_named("prompt", prompt), *_named("completion", completion))


def _segments(value: object, where: str, ignored: frozenset[str]) -> tuple[Segments, tuple[str, ...]]:
    """Texts that stand one behind the other as they are; `label` says which are trained."""
    place = f"{where}, field 'segments"
    if not isinstance(value, list | tuple) or not value:
        todo = 'write [{"label": true, "text": …}, …]'
        raise DataError(describe(f"{place}'", "is not a list of segments", got=repr(value), todo=todo))
    segments, unknown = [], dict[str, None]()
    for number, segment in enumerate(value):
        here = f"{place}[{number}]"
        label = segment.get("label") if isinstance(segment, Mapping) else None
        if (
            not isinstance(segment, Mapping)
            or not isinstance(label, bool | int | float)
            or label not in (0, 1)
        ):
            got, todo = repr(segment), 'write {"label": true | false, "text": …}'
            raise DataError(describe(f"{here}'", "is not a segment with a label", got=got, todo=todo))
        segments.append((text_of(segment.get("text"), f"{here}.text'"), bool(label)))
        for name, item in segment.items():
            if name not in ("label", "text") and item is not None:
                if name not in ignored and not says_nothing(item):
                    todo = f'remove it, or data.ignore_columns: ["segments[].{name}"]'
                    raise DataError(
                        describe(f"{here}.{name}'", "is not a field we read", got=repr(item), todo=todo)
                    )
                unknown[f"segments[].{name}"] = None
    return Segments(tuple(segments)), tuple(unknown)


def read_task(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        todo = "name the row's task"
        raise DataError(
            describe(
                f"{where}, field {column!r}", "is not a task", expected="a name", got=repr(value), todo=todo
            )
        )
    if len(str(value)) > LONGEST_NAME:
        wrong, got = "is too long for a task's name", f"{len(str(value))} characters"
        todo = "name the column of the tasks in data.task_column"
        expected = f"at most {LONGEST_NAME} characters"
        raise DataError(describe(f"{where}, field {column!r}", wrong, expected=expected, got=got, todo=todo))
    return text_of(str(value), f"{where}, field {column!r}")


def read_weight(row: Mapping[str, Any], column: str, where: str) -> float:
    """The row's weight: finite and ≥ 0. A weight of 0 is a row that is dropped and counted by the caller."""
    value = row.get(column)
    if isinstance(value, str):  # a cell of a .csv
        with contextlib.suppress(ValueError):
            value = float(value)
    good = isinstance(value, int | float) and not isinstance(value, bool) and _finite(value) and value >= 0
    if not good:
        got, todo = repr(value), "write a weight into every row"
        raise DataError(
            describe(
                f"{where}, field {column!r}", "is not a weight", expected="a number ≥ 0", got=got, todo=todo
            )
        )
    return float(value)  # type: ignore[arg-type]


def _finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int past the largest float
        return False
