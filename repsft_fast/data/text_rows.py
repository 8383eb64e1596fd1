"""Rows of JSON and CSV files, packed or not, read line by line within limits."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from typing import Any

from repsft_fast.data.csv_rows import csv_rows
from repsft_fast.data.filetypes import TORN, Twice, check_beginning, once, open_bytes, torn
from repsft_fast.data.folders import rows_of_object
from repsft_fast.data.source import Source
from repsft_fast.errors import DataError, describe

# a longer JSONL line is a mistake (64 MiB of text is ~16M tokens), and must not fill the memory
MAX_LINE_BYTES = 64 * 2**20
MAX_JSON_BYTES = 2 * 2**30  # .json is read whole


def text_rows(source: Source, split: str, columns: Sequence[str] | None = None) -> Iterator[tuple[Any, str]]:
    """(row, "file:row") of a jsonl, json, csv or tsv file. Row numbers are 1-based; they are lines, but in an
    array. columns: of a csv or tsv file without a header.

    A row may be a BadRow. Raises DataError for what cannot be read, at its place; split: of a .json file that
    holds several.
    """
    assert source.path is not None
    place = [f"{source.name}"]
    try:
        if source.kind == "json":
            yield from _json_rows(source, split, place)
        elif source.kind == "jsonl":
            yield from _json_lines(source, place)
        else:
            lines = (_text(line, where) for line, where in _lines(source, place))
            yield from csv_rows(lines, source.name, source.kind, MAX_LINE_BYTES, columns)
    except TORN as error:
        raise torn(place[0], source.path, error) from error


def _lines(source: Source, place: list[str]) -> Iterator[tuple[bytes, str]]:
    """Every line, with its place, which `place` holds while the next one is read. Bounded, packed or not."""
    assert source.path is not None
    with open_bytes(source.path) as stream:
        number = blank = 0
        place[0] = f"{source.name}:1"
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = place[0]
            if number == 1:
                check_beginning(line, where)
                line = _without_mark(line, where)
            if len(line) > MAX_LINE_BYTES:
                todo = "write one row a line"
                raise DataError(
                    describe(
                        where, "is too long a line", expected=f"at most {MAX_LINE_BYTES} bytes", todo=todo
                    )
                )
            # A packed file of a few KB may hold gigabytes of blank lines.
            blank = blank + len(line) if not line.strip(b" \t\r\n") else 0
            if blank > MAX_LINE_BYTES:
                wrong = f"is the end of {blank} bytes of blank lines"
                todo = "write the file again without them"
                raise DataError(describe(where, wrong, todo=todo))
            yield line, where
            place[0] = f"{source.name}:{number + 1}"


def _json_lines(source: Source, place: list[str]) -> Iterator[tuple[Any, str]]:
    for line, where in _lines(source, place):
        if line.strip(b" \t\r\n"):
            try:
                row = _decode(line, where, torn=not line.endswith(b"\n"))
            except BadRow as error:
                row = error
            yield row, where


def _without_mark(data: bytes, where: str) -> bytes:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(describe(where, "is UTF-16", expected="UTF-8", todo="convert the file"))
    return data.removeprefix(codecs.BOM_UTF8)


def _text(data: bytes, where: str) -> str:
    if b"\0" in data:
        todo = "the file was torn by a crash or is not text; remove the line"
        raise DataError(describe(where, f"holds a NUL byte at byte {data.index(0)}", todo=todo))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        got = f"0x{data[error.start]:02x} at byte {error.start}"
        raise DataError(
            describe(where, "is not UTF-8", expected="UTF-8", got=got, todo="convert the file")
        ) from None


class BadRow(DataError):
    """A row that is JSON and cannot be meant. It stands in the row's place, where data.on_bad_row looks at
    it."""


_JSON = json.JSONDecoder(object_pairs_hook=once)


def _decode(data: bytes, where: str, torn: bool = False) -> Any:
    text = _text(data, where)
    try:
        return _JSON.decode(text)
    except Twice as error:
        wrong = f"names {error.name[:80]!r} twice, with two values"
        got = " and ".join(repr(value)[:80] for value in error.values[:2])
        raise BadRow(describe(where, wrong, got=got, todo="keep the one that is meant")) from None
    except RecursionError:
        todo = "write what is nested as text"
        raise DataError(
            describe(where, "is nested too deeply", expected="a row of text fields", todo=todo)
        ) from None
    except ValueError as error:
        wrong = (
            f"is torn: the file ends in the middle of a row ({error})" if torn else f"is not JSON ({error})"
        )
        raise DataError(describe(where, wrong, todo="repair or remove the line")) from None


def _json_rows(source: Source, split: str, place: list[str]) -> Iterator[tuple[Any, str]]:
    """A .json file: an array of rows, an object that holds one such array, or JSON lines under another
    name."""
    assert source.path is not None
    # Its beginning first: what is no JSON at all needs no gigabytes to be seen.
    with open_bytes(source.path) as stream:
        data = stream.read(min(MAX_JSON_BYTES, 2**20) + 1)
        check_beginning(data, source.name)
        if len(data) <= MAX_JSON_BYTES:
            data += stream.read(MAX_JSON_BYTES + 1 - len(data))
    if len(data) > MAX_JSON_BYTES:
        todo = "write it as .jsonl, which is read line by line"
        raise DataError(
            describe(source.name, "is too large", expected=f"at most {MAX_JSON_BYTES} bytes", todo=todo)
        )
    data = _without_mark(data, source.name)
    if not data.strip():
        return
    # Rows one a line under this name: two objects one after the other are no JSON text.
    first, _, rest = data.strip().partition(b"\n")
    if first.rstrip().endswith(b"}") and rest.lstrip().startswith(b"{"):
        yield from _json_lines(source, place)
        return
    value = _decode(data, source.name)
    if isinstance(value, dict):
        value = rows_of_object(value, source.name, split, source.held_out)
    if not isinstance(value, list):
        todo = "write an array of rows, or one row a line as .jsonl"
        wrong = "holds no rows"
        raise DataError(
            describe(source.name, wrong, expected="an array of objects", got=type(value).__name__, todo=todo)
        )
    yield from ((row, f"{source.name}:{number}") for number, row in enumerate(value, 1))
