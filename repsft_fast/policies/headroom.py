"""Head-room: what an ideal schedule could have won at most over the best common checkpoint of a run.

    H = mean over tasks of  S_k(own best of k) − S_k(best common)

S_k is the task's curve smoothed over five looks: the mean of the defined scores at the look and at two on
each side, on one unbroken branch. At a branch's ends there are fewer, at least three: a task that training
only harms is best at the first look, and a whole window around it would not see that. A stage that goes back
begins another branch, at its start's score. *Own best* is the maximum of S_k over all branches, *best common*
the look with the highest mean of S_k over tasks (every task weighs the same), the earliest of equals.

Interval, 95 %, tasks independent: per task the larger of two errors of S_k(own best) − S_k(best common).
Items: the standard error of the paired differences, each item averaged over its looks first. Wobble: by the
weights of the looks, where a look has the variance mean(second difference²) / 6, as in rule "tested"; windows
that share looks cancel there as they do in the items. Student's quantile, with 0.6 degrees of freedom per
second difference, by each task's part of the error.

Both are maxima of noisy curves, so H is too high: "at most". `by_chance` is what flat curves with this wobble
show, a floor, as items that drift slowly show more: the expected maximum of n smoothed looks in their own
standard deviations, about Φ⁻¹(1 − 1/(n − 1)), times (mean of the tasks' deviations − the deviation of their
mean). Figures in docs/policies.md. Standard library only; pure.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from repsft_fast.policies.history import History
from repsft_fast.policies.overfit import DF_PER_DIFFERENCE, branches, wobble_of
from repsft_fast.policies.records import Evaluation
from repsft_fast.policies.statistics import Score
from repsft_fast.policies.student import student_quantile

WINDOW, LEAST = 5, 3  # looks that are averaged, and how few are enough at a branch's ends
TAIL = 0.025  # on each side of the interval

Branch = list[Evaluation]
Place = tuple[int, int]  # (branch, look on it)
Smooth = dict[Place, float]


@dataclass(frozen=True)
class Moment:
    """A look, as `Evaluation` has it: its name, its stage, epochs since the stage's start."""

    moment: str
    stage: int
    epochs: float


@dataclass(frozen=True)
class TaskRoom:
    """One task; smoothed scores, higher is better, in units of the metric."""

    own_best: float
    at: Moment
    in_common: float  # the score at the best common checkpoint
    error: float | None  # of own_best − in_common; None without per-item scores


@dataclass(frozen=True)
class Headroom:
    """In units of the metric, never negative."""

    value: float
    interval: float | None  # half of the 95 % interval; None where a task has no per-item scores
    by_chance: float  # what the wobble of curves without any peak shows: how much of `value` may be nothing
    common: Moment
    tasks: dict[str, TaskRoom]

    def values(self) -> dict[str, Any]:
        """As strict JSON."""
        return asdict(self)


def headroom(history: History) -> Headroom | str:
    """Of a run so far; in words why there is none.

    Tasks without a score take no part, nor those that no stage trains (weight 0): no schedule sets when they
    stop.
    """
    trained = {task for stage in history.stages for task in stage.active}
    return of_branches(branches(history), [t for t in history.measured_tasks() if t in trained])


def of_records(
    looks: Iterable[tuple[str, int, float, Mapping[str, float | None]]],
    starts: Mapping[int, str | None] | None = None,
) -> Headroom | str:
    """Of looks as records of older runs have them, in order: (moment, stage, epochs, {task: score, higher is
    better, or None}). Without items, so without an interval.

    starts: the moment each stage began at, where the run went back; None: an unbroken run.
    """
    found: list[Branch] = []
    by_moment: dict[str, Evaluation] = {}
    tasks: dict[str, None] = {}
    for moment, stage, epochs, scores in looks:
        known = {task: Score(math.nan if s is None else s, 1) for task, s in scores.items()}
        evaluation = Evaluation(stage, moment, 0, epochs, known)
        tasks |= dict.fromkeys(task for task, score in known.items() if score.defined)
        last = found[-1][-1] if found else None
        start = (starts or {}).get(stage)
        went_back = last is not None and stage != last.stage and start not in (None, last.snapshot_id)
        if last is None or went_back:
            found.append([by_moment[start]] if start in by_moment else [])
        found[-1].append(evaluation)
        by_moment[moment] = evaluation
    return of_branches(found, sorted(tasks))


