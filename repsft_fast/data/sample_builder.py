"""Rows → samples: parse, render, tokenise, check. Every row ends as samples, or is counted under a reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import islice
from math import isfinite
from typing import Any

from repsft_fast.data import cache
from repsft_fast.data.bad_rows import BAD_ROW, BadRows
from repsft_fast.data.bounded import bounded_map
from repsft_fast.data.columns import Columns, IgnoredFields, check_column
from repsft_fast.data.encode import Encoder
from repsft_fast.data.formats import Conversation, Pair, Segments, Text, detect, parse, read_task, read_weight
from repsft_fast.data.placeholders import special_pattern
from repsft_fast.data.plain import plain_pieces, with_ends
from repsft_fast.data.pretokenised import Pretokenised
from repsft_fast.data.sample import Loaded, Sample
from repsft_fast.data.settings import DataSettings
from repsft_fast.data.source import Source
from repsft_fast.data.template import ChatTemplate, Rendered, find_template
from repsft_fast.data.text_rows import BadRow
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
class _Item:
    """A row that was read, or one of the samples of a packed row."""

    parsed: Conversation | Pair | Text | Segments | Pretokenised
    task: str
    weight: float
    where: str


class SampleBuilder:
    """Called with sources and their rows, gives their samples and the account of the rest; one build at a
    time."""

    def __init__(self, tokenizer: Any, settings: DataSettings, vocab_size: int | None):
        """tokenizer: None is enough for input_ids rows. vocab_size: the model's; None = the tokenizer's."""
        self.tokenizer, self.settings = tokenizer, settings
        self.vocab_size = vocab_size
        self.parse_special = settings.special_tokens == "parse"
        self.template_text: str | None = None
        self.template: ChatTemplate | None = None
        self.encoder: Encoder | None = None
        self.specials: re.Pattern[str] | None = None
        if tokenizer is None:
            return
        if vocab_size is None:
            self.vocab_size = len(tokenizer)
        self.template_text = find_template(tokenizer, settings.chat_template)
        if self.template_text:
            self.template = ChatTemplate(
                self.template_text,
                tokenizer,
                train_on=settings.train_on,
                parse_special=self.parse_special,
                template_kwargs=settings.template_kwargs,
            )
        self.encoder = Encoder(tokenizer)
        self.specials = special_pattern(tokenizer)

    def description(self) -> dict[str, Any]:
        """What the cache key must cover, besides the content."""
        ignored = ("samples", "seed", "cache_folder", "chat_template")
        settings = {
            f.name: getattr(self.settings, f.name) for f in fields(self.settings) if f.name not in ignored
        }
        tokenizer = cache.tokenizer_fingerprint(self.tokenizer)
        with_tools = self.template.tool_template if self.template is not None else None
        templates = [self.template_text, with_tools]
        return {
            "settings": settings,
            "templates": templates,
            "tokenizer": tokenizer,
            "vocab_size": self.vocab_size,
        }

    def __call__(self, sources: list[tuple[Source, Iterator[tuple[Any, str]]]]) -> Loaded:
        """The samples of the sources, in their order. Raises DataError as `load` does."""
        settings = self.settings
        loaded, self.notes = Loaded([]), Counter[str]()
        self.columns = Columns(
            task=settings.task_column, weight=settings.weight_column, ignored=settings.ignore_columns
        )
        self.bad, self.rows = BadRows(), 0
        self.fields = IgnoredFields(settings.ignore_columns)
        for source, rows in sources:
            self._add_source(source, rows, loaded)

        # After all sources: one error says how many rows of how many are bad.
        if self.bad.count and settings.on_bad_row == "raise":
            raise self.bad.error(self.rows)
        if not isfinite(sum(sample.weight for sample in loaded.samples)):
            raise DataError(
                describe("data.weight_column", "the weights sum to infinity", todo="scale them down")
            )
        loaded.columns_used, loaded.columns_unused, also = self.columns.account()
        for (form, other), count in also.items():
            note = f"rows are whole {other!r} rows too, and read as {form!r} (data.format chooses)"
            self.notes[note] = count
        loaded.warnings += [f"{count} {note}" for note, count in sorted(self.notes.items())]
        loaded.warnings += [*self.bad.warnings(), *self.columns.never_seen(), *self.fields.never_seen()]
        loaded.warnings += self._template_warnings()
        return loaded

    def _add_source(self, source: Source, rows: Iterator[tuple[Any, str]], loaded: Loaded) -> None:
        """Adds one source's samples and what is counted of its rows. DataError where none is usable."""
        rows_before, samples_before = self.rows, len(loaded.samples)
        dropped_before, bad_before = Counter(loaded.dropped), self.bad.count
        items = self._items(source, rows, loaded)
        while chunk := list(islice(items, CHUNK_ROWS)):
            self._add(chunk, loaded)
        count = self.rows - rows_before
        loaded.files[source.name] = loaded.files.get(source.name, 0) + count
        if not count:
            raise DataError(describe(source.name, "is empty", expected="at least one row"))
        # Bad rows that raise are told together in the end, with those of the other sources.
        told_later = self.settings.on_bad_row == "raise" and self.bad.count != bad_before
        if len(loaded.samples) == samples_before and not told_later:
            reasons = Counter(loaded.dropped) - dropped_before
            lost = ", ".join(f"{rows} × {reason}" for reason, rows in reasons.items())
            raise self.bad.none_left(source.name, count, lost)

    def _template_warnings(self) -> list[str]:
        """What the template's text alone shows: samples that change by the day, variables not read."""
        text = self.template_text or ""
        warnings = []
        if "strftime_now" in text:
            warnings.append(
                "the chat template writes today's date: samples differ from day to day unless cached"
            )
        unread = [name for name in self.settings.template_kwargs if not re.search(rf"\b{name}\b", text)]
        return warnings + [
            f"tokenizer.template_kwargs: the chat template does not read {name}" for name in unread
        ]

    # A row that cannot be trained on is no reason to stop before the others were looked at.
    def _reject(self, where: str, error: DataError, loaded: Loaded) -> None:
        if self.bad.add(where, error):
            _drop(loaded, BAD_ROW)

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
                # Before the form is looked for, so that a column that is not there is what is said.
                check_column(row, settings.task_column, "data.task_column", where)
                check_column(row, settings.weight_column, "data.weight_column", where)
                # The first row decides for its source. What is no object has no form, and `parse` says so.
                if form == "auto" and isinstance(row, dict):
                    form = detect(self.columns.visible(row), where)
                parsed = parse(
                    row,
                    form if form != "auto" else "messages",
                    where,
                    merged=source.merged,
                    columns=self.columns,
                )
                if settings.task_column is not None:
                    task = read_task(row, settings.task_column, where)
                if settings.weight_column is not None:
                    weight = read_weight(row, settings.weight_column, where)
                # A packed row is several samples, kept or refused together.
                for part in parsed if isinstance(parsed, list) else ():
                    self._check_vocabulary(part.ids, where)
            except DataError as error:
                self._reject(where, error, loaded)
                continue
            yield from (
                _Item(part, task, weight, where)
                for part in (parsed if isinstance(parsed, list) else [parsed])
            )

    def _add(self, chunk: list[_Item], loaded: Loaded) -> None:
        """Render and tokenise one chunk, keep what is usable, count the rest."""
        weighted = []
        for item in chunk:
            if item.weight == 0:
                _drop(loaded, ZERO_WEIGHT)
            else:
                weighted.append(item)
        chunk, rendered = weighted, self._render(weighted)
        for item, result in zip(chunk, self._tokenise(chunk, rendered)):
            sample = self._sample(item, *result) if isinstance(result, tuple) else result
            if isinstance(sample, DataError):
                self._reject(item.where, sample, loaded)
            elif isinstance(sample, str):
                _drop(loaded, sample)
            else:
                loaded.samples.append(sample)

    def _render(self, chunk: list[_Item]) -> list[Rendered | str | DataError | None]:
        """Per row its pieces, the reason it is dropped for, what is wrong with it, or None for rows that need
        no text."""
        # Only chats are rendered by a template, which is untrusted and so runs bounded, in a child.
        prepared = [self._as_conversation(item) for item in chunk]
        chats = [(c, item.where) for c, item in zip(prepared, chunk) if isinstance(c, Conversation)]

        def work(chat: tuple[Conversation, str]) -> list[Any] | None:
            assert self.template is not None
            result = self.template(*chat)
            return None if result is None else result.to_json()

        # In the order of the rows again, whether they needed the template or not.
        answers: Iterable[Any] = bounded_map(work, chats, lambda chat: chat[1], "the chat template")
        answer = iter(answers)
        rendered: list[Rendered | str | DataError | None] = []
        for conversation, item in zip(prepared, chunk):
            if isinstance(conversation, Conversation):
                value = next(answer)
                good = value is not None and not isinstance(value, DataError)
                none = NOT_MARKED if conversation.trainable == () else NO_ASSISTANT
                # An error is passed on; None is a chat without a turn to train on.
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
            raise DataError(
                describe(item.where, "holds text, and there is no tokenizer", todo="set tokenizer.path")
            )
        if isinstance(parsed, Pair):
            if mode == "always" or (mode == "auto" and parsed.chat and self.template is not None):
                parsed = parsed.conversation()
            elif parsed.chat_only != Conversation([]):
                wrong = (
                    "holds a system prompt, history, tools or chat_template_kwargs, which only a chat"
                    " template can write"
                )
                todo = (
                    "write the row as messages, set tokenizer.chat_template, or name the columns in"
                    " data.ignore_columns"
                )
                return DataError(describe(item.where, wrong, todo=todo))
        if not isinstance(parsed, Conversation):
            return None
        if self.template is None:
            todo = (
                "set tokenizer.chat_template, use an instruction model's tokenizer, or write rows as"
                " prompt/completion text"
            )
            raise DataError(
                describe(item.where, "holds turns, and the tokenizer has no chat template", todo=todo)
            )
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
                yield (
                    with_ends(ids, trained, self.encoder, self.tokenizer) if result.plain else (ids, trained)
                )

    def _check_vocabulary(self, ids: list[int], where: str) -> None:
        if self.vocab_size is not None and ids and max(ids) >= self.vocab_size:
            at = next(number for number, token in enumerate(ids) if token >= self.vocab_size)
            expected = f"less than {self.vocab_size}, the model's vocabulary"
            todo = "use the model's own tokenizer"
            raise DataError(
                describe(f"{where}, token {at}", "is out of range", expected=expected, got=ids[at], todo=todo)
            )

    def _sample(self, item: _Item, ids: list[int], trained: list[bool]) -> Sample | str | DataError:
        """The sample, the reason it is dropped for, or what is wrong with its row."""
        try:
            self._check_vocabulary(ids, item.where)
        except DataError as error:
            return error
        # What follows the last trained token cannot change its loss: attention is causal.
        trained = [False, *trained[1:]]
        end = _last(trained) + 1
        if end == 0:
            return NO_TEXT if not ids else NOT_TRAINED
        limit = self.settings.max_tokens
        if limit is not None and end - 1 > limit:
            if self.settings.overlong == "raise":
                expected = f"at most {limit} positions"
                todo = "raise data.max_tokens, or set data.overlong: drop or truncate"
                raise DataError(
                    describe(item.where, "is over-long", expected=expected, got=end - 1, todo=todo)
                )
            if self.settings.overlong == "drop":
                return OVER_LONG
            end = _last(trained[: limit + 1]) + 1
            if end == 0:
                return TRUNCATED_AWAY
            self.notes[f"over-long rows truncated to {limit} positions"] += 1
        return Sample(ids[:end], trained[:end], item.task, item.weight, item.where)


def _drop(loaded: Loaded, reason: str) -> None:
    loaded.dropped[reason] = loaded.dropped.get(reason, 0) + 1


def _last(flags: list[bool]) -> int:
    """Index of the last True, -1 when there is none."""
    return next((number for number in range(len(flags) - 1, -1, -1) if flags[number]), -1)
