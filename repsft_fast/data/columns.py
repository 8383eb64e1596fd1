"""Which columns of a row are used, which are refused, and which are counted and named as unused.

Every column of a row that is not null is one of three things:

used      the row's form reads it (FORMATS), or data.task_column or data.weight_column names it
refused   its name says that it belongs to the prompt, decides what is trained or changes what the chat
          template writes, and the row's form does not read it, or it says that the row is not to be trained
          on: trained without it, the row would mean something else. Empty values ("", [], {}) say nothing and
          pass, and so does text that stands in the columns that are read (some sets keep the system prompt a
          second time beside messages).
unused    everything else: counted, and named once

What a name means is decided once per form and set of columns; a row costs one look-up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from repsft_fast.data.column_names import HARMLESS, denies, is_count, kind_of
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
        (
            ("labels",),
            *((name,) for name in MASKS),
            ("attention_mask",),
            ("seq_lengths",),
            ("position_ids",),
            ("cu_seqlens",),
        ),
    ),
    "messages": Form((("messages",),), _CHAT),
    "conversations": Form((("conversations", "conversation"),), _CHAT),
    "prompt": Form((("prompt",), ("completion",)), _CHAT, frozenset(("input", "context"))),
    "alpaca": Form(
        (("instruction",), ("output", "response")), (("input", "context"), HISTORY, *_CHAT), _QUESTION
    ),
    "query": Form((("query", "question"), ("response", "answer")), (HISTORY, *_CHAT), _QUESTION),
    "segments": Form((("segments",),)),
    "text": Form((("text",),)),
}


def says_nothing(value: object) -> bool:
    """Null, "", [], {}, and an object of such values (which is what arrow makes of an absent one)."""
    if isinstance(value, Mapping):
        return all(says_nothing(item) for item in value.values())
    return value is None or (hasattr(value, "__len__") and len(value) == 0)


def _check_count(name: str, value: int, attention_mask: Any, where: str) -> None:
    """A count that is not that of the ids may be that of the ids that the attention mask shows."""
    shown = None
    if hasattr(attention_mask, "__iter__"):
        shown = sum(1 for flag in attention_mask if flag)
    if value != shown:
        todo = f"mend one of the two, rename it, or data.ignore_columns: [{name}]"
        wrong = "is not the length of input_ids"
        raise DataError(describe(f"{where}, field {name!r}", wrong, got=repr(value), todo=todo))


def _check_list(name: str, value: Any, num_ids: int, where: str) -> None:
    """A list beside the ids may divide them into samples, or mark every one of them: neither may be lost."""
    if _divides(value, num_ids):
        wrong = "divides the ids into several samples, and is not a name we read"
        todo = f"rename it seq_lengths or cu_seqlens, or data.ignore_columns: [{name}]"
        raise DataError(describe(f"{where}, field {name!r}", wrong, got=repr(list(value)), todo=todo))
    # Segments of two kinds (token_type_ids) may be prompt and answer; of one kind they say nothing.
    harmless = name in HARMLESS and (name != "token_type_ids" or len(set(value)) < 2)
    if num_ids > 0 and len(value) == num_ids and not harmless:
        wrong = "has a value for every token, and 'input_ids' rows do not use it"
        names = " | ".join(sorted(FORMATS["input_ids"].names))
        todo = f"rename it ({names}), or data.ignore_columns: [{name}]"
        raise DataError(describe(f"{where}, field {name!r}", wrong, todo=todo))


def _divides(value: Any, count: int) -> bool:
    """Whether these are lengths that sum to `count`, or borders from 0 to it."""
    numbers = [int(number) for number in value if isinstance(number, int) and not isinstance(number, bool)]
    if len(numbers) != len(value) or len(numbers) < 2:
        return False
    borders = (
        len(numbers) > 2 and numbers[0] == 0 and numbers[-1] == count and numbers == sorted(set(numbers))
    )
    return borders or (sum(numbers) == count and min(numbers) > 0)


def _repeats(value: object, read: list[Any]) -> bool:
    """Whether it is text that what is read holds already. Short text must be all of a field: it stands
    somewhere by chance."""
    said = value.strip() if isinstance(value, str) else ""
    if not said:
        return False
    texts = list(_texts(read))
    return any(said == text.strip() for text in texts) or (
        len(said) >= 20 and any(said in text for text in texts)
    )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


@dataclass(frozen=True)
class ColumnRoles:
    """What each column is of rows that have the same columns and the same form."""

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
        self._known: dict[tuple[str, tuple[str, ...]], ColumnRoles] = {}
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
        roles = self._roles(self._key(row, form))
        for name, kind in roles.suspects:
            value = row[name]
            if says_nothing(value):
                continue
            # A name alone may mislead: keep: true denies nothing, and a count of these ids adds nothing.
            harmless = kind == "denying" and not denies(name, value)
            if harmless or (form == "input_ids" and is_count(name, value, row["input_ids"])):
                self._fields[name] += 1
                continue
            # Text that is read anyway may stand in the row a second time.
            if kind in ("holding", "prompt") and _repeats(value, [row[used] for used in roles.used]):
                self._fields[name] += 1
                continue
            raise self._refusal(name, kind, value, form, where)
        if form == "input_ids":
            self._check_beside_ids(row, roles, where)

    def _refusal(self, name: str, kind: str, value: object, form: str, where: str) -> DataError:
        """The error for a column whose name promises that the row means something else without it."""
        wrong = {
            "steering": f"may say what is trained, and {form!r} rows do not use it",
            "denying": "says that the row is not to be trained on",
            "variable": f"may change what the chat template writes, and {form!r} rows do not use it",
            "holding": f"may be a part of the text, and {form!r} rows do not use it",
            "prompt": f"looks like a part of the prompt, and {form!r} rows do not use it",
        }[kind]
        is_weight = "weight" in name.lower() and self.weight is None
        uses = {
            "steering": f"data.weight_column: {name} uses it" if is_weight else "rename it",
            "denying": "remove the row",
            "variable": "put it into chat_template_kwargs",
        }.get(kind, "write it into the text or into messages")
        unused = f"data.ignore_columns: [{name}] leaves it unused"
        return DataError(
            describe(f"{where}, field {name!r}", wrong, got=repr(value), todo=f"{uses}, {unused}")
        )

    def _check_beside_ids(self, row: Mapping[str, Any], roles: ColumnRoles, where: str) -> None:
        """A list with one value per token says something about every token, and another count of them: some
        are not meant."""
        ids = row["input_ids"]
        for name in roles.unused:
            if name in self.ignored:
                continue
            value = row[name]
            if is_count(name, value, None) and not is_count(name, value, ids):
                _check_count(name, value, row.get("attention_mask"), where)
            is_list = hasattr(value, "__len__") and not isinstance(value, str | bytes | Mapping)
            if is_list and hasattr(ids, "__len__"):
                _check_list(name, value, len(ids), where)

    def count(self, row: Mapping[str, Any], form: str, fields: Iterable[str] = ()) -> None:
        """Counts a row that was read; `fields` of its turns were not used ("messages[].id")."""
        self._rows[self._key(row, form)] += 1
        self._fields.update(fields)

    def account(self) -> tuple[dict[str, int], dict[str, int], Counter[tuple[str, str]]]:
        """(columns used, columns unused → rows that had them, (form, other form the rows are whole in) →
        rows)."""
        # Roles are per set of columns, so rows are counted once per set and not per column.
        used, unused, also = Counter[str](), Counter[str](), Counter[tuple[str, str]]()
        for key, rows in self._rows.items():
            roles = self._roles(key)
            used.update(dict.fromkeys(roles.used, rows))
            unused.update(dict.fromkeys(roles.unused, rows))
            if roles.also is not None:
                also[key[0], roles.also] += rows
        return dict(used), dict(unused + self._fields), also

    def never_seen(self) -> list[str]:
        """Names in data.ignore_columns that no row has: slips of the pen, in words."""
        seen = {name for _, keys in self._rows for name in keys}
        missing = sorted(self.ignored - seen)
        near = {name: did_you_mean(name, seen) for name in missing}
        return [
            f"data.ignore_columns: no row has {n!r}" + (f"; did you mean {near[n]}?" if near[n] else "")
            for n in missing
        ]

    def _key(self, row: Mapping[str, Any], form: str) -> tuple[str, tuple[str, ...]]:
        return form, tuple([name for name, value in row.items() if value is not None])

    def _roles(self, key: tuple[str, tuple[str, ...]]) -> ColumnRoles:
        roles = self._known.get(key)
        if roles is None:
            roles = self._known[key] = self._made(*key)
        return roles

    def _made(self, form: str, columns: tuple[str, ...]) -> ColumnRoles:
        known = {*FORMATS[form].names, *(name for name in (self.task, self.weight) if name is not None)}
        used = tuple(name for name in columns if name in known and name not in self.ignored)
        rest = [name for name in columns if name not in used]
        # Two forms in one row: which is meant is said, as trained on the other it would be another set.
        whole = dict.fromkeys(rest, True)
        also = next(
            (other for other, shape in FORMATS.items() if other != form and shape.missing(whole) is None),
            None,
        )
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
        return ColumnRoles(used, unused, refused, also)


def unused_line(unused: Mapping[str, int]) -> list[str]:
    """The one warning that names what was not used; none where everything was."""
    named = ", ".join(
        f"{name} ({rows} rows)" for name, rows in sorted(unused.items(), key=lambda pair: (-pair[1], pair[0]))
    )
    return [f"columns not used: {named}"] if named else []


def check_column(row: object, column: str | None, setting: str, where: str) -> None:
    """Raises DataError where a row has not the column that a setting names."""
    if column is not None and isinstance(row, dict) and column not in row:
        near = did_you_mean(column, map(str, row))
        todo = f"did you mean {near}?" if near else f"write it into every row, or drop {setting}"
        raise DataError(
            describe(f"{where}, field {column!r}", f"is missing, and {setting} names it", todo=todo)
        )


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
        return any(
            [
                self._holds(item, rest, f"{above}{name}[].")
                for item in (inner if isinstance(inner, list) else [])
            ]
        )

    def never_seen(self) -> list[str]:
        return [
            f"data.ignore_columns: no row has {path!r}{self._meant(path)}" for path in sorted(self.missing)
        ]

    def _meant(self, path: str) -> str:
        above, _, name = path.rpartition("[].")
        near = did_you_mean(
            name,
            [field for place, _, field in (seen.rpartition("[].") for seen in self._seen) if place == above],
        )
        return f"; did you mean {above}[].{near}?" if near else ""
