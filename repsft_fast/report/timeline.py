"""timeline.json: every evaluation, decision, snapshot and revert of a mixture's run, in order, and which were kept.

Made from metrics.jsonl and result.json alone, so that it can be made again at any time, for a killed run too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repsft_fast.errors import RepsftError, describe
from repsft_fast.report.picture import read_metrics
from repsft_fast.report.result import FILE as RESULT_FILE

FILE = "timeline.json"
DECISIONS = ("stage", "roll_back", "decision", "decay")
_NOT_NEEDED = ("kind", "update")


def build(folder: Path | str) -> dict[str, Any]:
    """The timeline as JSON. Raises RepsftError for a folder without a mixture's evaluations.

    evaluations  scores of every task (null: undefined), their standard errors, the pooled score; `branch` is "kept" on the
                 way to where the run ended, "discarded" where a later stage began before them
    decisions    in words and figures; a `roll_back` names the moment gone back to and the task that left
    `epoch` counts epochs of the active mixture along the branch; `done` counts updates, discarded ones too.
    """
    folder = Path(folder)
    records = read_metrics(folder)
    evaluations = [_plain(r) for r in records if r.get("kind") == "evaluation" and "moment" in r]
    if not evaluations:
        wrong = "holds no evaluation of tasks"
        raise RepsftError(describe(str(folder / "metrics.jsonl"), wrong, todo="is it a mixture's run?"))
    stages = [_plain(r) for r in records if r.get("kind") == "stage"]
    kept = kept_moments(evaluations, stages, _ended_at(records))
    for evaluation in evaluations:
        evaluation["branch"] = "kept" if evaluation["moment"] in kept else "discarded"
    result = _result(folder)
    more = result.get("more") or {}
    return {
        "tasks": list(evaluations[0]["scores"]),
        "evaluations": evaluations,
        "stages": stages,
        "decisions": [{"kind": r["kind"], **_plain(r)} for r in records if r.get("kind") in DECISIONS],
        "snapshots": [_plain(r) for r in records if r.get("kind") == "snapshot"],
        "reverts": [_plain(r) for r in records if r.get("kind") == "revert"],
        "result": {
            "moment": more.get("moment"),
            "reason": result.get("reason"),
            "test": more.get("test"),
            "account": more.get("account"),
        },
    }


def _ended_at(records: Sequence[Mapping[str, Any]]) -> str | None:
    """The moment gone back to after which no stage began any more."""
    moves = [r for r in records if r.get("kind") in ("stage", "roll_back")]
    return moves[-1]["to"] if moves and moves[-1]["kind"] == "roll_back" else None


def kept_moments(
    evaluations: Sequence[Mapping[str, Any]], stages: Sequence[Mapping[str, Any]], ended_at: str | None = None
) -> set[str]:
    """Moments on the way from the base to where the run ended: each stage up to the moment the next one began at.

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
    if start == ended_at is not None:
        kept = set()
    while start is not None and start in home:
        stage = home[start]
        line = by_stage[stage]
        kept |= set(line[: line.index(start) + 1])
        start = starts.get(stage)
    return kept


def write(folder: Path | str) -> Path:
    """timeline.json into the run's folder, whole or not at all."""
    path = Path(folder) / FILE
    part = path.with_name(f".{FILE}.part")
    part.write_text(json.dumps(build(folder), indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)
    return path


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in _NOT_NEEDED}


def _result(folder: Path) -> dict[str, Any]:
    try:
        value = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
