"""What a run's folder says of the run, read as it is found: what is damaged is left out and counted, and
nothing hangs.

A line of metrics.jsonl that a full disk, a power cut or an editor spoilt costs that line, and never the
picture of the run.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

import yaml

from repsft_fast.errors import RepsftError, describe, open_plain

METRICS = "metrics.jsonl"
LONGEST_LINE = 1 << 24  # bytes; ours have some hundreds per task
LARGEST_FILE = 1 << 26  # bytes of a file that is read as one value
MOST_BYTES = 1 << 31  # of metrics.jsonl: millions of updates; a hole in a file may be larger than any disk


@dataclass
class Metrics:
    """The records of metrics.jsonl in order, and what was left out of them."""

    records: list[dict[str, Any]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)  # of each record, counted from 1
    damaged: int = 0
    first: int = 0  # the first damaged line's number
    unread: int = 0  # bytes behind the first MOST_BYTES

    @property
    def words(self) -> str:
        """`2 lines of metrics.jsonl (the first: line 7) cannot be read and are left out`; "" when all
        could."""
        rest = f"{METRICS} is too large: its last {self.unread} bytes are left out" if self.unread else ""
        return "; ".join(words for words in (self._damage, rest) if words)

    @property
    def _damage(self) -> str:
        if not self.damaged:
            return ""
        if self.damaged == 1:
            return f"line {self.first} of {METRICS} cannot be read and is left out"
        return (
            f"{self.damaged} lines of {METRICS} (the first: line {self.first}) cannot be read and are"
            " left out"
        )

    def leave_out(self, line: int) -> None:
        self.damaged += 1
        self.first = min(self.first or line, line)

    def keep(self, is_whole: Callable[[dict[str, Any]], bool]) -> None:
        """Counts records that are JSON and yet not what they should be as damaged too."""
        for record, line in zip(self.records, self.lines, strict=True):
            if not is_whole(record):
                self.leave_out(line)
        kept = [pair for pair in zip(self.records, self.lines, strict=True) if is_whole(pair[0])]
        self.records, self.lines = [record for record, _ in kept], [line for _, line in kept]


def read_metrics(folder: Path | str) -> Metrics:
    """Every line that is one JSON object. A last line without its end is still being written: it is no
    damage.

    Raises RepsftError when there is no such plain file.
    """
    # NaN and Infinity are no JSON: a line that has them is damage like any other.
    path = Path(folder) / METRICS
    found = Metrics()
    decoder = json.JSONDecoder(parse_constant=_no_constant)
    try:
        with open_plain(path) as file:
            for number, line in enumerate(_lines(file), 1):
                text = line.strip()
                if not text:
                    continue
                try:
                    record = decoder.decode(text.decode())
                except (ValueError, RecursionError):
                    record = None
                if isinstance(record, dict):
                    found.records.append(record)
                    found.lines.append(number)
                elif line.endswith(b"\n"):
                    found.leave_out(number)
            # Beyond what is read the rest is counted, so that a reader is told.
            if file.tell() >= MOST_BYTES:
                found.unread = max(0, os.fstat(file.fileno()).st_size - file.tell())
    except OSError as error:
        raise RepsftError(
            describe(str(path), f"cannot be read ({_why(error)})", todo="is this a run's folder?")
        ) from error
    return found


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object. Raises OSError for what is no plain file of a sensible size, ValueError for what is no
    object."""
    with open_plain(path) as file:
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise ValueError(f"it has more than {LARGEST_FILE >> 20} MiB")
    try:
        value = json.loads(content.decode(), object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


def result_or_nothing(path: Path) -> dict[str, Any]:
    """A small JSON file, or nothing: the picture of a killed run is drawn without its result."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def setting(folder: Path, section: str, name: str) -> Any:
    """A setting as run.yaml has it, None where that cannot be read."""
    try:
        with open_plain(folder / "run.yaml") as file:
            settings = yaml.safe_load(file.read(LARGEST_FILE).decode())
        return settings[section][name]
    except (OSError, yaml.YAMLError, LookupError, TypeError, ValueError, RecursionError):
        return None


def is_number(value: Any) -> bool:
    """A finite one that a figure can show; True and False are none."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """Lines with their ends. Of one that is far too long only its beginning, made to be no JSON. None begins
    behind the first MOST_BYTES, and the last is read no further than that and LONGEST_LINE."""
    while file.tell() < MOST_BYTES and (line := file.readline(LONGEST_LINE)):
        whole = line
        while whole and not whole.endswith(b"\n") and len(line) == LONGEST_LINE and file.tell() < MOST_BYTES:
            whole = file.readline(LONGEST_LINE)
        yield line if whole is line else b"{\n"


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, one in pairs:
        if name in value:
            raise ValueError(f"it has {name} twice")
        value[name] = one
    return value


def _why(error: OSError) -> str:
    return error.strerror or str(error)
