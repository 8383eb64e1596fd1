"""run.png of a mixture: how all tasks did together, who was trained when, and every task's own curve.

The axis counts epochs of the active mixture along the branch, so a roll-back is a step to the left: what was
thrown away runs on in grey, and the branch that was kept goes on in colour from the peak. Reads timeline data
only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repsft_fast.report import timeline
from repsft_fast.report.format import count, duration, number, percent
from repsft_fast.report.live_mixture import headroom_line
from repsft_fast.report.picture import FAINT, GRID, INK, drawing, new_figure, save, say_damage
from repsft_fast.report.records import is_number, result_or_nothing, setting
from repsft_fast.report.result import FILE as RESULT_FILE
from repsft_fast.report.visible import one_line

KEPT, GONE, LEFT, BEST = "#0b6e99", "#c9ced4", "#bc6c25", "#1a7f37"
COLUMNS, MOST_TASKS, MOST_LISTED = 4, 24, 60
Points = list[tuple[float, float]]


def draw(folder: Path | str) -> Path:
    """Draws run.png into the run's folder and returns its path. Raises RepsftError when there is nothing to
    draw."""
    folder = Path(folder)
    data = timeline.build(folder)
    metric = str(setting(folder, "mixture", "metric") or "exact_match")
    with drawing():
        return save(_figure_of(folder, data, metric), folder)


def _figure_of(folder: Path, data: Mapping[str, Any], metric: str) -> Any:
    # The panels' number decides the height: a picture of three tasks is not one of thirty.
    tasks = data["tasks"]
    shown = tasks[:MOST_TASKS]
    columns = _columns(len(shown))
    lines = math.ceil(len(shown) / columns)
    top_height, height = 1.1 + max(2.2, 0.24 * min(len(tasks), MOST_LISTED)), 1.9

    # Two figures in one: their panels have different heights, which one grid cannot give them.
    figure = new_figure(11, top_height + height * lines + 0.5)
    halves: Any = figure.subfigures(2, 1, height_ratios=(top_height, height * lines))
    top, below = halves
    left, right = top.subplots(1, 2, width_ratios=(1.15, 1))
    paths = _paths(data)
    _pooled(left, data, paths, metric)
    _who(right, data)

    # Every task on its own axes: scores of different tasks share no scale. Places left over stay empty.
    words = (
        "each task by itself · grey: thrown away · dashed: left the mixture, still evaluated · band: ± 1"
        " standard error"
    )
    for line in headroom_line(data["result"].get("headroom")):
        words += f"\n{line} · ring: a task's own best, dotted: the best for all, smoothed"
    below.suptitle(words, fontsize=9, color=FAINT, x=0.01, ha="left")
    # Places that no task fills are hidden, and the lowest panel of each column says the unit.
    panels = below.subplots(lines, columns, squeeze=False, sharex=True)
    for axes, task in zip(panels.flat, shown, strict=False):
        _task(axes, task, data, paths, metric)
    for axes in panels.flat[len(shown) :]:
        axes.set_visible(False)

    # The panels share their axis, which matplotlib labels in the last line only, empty or not.
    for column in range(columns):
        last = max((i for i in range(len(shown)) if i % columns == column), default=None)
        if last is not None:
            panels.flat[last].set_xlabel("epochs", fontsize=9, color=INK)
            panels.flat[last].tick_params(labelbottom=True)
    more = "" if len(shown) == len(tasks) else f" · the first {len(shown)} of {len(tasks)} tasks"
    figure.suptitle(
        one_line(_title(folder, data)) + more, fontsize=11, color=INK, x=0.01, ha="left", parse_math=False
    )
    say_damage(figure, data.get("left_out", ""))
    return figure


def _columns(tasks: int) -> int:
    """Of three or four columns those that leave fewer places empty."""
    return min(tasks, min((COLUMNS, COLUMNS - 1), key=lambda n: (-tasks % n, -n))) if tasks else 1


def _paths(data: Mapping[str, Any]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """("kept" | "discarded", evaluations in a row) of every stretch, each beginning at the moment it left
    from."""
    by_moment = {e["moment"]: e for e in data["evaluations"]}
    starts = {stage["stage"]: stage.get("start") for stage in data["stages"]}
    found: list[tuple[str, list[Mapping[str, Any]]]] = []
    for stage in sorted({e["stage"] for e in data["evaluations"]} | set(starts)):
        line = [e for e in data["evaluations"] if e["stage"] == stage]
        origin = by_moment.get(starts.get(stage))
        if origin is not None:
            line = [origin, *line]
        kept = [e for i, e in enumerate(line) if e["branch"] == "kept" or (i == 0 and origin is not None)]
        # Kept ones come first: a stage is left at one moment, and all after it is gone.
        own_kept = [e for e in kept if e is not origin]
        if own_kept or (origin is None and kept):
            found.append(("kept", kept))
        gone = [e for e in line if e["branch"] == "discarded" and e is not origin]
        if gone:
            before = own_kept[-1:] or ([origin] if origin is not None else kept[-1:])
            found.append(("discarded", [*before, *gone]))
    return found


def _points(line: Sequence[Mapping[str, Any]], value: Any) -> Points:
    return [(e["epoch"], y) for e in line if (y := value(e)) is not None]


def _pooled(axes: Any, data: Mapping[str, Any], paths: Any, metric: str) -> None:
    _style(axes, f"all tasks together: {_name(metric)}", metric)
    for branch, line in paths:
        points = _points(line, lambda e: _shown(e.get("pooled"), metric))
        if points:
            axes.plot(*zip(*points, strict=True), **_pen(branch, 2.0))
    result = next((e for e in data["evaluations"] if e["moment"] == data["result"]["moment"]), None)
    y = _shown(result.get("pooled"), metric) if result else None
    for branch, line in paths:  # where the result lies on a branch that was left, the way to it
        places = [i for i, e in enumerate(line) if result is not None and e["moment"] == result["moment"]]
        if branch == "discarded" and places and places[0] > 0:
            way = _points(line[: places[0] + 1], lambda e: _shown(e.get("pooled"), metric))
            axes.plot(*zip(*way, strict=True), **{**_pen("kept", 2.0), "color": BEST})
    if result is not None and y is not None:
        axes.plot([result["epoch"]], [y], "o", color=BEST, markersize=8, markeredgecolor="white", zorder=5)
        axes.annotate(f"result {_figure(y, metric)}", (result["epoch"], y), xytext=(0, 9),
                      textcoords="offset points", ha="center", fontsize=9, color=BEST,
                      fontweight="bold")  # fmt: skip
        axes.margins(y=0.16)
    _roll_backs(axes, data, lambda e: _shown(e.get("pooled"), metric))
    for branch, word in (("kept", "kept"), ("discarded", "thrown away")):
        axes.plot([], [], label=word, **_pen(branch, 2.0))
    axes.plot([], [], color=LEFT, linewidth=0.9, label="roll-back")
    place = "upper right" if metric == "nll" else "lower right"
    axes.legend(loc=place, fontsize=8, framealpha=1, edgecolor="none", labelcolor=INK)
    axes.set_xlabel("epochs", fontsize=9, color=INK)


def _who(axes: Any, data: Mapping[str, Any]) -> None:
    """A line per task: in colour while it was trained, a thin one after it left."""
    tasks = data["tasks"][:MOST_LISTED]
    rest = (
        "" if len(tasks) == len(data["tasks"]) else f": the first {len(tasks)} of {len(data['tasks'])} tasks"
    )
    axes.set_title(f"who was trained{rest}", loc="left", fontsize=10, color=INK)
    # A stage lasts until its last evaluation on the way that was kept.
    ends: dict[int, float] = {}
    begins: dict[int, float] = {}
    for evaluation in data["evaluations"]:
        if evaluation["branch"] == "kept":
            ends[evaluation["stage"]] = max(ends.get(evaluation["stage"], 0.0), evaluation["epoch"])
    for stage in data["stages"]:
        begins[stage["stage"]] = stage["epoch"]
    last = max(ends.values(), default=1.0)
    for stage in data["stages"]:
        number_, begin = stage["stage"], begins[stage["stage"]]
        end = ends.get(number_, begin)
        for row, task in enumerate(tasks):
            trained = task in stage["active"]
            rehearsed = not trained and (stage.get("weights") or {}).get(task)
            untrained = FAINT if rehearsed else GRID
            axes.plot([begin, end], [row, row], color=KEPT if trained else untrained,
                      linewidth=7 if trained else 3, solid_capstyle="butt", zorder=2)  # fmt: skip

    # Where the fall was seen, which is later than the peak that the line ends at.
    for decision in data["decisions"]:
        if decision["kind"] == "roll_back" and decision.get("drop") in tasks:
            row = tasks.index(decision["drop"])
            axes.plot(
                [decision["epoch"]], [row], marker="x", color=LEFT, markersize=7, markeredgewidth=2, zorder=4
            )
    # A table and no diagram: names for the rows, no frame.
    axes.set_yticks(range(len(tasks)), [_short(task) for task in tasks], parse_math=False)
    axes.set_ylim(len(tasks) - 0.4, -0.6)
    axes.set_xlim(-0.02 * last, last * 1.02 or 1.0)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.grid(True, axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("epochs", fontsize=9, color=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _task(axes: Any, task: str, data: Mapping[str, Any], paths: Any, metric: str) -> None:
    def value(evaluation: Mapping[str, Any]) -> float | None:
        return _shown(evaluation["scores"].get(task), metric)

    # The kept branch is drawn last, above those thrown away; dashed from where the task left the mixture.
    _style(axes, _short(task), metric)
    dropped = next((d for d in data["decisions"] if d["kind"] == "roll_back" and d.get("drop") == task), None)
    left_at = _left_at(task, data)

    # Kept branches last, over the others. After the task has left its curve is what others did to it.
    for branch, line in sorted(paths, key=lambda pair: pair[0] == "kept"):
        points = _points(line, value)
        if not points:
            continue
        if branch == "discarded":
            axes.plot(*zip(*points, strict=True), **_pen(branch, 1.4))
            continue
        before = [p for p in points if left_at is None or p[0] <= left_at + 1e-9]
        after = [p for p in points if left_at is not None and p[0] >= left_at - 1e-9]
        if len(before) > 1 or not after:
            axes.plot(*zip(*before, strict=True), **_pen(branch, 1.8))
        if len(after) > 1:
            axes.plot(
                *zip(*after, strict=True), **{**_pen(branch, 1.2), "linestyle": (0, (3, 2)), "alpha": 0.75}
            )

    # The noise of the score, one standard error each way: without it every wiggle looks like a fall.
    for branch, line in paths:
        band = [
            (e["epoch"], y, s)
            for e in line
            if (y := value(e)) is not None and (s := (e.get("errors") or {}).get(task))
        ]
        if branch == "kept" and len(band) > 1:
            xs, ys, errors = zip(*band, strict=True)
            low, high = ([y + sign * s for y, s in zip(ys, errors, strict=True)] for sign in (-1, 1))
            axes.fill_between(xs, low, high, color=KEPT, alpha=0.10, linewidth=0, zorder=1)
    _own_best(axes, task, data, metric)
    # The moment gone back to is why the task left: it was at its best there.
    if dropped is not None:
        peak = next((e for e in data["evaluations"] if e["moment"] == dropped["to"]), None)
        if peak is not None and (y := value(peak)) is not None:
            axes.plot([peak["epoch"]], [y], "o", color=LEFT, markersize=6, markeredgecolor="white", zorder=5)
            axes.annotate(f"out at {peak['epoch']:.2f}", (peak["epoch"], y), xytext=(0, 6),
                          textcoords="offset points", ha="center", fontsize=8, color=LEFT)  # fmt: skip
            axes.margins(y=0.22)


def _own_best(axes: Any, task: str, data: Mapping[str, Any], metric: str) -> None:
    """A ring at the task's best, smoothed over looks, and a line at the checkpoint that is best for all."""
    found = data["result"].get("headroom") or {}
    by_moment = {e["moment"]: e for e in data["evaluations"]}
    common = by_moment.get(_moment_of(found.get("common")))
    if common is not None:
        axes.axvline(common["epoch"], color=BEST, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    tasks = found.get("tasks")
    room = tasks.get(task) if isinstance(tasks, Mapping) else None
    if not isinstance(room, Mapping) or not is_number(room.get("own_best")):
        return
    at, y = by_moment.get(_moment_of(room.get("at"))), _shown(room["own_best"], metric)
    if at is not None and y is not None:
        axes.plot([at["epoch"]], [y], "o", markersize=5, markerfacecolor="white",
                  markeredgecolor=BEST, markeredgewidth=1.2, zorder=4)  # fmt: skip


def _moment_of(place: Any) -> Any:
    """The moment that a place in result.json names."""
    moment = place.get("moment") if isinstance(place, Mapping) else None
    return moment if isinstance(moment, str) else None


def _left_at(task: str, data: Mapping[str, Any]) -> float | None:
    """Epochs at which the task left for good, by a roll-back or by a stage without it."""
    for before, after in zip(data["stages"], data["stages"][1:], strict=False):
        if task in before["active"] and task not in after["active"]:
            return float(after["epoch"])
    return None


def _roll_backs(axes: Any, data: Mapping[str, Any], value: Any) -> None:
    """Where a branch was left and where it went back to: a thin arrow to the left."""
    by_moment = {e["moment"]: e for e in data["evaluations"]}
    for decision in data["decisions"]:
        if decision["kind"] != "roll_back" or decision["to"] not in by_moment:
            continue
        to = by_moment[decision["to"]]
        gone = [e for e in data["evaluations"] if e["done"] <= decision["done"] and value(e) is not None]
        if not gone or value(to) is None:
            continue
        end = gone[-1]
        arrow = {
            "arrowstyle": "->", "color": LEFT, "linewidth": 0.9, "alpha": 0.8,
            "connectionstyle": "arc3,rad=0.25", "shrinkA": 2, "shrinkB": 3,
        }  # fmt: skip
        there, here = (to["epoch"], value(to)), (end["epoch"], value(end))
        axes.annotate("", there, xytext=here, zorder=3, arrowprops=arrow)


def _pen(branch: str, width: float) -> dict[str, Any]:
    if branch == "kept":
        return {
            "color": KEPT,
            "linewidth": width,
            "zorder": 3,
            "solid_capstyle": "round",
            "solid_joinstyle": "round",
        }
    return {
        "color": GONE,
        "linewidth": width * 0.8,
        "zorder": 2,
        "solid_capstyle": "round",
        "solid_joinstyle": "round",
    }


def _style(axes: Any, title: str, metric: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_title(title, loc="left", fontsize=10, color=INK, parse_math=False)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8, length=0)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    if metric != "nll":
        axes.yaxis.set_major_formatter(FuncFormatter(share_label))
    axes.margins(x=0.03, y=0.08)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)


