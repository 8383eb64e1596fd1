"""What a run came to: how every task of a mixture stands, and the result that is written down."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from repsft_fast.config.sections import Mixture
from repsft_fast.policies.decisions import RollBack
from repsft_fast.policies.headroom import headroom
from repsft_fast.policies.history import History
from repsft_fast.policies.msft import MsftSettings
from repsft_fast.policies.overfit import bound, looks
from repsft_fast.policies.statistics import pooled
from repsft_fast.report.result import RunResult
from repsft_fast.training import graph_choice
from repsft_fast.training.build import versions
from repsft_fast.training.evaluation import finite, standard_error
from repsft_fast.training.parts import Parts
from repsft_fast.training.reporter import Reporter
from repsft_fast.training.snapshots import Snapshots


def standing(history: History, snapshots: Snapshots, mixture: Mixture) -> dict[str, Any]:
    """For the live view and the result, as JSON. Scores are higher-is-better: a loss appears negated."""
    # A roll-back drops its task at once; the stage without it opens with the next decision.
    dropped = {
        taken.decision.drop
        for taken in history.decisions
        if isinstance(taken.decision, RollBack) and history.stages and taken.stage == history.stage.number
    }
    active = history.active - dropped
    best = None
    if (top := history.best(pool=mixture.pool)) is not None:
        score = pooled(top.scores, history.measured_tasks(), mixture.pool)
        best = {"moment": top.snapshot_id, "pooled": score, "epochs": top.epochs}
    return {
        "stage": history.stage.number if history.stages else 0,
        "policy": mixture.policy,
        "metric": mixture.metric,
        "tasks": {
            name: _task_standing(history, snapshots, mixture, name, name in active) for name in history.tasks
        },
        "best": best,
    }


def _task_standing(
    history: History, snapshots: Snapshots, mixture: Mixture, name: str, is_active: bool
) -> dict[str, Any]:
    """One task's line of `standing`."""
    scored = [(e.scores[name].value, e) for e in history.evaluations if e.scores[name].defined]
    lost = nan_since(history, name)
    state = "active" if is_active else "excluded"
    if history.stages and not any(name in stage.active for stage in history.stages):
        state = "only scored" if (mixture.weights or {}).get(name) == 0 else "not trained yet"
    elif not is_active and name in (history.stage.weights or {} if history.stages else {}):
        state = "rehearsed"
    if not scored:
        if lost is None:
            state = "active, no scores yet" if not history.evaluations else "no validation rows"
        else:
            state = f"{state}, {_since(lost)}"
        return {"score": None, "best": None, "state": state}
    best, at = max(scored, key=lambda pair: pair[0])  # the first of equals
    first = scored[0][0]
    if lost is not None:
        state = f"{state}, {_since(lost)}"
    elif is_active and best == first and len(scored) > 1:
        state = _without_a_rise(history, mixture, name)
    return {
        "first": first,
        "score": scored[-1][0] if lost is None else None,
        "best": best,
        "lowest": min(value for value, _ in scored),
        "stage": at.stage,
        "epochs": at.epochs,
        "kept": snapshots.tier(at.snapshot_id) if at.snapshot_id in snapshots.names() else None,
        "state": state,
    }


def _without_a_rise(history: History, mixture: Mixture, name: str) -> str:
    """The state of an active task that has never scored better than before training."""
    first, *_, last = [e.scores[name] for e in history.evaluations if e.scores[name].defined]
    if mixture.metric != "nll" and first.value == 1.0 == last.value:
        return "active"  # it cannot rise
    settings = MsftSettings(
        mixture.rule, mixture.compute_budget, mixture.evaluations_per_epoch, mixture.max_stages
    )
    since = len(looks(history, name)[-1]) - 1
    fallen = bound(history, name, mixture.alpha, settings.looks, mixture.z, since).exceeded(first, last)
    return "best before training" if fallen else "not started"


def nan_since(history: History, task: str) -> int | None:
    """The update from which the task's score is not a number, up to now; None where it is one, or has no rows
    to be one of."""
    found = None
    for evaluation in reversed(history.evaluations):
        score = evaluation.scores[task]
        if score.defined or not score.n:
            break
        found = evaluation.update
    return found


