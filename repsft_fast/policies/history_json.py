"""The policy's table as strict JSON and back: the form it has in checkpoints, which later versions must read.

Numbers that are not finite are null in it. A decision's own form is `decisions.to_json`.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from repsft_fast.policies.decisions import from_json, to_json
from repsft_fast.policies.records import Epoch, Evaluation, Position, Probed, Stage, Taken
from repsft_fast.policies.statistics import Score

_SNAPSHOT = "moment_id"  # the key of `Evaluation.snapshot_id` in checkpoints, as the first versions wrote it


def dump(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The whole table; fields: of a History, as `parse` gives them back."""
    return {
        "tasks": dict(fields["tasks"]),
        "stages": [asdict(s) for s in fields["stages"]],
        "evaluations": [_dump_evaluation(e) for e in fields["evaluations"]],
        "epochs": [_dump_epoch(e) for e in fields["epochs"]],
        "probes": [_dump_probe(p) for p in fields["probes"]],
        "decisions": [{**asdict(t), "decision": to_json(t.decision)} for t in fields["decisions"]],
        "position": asdict(fields["position"]),
        "clock": fields["clock"],
        "here": fields["here"],
    }


def parse(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the History that was dumped. Raises TrainingError for an unknown decision."""
    return {
        "tasks": dict(values["tasks"]),
        "stages": [Stage(**{**s, "active": tuple(s["active"])}) for s in values["stages"]],
        "evaluations": [_parse_evaluation(e) for e in values["evaluations"]],
        "epochs": [_parse_epoch(e) for e in values["epochs"]],
        "probes": [_parse_probe(p) for p in values["probes"]],
        "decisions": [Taken(**{**t, "decision": from_json(t["decision"])}) for t in values["decisions"]],
        "position": Position(**values["position"]),
        "clock": values["clock"],
        "here": values["here"],
    }


def _dump_evaluation(evaluation: Evaluation) -> dict[str, Any]:
    scores = {
        task: {"value": _finite(s.value), "n": s.n, "items": _pack_items(s)}
        for task, s in evaluation.scores.items()
    }
    return {
        "stage": evaluation.stage,
        _SNAPSHOT: evaluation.snapshot_id,
        "update": evaluation.update,
        "epochs": evaluation.epochs,
        "scores": scores,
    }


def _parse_evaluation(e: Mapping[str, Any]) -> Evaluation:
    scores = {
        task: Score(_or_nan(s["value"]), s["n"], _unpack_items(s["items"])) for task, s in e["scores"].items()
    }
    return Evaluation(e["stage"], e[_SNAPSHOT], e["update"], e["epochs"], scores)


def _dump_epoch(e: Epoch) -> dict[str, Any]:
    values = {**asdict(e), "losses": _pack_losses(e.losses)}
    return values if e.own is not None else {name: v for name, v in values.items() if name != "own"}


def _parse_epoch(e: Mapping[str, Any]) -> Epoch:
    tokens = {task: (int(c), int(n)) for task, (c, n) in e["tokens"].items()}
    losses = None if e["losses"] is None else {int(i): _or_nan(loss) for i, loss in e["losses"]}
    own = None if e.get("own") is None else (int(e["own"][0]), int(e["own"][1]))
    return Epoch(**{**e, "tokens": tokens, "losses": losses, "own": own})


def _dump_probe(p: Probed) -> dict[str, Any]:
    losses = {task: [_finite(x) for x in pair] for task, pair in p.losses.items()}
    return {**asdict(p), "losses": losses}


def _parse_probe(p: Mapping[str, Any]) -> Probed:
    pairs = {task: (_or_nan(before), _or_nan(after)) for task, (before, after) in p["losses"].items()}
    return Probed(**{**p, "losses": pairs})


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _or_nan(x: float | None) -> float:
    return math.nan if x is None else x


def _pack_losses(losses: Mapping[int, float] | None) -> list[list[float | None]] | None:
    return None if losses is None else [[i, _finite(loss)] for i, loss in losses.items()]


def _pack_items(score: Score) -> str | list[float | None] | None:
    """0/1 items as a string of digits: a tenth of the JSON."""
    if score.items is None or not score.is_binary:
        return None if score.items is None else [_finite(item) for item in score.items]
    return "".join("1" if item else "0" for item in score.items)


def _unpack_items(packed: str | list[float | None] | None) -> tuple[float, ...] | None:
    return None if packed is None else tuple(float(i) if isinstance(i, str) else _or_nan(i) for i in packed)
