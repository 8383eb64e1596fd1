"""What noise alone does under msft's rule "tested", and which falls it sees: docs/rule_tables.md.

    python -m benchmarks.studies.rule_tables           simulates what is missing, appends its records
    python -m benchmarks.studies.rule_tables --table   the page

One record a pass: a world (how items vary), a curve, validation rows. It holds the share of paths that leave
for every number of tasks, looks a stage and wobble; `rule_paths` says what a path is. Some minutes on
one core.
"""

from __future__ import annotations

import functools
import resource
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import machine, records
from benchmarks.studies.rule_paths import NEVER, Cell, Losses, Shares, World, leaving

PATH = records.FOLDER / "rule_tables.jsonl"
SEED, BATCH, FLAT_PATHS, FALL_PATHS = 1407, 500, 4000, 1000
TASKS, LOOKS, ROWS, WOBBLES = (1, 2, 5, 10, 20), (4, 12, 40), (50, 200, 1000), (0.0, 0.01, 0.02, 0.04)
STAGES, PER_EPOCH = 10, 4

Make = Callable[..., World]
WORLDS: dict[str, Make] = {
    "exact match, redrawn 0.3, lasting": functools.partial(Shares, churn=0.3, lasting=True),
    "exact match, redrawn 0.3, passing": functools.partial(Shares, churn=0.3, lasting=False),
    "nll, passing": functools.partial(Losses, sigma=0.3, lasting=0.0),
    "nll, lasting 0.9": functools.partial(Losses, sigma=0.3, lasting=0.9),
    "exact match, redrawn 0.1, lasting": functools.partial(Shares, churn=0.1, lasting=True),
    "exact match, redrawn 1.0": functools.partial(Shares, churn=1.0, lasting=True),
}
MAIN = tuple(WORLDS)[:4]
LEVEL = {"exact match": 0.6, "nll": 0.0}
SUDDEN, RISE = 0.4, 0.4


