"""Records: one JSON line per measured point, appended, never edited. A line that cannot be true is
refused."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.checkout import ROOT
from benchmarks.harness.timing import quantile

FOLDER = ROOT / "benchmarks" / "records"
REQUIRED = (
    "commit", "dirty", "device", "device_class", "driver", "torch", "triton",
    "op", "implementation", "shape", "dtype", "p20_ms", "p50_ms", "p80_ms", "peak_bytes",
)  # fmt: skip


class BadRecord(ValueError):
    """A record that is incomplete or says something impossible."""


def make(
    environment: Mapping[str, Any],
    *,
    op: str,
    implementation: str,
    shape: Mapping[str, int | float | str],
    dtype: str,
    times_ms: Sequence[float],
    peak_bytes: int,
    moved_bytes: int | None = None,
    flops: int | None = None,
    ceilings: Mapping[str, float] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One record. moved_bytes or flops: the least the operation must move or compute; its rate is shown as a
    share of `ceilings`. The round times are kept: a verdict needs more than three quantiles."""
    record: dict[str, Any] = dict(environment)
    record |= {"op": op, "implementation": implementation, "shape": dict(shape), "dtype": dtype}
    if not times_ms:
        raise BadRecord(f"record {op}/{implementation}: no times, expected at least one")
    record |= {f"p{q}_ms": quantile(times_ms, q / 100) for q in (20, 50, 80)}
    record |= {"peak_bytes": peak_bytes, "rounds_ms": [float(f"{t:.6g}") for t in times_ms]}
    for name, amount in (("bytes_per_s", moved_bytes), ("flops_per_s", flops)):
        if amount is not None:
            record[name] = amount / (record["p50_ms"] / 1e3) if record["p50_ms"] else math.nan
            if ceilings is not None:
                record[f"share_of_{name}"] = record[name] / ceilings[name]
    record |= more
    return check(record)


def check(record: dict[str, Any]) -> dict[str, Any]:
    """The record, if it is whole and possible; else BadRecord naming the field."""
    where = f"record {record.get('op')}/{record.get('implementation')}"
    missing = [name for name in REQUIRED if name not in record]
    if missing:
        raise BadRecord(f"{where}: fields are missing, expected {', '.join(missing)}")
    commit = record["commit"]
    if not isinstance(commit, str) or len(commit) != 40 or set(commit) - set("0123456789abcdef"):
        raise BadRecord(
            f"{where}: commit does not say which code was measured, expected 40 hexadecimal digits, got"
            f" {commit!r}"
        )
    numbers = {name: record[name] for name in ("p20_ms", "p50_ms", "p80_ms")}
    numbers |= {name: value for name, value in record.items() if "_per_s" in name}
    numbers |= {f"rounds_ms[{i}]": value for i, value in enumerate(record.get("rounds_ms", []))}
    for name, value in numbers.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
            or value <= 0
        ):
            raise BadRecord(f"{where}: {name} is not a measurement, expected a number above 0, got {value!r}")
    if not record["p20_ms"] <= record["p50_ms"] <= record["p80_ms"]:
        raise BadRecord(f"{where}: quantiles out of order, got {[record[f'p{q}_ms'] for q in (20, 50, 80)]}")
    if not isinstance(record["peak_bytes"], int) or record["peak_bytes"] < 0:
        raise BadRecord(f"{where}: peak_bytes is not a count, got {record['peak_bytes']!r}")
    return record


def append(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Add lines at the end of a .jsonl file, all or none. Existing lines are never touched."""
    lines = [json.dumps(check(record), sort_keys=True, allow_nan=False) for record in records]
    if not lines:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    with os.fdopen(descriptor, "w") as file:
        file.write("\n".join(lines) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Every record of a file. BadRecord names the line that is torn, incomplete or impossible; an empty file
    is refused."""
    records = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            records.append(check(json.loads(line)))
        except (json.JSONDecodeError, BadRecord, TypeError, AttributeError) as error:
            raise BadRecord(f"{path.name}:{number}: not a record: {error}") from error
    if not records:
        raise BadRecord(f"{path.name}: holds no records; run the suite first")
    return records


def key(record: Mapping[str, Any]) -> str:
    """What makes two records the same measurement: operation, implementation, shape and dtype."""
    shape = ",".join(f"{name}={value}" for name, value in sorted(record["shape"].items()))
    return f"{record['op']}/{record['implementation']}[{shape}]{record['dtype']}"


def latest(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The last record of every key."""
    return {key(record): record for record in records}
