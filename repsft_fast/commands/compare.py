"""`repsft compare RUN…`: one table over finished runs, a line for every arm."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from repsft_fast.errors import ConfigError, describe
from repsft_fast.report import compare as arithmetic
from repsft_fast.report import finished, visible
from repsft_fast.report.compare import Interval, Line
from repsft_fast.report.format import MISSING, count, number
from repsft_fast.report.visible import aligned, columns, one_line


def compare(
    runs: Sequence[str],
    *,
    baseline: str | None = None,
    by: str | None = None,
    names: str | None = None,
    metric: str | None = None,
    pool: str | None = None,
    markdown: bool = False,
    as_json: bool = False,
) -> None:
    """Print the table of these runs. Raises ConfigError, every problem at once, and prints nothing then."""
    _check_words(metric, pool, markdown and as_json)
    scored, lines = compared(runs, baseline=baseline, by=by, names=names, metric=metric, pool=pool)
    console = visible.console()
    if as_json:
        found = {
            "metric": scored.metric,
            "rows": "test" if scored.test else "validation",
            "pool": scored.pool,
            "baseline": lines[0].arm.name,
            "arms": arithmetic.as_json(lines),
        }
        visible.show(console, json.dumps(found, indent=2, allow_nan=False))
        return
    table = cells(lines, scored)
    if markdown:
        text = _markdown(table)
    else:
        text = _plain(table, console.width if console.is_terminal else None)
    for line in [*text, "", *_said(lines, scored)]:
        visible.show(console, line)


def compared(
    runs: Sequence[str],
    *,
    baseline: str | None = None,
    by: str | None = None,
    names: str | None = None,
    metric: str | None = None,
    pool: str | None = None,
) -> tuple[finished.Scored, list[Line]]:
    """How the runs were scored, and the table's lines, the baseline first."""
    problems: list[str] = []
    folders = []
    for path in _once(runs, problems):
        try:
            folders.append(finished.read(path))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    if not folders:
        raise ConfigError(describe("compare", "no run is given", todo="repsft compare RUN RUN…"))
    how = folders[0].scored(metric, pool)
    read = []
    for folder in folders:
        own = folder.scored(metric, pool)
        if (own.metric, own.pool) != (how.metric, how.pool):
            wrong = "was decided by another measure than the runs before it"
            expected, got = how.words, own.words
            todo = "say which is compared, with --metric and --pool"
            problems.append(describe(folder.folder, wrong, expected=expected, got=got, todo=todo))
            continue
        try:
            read.append(finished.finished(folder, how))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    arms = arithmetic.arms_of(read, _listed(by), _listed(names))
    return how, arithmetic.lines_of(arms, baseline)


def _once(runs: Sequence[str], problems: list[str]) -> list[Path]:
    """The runs' folders, each once however often it was named, in the order in which they were."""
    found: dict[Path, Path] = {}
    for run in runs:
        try:
            for folder in finished.runs_below(Path(run)):
                found.setdefault(folder.resolve(), folder)
        except ConfigError as error:
            problems += error.problems
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            problems.append(describe(run, f"cannot be read ({why})"))
    return list(found.values())


def _check_words(metric: str | None, pool: str | None, two_forms: bool) -> None:
    problems = [
        describe(flag, "cannot be used", expected=f"one of {', '.join(known)}", got=given)
        for flag, given, known in (("--metric", metric, finished.METRICS), ("--pool", pool, finished.POOLS))
        if given is not None and given not in known
    ]
    if two_forms:
        problems.append(describe("--markdown", "cannot stand beside --json", todo="choose one of them"))
    if problems:
        raise ConfigError(problems)


def _listed(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",")]


# The table ------------------------------------------------------------------------------------------------


def cells(lines: Sequence[Line], scored: finished.Scored) -> list[list[str]]:
    """The table as text, its heads first. Names are data: what could not be seen is spelled."""
    known = {what: any(line.arm.mean(what) is not None for line in lines) for what in ("gross", "net")}
    heads = ["arm", "seeds", scored.words]
    heads += ["minus the baseline"] if len(lines) > 1 else []
    heads += ["tokens", *(f"FLOPs {what}" for what, is_there in known.items() if is_there)]
    table = [heads]
    for line in lines:
        row = [one_line(line.arm.name), str(len(line.arm.runs)), _spread(line.score)]
        if len(lines) > 1:
            row.append(_difference(line))
        row.append(count(line.arm.mean("tokens")))
        row += [number(line.arm.mean(what)) for what, is_there in known.items() if is_there]
        table.append(row)
    return table


def _difference(line: Line) -> str:
    if line.difference is None:
        return ""
    fewer = len(line.common) < len(line.arm.runs)
    return _spread(line.difference, "+") + (f" ({len(line.common)} seeds)" if fewer else "")


def _spread(found: Interval, sign: str = "") -> str:
    middle, half = found
    return f"{middle:{sign}.3f}" + (f" ± {half:.3f}" if math.isfinite(half) else "")


def _markdown(table: list[list[str]]) -> list[str]:
    rows = [" | ".join(cell.replace("\\", "\\\\").replace("|", "\\|") for cell in row) for row in table]
    lines = [f"| {row} |" for row in rows]
    return [lines[0], "|" + "---|" * len(table[0]), *lines[1:]]


def _plain(table: list[list[str]], width: int | None) -> list[str]:
    """Columns side by side; where the terminal is too narrow for that, letters for the names; where it still
    is, an arm's figures below its name."""
    side_by_side = aligned(table)
    if width is None or max(map(columns, side_by_side)) <= width:
        return side_by_side
    letters = [_letters(number) for number in range(len(table) - 1)]
    legend = [f"{letter}  {row[0]}" for letter, row in zip(letters, table[1:], strict=True)]
    short = [table[0], *([letter, *row[1:]] for letter, row in zip(letters, table[1:], strict=True))]
    side_by_side = aligned(short)
    if max(map(columns, side_by_side)) <= width:
        return [*side_by_side, "", *legend]
    text: list[str] = []
    for row in table[1:]:
        text.append(row[0])
        text += [f"  {head}: {cell or MISSING}" for head, cell in zip(table[0][1:], row[1:], strict=True)]
    return text


def _letters(number: int) -> str:
    """A … Z, AA, AB …"""
    text = ""
    while number >= 0:
        text, number = chr(ord("A") + number % 26) + text, number // 26 - 1
    return text


def _said(lines: Sequence[Line], scored: finished.Scored) -> list[str]:
    """What the table means, and what it does not."""
    said = [f"baseline: {one_line(lines[0].arm.name)}"] if len(lines) > 1 else []
    if any(len(line.arm.runs) > 1 for line in lines):
        said.append("± is Student's 95 % interval over seeds; differences are taken seed by seed")
    else:
        said.append("one seed an arm: nothing says how far these figures would move with another")
    if not scored.test:
        said.append("the validation rows also chose the result: their scores are too high")
    if any(line.arm.mean("gross") is not None for line in lines):
        said.append("FLOPs gross: training, evaluation and what was discarded; net: what the result has seen")
    return said