def curve_of(name: str, world: str, looks: int) -> NDArray[np.float64]:
    """The task's level at every look of a run of so many looks a stage. It turns after a third of the run."""
    at = np.arange(looks * STAGES + 1, dtype=np.float64)
    after = np.maximum(0.0, at - looks * STAGES // 3)
    base = LEVEL[world.split(",")[0]]
    match name.split():
        case ["flat"]:
            return np.full(len(at), base - 0.1 if base else 0.0)
        case ["flat", level]:
            return np.full(len(at), float(level))
        case ["rising"]:
            return 0.2 + 0.6 * at / at[-1]
        case ["falls", points]:
            return base - float(points) / PER_EPOCH * after
        case ["rises,", "falls", points]:
            return base - RISE * np.maximum(0.0, 1 - at / 4) - float(points) / PER_EPOCH * after
        case ["sudden"]:
            return base + 0.3 - SUDDEN * (after > 0)
    raise ValueError(f"rule_tables: no such curve, got {name!r}")


FALLS = ("falls 0.02", "falls 0.05", "falls 0.10", "rises, falls 0.05", "sudden")


def passes() -> list[tuple[str, str, int]]:
    """(world, curve, rows) of every pass."""
    flat = [(world, "flat", rows) for world in MAIN for rows in ROWS]
    others = [(world, "flat", 200) for world in WORLDS if world not in MAIN]
    others += [(MAIN[0], "flat 0.9", 200), (MAIN[0], "rising", 200)]
    return flat + others + [(world, curve, rows) for world in MAIN for rows in ROWS for curve in FALLS]


@functools.cache
def left_at(world: str, curve: str, rows: int, looks: int = max(LOOKS)) -> NDArray[np.int64]:
    """The look at which each path leaves, [cells, wobbles, paths]; a pass with a fall is one of `looks` a
    stage, a flat one of all."""
    cells = cells_of(curve, looks)
    paths = FALL_PATHS if curve in FALLS else FLAT_PATHS
    line, seed = curve_of(curve, world, looks), zlib.crc32(f"{world}|{curve}|{rows}|{looks}".encode())
    found = []
    for batch in range(paths // BATCH):
        rng = np.random.Generator(np.random.SFC64([SEED, seed, batch]))
        found.append(leaving(WORLDS[world](rng, BATCH, rows, WOBBLES, line), looks * (STAGES - 1), cells))
    return np.concatenate(found, axis=2)


def cells_of(curve: str, looks: int) -> list[Cell]:
    return [Cell(tasks, k, STAGES) for k in ((looks,) if curve in FALLS else LOOKS) for tasks in TASKS]


def somebody(share: float, tasks: int, paths: int) -> tuple[float, float]:
    """(chance that one of so many tasks leaves, its standard error) from the share of single paths that do.

    The error by the delta method, of a share of at least one path.
    """
    at_least = max(share, 1.0 / paths)
    error = tasks * (1 - at_least) ** (tasks - 1) * (at_least * (1 - at_least) / paths) ** 0.5
    return 1 - (1 - share) ** tasks, error


def noise(world: str, curve: str, rows: int) -> list[dict[str, float]]:
    """A line per cell and wobble: what noise alone does where nothing falls."""
    left, found = left_at(world, curve, rows), []
    for c, cell in enumerate(cells_of(curve, max(LOOKS))):
        for w, wobble in enumerate(WOBBLES):
            line: dict[str, float] = {"tasks": cell.tasks, "looks": cell.looks, "wobble": wobble}
            for part, last in (("run", cell.last), ("stage", cell.first_stage)):
                share = float((left[c, w] <= last).mean())
                value, error = somebody(share, cell.tasks, left.shape[2])
                line |= {part: round(value, 5), f"{part}_error": round(error, 5)}
            found.append(line)
    return found


def seen(world: str, curve: str, rows: int) -> list[dict[str, float]]:
    """A line per cell and wobble: how often the task that falls leaves first, all others being flat; the
    median of its looks after the turn; how often it left before it."""
    flat, found = left_at(world, "flat", rows), []
    by_cell = {(cell.tasks, cell.looks): c for c, cell in enumerate(cells_of("flat", max(LOOKS)))}
    for looks in LOOKS:
        left, turn = left_at(world, curve, rows, looks), looks * STAGES // 3
        for c, cell in enumerate(cells_of(curve, looks)):
            for w, wobble in enumerate(WOBBLES):
                others = np.sort(flat[by_cell[cell.tasks, looks], w])
                own = left[c, w][left[c, w] < NEVER]
                gone = np.searchsorted(others, own, side="right") / len(others)
                first = (1 - gone) ** (cell.tasks - 1) * (own > turn)
                delay = float(np.median(own[own > turn])) - turn if (own > turn).any() else -1.0
                line = {"tasks": cell.tasks, "looks": looks, "wobble": wobble, "after": delay}
                line["first"] = round(float(first.sum()) / left.shape[2], 4)
                found.append(line | {"early": round(float((own <= turn).sum()) / left.shape[2], 4)})
    return found


def record_of(world: str, curve: str, rows: int) -> dict[str, Any]:
    """Simulate one pass."""
    started = time.perf_counter()
    cells = (seen if curve in FALLS else noise)(world, curve, rows)
    times = [1e3 * (time.perf_counter() - started)]
    shape = {"rows": rows, "curve": curve, "paths": FALL_PATHS if curve in FALLS else FLAT_PATHS}
    memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return records.make(
        machine.environment("cpu"), op="rule tested", implementation=world, shape=shape, dtype="float64",
        times_ms=times, peak_bytes=memory, seed=SEED, cells=cells,
    )  # fmt: skip


def key_of(record: dict[str, Any]) -> tuple[str, str, int]:
    return record["implementation"], record["shape"]["curve"], record["shape"]["rows"]


def main(arguments: list[str], path: Path = PATH) -> None:
    if arguments == ["--table"]:
        from benchmarks.studies import rule_pages

        print(rule_pages.page(records.read(path)))
        return
    if arguments:
        raise SystemExit(f"rule_tables: expected nothing or --table, got {' '.join(arguments)}")
    done = {key_of(record) for record in records.read(path)} if path.exists() else set()
    for world, curve, rows in passes():
        if (world, curve, rows) not in done:
            records.append(path, [record := record_of(world, curve, rows)])
            print(f"{world}, {curve}, {rows} rows: {record['p50_ms'] / 1e3:.1f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
