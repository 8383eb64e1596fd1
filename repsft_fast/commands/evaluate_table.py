"""The table of `repsft eval`: a line a task and model, differences below it, and what the figures mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from repsft_fast.evaluate.scores import difference, pooled
from repsft_fast.report.format import MISSING, count, number
from repsft_fast.report.visible import aligned, one_line
from repsft_fast.suite.results import TaskResult, interval_words

MODEL, BASE = "model", "base"
HEADS = (
    "task", "model", "problems", "Acc@n", "Pass@n", "ended", "Acc if ended", "no answer", "tokens", "entropy",
)  # fmt: skip
ROW_HEADS = (
    "rows",
    "model",
    "samples",
    "loss",
    "token accuracy",
    "entropy",
    "top-1",
    "margin",
    "exact match",
)
_OF_ROWS = ("loss", "token_accuracy", "entropy", "top1_probability", "margin", "exact_match")

Found = Mapping[str, Sequence[TaskResult]]  # of every model its tasks, in one order


def lines_of(results: Found, rows: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """Everything that is printed, line by line. rows: of every model, what it made of rows; None: of none."""
    said: list[str] = []
    if any(results.values()):
        said += [*aligned(_table(results)), "", *_differences(results), *_meaning(results)]
    scored = {name: found for name, found in rows.items() if found is not None}
    if scored:
        said += [*([""] if said else []), *aligned(_table_of_rows(scored))]
    return said


def _table(results: Found) -> list[list[str]]:
    several = len(results) > 1
    table = [[head for head in HEADS if several or head != "model"]]
    for found in zip(*results.values(), strict=True):
        for name, result in zip(results, found, strict=True):
            cells = _cells(result)
            table.append([one_line(result.task.name), *([name] if several else []), *cells])
    for name, of_model in results.items():
        told = {
            one.task.name: one.scores for one in of_model if one.scores is not None and one.choices is None
        }
        if len(told) > 1:
            means = pooled(told)
            ended, given = (interval_words(means[n], interval=False) for n in ("ended", "acc_given_end"))
            cells = ["", interval_words(means["acc"]), "", ended, given, "", "", ""]
            table.append(["mean over tasks", *([name] if several else []), *cells])
    return table


def _cells(result: TaskResult) -> list[str]:
    """Of one task of one model, from `problems` on."""
    scores = result.scores
    if scores is None:
        return [MISSING] * 8
    problems, acc = count(scores.problems), interval_words(scores.acc)
    if result.choices is not None:
        return [problems, f"{acc} by likelihood", "", "", "", "", "", ""]
    replies = scores.problems * scores.n
    return [
        f"{problems} × {scores.n}" if scores.n > 1 else problems,
        acc,
        interval_words(scores.pass_at[scores.n], interval=False) if scores.n > 1 else "",
        interval_words(scores.ended, interval=False),
        interval_words(scores.acc_given_end, interval=False),
        f"{100 * scores.no_answer / replies:.0f} %",
        count(scores.lengths.mean),
        number(scores.entropy.value),
    ]


def _differences(results: Found) -> list[str]:
    if BASE not in results:
        return []
    said = []
    for mine, theirs in zip(results[MODEL], results[BASE], strict=True):
        found = difference(theirs.problems, mine.problems)
        value, low, high = (
            None if one is None else 100 * one for one in (found.value, found.low, found.high)
        )
        between = "" if low is None or high is None else f" ({low:+.1f} to {high:+.1f})"
        said.append(f"{one_line(mine.task.name)}: model − base {value or 0.0:+.1f} points{between}")
    return [*said, ""]


def _meaning(results: Found) -> list[str]:
    """What the table means, and what it does not."""
    found = [one for of_model in results.values() for one in of_model if one.scores is not None]
    said = ["in brackets: 95 % intervals over problems"]
    late = sum(one.scores.right_without_end for one in found if one.scores is not None)
    if late:
        said.append(f"{late} right answers are in replies that did not end by themselves; Acc@n counts them")
    if undecided := sum(len(one.undecided) for one in found):
        where = "counted as not right, listed in results.json"
        said.append(f"{undecided} pairs of answers could not be decided: {where}")
    if any(one.scores is not None and one.scores.problems == 1 for one in found):
        said.append("a task of one problem has no interval")
    return said


def harness_lines(found: Mapping[str, Any], model: str) -> list[str]:
    """A line for every figure of lm-eval's own tasks. found: by our names what it said."""
    lines = []
    for name, said in found.items():
        for task, line in said["tasks"].items():
            for metric, figure in line["metrics"].items():
                value, error = figure["value"], figure["stderr"]
                spread = "" if error is None else f" ± {number(error)} (standard error)"
                words = f"{name}{f' {model}' if model else ''}: lm-eval {said['lm_eval']} {task} {metric}"
                lines.append(one_line(f"{words} {number(value)}{spread}"))
    return ["", *lines] if lines else []


def _table_of_rows(rows: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    several = len(rows) > 1
    table = [[head for head in ROW_HEADS if several or head != "model"]]
    tasks = next(iter(rows.values())).get("tasks", {})
    for task in (None, *tasks):
        for name, found in rows.items():
            line = found if task is None else found["tasks"][task]
            samples = count(found["samples"]) if task is None else ""
            cells = [number(line.get(figure), 4) for figure in _OF_ROWS]
            table.append([one_line(task or "all"), *([name] if several else []), samples, *cells])
    return table