def said_of_scores(history: History) -> list[str]:
    """What is to be said, once, of the evaluation just made: scores that stopped or began to be numbers,
    tasks without rows."""
    last, *before = [evaluation.scores for evaluation in reversed(history.evaluations)]
    said = []
    for task, score in last.items():
        was = before[0][task] if before else None
        if not score.n and was is None:
            said.append(f"`{task}` has no validation rows: nothing excludes it, and it counts in no score")
        elif not score.defined and (was is None or was.defined):
            bad = sum(not math.isfinite(item) for item in score.items or ())
            words = (
                f"the score of `{task}` is {_since(history.position.update)} ({bad} of its {score.n}"
                " validation rows)"
            )
            words += ": it is neither a best nor a fall"
            said.append(
                words + ("; no moment can be the result until it is one again" if was is not None else "")
            )
        elif score.defined and was is not None and was.n and not was.defined:
            said.append(f"the score of `{task}` is a number again at update {history.position.update:,}")
    return said


def _since(update: int) -> str:
    return f"not a number since update {update:,}"


def result_of(
    parts: Parts, reporter: Reporter, code: Any, words: str, last_epoch: Mapping[str, Any], **more: Any
) -> RunResult:
    """The run's result as it is now. code: of report.result; words: why it ended."""
    progress, lasting = parts.progress, parts.lasting
    return RunResult(
        code=code,
        reason=words,
        folder=str(parts.folder),
        updates=progress.updates,
        epochs=round(progress.epochs, 4),
        token_accuracy=lasting.token_accuracy,
        seconds=time.perf_counter() - reporter.started,
        tokens=lasting.all_work.tokens,
        trained_tokens=lasting.all_work.trained,
        seed=parts.config.run.seed,
        loss=last_epoch.get("loss"),
        validation_loss=(lasting.best or {}).get("loss"),
        tasks=last_epoch.get("tasks", {}),
        versions=versions(parts.world.device),
        more={
            "vetoed": lasting.vetoed,
            "spiked": lasting.spiked,
            "read": dict(parts.data.files),
            "dropped": dict(parts.data.dropped),
            "work": lasting.all_work.values(),
            "troubles": list(reporter.troubles),
            **graph_choice.result(parts),
            **more,
        },
    )


def mixture_result(
    history: History, snapshots: Snapshots, mixture: Mixture, snapshot_id: str | None
) -> dict[str, Any]:
    """How the tasks stood at the end, and each task's score in the result, with what it lost since its
    best."""
    stood = standing(history, snapshots, mixture)
    found: dict[str, Any] = {
        "standing": stood,
        "evaluations": len(history.evaluations),
        "stages": len(history.stages),
        "headroom": headroom_result(history, mixture),
    }
    # The last state is the result: its scores are those of the evaluation made there, if one was.
    snapshot_id = snapshot_id or history.here
    if snapshot_id is None:
        return {"mixture": found}
    at = history.evaluation_of(snapshot_id)
    tasks = {}
    for name, score in at.scores.items():
        best = stood["tasks"][name]["best"]
        forgotten = best - score.value if best is not None and score.defined else None
        tasks[name] = {
            "score": finite(score.value),
            "error": standard_error(score),
            "below_its_best": forgotten,
        }
    found["result"] = {
        "moment": snapshot_id,
        "stage": at.stage,
        "epochs": at.epochs,
        "pooled": finite(pooled(at.scores, history.measured_tasks(), mixture.pool)),
        "tasks": tasks,
    }
    return {"mixture": found}


def headroom_result(history: History, mixture: Mixture) -> dict[str, Any]:
    """What an ideal schedule could have won at most, as JSON (`policies.headroom`), or why nobody knows.

    Scores are higher-is-better, as in `standing`. It only reports: whatever goes wrong in it is its reason.
    """
    unit = "nats" if mixture.metric == "nll" else "share"
    try:
        found = headroom(history)
    except Exception as error:
        found = f"it could not be computed: {type(error).__name__}: {error}"
    if isinstance(found, str):
        return {"value": None, "reason": found, "unit": unit}
    return {**found.values(), "unit": unit}
