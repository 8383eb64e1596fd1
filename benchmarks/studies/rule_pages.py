"""The page docs/rule_tables.md from the records of `rule_tables`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from benchmarks.harness import records

Line = Mapping[str, float]
LIMIT = 0.1  # of whole runs in which noise alone may exclude somebody

HEAD = """# Rule `tested`: what noise alone does, and which falls it sees

Made by `python -m benchmarks.studies.rule_tables` and printed with `--table`; what is simulated is told in
[policies.md](policies.md). Settings are the defaults: alpha 0.1, patience 2, no exclusion before the eighth
look, ten stages, four looks an epoch. A *wobble* of 0.01 moves a task as a whole by one point (0.01 nats)
from look to look. *rows*: validation rows of each task."""


def page(found: Iterable[dict[str, Any]]) -> str:
    latest = list(records.latest(found).values())
    flat = [record for record in latest if "run" in record["cells"][0]]
    falls = [record for record in latest if "first" in record["cells"][0]]
    parts = [HEAD, "## In short", worst_table(flat), "", seen_table(falls)]
    parts += ["## Noise alone: runs in which somebody leaves"]
    parts += ["Nothing falls. Share of whole runs / of first stages in which somebody leaves."]
    for world in names(flat, "implementation"):
        parts += [f"### {world}", full(by(flat, world), noise_cell)]
    parts += ["## One task falls, the others are flat"]
    parts += [
        "Share of runs in which that task is the first to leave / median of the looks from the turn to there."
    ]
    for world in names(falls, "implementation"):
        parts += [f"### {world}", full(by(falls, world), seen_cell)]
    return "\n\n".join(part for part in parts if part)


def names(found: Iterable[Mapping[str, Any]], field: str) -> list[str]:
    return list(dict.fromkeys(record[field] for record in found))


def by(found: Iterable[Mapping[str, Any]], world: str) -> list[Mapping[str, Any]]:
    return [record for record in found if record["implementation"] == world]


def above(line: Line) -> bool:
    """Whether a cell misses the limit by more than two standard errors."""
    return line["run"] > LIMIT + 2 * line["run_error"]


def worst_table(flat: list[dict[str, Any]]) -> str:
    """A line per pass: the worst cell over tasks and wobbles, by looks a stage; how many cells miss the
    limit."""
    looks = sorted({int(line["looks"]) for record in flat for line in record["cells"]})
    head = [
        "items",
        "curve",
        "rows",
        *(f"{k} looks a stage" for k in looks),
        "a first stage",
        "above 10 % + 2 SE",
    ]
    lines = [row(head), "|" + "---|" * len(head)]
    for record in flat:
        cells, shown = (
            record["cells"],
            [record["implementation"], record["shape"]["curve"], record["shape"]["rows"]],
        )
        for k in looks:
            worst = max((line for line in cells if line["looks"] == k), key=lambda line: line["run"])
            shown.append(f"{worst['run']:.3f} ± {worst['run_error']:.3f}")
        shown += [f"{max(line['stage'] for line in cells):.3f}", f"{sum(map(above, cells))} of {len(cells)}"]
        lines.append(row(shown))
    return "\n".join(lines)


def seen_table(falls: list[dict[str, Any]], tasks: int = 5, wobble: float = 0.01) -> str:
    """A line per world and curve, a column per rows and looks a stage, at so many tasks and this wobble."""
    at = {
        (
            record["implementation"],
            record["shape"]["curve"],
            record["shape"]["rows"],
            int(line["looks"]),
        ): line
        for record in falls
        for line in record["cells"]
        if (line["tasks"], line["wobble"]) == (tasks, wobble)
    }
    columns = sorted({key[2:] for key in at})
    head = ["items", f"curve; {tasks} tasks, wobble {wobble:g}"]
    head += [f"{rows} rows, {looks} looks" for rows, looks in columns]
    lines = [row(head), "|" + "---|" * len(head)]
    for named in dict.fromkeys(key[:2] for key in at):
        cells = (at.get((*named, *column)) for column in columns)
        lines.append(row([*named, *(seen_cell(line) if line else "" for line in cells)]))
    return "\n".join(lines) if at else ""


def full(found: list[Mapping[str, Any]], cell: Callable[[Line], str]) -> str:
    """A line per pass, looks a stage and wobble; a column per number of tasks."""
    cells = [line for record in found for line in record["cells"]]
    tasks, looks = (sorted({int(line[name]) for line in cells}) for name in ("tasks", "looks"))
    wobbles = sorted({line["wobble"] for line in cells})
    head = ["curve", "rows", "looks a stage", "wobble", *(f"{n} task{'s' if n > 1 else ''}" for n in tasks)]
    lines = [row(head), "|" + "---|" * len(head)]
    for record in found:
        at = {(line["tasks"], line["looks"], line["wobble"]): line for line in record["cells"]}
        for k in looks:
            for wobble in wobbles:
                start = [record["shape"]["curve"], record["shape"]["rows"], k, f"{wobble:g}"]
                lines.append(row([*start, *(cell(at[n, k, wobble]) for n in tasks)]))
    return "\n".join(lines)


def noise_cell(line: Line) -> str:
    return f"{line['run']:.3f} / {line['stage']:.3f}" + (" (!)" if above(line) else "")


def seen_cell(line: Line) -> str:
    return f"{line['first']:.2f} / {line['after']:.0f}" if line["after"] >= 0 else f"{line['first']:.2f}"


def row(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
