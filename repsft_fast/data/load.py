"""load(sources, tokenizer, settings) → samples: read, parse, render, tokenise, check; cached; every loss counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

from repsft_fast.data import cache
from repsft_fast.data.bad_rows import BAD_ROW, BadRows
from repsft_fast.data.bounded import bounded_map
from repsft_fast.data.columns import Columns, IgnoredFields, check_column, unused_line
from repsft_fast.data.encode import Encoder
from repsft_fast.data.formats import (
    FORMATS,
    Conversation,
    Pair,
    Segments,
    Text,
    check_kwargs,
    detect,
    parse,
    read_task,
    read_weight,
)
from repsft_fast.data.placeholders import special_pattern
from repsft_fast.data.plain import plain_pieces, with_ends
from repsft_fast.data.pretokenised import Pretokenised
from repsft_fast.data.sample import Loaded, Sample
from repsft_fast.data.sources import BadRow, Source, SourceSpec, list_sources, open_rows, without_copies
from repsft_fast.data.splits import Splits, carve, nested_subset, overlap_warnings
from repsft_fast.data.template import ChatTemplate, Rendered, find_template
from repsft_fast.errors import DataError, describe

CHUNK_ROWS = 2048  # rows in flight: bounds the memory, amortises the fork and the tokenizer's batch

NO_TEXT = "no text, or only special tokens"
NO_ASSISTANT = "no assistant turn to train on"
NOT_MARKED = "no turn is marked as trained"
NOT_TRAINED = "no trained token"
ZERO_WEIGHT = "weight 0"
OVER_LONG = "over-long"
TRUNCATED_AWAY = "over-long, and truncation leaves no target"


@dataclass(frozen=True)
class DataSettings:
    """How sources become samples. `samples`, `seed` and `cache_folder` do not change what is tokenised."""

    format: str = "auto"  # auto = by the keys of each source's first row; else a key of formats.FORMATS
    split: str = "train"  # which split of a hub data set or of a saved DatasetDict
    train_on: str = "all"  # all | last: which assistant turns are trained
    chat_template: str | None = None  # template text or file in place of the tokenizer's own
    apply_template: str = "auto"  # auto: turns, alpaca, query/response | always: + prompt/completion | never: turns only
    special_tokens: str = "text"  # text: special-token strings in the data stay text | parse: they become the tokens
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # variables of the chat template; a row's own go over them
    on_bad_row: str = "raise"  # raise: all rows are looked at, then one error | drop: bad rows are dropped, counted and named
    ignore_columns: tuple[str, ...] = ()  # columns (or "messages[].field") that are not used though they look like instructions
    task_column: str | None = None  # column with the row's task; else {task: path} or "default"
    weight_column: str | None = None  # column with the row's weight, ≥ 0
    max_tokens: int | None = None  # longest sample, in positions
    overlong: str = "drop"  # drop | truncate | raise
    samples: int | None = None  # nested subset: the first n of a seeded permutation of what was loaded
    seed: int = 42
    cache_folder: str | Path | None = None  # None = no cache

    def __post_init__(self) -> None:
        choices = {
            "format": ("auto", *FORMATS),
            "train_on": ("all", "last"),
            "apply_template": ("auto", "always", "never"),
            "special_tokens": ("text", "parse"),
            "overlong": ("drop", "truncate", "raise"),
            "on_bad_row": ("raise", "drop"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                got = getattr(self, name)
                raise DataError(describe(f"data.{name}", "is not a choice", expected=" | ".join(allowed), got=got))
        for name in ("max_tokens", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(describe(f"data.{name}", "is too small", expected="at least 1", got=value))
        check_kwargs(self.template_kwargs, "tokenizer.template_kwargs")
        for name in ("task_column", "weight_column"):
            if getattr(self, name) is not None and getattr(self, name) in self.ignore_columns:
                raise DataError(describe("data.ignore_columns", f"names data.{name} too", todo="drop it from one of the two"))


def load(
    sources: SourceSpec,  # path(s), {task: path(s)}, or hub ids ("owner/name" or "owner/name:subset")
    tokenizer: Any,  # a transformers tokenizer; None is enough for input_ids rows
    settings: DataSettings = DataSettings(),
    *,
    vocab_size: int | None = None,  # of the model; None = the tokenizer's
    first_rows: int | None = None,  # of every source, read past the cache: a look at large data. None = all
) -> Loaded:
    """Every usable sample of the sources (or the nested subset of `settings.samples`), in their order.

    Raises DataError (exit 2) naming the source, row and field for what cannot be read, and for a source without a usable
    row. Rows that are legal but hold nothing to train on are dropped and counted in `dropped`.
    """
    loaded = _load(list_sources(sources, settings.split), sources, tokenizer, settings, vocab_size, first_rows)
    loaded.warnings += unused_line(loaded.columns_unused)
    return loaded


def _load(
    listed: list[Source],
    sources: SourceSpec,
    tokenizer: Any,
    settings: DataSettings,
    vocab_size: int | None,
    first_rows: int | None = None,
) -> Loaded:
    """Without the line about the columns that were not used."""
    if isinstance(sources, dict) and settings.task_column is not None:
        raise DataError(describe("data.task_column", "contradicts {task: path}", todo="use one of the two"))
    opened = [(source, *open_rows(source, settings.split)) for source in listed]
    without_copies(opened)
    build = _Builder(tokenizer, settings, vocab_size)
    if settings.cache_folder is None or first_rows is not None:
        loaded = build([(source, islice(rows, first_rows)) for source, rows, _ in opened])
    else:
        key = cache.cache_key(build.description() | {"content": [(s.name, s.task, digest) for s, _, digest in opened]})
        folder = Path(settings.cache_folder).expanduser()
        kept, damage = cache.read(folder, key)
        if kept is None:
            kept = build([(source, rows) for source, rows, _ in opened])
            trouble = [f"cache: {damage}; rebuilt"] if damage else []
            try:
                cache.write(folder, key, kept)
            except OSError as error:
                trouble.append(f"cache: {folder} cannot be written ({error.strerror}); tokenised again next time")
            kept.warnings += trouble
        loaded = kept
    loaded.warnings += dict.fromkeys(note for source in listed for note in source.notes)
    loaded.samples = nested_subset(loaded.samples, settings.samples, settings.seed)
    return loaded


def load_splits(
    sources: SourceSpec,
    tokenizer: Any,
    settings: DataSettings = DataSettings(),
    *,
    validation: SourceSpec | float = 0,  # a source of its own, or a size carved out of `sources` (splits.carve)
    test: SourceSpec | float = 0,
    vocab_size: int | None = None,
) -> tuple[Splits, Loaded]:
    """Train, validation and test, and the account of loading. `settings.samples` is drawn from what is left for training.

    Validation and test are held out *before* the subset is drawn, so 200 and 400 samples share one validation set.
    """
    whole = replace(settings, samples=None)
    listed = list_sources(sources, settings.split)
    loaded = _load(listed, sources, tokenizer, whole, vocab_size)
    sizes = [size if isinstance(size, int | float) else 0 for size in (validation, test)]
    splits = carve(loaded.samples, validation=sizes[0], test=sizes[1], seed=settings.seed)
    for name, given in (("validation", validation), ("test", test)):
        if not isinstance(given, int | float):
            held_out = replace(whole, split=name)
            other = _load(list_sources(given, name, listed), given, tokenizer, held_out, vocab_size)
            setattr(splits, name, other.samples)
            for column, rows in other.columns_unused.items():
                loaded.columns_unused[column] = loaded.columns_unused.get(column, 0) + rows
            for column, rows in other.columns_used.items():
                loaded.columns_used[column] = loaded.columns_used.get(column, 0) + rows
            loaded.files |= {f"{name}: {file}": rows for file, rows in other.files.items()}
            loaded.dropped = Counter(loaded.dropped) + Counter({f"{name}: {k}": v for k, v in other.dropped.items()})
            loaded.warnings += [f"{name}: {text}" for text in other.warnings]
    splits.train = nested_subset(splits.train, settings.samples, settings.seed)
    splits.warnings += overlap_warnings(splits.train, splits.validation, splits.test)
    loaded.warnings += [*splits.warnings, *unused_line(loaded.columns_unused)]
    return splits, loaded


@dataclass(frozen=True)
class _Item:
    parsed: Conversation | Pair | Text | Segments | Pretokenised
    task: str
    weight: float
    where: str


class _Builder:
    def __init__(self, tokenizer: Any, settings: DataSettings, vocab_size: int | None):
        self.tokenizer, self.settings = tokenizer, settings
        self.vocab_size = vocab_size if vocab_size is not None else len(tokenizer) if tokenizer is not None else None
        text = find_template(tokenizer, settings.chat_template) if tokenizer is not None else None
        self.parse_special = settings.special_tokens == "parse"
        self.template_text = text
        self.template = None
        if text:
            self.template = ChatTemplate(
                text,
                tokenizer,
                train_on=settings.train_on,
                parse_special=self.parse_special,
                template_kwargs=settings.template_kwargs,
            )
        self.encoder = Encoder(tokenizer) if tokenizer is not None else None
        self.specials = special_pattern(tokenizer) if tokenizer is not None else None

    def description(self) -> dict[str, Any]:
        """What the cache key must cover, besides the content."""
        ignored = ("samples", "seed", "cache_folder", "chat_template")
        settings = {f.name: getattr(self.settings, f.name) for f in fields(self.settings) if f.name not in ignored}
        tokenizer = cache.tokenizer_fingerprint(self.tokenizer)
        with_tools = self.template.tool_template if self.template is not None else None
        templates = [self.template_text, with_tools]
        return {"settings": settings, "templates": templates, "tokenizer": tokenizer, "vocab_size": self.vocab_size}

    def __call__(self, sources: list[tuple[Source, Iterator[tuple[Any, str]]]]) -> Loaded:
        settings = self.settings
        loaded, self.notes = Loaded([]), Counter[str]()
        self.columns = Columns(task=settings.task_column, weight=settings.weight_column, ignored=settings.ignore_columns)
        self.bad, self.rows = BadRows(), 0
        self.fields = IgnoredFields(settings.ignore_columns)
        for source, rows in sources:
            first, before, dropped, bad = self.rows, len(loaded.samples), Counter(loaded.dropped), self.bad.count
            items = self._items(source, rows, loaded)
            while chunk := list(islice(items, CHUNK_ROWS)):
                self._add(chunk, loaded)
            count = self.rows - first
            loaded.files[source.name] = loaded.files.get(source.name, 0) + count
            if not count:
                raise DataError(describe(source.name, "is empty", expected="at least one row"))
            if len(loaded.samples) == before and (settings.on_bad_row == "drop" or self.bad.count == bad):
                lost = ", ".join(f"{n} × {reason}" for reason, n in (Counter(loaded.dropped) - dropped).items())
                raise self.bad.none_left(source.name, count, lost)
        if self.bad.count and settings.on_bad_row == "raise":
            raise self.bad.error(self.rows)
        if not isfinite(sum(sample.weight for sample in loaded.samples)):
            raise DataError(describe("data.weight_column", "the weights sum to infinity", todo="scale them down"))
        loaded.columns_used, loaded.columns_unused, also = self.columns.account()
        for (form, other), count in also.items():
            self.notes[f"rows are whole {other!r} rows too, and read as {form!r} (data.format chooses)"] = count
        loaded.warnings += [f"{count} {note}" for note, count in sorted(self.notes.items())]
        loaded.warnings += [*self.bad.warnings(), *self.columns.never_seen(), *self.fields.never_seen()]
        if self.template_text and "strftime_now" in self.template_text:
            loaded.warnings.append("the chat template writes today's date: samples differ from day to day unless cached")
        unread = [name for name in settings.template_kwargs if not re.search(rf"\b{name}\b", self.template_text or "")]
        loaded.warnings += [f"tokenizer.template_kwargs: the chat template does not read {name}" for name in unread]
        return loaded

    def _reject(self, where: str, error: DataError, loaded: Loaded) -> None:
        if self.bad.add(where, error):
            loaded.dropped[BAD_ROW] = loaded.dropped.get(BAD_ROW, 0) + 1

    def _items(self, source: Source, rows: Iterator[tuple[Any, str]], loaded: Loaded) -> Iterator[_Item]:
        form, settings = self.settings.format, self.settings
        for row, where in rows:
            self.rows += 1
            if isinstance(row, BadRow):
                self._reject(where, row, loaded)
                continue
            self.fields.look(row)
            task, weight = source.task or "default", 1.0
            try:
                check_column(row, settings.task_column, "data.task_column", where)
                check_column(row, settings.weight_column, "data.weight_column", where)
                if form == "auto" and isinstance(row, dict):
                    form = detect(self.columns.visible(row), where)
                parsed = parse(row, form if form != "auto" else "messages", where, merged=source.merged, columns=self.columns)
                if settings.task_column is not None:
                    task = read_task(row, settings.task_column, where)
                if settings.weight_column is not None:
                    weight = read_weight(row, settings.weight_column, where)
                for part in parsed if isinstance(parsed, list) else ():
                    self._check_vocabulary(part.ids, where)
            except DataError as error:
                self._reject(where, error, loaded)
                continue
            yield from (_Item(part, task, weight, where) for part in (parsed if isinstance(parsed, list) else [parsed]))

    def _add(self, chunk: list[_Item], loaded: Loaded) -> None:
        """Render and tokenise one chunk, keep what is usable, count the rest."""
        weighted = []
        for item in chunk:
            if item.weight == 0:
                loaded.dropped[ZERO_WEIGHT] = loaded.dropped.get(ZERO_WEIGHT, 0) + 1
            else:
                weighted.append(item)
        chunk, rendered = weighted, self._render(weighted)
        for item, result in zip(chunk, self._tokenise(chunk, rendered)):
            sample = self._sample(item, *result) if isinstance(result, tuple) else result
            if isinstance(sample, DataError):
                self._reject(item.where, sample, loaded)
            elif isinstance(sample, str):
                loaded.dropped[sample] = loaded.dropped.get(sample, 0) + 1
            else:
                loaded.samples.append(sample)

    def _render(self, chunk: list[_Item]) -> list[Rendered | str | DataError | None]:
        """Per row its pieces, the reason it is dropped for, what is wrong with it, or None for rows that need no text."""
        prepared = [self._as_conversation(item) for item in chunk]
        chats = [(c, item.where) for c, item in zip(prepared, chunk) if isinstance(c, Conversation)]

        def work(chat: tuple[Conversation, str]) -> list[Any] | None:
            assert self.template is not None
            result = self.template(*chat)
            return None if result is None else result.to_json()

        answers: Iterable[Any] = bounded_map(work, chats, lambda chat: chat[1], "the chat template")
        answer = iter(answers)
        rendered: list[Rendered | str | DataError | None] = []
        for conversation, item in zip(prepared, chunk):
            if isinstance(conversation, Conversation):
                value = next(answer)
                good = value is not None and not isinstance(value, DataError)
                none = NOT_MARKED if conversation.trainable == () else NO_ASSISTANT
                rendered.append(Rendered.from_json(value) if good else value or none)
            elif isinstance(conversation, DataError) or isinstance(item.parsed, Pretokenised):
                rendered.append(conversation)
            else:
                assert not isinstance(item.parsed, Conversation | list)
                pieces = plain_pieces(item.parsed, self.specials, parse_special=self.parse_special)
                rendered.append(pieces or NO_TEXT)
        # The generator ends its child when it is exhausted.
        next(answer, None)
        return rendered

    def _as_conversation(self, item: _Item) -> Conversation | DataError | None:
        parsed, mode = item.parsed, self.settings.apply_template
        if not isinstance(parsed, Pretokenised) and self.tokenizer is None:
            raise DataError(describe(item.where, "holds text, and there is no tokenizer", todo="set tokenizer.path"))
        if isinstance(parsed, Pair):
            if mode == "always" or (mode == "auto" and parsed.chat and self.template is not None):
                parsed = parsed.conversation()
            elif parsed.chat_only != Conversation([]):
                wrong = "holds a system prompt, history, tools or chat_template_kwargs, which only a chat template can write"
                todo = "write the row as messages, set tokenizer.chat_template, or name the columns in data.ignore_columns"
                return DataError(describe(item.where, wrong, todo=todo))
        if not isinstance(parsed, Conversation):
            return None
        if self.template is None:
            todo = "set tokenizer.chat_template, use an instruction model's tokenizer, or write rows as prompt/completion text"
            raise DataError(describe(item.where, "holds turns, and the tokenizer has no chat template", todo=todo))
        return parsed

    def _tokenise(
        self, chunk: list[_Item], rendered: list[Rendered | str | DataError | None]
    ) -> Iterator[tuple[list[int], list[bool]] | str | DataError]:
        rows = [result.pieces for result in rendered if isinstance(result, Rendered)]
        encoded = iter(self.encoder(rows) if self.encoder is not None and rows else [])
        for item, result in zip(chunk, rendered):
            if isinstance(result, str | DataError):
                yield result
            elif result is None:
                assert isinstance(item.parsed, Pretokenised)
                yield item.parsed.ids, item.parsed.trained
            else:
                assert self.encoder is not None
                self.notes.update(result.notes)
                ids, trained = next(encoded)
                yield with_ends(ids, trained, self.encoder, self.tokenizer) if result.plain else (ids, trained)

    def _check_vocabulary(self, ids: list[int], where: str) -> None:
        if self.vocab_size is not None and ids and max(ids) >= self.vocab_size:
            at = next(number for number, token in enumerate(ids) if token >= self.vocab_size)
            expected = f"less than {self.vocab_size}, the model's vocabulary"
            todo = "use the model's own tokenizer"
            raise DataError(describe(f"{where}, token {at}", "is out of range", expected=expected, got=ids[at], todo=todo))

    def _sample(self, item: _Item, ids: list[int], trained: list[bool]) -> Sample | str | DataError:
        """The sample, the reason it is dropped for, or what is wrong with its row."""
        try:
            self._check_vocabulary(ids, item.where)
        except DataError as error:
            return error
        trained = [False, *trained[1:]]
        end = _last(trained) + 1
        if end == 0:
            return NO_TEXT if not ids else NOT_TRAINED
        limit = self.settings.max_tokens
        if limit is not None and end - 1 > limit:
            if self.settings.overlong == "raise":
                expected, todo = f"at most {limit} positions", "raise data.max_tokens, or set data.overlong: drop or truncate"
                raise DataError(describe(item.where, "is over-long", expected=expected, got=end - 1, todo=todo))
            if self.settings.overlong == "drop":
                return OVER_LONG
            end = _last(trained[: limit + 1]) + 1
            if end == 0:
                return TRUNCATED_AWAY
            self.notes[f"over-long rows truncated to {limit} positions"] += 1
        return Sample(ids[:end], trained[:end], item.task, item.weight, item.where)


def _last(flags: list[bool]) -> int:
    """Index of the last True, -1 when there is none."""
    return next((number for number in range(len(flags) - 1, -1, -1) if flags[number]), -1)
