"""How every task of a mixture stands: score, best, where its best is kept, active, excluded or not started."""

from __future__ import annotations

from typing import Any

from repsft_fast.config.sections import Mixture
from repsft_fast.policies.decisions import RollBack
from repsft_fast.policies.history import History
from repsft_fast.policies.statistics import pooled
from repsft_fast.training.moments import Moments


def standing(history: History, moments: Moments, mixture: Mixture) -> dict[str, Any]:
    """For the live view and the result, as JSON. Scores are higher-is-better: a loss appears negated."""
    kept = set(moments.names())
    gone = {t.decision.drop for t in history.decisions if isinstance(t.decision, RollBack) and history.stages
            and t.stage == history.stage.number}  # fmt: skip
    active = history.active - gone
    tasks: dict[str, dict[str, Any]] = {}
    for name in history.tasks:
        scored = [(e.scores[name].value, e) for e in history.evaluations if e.scores[name].defined]
        if not scored:
            state = "active, no scores yet" if not history.evaluations else "no validation rows"
            tasks[name] = {"score": None, "best": None, "state": state}
            continue
        best, at = max(scored, key=lambda pair: pair[0])  # the first of equals
        first = scored[0][0]
        started = best > first or len(scored) == 1
        tasks[name] = {
            "first": first,
            "score": scored[-1][0],
            "best": best,
            "lowest": min(value for value, _ in scored),
            "stage": at.stage,
            "epochs": at.epochs,
            "kept": moments.tier(at.moment_id) if at.moment_id in kept else None,
            "state": "excluded" if name not in active else "active" if started else "not started",
        }
    top = history.best()
    return {
        "stage": history.stage.number if history.stages else 0,
        "policy": mixture.policy,
        "metric": mixture.metric,
        "tasks": tasks,
        "best": None
        if top is None
        else {"moment": top.moment_id, "pooled": pooled(top.scores, history.measured_tasks()), "epochs": top.epochs},
    }
