"""What head-room says on simulated runs whose true head-room is known, and how often its interval holds it.

    python -m benchmarks.studies.headroom_coverage       the table of docs/policies.md

A run is one unbroken branch of 25 looks. A task has 100 items that are right or wrong, 30 % of them redrawn
at every look, over a curve that wobbles by 0.02 as a whole. The truth is head-room of the curves without
noise.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from statistics import fmean

from repsft_fast.policies.headroom import Headroom, of_branches
from repsft_fast.policies.records import Evaluation
from repsft_fast.policies.statistics import Score

Curve = Callable[[int, float], float]  # of a task's number and the share of the run that is over

LOOKS, ROWS, REDRAWN, WOBBLE = 25, 100, 0.3, 0.02
RUNS, SEED, TASKS = 1000, 1, (4, 8)
CURVES: dict[str, Curve] = {
    "flat": lambda task, x: 0.5,
    "peaks at 0, ⅓, ⅔, 1 of the run": lambda task, x: 0.7 - 0.4 * (x - task % 4 / 3) ** 2,
}
HEAD = (
    "curves", "tasks", "true", "shown, mean", "`by_chance`, mean", "interval, mean",
    "interval holds the truth", "shown + interval ≥ truth", "shown − `by_chance` − interval ≤ truth",
)  # fmt: skip


def noisy(
    r: random.Random, tasks: int, curve: Curve, *,
    length: int = LOOKS, rows: int = ROWS, wobble: float = WOBBLE,
) -> Headroom:  # fmt: skip
    """Head-room of one run."""
    draws = [[r.random() for _ in range(rows)] for _ in range(tasks)]
    looks = []
    for i in range(length):
        scores = []
        for task in range(tasks):
            share = curve(task, i / (length - 1)) + r.gauss(0.0, wobble)
            draws[task] = [r.random() if r.random() < REDRAWN else u for u in draws[task]]
            scores.append(Score.of([float(u < share) for u in draws[task]]))
        looks.append(scores)
    return _of(looks)


def truth(tasks: int, curve: Curve, *, length: int = LOOKS) -> float:
    """Of the curves themselves."""
    return _of(
        [[Score(curve(task, i / (length - 1)), 1) for task in range(tasks)] for i in range(length)]
    ).value


def _of(looks: Sequence[Sequence[Score]]) -> Headroom:
    """Head-room of scores look by look, a list over tasks each."""
    branch = [
        Evaluation(0, f"m{i}", i, i / 4, {f"t{task}": score for task, score in enumerate(scores)})
        for i, scores in enumerate(looks)
    ]
    found = of_branches([branch], [f"t{task}" for task in range(len(looks[0]))])
    assert not isinstance(found, str), found
    return found


def line(name: str, tasks: int, runs: int, seed: int = SEED) -> list[str]:
    """Cells of the table, of so many runs; points and shares of the runs."""
    curve = CURVES[name]
    true = truth(tasks, curve)
    found = [noisy(random.Random(f"{seed} {name} {tasks} {run}"), tasks, curve) for run in range(runs)]
    sure = [(room.value, room.by_chance, room.interval) for room in found if room.interval is not None]
    assert len(sure) == runs, "an interval that is missing holds nothing"
    points = [true, *(fmean(column) for column in zip(*sure, strict=True))]
    shares = [
        fmean(abs(value - true) <= half for value, _, half in sure),
        fmean(value + half >= true for value, _, half in sure),
        fmean(value - chance - half <= true for value, chance, half in sure),
    ]
    return [name, str(tasks), *(f"{100 * value:.1f}" for value in points), *(f"{s:.2f}" for s in shares)]


def table(runs: int = RUNS) -> str:
    lines = [
        list(HEAD),
        ["---"] * len(HEAD),
        *(line(name, tasks, runs) for name in CURVES for tasks in TASKS),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=RUNS, help=f"simulated runs a line ({RUNS:,})")
    print(table(parser.parse_args(arguments).runs))


if __name__ == "__main__":
    main()