def share_label(share: float, _place: int | None = None) -> str:
    """A tick's label. An axis round a score that stays 0 reaches below it, where there is no share."""
    return f"{abs(share):.0%}" if share > -1e-9 else ""


def _shown(value: float | None, metric: str) -> float | None:
    """Losses are kept negated; people read them the right way round."""
    if value is None or not math.isfinite(value):
        return None
    return -value if metric == "nll" else value


def _figure(value: float, metric: str) -> str:
    return number(value) if metric == "nll" else percent(value)


def _name(metric: str) -> str:
    names = {
        "nll": "loss",
        "exact_match": "exact match",
        "token_accuracy": "token accuracy",
        "answer": "right answers",
    }
    return names.get(metric, metric)


def _short(task: str) -> str:
    """A task's name as a label: data, in which a $ begins no formula."""
    task = one_line(task)
    return task if len(task) <= 22 else f"{task[:21]}…"


def _title(folder: Path, data: Mapping[str, Any]) -> str:
    result = result_or_nothing(folder / RESULT_FILE)
    facts = [str(result.get("reason", "unfinished run"))]
    account = data["result"].get("account")
    tokens = account.get("tokens") if isinstance(account, dict) else None
    if (
        isinstance(tokens, dict)
        and all(is_number(tokens.get(name)) for name in ("trained", "discarded"))
        and tokens["trained"]
    ):
        share = tokens["discarded"] / tokens["trained"]
        facts.append(f"{count(tokens['trained'])} tokens trained, {percent(share, 0)} gone with roll-backs")
    if is_number(result.get("seconds")):
        facts.append(duration(result["seconds"]))
    title = " · ".join(facts)
    return title if len(title) <= 200 else f"{title[:199]}…"
