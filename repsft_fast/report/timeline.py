"""timeline.json: every evaluation, decision, snapshot and revert of a mixture's run, in order, and which were
kept.

Made from metrics.jsonl and result.json alone, so that it can be made again at any time, for a killed run too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repsft_fast.errors import RepsftError, describe
from repsft_fast.report.picture import write_whole
from repsft_fast.report.records import is_number, read_metrics, result_or_nothing
from repsft_fast.report.result import FILE as RESULT_FILE

FILE = "timeline.json"
DECISIONS = ("stage", "roll_back", "decision", "decay")
_NOT_NEEDED = ("kind", "update")


def build(folder: Path | str) -> dict[str, Any]:
    """The timeline as JSON. Raises RepsftError for a folder without a mixture's evaluations.

    evaluations  scores of every task (null: undefined), their standard errors, the pooled score; `branch` is
                 "kept" on the way to where the run ended, "discarded" where a later stage began before them
    decisions    in words and figures; a `roll_back` names the moment gone back to and the task that left
    `epoch` counts epochs of the active mixture along the branch; `done` counts updates, discarded ones too.
    """
    # A file changed by hand must not end in a traceback: what is not whole is left out and counted.
    folder = Path(folder)
    found = read_metrics(folder)
    found.keep(_is_whole)
    records = found.records

    # A run without a mixture validates too; only a mixture's evaluations name where they can be gone back to.
    evaluations = [_plain(r) for r in records if r.get("kind") == "evaluation" and "moment" in r]
    tasks = list(dict.fromkeys(task for evaluation in evaluations for task in evaluation["scores"]))
    if not tasks:
        wrong = "holds no evaluation of tasks"
        raise RepsftError(describe(str(folder / "metrics.jsonl"), wrong, todo="is it a mixture's run?"))
    # Which branch is which is known at the end alone: by where the later stages began.
    stages = [_plain(r) for r in records if r.get("kind") == "stage"]
    kept = kept_moments(evaluations, stages, _ended_at(records))
    for evaluation in evaluations:
        evaluation["branch"] = "kept" if evaluation["moment"] in kept else "discarded"
    # A run that is under way has no result yet.
    result = result_or_nothing(folder / RESULT_FILE)
    more = result["more"] if isinstance(result.get("more"), dict) else {}
    return {
        **({"left_out": found.words} if found.words else {}),
        "tasks": tasks,
        "evaluations": evaluations,
        "stages": stages,
        "decisions": [{"kind": r["kind"], **_plain(r)} for r in records if r.get("kind") in DECISIONS],
        "snapshots": [_plain(r) for r in records if r.get("kind") == "snapshot"],
        "reverts": [_plain(r) for r in records if r.get("kind") == "revert"],
        "result": {
            "moment": more.get("moment"),
            "reason": result.get("reason"),
            "test": _finite(more.get("test")),
            "account": _finite(more.get("account")),
            "headroom": _headroom(more.get("mixture")),
        },
    }


def _ended_at(records: Sequence[Mapping[str, Any]]) -> str | None:
    """The moment gone back to after which no stage began any more."""
    moves = [r for r in records if r.get("kind") in ("stage", "roll_back")]
    return moves[-1]["to"] if moves and moves[-1]["kind"] == "roll_back" else None


def kept_moments(
    evaluations: Sequence[Mapping[str, Any]], stages: Sequence[Mapping[str, Any]], ended_at: str | None = None
) -> set[str]:
    """Moments on the way from the base to where the run ended: each stage up to the moment the next one began
    at.

    ended_at: the moment the last stage was taken back to, if it was.
    """
    by_stage: dict[int, list[str]] = {}
    home: dict[str, int] = {}
    for evaluation in evaluations:
        by_stage.setdefault(evaluation["stage"], []).append(evaluation["moment"])
        home[evaluation["moment"]] = evaluation["stage"]
    starts = {stage["stage"]: stage.get("start") for stage in stages}
    stage = max(by_stage | starts, default=0)
    kept = set(by_stage.get(stage, []))
    start = ended_at if ended_at in home else starts.get(stage)
    if start is not None and start == ended_at:
        kept = set()  # nothing of the last stage
    ways: set[int] = set()
    # a damaged stage may lead round in a ring
    while start is not None and start in home and home[start] not in ways:
        stage = home[start]
        ways.add(stage)
        line = by_stage[stage]
        kept |= set(line[: line.index(start) + 1])
        start = starts.get(stage)
    return kept


def write(folder: Path | str) -> Path:
    """timeline.json into the run's folder, whole or not at all."""
    text = json.dumps(build(folder), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    # half a surrogate pair as JSON spells it
    return write_whole(Path(folder) / FILE, text.encode("utf-8", "backslashreplace"))


def _headroom(mixture: Any) -> dict[str, Any] | None:
    """Of result.json, where it has a value."""
    found = mixture.get("headroom") if isinstance(mixture, dict) else None
    return _finite(found) if isinstance(found, dict) and is_number(found.get("value")) else None


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _finite(value) for name, value in record.items() if name not in _NOT_NEEDED}


def _finite(value: Any) -> Any:
    """The value with null for numbers that JSON cannot write: 1e999 is read as infinite."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_whole(record: Mapping[str, Any]) -> bool:
    """Whether it has what the timeline and its picture are made from; one that was changed by hand or by
    chance may not."""
    kind = record.get("kind")
    if not isinstance(kind, str):
        return False
    if kind == "evaluation" and "moment" in record:
        named = ("scores", "errors") if record.get("errors") is not None else ("scores",)
        return (
            isinstance(record["moment"], str)
            and type(record.get("stage")) is int
            and is_number(record.get("epoch"))
            and is_number(record.get("done"))
            and (record.get("pooled") is None or is_number(record["pooled"]))
            and all(_is_figures(record.get(name)) for name in named)
        )
    if kind == "stage":
        active, start, weights = record.get("active"), record.get("start"), record.get("weights")
        return (
            type(record.get("stage")) is int
            and is_number(record.get("epoch"))
            and isinstance(active, list)
            and all(isinstance(task, str) for task in active)
            and (start is None or isinstance(start, str))
            and (weights is None or _is_figures(weights))
        )
    if kind == "roll_back":
        texts = isinstance(record.get("to"), str) and isinstance(record.get("drop"), str | None)
        return texts and is_number(record.get("epoch")) and is_number(record.get("done"))
    return True


def _is_figures(value: Any) -> bool:
    """{name: number or null}"""
    return isinstance(value, dict) and all(one is None or is_number(one) for one in value.values())
