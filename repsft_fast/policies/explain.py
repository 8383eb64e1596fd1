"""Decisions in words, for the live line and the timeline."""

import math
from collections.abc import Sized

from repsft_fast.policies.decisions import (
    Continue,
    Decay,
    Decision,
    NewStage,
    Probe,
    Reweight,
    RollBack,
    SkipSamples,
    Stop,
)
from repsft_fast.policies.history import History, shares
from repsft_fast.policies.overfit import looks, wobble_of
from repsft_fast.policies.statistics import difference


def explain(decision: Decision, history: History, *, losses: bool = False) -> str:
    """One line a person understands. Call it after History.took(decision), or just before. losses: scores are
    negated ones."""
    match decision:
        case RollBack():
            return _roll_back(decision, history, losses)
        case NewStage():
            return _new_stage(decision, history)
        case Reweight(weights):
            drawn = sorted(
                shares(history.tasks, weights, weights).items(), key=lambda pair: (-pair[1], pair[0])
            )
            return "new mixture: " + ", ".join(f"`{task}` {share:.1%}" for task, share in drawn)
        case SkipSamples(ids):
            return f"{len(ids)} mastered sample{_s(ids)} skip the backward pass of the next epoch"
        case Probe(tasks):
            return f"looking one update ahead on {len(tasks)} task{_s(tasks)}"
        case Decay(reason=reason, updates=updates):
            return f"{reason}: the learning rate decays" + (
                "" if updates is None else f" over {updates} update{_s(range(updates))}"
            )
        case Stop(reason=reason):
            return f"stopped: {reason}"
        case Continue():
            return "going on"


def _roll_back(decision: RollBack, history: History, losses: bool) -> str:
    # An evaluation that opens a stage repeats its start's: counted once, it is no step.
    to, last = history.evaluation_of(decision.to), history.evaluations[-1]
    ids = list(dict.fromkeys(e.snapshot_id for e in history.evaluations if e.stage >= to.stage))
    steps = ids.index(last.snapshot_id) - ids.index(to.snapshot_id)
    back = f"going back {steps} evaluation{_s(range(steps))}"
    if decision.drop is None:
        return back

    # A loss is scored negated, and told as the loss that people know.
    peak, score = to.scores[decision.drop], last.scores[decision.drop]
    stage = f" of stage {to.stage}" if to.stage else ""
    sign, high, fell, risen = (
        (-1, "was lowest", "rose", "fallen below") if losses else (1, "peaked", "fell", "risen above")
    )

    text = f"`{decision.drop}` {high} at {to.epochs:.2f} epochs{stage} ({sign * peak.value:.3f})"
    if score.defined:
        fall = difference(peak, score)
        # both errors that the rule asks for: of the items, and of the task as a whole
        wobble, _ = wobble_of(looks(history, decision.drop), steps)
        noise = math.hypot(fall.standard_error, math.sqrt(2.0) * wobble)
        error = f" ± {noise:.3f}" if noise < float("inf") else ""
        if fall.mean > 0:
            text += f", {fell} {fall.mean:.3f}{error} since"
        else:
            text += f", has not {risen} it since ({sign * score.value:.3f})"
    return f"{text}: excluded; {back}"


def _new_stage(decision: NewStage, history: History) -> str:
    opened = bool(history.stages) and history.last_decision == decision
    number = len(history.stages) - opened
    text = f"stage {number}: {len(decision.active)} of {len(history.tasks)} tasks active"
    before = history.stages[number - 1].active if number else ()
    left = sorted(set(before) - set(decision.active))
    if left and not any(
        isinstance(t.decision, RollBack) and t.stage == number - 1 for t in history.decisions
    ):
        text += "; " + ", ".join(f"`{task}`" for task in left) + " left"
    rehearsed = sorted(set(decision.weights or ()) - set(decision.active))
    if rehearsed:
        drawn = shares(history.tasks, decision.weights, decision.active)
        share = sum(drawn[task] for task in rehearsed)
        text += f"; {len(rehearsed)} excluded task{_s(rehearsed)} rehearsed ({share:.1%} of the samples)"
    return text


def _s(things: Sized) -> str:
    return "" if len(things) == 1 else "s"
