"""How every task of a mixture stands: score, best, where its best is kept, active, excluded or not started."""

from __future__ import annotations

import math
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
        lost = lost_since(history, name)
        state = "excluded" if name not in active else "active"
        if not scored:
            if lost is None:
                state = "active, no scores yet" if not history.evaluations else "no validation rows"
            tasks[name] = {"score": None, "best": None, "state": state if lost is None else f"{state}, {_since(lost)}"}
            continue
        best, at = max(scored, key=lambda pair: pair[0])  # the first of equals
        first = scored[0][0]
        if lost is not None:
            state = f"{state}, {_since(lost)}"
        elif state == "active" and best == first and len(scored) > 1:
            state = "not started"
        tasks[name] = {
            "first": first,
            "score": scored[-1][0] if lost is None else None,
            "best": best,
            "lowest": min(value for value, _ in scored),
            "stage": at.stage,
            "epochs": at.epochs,
            "kept": moments.tier(at.moment_id) if at.moment_id in kept else None,
            "state": state,
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


def lost_since(history: History, task: str) -> int | None:
    """The update from which the task's score is not a number, up to now; None where it is one, or has no rows to be one of."""
    found = None
    for evaluation in reversed(history.evaluations):
        score = evaluation.scores[task]
        if score.defined or not score.n:
            break
        found = evaluation.update
    return found


def said_of_scores(history: History) -> list[str]:
    """What is to be said, once, of the evaluation just made: scores that stopped or began to be numbers, tasks without rows."""
    last, *before = [evaluation.scores for evaluation in reversed(history.evaluations)]
    said = []
    for task, score in last.items():
        was = before[0][task] if before else None
        if not score.n and was is None:
            said.append(f"`{task}` has no validation rows: nothing excludes it, and it counts in no score")
        elif not score.defined and (was is None or was.defined):
            bad = sum(not math.isfinite(item) for item in score.items or ())
            words = f"the score of `{task}` is {_since(history.position.update)} ({bad} of its {score.n} validation rows)"
            words += ": it is neither a best nor a fall"
            said.append(words + ("; no moment can be the result until it is one again" if was is not None else ""))
        elif score.defined and was is not None and was.n and not was.defined:
            said.append(f"the score of `{task}` is a number again at update {history.position.update:,}")
    return said


def _since(update: int) -> str:
    return f"not a number since update {update:,}"
