"""The tasks of a mixture as bars: score, best, where the best is kept, and how the task stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from repsft_fast.report.format import MISSING, number, percent
from repsft_fast.report.records import is_number
from repsft_fast.report.visible import columns, one_line, padded

BAR = 28  # columns, at most
NARROW = 60  # columns; below this only names and scores
COLOURS = {
    "active": "green",
    "excluded": "grey50",
    "rehearsed": "grey50",
    "not started": "yellow",
    "best before training": "yellow",
}
SHARES = ("exact_match", "token_accuracy", "answer")


def score_text(value: float | None, metric: str) -> str:
    """64.1 % for a share, 2.31 for a loss (which the policy sees negated)."""
    if value is None:
        return MISSING
    return percent(value) if metric in SHARES else number(-value, 4)


def filled(task: Mapping[str, Any], metric: str) -> tuple[float, float]:
    """(score, best) as shares of the bar. A loss has no natural ends: from its worst to its best so far."""
    if task.get("score") is None:
        return 0.0, 0.0
    if metric in SHARES:
        return task["score"], task["best"]
    span = task["best"] - task["lowest"]
    if span <= 0:
        return 0.0, 0.0
    return (task["score"] - task["lowest"]) / span, 1.0


def note_of(task: Mapping[str, Any]) -> str:
    """`active`, `excluded, best in device memory`, …"""
    text = str(task["state"])
    if task.get("kept"):
        text += f" · best kept ({task['kept']})"
    return text


def bars(standing: Mapping[str, Any], width: int) -> Any:
    """A rich table, one line per task, at most `width` columns."""
    from rich.table import Table
    from rich.text import Text

    metric = str(standing["metric"])
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    width_of_bar = max(min(BAR, width - min(_longest(standing), 24) - 46), 6)
    for name, task in standing["tasks"].items():
        colour = COLOURS.get(str(task["state"]), "grey50")
        now, best = filled(task, metric)
        name = one_line(name)
        cells = [
            Text(
                name if len(name) <= 24 else f"{name[:23]}…",
                style="bold" if task["state"] == "active" else "dim",
            ),
            Text(f"{score_text(task.get('score'), metric):>7}"),
        ]
        if width >= NARROW:
            cells.insert(1, bar(now, best, width_of_bar, colour))
            cells.append(Text(f"best {score_text(task.get('best'), metric):>7}", style="dim"))
            cells.append(Text(note_of(task), style=colour if task["state"] != "active" else "dim"))
        table.add_row(*cells)
    return table


def bar(now: float, best: float, width: int, colour: str) -> Any:
    """━━━━╸──┃── : the score, and a mark at the best."""
    from rich.text import Text

    full = round(min(max(now, 0.0), 1.0) * width)
    mark = min(round(min(max(best, 0.0), 1.0) * width), width - 1)
    text = Text()
    for column in range(width):
        if column == mark and mark >= full and best > now:
            text.append("┃", style="bold")
        elif column < full:
            text.append("━", style=colour)
        else:
            text.append("─", style="grey35")
    return text


def evaluation_line(record: Mapping[str, Any], metric: str, width: int | None = None) -> str:
    """1.75 epochs  all 61.2 %  boolq 64.1 %  gsm8k 12.0 %. Without the tasks where they do not fit: the bars
    show them."""
    scores = record.get("scores") or {}
    head = f"  {record.get('epoch', 0.0):.2f} epochs  all {score_text(record.get('pooled'), metric)}"
    whole = "  ".join(
        [head, *(f"{one_line(name)} {score_text(score, metric)}" for name, score in scores.items())]
    )
    return whole if width is None or len(whole) <= width else head


def ending(standing: Mapping[str, Any], more: Mapping[str, Any]) -> list[str]:
    """The result, task by task: its score where it was chosen, on the test rows, and how the task's training
    ended.

    more: of result.json. A run that ended without a result shows how its tasks stood.
    """
    mixture = more.get("mixture") or {}
    result, room = mixture.get("result"), headroom_line(mixture.get("headroom"))
    if result is None:
        return [*lines(standing), *room]
    metric, test = str(standing["metric"]), more.get("test") or {}
    tested = test.get("scores") or {}
    where = f"stage {result['stage']}, {result['epochs']:.2f} epochs"
    found = [f"the result ({where}): validation {score_text(result['pooled'], metric)}"]
    if test:
        found[0] += f", test {score_text(test.get('pooled'), metric)}"
    longest = _longest(standing)
    for name, task in standing["tasks"].items():
        figures = [f"validation {score_text(result['tasks'][name]['score'], metric):>7}"]
        figures += [f"test {score_text(tested.get(name), metric):>7}"] if test else []
        found.append(f"    {padded(one_line(name), longest)}  {'  '.join(figures)}  {task['state']}")
    return [*found, *room]


def headroom_line(found: Any) -> list[str]:
    """One line: `an ideal schedule could have won at most 1.7 ± 0.4 points here`; none of a run without a
    value, and of a record that is not whole.

    found: `more.mixture.headroom` of result.json.
    """
    if not isinstance(found, Mapping) or not is_number(found.get("value")):
        return []
    loss = found.get("unit") == "nats"
    figure, unit = (lambda x: f"{x:.2g}", "nats") if loss else (lambda x: f"{100 * x:.1f}", "points")
    half = f" ± {figure(found['interval'])}" if is_number(found.get("interval")) else ""
    text = f"an ideal schedule could have won at most {figure(found['value'])}{half} {unit} here"
    if is_number(found.get("by_chance")):
        text += f" (noise alone shows {figure(found['by_chance'])} or more)"
    return [text]


def lines(standing: Mapping[str, Any]) -> list[str]:
    """The same without a terminal: one line per task."""
    metric = str(standing["metric"])
    longest = _longest(standing)
    return [
        f"    {padded(one_line(name), longest)}  {score_text(task.get('score'), metric):>7}"
        f"  best {score_text(task.get('best'), metric):>7}  {note_of(task)}"
        for name, task in standing["tasks"].items()
    ]


def _longest(standing: Mapping[str, Any]) -> int:
    """Columns of the longest task's name."""
    return max((columns(one_line(name)) for name in standing["tasks"]), default=0)
