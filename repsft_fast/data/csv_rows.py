"""Rows of .csv and .tsv files: a header of names, then cells. Every value is text; an empty cell is null."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from typing import Any

from repsft_fast.errors import DataError, describe

DELIMITERS = {"csv": ",", "tsv": "\t"}


def csv_rows(
    lines: Iterator[str], name: str, kind: str, limit: int, columns: Sequence[str] | None = None
) -> Iterator[tuple[dict[str, Any], str]]:
    """({column: text or null}, "file:line") for every row. limit: of characters in a cell. columns: their
    names, where the first line does not say them. DataError names the line.

    A column without a name, as data frames write their index, is called "Unnamed: N".
    """
    csv.field_size_limit(limit)  # of the whole process, by the module's design
    reader = csv.reader(lines, delimiter=DELIMITERS[kind], strict=True)
    header = None if columns is None else list(columns)
    while True:
        where = f"{name}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            todo = "repair the quotes, or write the rows as .jsonl"
            raise DataError(describe(where, f"is not {kind} ({error})", todo=todo)) from None
        # Blank lines are no rows, and the first line that is none names the columns.
        if not cells:
            continue
        if header is None:
            header = _header(cells, where, kind)
        elif len(cells) != len(header):
            todo = f"quote cells that hold {DELIMITERS[kind]!r}, or write the rows as .jsonl"
            raise DataError(
                describe(
                    where, "has not a cell for each column", expected=len(header), got=len(cells), todo=todo
                )
            )
        else:
            yield {column: cell or None for column, cell in zip(header, cells)}, where


def _header(cells: list[str], where: str, kind: str) -> list[str]:
    for cell in cells[1:]:
        # then cells begin with it too, or with a quote that quotes nothing
        if cell.strip() and cell[0].isspace():
            todo = f"remove the white space behind each {DELIMITERS[kind]!r}, or write the rows as .jsonl"
            raise DataError(
                describe(where, f"has white space in front of column {cell.strip()!r}", todo=todo)
            )
    names = [cell.strip() or f"Unnamed: {number}" for number, cell in enumerate(cells)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(describe(where, f"names a column twice: {twice[0]}", todo="rename one of them"))
    for other in ";\t|,":
        if len(cells) == 1 and other in cells[0] and other != DELIMITERS[kind]:
            todo = "write it with commas (.csv) or tabs (.tsv)"
            raise DataError(
                describe(where, "holds one column", expected=repr(DELIMITERS[kind]), got=cells[0], todo=todo)
            )
    return names
