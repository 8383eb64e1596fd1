"""rule "paper" against a second implementation, written from the loop of the paper's facts and nothing else.

The oracle shares no code with the policy but the score of a state: no History, no decisions, no peaks, no
snapshots.
"""

import math
import random
from fractions import Fraction

import pytest

from repsft_fast.policies import Msft, MsftSettings, NewStage, RollBack
from tests.helpers.policies_simulation import Curve, Driver, World, curves, hashed, simulate


def oracle(world: World, compute_budget: int, max_stages: int, per_epoch: int = 4):
    """1 … 5 of the paper's loop. Returns per stage (active, state at its start, excluded), and the best
    state."""
    values: dict = {}

    def value_of(state: dict) -> dict:
        key = tuple(sorted(state.items()))
        if key not in values:
            values[key] = {task: world.score(task, state).value for task in world.tasks}
        return values[key]

    all_points = []
    active = sorted(world.tasks)
    weights = {task: Fraction(0) for task in world.tasks}
    stages = []
    for _stage in range(max_stages):
        if not active:
            break
        # 2: evaluate at 0.00, roll out C epochs of the active mixture, four evaluations per epoch
        updates = math.ceil(sum(world.tasks[t] for t in active) / world.batch)
        wanted = {math.ceil(j * updates / per_epoch) for j in range(per_epoch + 1)}
        points = []
        for epoch in range(compute_budget):
            for u in sorted(wanted):
                if u > 0 or epoch == 0:
                    trained = epoch + Fraction(u, updates)
                    points.append({t: weights[t] + (trained if t in active else 0) for t in weights})
        all_points += points
        # 3: the first maximum of each active task; none where nothing was measured after it
        peaks = {}
        for task in active:
            best = None
            for i, point in enumerate(points):
                score = value_of(point)[task]
                if score == score and (best is None or score > best):
                    best, peaks[task] = score, i
            if best is not None and all(
                value_of(p)[task] != value_of(p)[task] for p in points[peaks[task] + 1 :]
            ):
                del peaks[task]
        # 4: exclude one task at the earliest peak, or go on from the end
        excluded = None
        start = dict(weights)
        m = min(peaks.values()) if peaks else len(points) - 1
        if m != len(points) - 1:
            excluded = sorted(t for t in peaks if peaks[t] == m)[0]
        weights = points[m]
        stages.append((tuple(active), start, excluded))
        if excluded is not None:
            active = [t for t in active if t != excluded]
    # 5: the best pooled accuracy over everything seen, strictly better wins; tasks never measured take no
    # part
    measured = [t for t in world.tasks if any(value_of(p)[t] == value_of(p)[t] for p in all_points)]
    best_state, best_sum = None, -1
    for point in all_points:
        scores = [value_of(point)[t] for t in measured]
        if scores and not any(s != s for s in scores):
            # every task has 60 items, so the pooled mean orders as the sum
            counts = sum(round(s * 60) for s in scores)
            if counts > best_sum:
                best_state, best_sum = point, counts
    return stages, best_state


def stages_of(run: Driver, states: dict):
    found = []
    history = run.history
    for stage in history.stages:
        start = states[stage.start] if stage.start else states[history.evaluations[0].snapshot_id]
        dropped = [
            d.drop
            for d, n in zip(run.log, stage_numbers(run))
            if isinstance(d, RollBack) and n == stage.number
        ]
        found.append((stage.active, start, dropped[0] if dropped else None))
    return found


def stage_numbers(run: Driver):
    number = -1
    for decision in run.log:
        number += isinstance(decision, NewStage)
        yield number


class Recording(Driver):
    def evaluate(self):
        super().evaluate()
        self.__dict__.setdefault("states", {})[self.history.here] = dict(self.state)


def check(world: World, compute_budget: int, max_stages: int) -> Driver:
    run = Recording(
        Msft(MsftSettings(rule="paper", compute_budget=float(compute_budget), max_stages=max_stages)), world
    ).run()
    expected, best = oracle(world, compute_budget, max_stages)
    got = stages_of(run, run.states)
    # the last stage's exclusion changes nothing, so the policy stops without it; all others must be identical
    assert [s[:2] for s in got] == [s[:2] for s in expected]
    assert [s[2] for s in got[:-1]] == [s[2] for s in expected[:-1]]
    assert (None if run.result is None else run.states[run.result]) == best
    return run


def decided_identically(count):
    """So many random mixtures; how often each branch of the rule was taken."""
    rng = random.Random(20260321)
    excluded = continued = ties = 0
    for seed in range(count):
        tasks = {f"task{i}": rng.randint(1, 90) for i in range(rng.randint(1, 6))}
        world = hashed(
            tasks,
            seed,
            levels=rng.choice((2, 3, 7, 61)),
            nan=rng.choice((0.0, 0.1, 0.6)),
            batch=rng.choice((4, 16, 64)),
        )
        run = check(world, rng.choice((1, 1, 2, 3)), rng.randint(1, 10))
        dropped = [d for d in run.log if isinstance(d, RollBack)]
        excluded += len(dropped)
        continued += sum(s.follows for s in run.history.stages[1:])
        ties += any(d.to == run.history.evaluations[0].snapshot_id for d in dropped)
    return excluded, continued, ties


@pytest.mark.parametrize("count", [500, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_mixtures_are_decided_identically(count):
    excluded, continued, ties = decided_identically(count)
    assert excluded > 1.5 * count  # the test would be empty if few of the branches were taken
    assert min(continued, ties) > count / 20


@pytest.mark.parametrize("shift", [0.0, 0.15, -0.15])
def test_smooth_curves_with_known_peaks_that_move_after_an_exclusion(shift):
    for seed in range(40):
        rng = random.Random(seed)
        tasks = {
            f"t{i}": Curve(
                rng.uniform(0, 0.4), rng.uniform(0.4, 1.0), rng.uniform(0.1, 6), rng.uniform(0, 0.2), shift
            )
            for i in range(5)
        }
        tasks["never"] = Curve(0.0, 0.0, 1.0, 0.0)
        noiseless = curves(tasks, n=60, seed=seed, churn=0.0, sizes={t: rng.randint(20, 90) for t in tasks})
        check(noiseless, rng.randint(1, 3), 10)


def test_the_task_that_never_learns_is_thrown_out_first_by_the_literal_rule():
    tasks = {"a": Curve(0.1, 0.9, 3, 0.1), "never": Curve(0.0, 0.0, 1.0, 0.0)}
    run = simulate(Msft(MsftSettings(rule="paper", compute_budget=1)), curves(tasks, 60, 0, churn=0.0))
    (first, *_) = [d for d in run.log if isinstance(d, RollBack)]
    assert first == RollBack(run.history.evaluations[0].snapshot_id, "never")
