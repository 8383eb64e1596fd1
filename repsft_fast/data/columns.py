"""Which columns of a row are used, which are refused, and which are counted and named as unused.

Every column of a row that is not null is one of three things:

used      the row's form reads it (FORMATS), or data.task_column or data.weight_column names it
refused   its name says that it belongs to the prompt, decides what is trained or changes what the chat template writes, and
          the row's form does not read it, or it says that the row is not to be trained on: trained without it, the row
          would mean something else. Empty values ("", [], {}) say nothing and pass, and so
          does text that stands in the columns that are read (some sets keep the system prompt a second time beside messages).
unused    everything else: counted, and named once

What a name means is decided once per form and set of columns; a row costs one look-up.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from repsft_fast.errors import DataError, describe, did_you_mean


@dataclass(frozen=True)
class Form:
    """What a kind of row is made of. Every item is one thing under its names, the usual one first."""

    needed: tuple[tuple[str, ...], ...]
    optional: tuple[tuple[str, ...], ...] = ()
    prompt_parts: frozenset[str] = frozenset()  # in such a row these names would be part of the prompt

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(name for names in (*self.needed, *self.optional) for name in names)

    def missing(self, row: Mapping[str, Any]) -> str | None:
        """The first thing that is needed and null or not there."""
        return next((names[0] for names in self.needed if all(row.get(name) is None for name in names)), None)


SYSTEM = ("system", "system_prompt", "system_message")
HISTORY = ("history",)
TOOLS = ("tools", "functions")
KWARGS = ("chat_template_kwargs",)
MASKS = ("completion_mask", "assistant_masks", "assistant_mask", "loss_mask")
_CHAT = (SYSTEM, TOOLS, KWARGS)
_QUESTION = frozenset(("instruction", "input", "context", "prompt", "query", "question"))

# The order is the order of detection.
FORMATS: dict[str, Form] = {
    "input_ids": Form(
        (("input_ids",),),
        (("labels",), *((name,) for name in MASKS), ("attention_mask",), ("seq_lengths",), ("position_ids",), ("cu_seqlens",)),
    ),
    "messages": Form((("messages",),), _CHAT),
    "conversations": Form((("conversations", "conversation"),), _CHAT),
    "prompt": Form((("prompt",), ("completion",)), _CHAT, frozenset(("input", "context"))),
    "alpaca": Form((("instruction",), ("output", "response")), (("input", "context"), HISTORY, *_CHAT), _QUESTION),
    "query": Form((("query", "question"), ("response", "answer")), (HISTORY, *_CHAT), _QUESTION),
    "segments": Form((("segments",),)),
    "text": Form((("text",),)),
}

# Words of a name that says what is trained or how.
_STEERING = re.compile(
    r"\w*weights?|\w*weighting|train|training|trained|trainable|loss(es)?|loss\w*mask|\w*mask(s|ed)?|\w*labels?|\w*kwargs"
    r"|seq_?lens?|seqlens?|ignore"
)
_STEERING_NAMES = re.compile(
    r"(seq|sequence)_?(lengths?|lens?|idx|ids?)|cu_?seqlens?\w*|position_?ids?|pos_?ids?|(segment|document|doc)_ids"
    r"|chat_?template|add_(eos|bos)(_token)?|add_generation_prompt|continue_final_message|last_turn_only|target_turns?|kto_tag|(is_)?(un)?(desirable|preferred)"
)
# Variables of chat templates.
_VARIABLES = re.compile(
    r"reasoning_effort|model_identity|thinking_(mode|effort|budget|enabled)"
    r"|(enable|disable|keep|preserve|force|use|no)_(\w+_)?thinking"
)
# These may say yes or no to the row as a whole.
_LEAVING_OUT = re.compile(r"(is_|to_)?(exclude|skip|discard|drop|delete|remove|reject)(e?d|ped)?")
_KEEPING = re.compile(r"(is_|to_)?(keep|include|included|use|used|valid|sft)")
# Beside token ids these say where the prompt ends.
_PART = r"(prompt|source|src|input|context|question|target|tgt|response|completion|answer|assistant|label|loss)s?"
_BORDER = re.compile(
    rf"((n|num)_)?{_PART}"
    r"(_?(lens?|lengths?|starts?|ends?|offsets?|pos|positions?|begin|idx|index|spans?|tokens?|token_ids|ids|count|size))+"
    rf"|(n|num|len)_{_PART}"
)
# … and these how many of them there are.
_COUNT = re.compile(r"((n|num|input|total|token|seq|sequence)_)?(len|length|tokens|input_len|input_length|input_tokens)")
# Words of a name that holds a part of the text, unless it only counts or points.
_HOLDING = re.compile(r"history|histories|systems?|sys|tools?|functions?|images?|audios?|videos?|prefix|prefill|suffix")
_HOLDING_NAMES = re.compile(
    r"reasoning(_content|_text)?|thinking|thoughts?|rationale|developer(_prompt|_message)?|pixel_values|documents"
)
_POINTING = re.compile(
    r"^(has|is|num|n)_|_(id|ids|index|idx|time|date|at|hash|counts?|tokens|lengths?|len|lang|language|score|source|type|name)$"
)
_HARMLESS = frozenset(("parallel_tool_calls", "tool_choice", "special_tokens_mask", "token_type_ids"))


def kind_of(name: str, form: str = "") -> str | None:
    """steering | variable | denying | holding | None: what the name of a column promises."""
    if name in _HARMLESS:
        return None
    lower = _spelled(name)
    words = lower.split("_")
    if form == "input_ids" and _BORDER.fullmatch(lower):
        return "steering"
    if _STEERING_NAMES.fullmatch(lower) or any(_STEERING.fullmatch(word) for word in words):
        return "steering"
    if _VARIABLES.fullmatch(lower):
        return "variable"
    if _LEAVING_OUT.fullmatch(lower) or _KEEPING.fullmatch(lower):
        return "denying"
    if _HOLDING_NAMES.fullmatch(lower):
        return "holding"
    return "holding" if any(_HOLDING.fullmatch(word) for word in words) and not _POINTING.search(lower) else None


def _spelled(name: str) -> str:
    """sampleWeight, Sample-Weight → sample_weight"""
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()).strip("_")


def says_nothing(value: object) -> bool:
    """Null, "", [], {}, and an object of such values (which is what arrow makes of an absent one)."""
    if isinstance(value, Mapping):
        return all(says_nothing(item) for item in value.values())
    return value is None or (hasattr(value, "__len__") and len(value) == 0)


def _denies(name: str, value: object) -> bool:
    return isinstance(value, bool | int) and value == (_LEAVING_OUT.fullmatch(_spelled(name)) is not None)


def _is_count(name: str, value: object, ids: object) -> bool:
    """Does it count tokens? With ids: and these ones?"""
    counts = isinstance(value, int) and not isinstance(value, bool) and _COUNT.fullmatch(_spelled(name)) is not None
    return counts and (ids is None or (hasattr(ids, "__len__") and len(ids) == value))


def _divides(value: Any, count: int) -> bool:
    """Are these lengths that sum to `count`, or borders from 0 to it?"""
    numbers = [int(number) for number in value if isinstance(number, int) and not isinstance(number, bool)]
    if len(numbers) != len(value) or len(numbers) < 2:
        return False
    borders = len(numbers) > 2 and numbers[0] == 0 and numbers[-1] == count and numbers == sorted(set(numbers))
    return borders or (sum(numbers) == count and min(numbers) > 0)


def _repeats(value: object, read: list[Any]) -> bool:
    """Is it text that what is read holds already? Short text must be all of a field: it stands somewhere by chance."""
    said = value.strip() if isinstance(value, str) else ""
    if not said:
        return False
    texts = list(_texts(read))
    return any(said == text.strip() for text in texts) or (len(said) >= 20 and any(said in text for text in texts))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


@dataclass(frozen=True)
class Plan:
    """What the columns of one set are."""

    used: tuple[str, ...]
    unused: tuple[str, ...]
    suspects: tuple[tuple[str, str], ...]  # (column, kind): refused unless it says nothing
    also: str | None  # another form that the unused columns make whole


class Columns:
    """Checks every row's columns and counts them, over all sources."""

    def __init__(self, *, task: str | None, weight: str | None, ignored: Iterable[str]):
        self.task, self.weight = task, weight
        names = list(ignored)
        self.ignored = frozenset(name for name in names if "[]." not in name)
        self.ignored_fields = [name.partition("[].")[::2] for name in names if "[]." in name]
        self._plans: dict[tuple[str, tuple[str, ...]], Plan] = {}
        self._rows: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self._fields: Counter[str] = Counter()

    def fields_of(self, column: str) -> frozenset[str]:
        """The fields of this column's turns that may be passed over."""
        return frozenset(field for name, field in self.ignored_fields if name == column)

    def visible(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row without the columns that are to be left unused."""
        if not self.ignored or self.ignored.isdisjoint(row):
            return row
        return {name: value for name, value in row.items() if name not in self.ignored}

    def check(self, row: Mapping[str, Any], form: str, where: str) -> None:
        """Raises DataError for a column that is refused."""
        plan = self._plan(self._key(row, form))
        for name, kind in plan.suspects:
            value = row[name]
            if says_nothing(value):
                continue
            harmless = kind == "denying" and not _denies(name, value)
            if harmless or (form == "input_ids" and _is_count(name, value, row["input_ids"])):
                self._fields[name] += 1
                continue
            if kind in ("holding", "prompt") and _repeats(value, [row[used] for used in plan.used]):
                self._fields[name] += 1
                continue
            wrong = {
                "steering": f"may say what is trained, and {form!r} rows do not use it",
                "denying": "says that the row is not to be trained on",
                "variable": f"may change what the chat template writes, and {form!r} rows do not use it",
                "holding": f"may be a part of the text, and {form!r} rows do not use it",
                "prompt": f"looks like a part of the prompt, and {form!r} rows do not use it",
            }[kind]
            unused = f"data.ignore_columns: [{name}] leaves it unused"
            uses = f"data.weight_column: {name} uses it" if "weight" in name.lower() and self.weight is None else "rename it"
            if kind == "denying":
                uses = "remove the row"
            elif kind == "variable":
                uses = "put it into chat_template_kwargs"
            elif kind != "steering":
                uses = "write it into the text or into messages"
            raise DataError(describe(f"{where}, field {name!r}", wrong, got=repr(value), todo=f"{uses}, {unused}"))
        if form == "input_ids":
            self._beside_ids(row, plan, where)

    def _beside_ids(self, row: Mapping[str, Any], plan: Plan, where: str) -> None:
        """A list with one value per token says something about every token, and another count of them: some are not meant."""
        for name in plan.unused:
            value = row[name]
            if name not in self.ignored and _is_count(name, value, None) and not _is_count(name, value, row["input_ids"]):
                shown = row.get("attention_mask")
                if shown is None or not hasattr(shown, "__iter__") or value != sum(1 for flag in shown if flag):
                    todo = f"mend one of the two, rename it, or data.ignore_columns: [{name}]"
                    wrong = "is not the length of input_ids"
                    raise DataError(describe(f"{where}, field {name!r}", wrong, got=repr(value), todo=todo))
            is_list = hasattr(value, "__len__") and not isinstance(value, str | bytes | Mapping)
            ids = row["input_ids"]
            if is_list and hasattr(ids, "__len__") and name not in self.ignored and _divides(value, len(ids)):
                wrong = "divides the ids into several samples, and is not a name we read"
                todo = f"rename it seq_lengths or cu_seqlens, or data.ignore_columns: [{name}]"
                raise DataError(describe(f"{where}, field {name!r}", wrong, got=repr(list(value)), todo=todo))
            harmless = name in self.ignored or (name in _HARMLESS and (name != "token_type_ids" or len(set(value)) < 2))
            if is_list and hasattr(ids, "__len__") and len(value) == len(ids) > 0 and not harmless:
                wrong = "has a value for every token, and 'input_ids' rows do not use it"
                todo = f"rename it ({' | '.join(sorted(FORMATS['input_ids'].names))}), or data.ignore_columns: [{name}]"
                raise DataError(describe(f"{where}, field {name!r}", wrong, todo=todo))

    def count(self, row: Mapping[str, Any], form: str, fields: Iterable[str] = ()) -> None:
        """Counts a row that was read; `fields` of its turns were not used ("messages[].id")."""
        self._rows[self._key(row, form)] += 1
        self._fields.update(fields)

    def account(self) -> tuple[dict[str, int], dict[str, int], Counter[tuple[str, str]]]:
        """(columns used, columns unused → rows that had them, (form, other form the rows are whole in) → rows)."""
        used, unused, also = Counter[str](), Counter[str](), Counter[tuple[str, str]]()
        for key, rows in self._rows.items():
            plan = self._plan(key)
            used.update(dict.fromkeys(plan.used, rows))
            unused.update(dict.fromkeys(plan.unused, rows))
            if plan.also is not None:
                also[key[0], plan.also] += rows
        return dict(used), dict(unused + self._fields), also

    def never_seen(self) -> list[str]:
        """Names in data.ignore_columns that no row has: slips of the pen, in words."""
        seen = {name for _, keys in self._rows for name in keys}
        missing = sorted(self.ignored - seen)
        near = {name: did_you_mean(name, seen) for name in missing}
        return [f"data.ignore_columns: no row has {n!r}" + (f"; did you mean {near[n]}?" if near[n] else "") for n in missing]

    def _key(self, row: Mapping[str, Any], form: str) -> tuple[str, tuple[str, ...]]:
        return form, tuple([name for name, value in row.items() if value is not None])

    def _plan(self, key: tuple[str, tuple[str, ...]]) -> Plan:
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._made(*key)
        return plan

    def _made(self, form: str, columns: tuple[str, ...]) -> Plan:
        known = {*FORMATS[form].names, *(name for name in (self.task, self.weight) if name is not None)}
        used = tuple(name for name in columns if name in known and name not in self.ignored)
        rest = [name for name in columns if name not in used]
        whole = dict.fromkeys(rest, True)
        also = next((other for other, shape in FORMATS.items() if other != form and shape.missing(whole) is None), None)
        parts = FORMATS[form].prompt_parts - (FORMATS[also].names if also else frozenset())
        # Beside labels or a mask the prompt's length says nothing new.
        marked = form == "input_ids" and not {"labels", *MASKS}.isdisjoint(used)
        suspects = [
            (name, "prompt" if name in parts else kind_of(str(name), "" if marked else form))
            for name in rest
            if name not in self.ignored
        ]
        refused = tuple((name, kind) for name, kind in suspects if kind is not None)
        unused = tuple(name for name in rest if name not in dict(refused))
        return Plan(used, unused, refused, also)


def unused_line(unused: Mapping[str, int]) -> list[str]:
    """The one warning that names what was not used; none where everything was."""
    named = ", ".join(f"{name} ({rows} rows)" for name, rows in sorted(unused.items(), key=lambda pair: (-pair[1], pair[0])))
    return [f"columns not used: {named}"] if named else []


def check_column(row: object, column: str | None, setting: str, where: str) -> None:
    """Raises DataError where a row has not the column that a setting names."""
    if column is not None and isinstance(row, dict) and column not in row:
        near = did_you_mean(column, map(str, row))
        todo = f"did you mean {near}?" if near else f"write it into every row, or drop {setting}"
        raise DataError(describe(f"{where}, field {column!r}", f"is missing, and {setting} names it", todo=todo))


class IgnoredFields:
    """Fields like "messages[].name" that no turn has had so far. Those that stay are slips of the pen."""

    def __init__(self, names: Iterable[str]):
        self.missing = [name for name in names if "[]." in name]
        self._seen: set[str] = set()

    def look(self, row: object) -> None:
        for path in list(self.missing):
            if self._holds(row, path, ""):
                self.missing.remove(path)

    def _holds(self, value: Any, path: str, above: str) -> bool:
        """Does the path lead to a field? a[].b: in any item of the list a."""
        name, _, rest = path.partition("[].")
        if not isinstance(value, dict):
            return False
        if above:
            self._seen.update(f"{above}{key}" for key in value)
        inner = value.get(name)
        if not rest:
            return name in value
        return any([self._holds(item, rest, f"{above}{name}[].") for item in (inner if isinstance(inner, list) else [])])

    def never_seen(self) -> list[str]:
        return [f"data.ignore_columns: no row has {path!r}{self._meant(path)}" for path in sorted(self.missing)]

    def _meant(self, path: str) -> str:
        above, _, name = path.rpartition("[].")
        near = did_you_mean(
            name, [field for place, _, field in (seen.rpartition("[].") for seen in self._seen) if place == above]
        )
        return f"; did you mean {above}[].{near}?" if near else ""
