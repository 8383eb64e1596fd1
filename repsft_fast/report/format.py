"""Figures as people read them, short enough for one line."""

import math
from collections.abc import Mapping

MISSING = "–"


def number(value: float | None, digits: int = 3) -> str:
    """0.213, 12.3, 1.2e-05: `digits` significant ones."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(value)
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.{max(digits - 2, 0)}e}"
    places = digits - 1 - (math.floor(math.log10(abs(value))) if value else 0)
    return f"{value:.{min(max(places, 0), digits)}f}"


def percent(fraction: float | None, digits: int = 1) -> str:
    """94.3 %. Never rounds up to 100: a reader must see that something is left."""
    if fraction is None or not math.isfinite(fraction):
        return MISSING
    scale = 10**digits
    shown = round(fraction * 100 * scale) / scale
    if shown >= 100 and fraction < 1:
        shown = math.floor(fraction * 100 * scale) / scale
    return f"{shown:.{digits}f} %"


def count(value: float | None) -> str:
    """1,204, 6.1k, 51.2M, 8.03B."""
    if value is None:
        return MISSING
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            scaled = value / (1e3 if letter == "k" else size)
            return f"{scaled:.{0 if scaled >= 100 else 1}f}{letter}"
    return f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes as 23.1 GiB."""
    if value is None:
        return MISSING
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def duration(seconds: float | None) -> str:
    """4.2 s, 3:12, 1:02:33, 3 d 04:10."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def rows_of(files: Mapping[str, int], most: int = 8) -> str:
    """train.jsonl (1,204 rows), more.jsonl (2 rows), and 3 more (57 rows). Long paths by their last name."""
    named = [
        f"{_short(name)} ({count(rows)} row{'' if rows == 1 else 's'})"
        for name, rows in list(files.items())[:most]
    ]
    rest = list(files.values())[most:]
    return ", ".join([*named, *([f"and {len(rest)} more ({count(sum(rest))} rows)"] if rest else [])])


def _short(path: str, most: int = 48) -> str:
    """A long path by its last name, a long name by both its ends."""
    name = path if len(path) <= most else path.rstrip("/").rpartition("/")[2]
    return name if len(name) <= most else f"{name[: most - 17]}…{name[-16:]}"
