"""When has a task overfit? Rule "tested" of msft: a fall from the task's peak that neither its items nor its
wobble explains.

A *look* is one evaluation of a task with a defined score; looks of all stages count. Three numbers decide:

item error  sqrt(Σ d²) / n of the paired differences d of the n validation items: the choice of the items
wobble      how far a task as a whole moves from one look to the next, whatever the items: the same weights
            score otherwise a few updates later. wobble² = mean(second difference²) / 6 over three looks in a
            row on one branch, in which a straight trend cancels; two looks differ by √2 · wobble. The
            steepest step down since the peak is the fall in question, so the (at most two) second differences
            that hold it are left out: else a sudden fall would hide itself
quantiles   noise alone may exclude somebody in a share alpha of whole runs. A run compares every task at
            every look and both errors may deceive, so each gets p = alpha / (2 · 2 · tasks · looks), one 2
            for the two errors and one, measured, for the peak, which is the best of all looks before it: the
            normal quantile z for the items, which are many; Student's t with 0.6 degrees of freedom for each
            second difference for the wobble, which few looks tell (neighbours share looks: 0.6, measured)

A fall counts above sqrt((z · item error)² + (t · √2 · wobble)²): the two add, as independent errors do.
docs/policies.md has what noise alone does under it, and which falls it sees.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from repsft_fast.policies.history import History
from repsft_fast.policies.records import Evaluation
from repsft_fast.policies.statistics import Score, difference
from repsft_fast.policies.student import normal_quantile, student_quantile

DF_PER_DIFFERENCE = 0.6
ERRORS = 2  # of items and of the wobble
PEAKS = 2  # a run compares pairs of looks: without it up to 19 % of whole runs lose a task that stands still
PERCENT_SEEN = 0.05  # the fall of a share that `said_of_rows` counts rows for


@dataclass(frozen=True)
class Bound:
    """How large a fall of one task has to be at this point of a run to be one."""

    z: float  # of the item error
    t: float  # of the wobble's
    wobble: float  # in units of the metric; 0 where no three looks in a row tell it

    def exceeded(self, peak: Score, now: Score) -> bool:
        """Whether `now` lies below `peak` by more than items and wobble explain. False for undefined
        scores."""
        fall = difference(peak, now)
        if math.isinf(self.t) or not fall.mean > 0:
            return False
        error = math.hypot(self.z * fall.null_error, self.t * math.sqrt(2.0) * self.wobble)
        return fall.mean - fall.correction >= error


def bound(
    history: History, task: str, alpha: float, looks_of_run: int, z: float | None = None, since: int = 0
) -> Bound:
    """The bound for a task now. z: in place of both quantiles; since: looks since its peak."""
    wobble, differences = wobble_of(looks(history, task), since)
    if z is not None:
        return Bound(z, z, wobble)
    p = chance(alpha, compared(history), looks_of_run)
    return Bound(normal_quantile(p), student_quantile(p, DF_PER_DIFFERENCE * differences), wobble)


def chance(alpha: float, tasks: int, looks_of_run: int) -> float:
    """The share of alpha that one error of one comparison gets."""
    return alpha / (ERRORS * PEAKS * max(1, tasks) * max(1, looks_of_run))


def compared(history: History) -> int:
    """Tasks that the run compares: those with a score which its first stage trains."""
    return len(set(history.stages[0].active) & set(history.measured_tasks())) if history.stages else 0


def looks_seen(history: History, task: str) -> int:
    """Looks at the task so far. One that opens a stage repeats its start's and is none."""
    return len({e.snapshot_id for e in history.evaluations if e.scores[task].defined})


def looks(history: History, task: str) -> list[list[float]]:
    """The task's scores look by look, a list per branch; NaN where a score is undefined.

    A stage that follows on goes on with its branch; one that goes back begins another, at its start's score.
    """
    branches: list[list[float]] = []
    last: Evaluation | None = None
    for evaluation in history.evaluations:
        repeats = last is not None and evaluation.snapshot_id == last.snapshot_id
        new_stage = last is None or evaluation.stage != last.stage
        if last is None or (new_stage and not history.stages[evaluation.stage].follows):
            branches.append([])
            repeats = False
        if not repeats:
            score = evaluation.scores[task]
            branches[-1].append(score.value if score.defined else math.nan)
        last = evaluation
    return branches


def wobble_of(branches: list[list[float]], since: int = 0) -> tuple[float, int]:
    """(wobble, second differences it was measured on); (0, 0) without three looks in a row.

    since: steps since the peak, at the end of the last branch, of which the steepest down is left out.
    """
    squares = []
    for number, branch in enumerate(branches):
        steps = [b - a for a, b in pairwise(branch)]
        fallen = _steepest(steps, since) if number == len(branches) - 1 else None
        for k, (a, b) in enumerate(pairwise(steps)):
            if math.isfinite(a) and math.isfinite(b) and fallen not in (k, k + 1):
                squares.append((b - a) ** 2)
    return (math.sqrt(math.fsum(squares) / len(squares) / 6.0), len(squares)) if squares else (0.0, 0)


def _steepest(steps: list[float], since: int) -> int | None:
    """Index of the smallest of the last `since` steps, the first of equals; None where none is defined."""
    found = [(steps[k], k) for k in range(max(0, len(steps) - since), len(steps)) if math.isfinite(steps[k])]
    return min(found)[1] if found else None


# What can be seen -----------------------------------------------------------------------------------------


def smallest_fall(rows: int, z: float) -> float:
    """The smallest fall of a share of 0/1 rows that the item error lets through: when nothing else moves.

    With k of n rows lost and none won the fall is k/n and its error √k/n, so k − 1 ≥ z · √k. More than 1:
    none can be seen.
    """
    if rows < 2:
        return math.inf
    root = (z + math.sqrt(z * z + 4.0)) / 2.0
    return math.ceil(root * root - 1e-9) / rows


def rows_needed(fall: float, z: float) -> int:
    """Rows with which `smallest_fall` is at most this."""
    root = (z + math.sqrt(z * z + 4.0)) / 2.0
    return max(2, math.ceil(math.ceil(root * root - 1e-9) / fall - 1e-9))


def said_of_rows(rows: Mapping[str, int], z: float, shares: bool) -> list[str]:
    """What can be seen with so many validation rows per task, in words. shares: the metric is right or wrong
    per row."""
    counted = {task: n for task, n in rows.items() if n > 0}
    if not counted or z == 0:
        return []
    few = min(counted, key=lambda task: (counted[task], task))
    least, most = counted[few], max(counted.values())
    with_rows = f"with {least} validation row{'' if least == 1 else 's'}"
    if least != most:
        with_rows += f" (`{few}`; the most is {most:,})"
    if not shares:
        spread = f"{z / math.sqrt(least):.2g} standard deviations of the rows' changes"
        seen = f"a mean fall below {spread} cannot be seen" if least > 1 else "no fall can be seen"
        return [f"{with_rows} {seen} (z = {z:.2f})"]
    fall = smallest_fall(least, z)
    seen = "no fall can be seen" if fall > 1 else f"a fall below {100 * fall:.2g} points cannot be seen"
    text = f"{with_rows} {seen} (z = {z:.2f}"
    if fall > PERCENT_SEEN:
        text += (
            f"); one of {100 * PERCENT_SEEN:g} needs about {_rounded(rows_needed(PERCENT_SEEN, z)):,} rows"
        )
        return [text]
    return [text + ")"]


def _rounded(rows: int) -> int:
    """To two figures, upwards."""
    step = 10 ** max(0, len(str(rows)) - 2)
    return -(-rows // step) * step