def of_branches(found: Sequence[Branch], tasks: Iterable[str]) -> Headroom | str:
    """Of evaluations in unbroken branches, over these tasks; a score they lack is undefined."""
    curves = {task: [[_value(e, task) for e in branch] for branch in found] for task in tasks}
    smooth = {task: line for task, curve in curves.items() if (line := _smoothed(curve))}
    if not any(len(branch) >= WINDOW for branch in found):
        return f"no unbroken stretch of {WINDOW} evaluations"
    if len(smooth) < 2:
        few = next(iter(smooth), None)
        return f"only `{few}` is trained and scored" if few else "no task has scores to compare"

    # Ties go to the earliest: places come in order, and max keeps the first of equals.
    places = [place for place in next(iter(smooth.values())) if all(place in s for s in smooth.values())]
    if not places:
        return "at no evaluation does every task have a score"
    common = max(places, key=lambda place: math.fsum(line[place] for line in smooth.values()))
    own = {task: max(line, key=line.__getitem__) for task, line in smooth.items()}
    errors, half = _interval(found, curves, own, common)
    rooms = {
        task: TaskRoom(line[own[task]], _moment(found, own[task]), line[common], errors[task])
        for task, line in smooth.items()
    }
    value = math.fsum(room.own_best - room.in_common for room in rooms.values()) / len(rooms)
    chance = _by_chance([wobble_of(curves[task])[0] for task in smooth], len(places))
    return Headroom(value, half, chance, _moment(found, common), rooms)


def _value(evaluation: Evaluation, task: str) -> float:
    score = evaluation.scores.get(task)
    return score.value if score is not None and score.defined else math.nan


def _moment(found: Sequence[Branch], place: Place) -> Moment:
    at = found[place[0]][place[1]]
    return Moment(at.snapshot_id, at.stage, at.epochs)


def _window(values: Sequence[float], at: int) -> list[int]:
    """The looks that are averaged at one: those with a score among it and two on each side."""
    reach = WINDOW // 2
    return [i for i in range(max(0, at - reach), min(len(values), at + reach + 1)) if values[i] == values[i]]


def _smoothed(curve: Sequence[Sequence[float]]) -> Smooth:
    """S_k wherever the task has a score and enough of them around it."""
    found: Smooth = {}
    for number, values in enumerate(curve):
        for at, value in enumerate(values):
            looks = _window(values, at)
            if value == value and len(looks) >= LEAST:
                found[number, at] = math.fsum(values[i] for i in looks) / len(looks)
    return found


def _interval(
    found: Sequence[Branch], curves: Mapping[str, Sequence[Sequence[float]]],
    own: Mapping[str, Place], common: Place,
) -> tuple[dict[str, float | None], float | None]:  # fmt: skip
    """Every task's error, and half of the interval of their mean; None where it cannot be known."""
    errors: dict[str, float | None] = {}
    df: dict[str, float] = {}
    for task, place in own.items():
        wobble, measured_on = wobble_of([list(values) for values in curves[task]])
        df[task] = DF_PER_DIFFERENCE * measured_on
        windows = [(number, _window(curves[task][number], at)) for number, at in (place, common)]
        items = _item_error(*([found[number][i].scores[task] for i in looks] for number, looks in windows))
        errors[task] = None if items is None else max(items, wobble * _spread(*windows))
    known = [error for error in errors.values() if error is not None]
    if len(known) < len(errors):
        return errors, None
    total = math.hypot(*known)
    if not total:
        return errors, 0.0
    # Welch–Satterthwaite: a task that is most of the error brings most of the degrees of freedom.
    shares = {task: (error / total) ** 4 for task, error in errors.items() if error}
    if not all(df[task] for task in shares):
        return errors, None
    freedom = 1.0 / math.fsum(share / df[task] for task, share in shares.items())
    return errors, student_quantile(TAIL, freedom) * total / len(known)


def _item_error(own: Sequence[Score], common: Sequence[Score]) -> float | None:
    """Standard error of the mean over items of (its mean over own − its mean over common), paired."""
    n = own[0].n
    every = [score.items for score in (*own, *common)]
    if n < 2 or any(items is None or len(items) != n for items in every):
        return None
    sums = [
        [math.fsum(of_one) / len(scores) for of_one in zip(*(s.items or () for s in scores), strict=True)]
        for scores in (own, common)
    ]
    moved = [a - b for a, b in zip(*sums, strict=True)]
    mean = math.fsum(moved) / n
    return math.sqrt(math.fsum((d - mean) ** 2 for d in moved) / (n - 1) / n)


def _spread(own: tuple[int, list[int]], common: tuple[int, list[int]]) -> float:
    """Deviation of the difference of two windows' means, in those of one look: looks in both cancel."""
    weights: dict[Place, float] = {}
    for sign, (number, looks) in ((1.0, own), (-1.0, common)):
        for look in looks:
            weights[number, look] = weights.get((number, look), 0.0) + sign / len(looks)
    return math.hypot(*weights.values())


def _by_chance(wobbles: Sequence[float], looks: int) -> float:
    """What so many smoothed looks at flat curves with this noise show on average."""
    if looks < LEAST:
        return 0.0
    most = NormalDist().inv_cdf(1.0 - 1.0 / (looks - 1))
    return most * (math.fsum(wobbles) - math.hypot(*wobbles)) / len(wobbles) / math.sqrt(WINDOW)
