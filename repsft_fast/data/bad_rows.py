"""Rows that cannot be trained on: counted, the first five kept in words, and one error or one warning at the end.

And fields of turns in data.ignore_columns that no row has: they would have to be looked for in every row, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from repsft_fast.errors import DataError, describe, did_you_mean

BAD_ROW = "cannot be trained on (data.on_bad_row: drop)"
SHOWN = 5


class BadRows:
    def __init__(self) -> None:
        self.count = 0
        self.first: list[tuple[str, str]] = []  # (place, message), in the order of the sources
        self._files: dict[str, int] = {}  # in the order of reading
        self._last = ""

    def add(self, where: str, error: DataError) -> bool:
        """False when this row was added before: a packed row is one row, however many samples it holds."""
        if where == self._last:
            return False
        self._last = where
        self.count += 1
        self._files.setdefault(where.rpartition(":")[0], len(self._files))
        # What is wrong with a row's form is found before what is wrong with its text: they come in no order.
        self.first = sorted([*self.first, (where, str(error))], key=lambda bad: self._position(bad[0]))[:SHOWN]
        return True

    def _position(self, where: str) -> tuple[int, int]:
        file, _, row = where.rpartition(":")
        return self._files[file], int(row) if row.isdecimal() else 0

    def error(self, rows: int) -> DataError:
        """What is said when bad rows are not to be dropped; `rows` were looked at."""
        if self.count == 1:
            message = self.first[0][1]
            return DataError(message if "data.on_bad_row" in message else f"{message} (or set data.on_bad_row: drop)")
        shown = "the first five:" if self.count > SHOWN else "they are:"
        todo = "mend them, or set data.on_bad_row: drop"
        lines = "\n".join(f"  {message}" for _, message in self.first)
        return DataError(f"{self.count} of {rows} rows cannot be trained on; {shown}\n{lines}\n{todo}")

    def none_left(self, source: str, rows: int, lost: str) -> DataError:
        """A source without a usable row: an error in any case."""
        own = [message for place, message in self.first if place.rpartition(":")[0] == source]
        todo = f"the first bad row is {own[0]}" if own else "see the reasons; nothing is left to train on"
        return DataError(describe(source, f"none of its {rows} rows is usable ({lost})", todo=todo))

    def warnings(self) -> list[str]:
        if not self.count:
            return []
        places = ", ".join(place for place, _ in self.first)
        more = ", …" if self.count > SHOWN else ""
        return [f"{self.count} rows cannot be trained on and were dropped: {places}{more}; the first: {self.first[0][1]}"]


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
