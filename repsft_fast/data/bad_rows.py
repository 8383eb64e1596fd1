"""Rows that cannot be trained on: counted, the first five kept in words, and one error or one warning at the
end."""

from __future__ import annotations

from repsft_fast.errors import DataError, describe

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
        self.first = sorted([*self.first, (where, str(error))], key=lambda bad: self._position(bad[0]))[
            :SHOWN
        ]
        return True

    def _position(self, where: str) -> tuple[int, int]:
        file, _, row = where.rpartition(":")
        return self._files[file], int(row) if row.isdecimal() else 0

    def error(self, rows: int) -> DataError:
        """What is said when bad rows are not to be dropped; `rows` were looked at."""
        if self.count == 1:
            message = self.first[0][1]
            return DataError(
                message if "data.on_bad_row" in message else f"{message} (or set data.on_bad_row: drop)"
            )
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
        return [
            f"{self.count} rows cannot be trained on and were dropped: {places}{more}; the first:"
            f" {self.first[0][1]}"
        ]
