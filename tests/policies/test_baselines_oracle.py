"""The baselines against second implementations, written from their one-line descriptions and nothing else.

As in test_msft_oracle: the oracles share no code with the policies but the score of a state, and a state is
how many epochs each task has been trained, in exact fractions.
"""

import math
import random
from dataclasses import replace
from fractions import Fraction

import pytest

from repsft_fast.policies import BaselineSettings, Dynamix, Ies, NewStage, Probe, Reweight, SkipSamples
from repsft_fast.policies.registry import POLICIES
from tests.helpers.policies_simulation import Driver, World, hashed

Point = tuple[Fraction, dict]  # epochs of the roll-out, the state there


class Recording(Driver):
    """Writes down every state that was looked at, in order, and what each epoch's end and probe gave."""

    def __post_init__(self):
        super().__post_init__()
        self.looked: list[dict] = []
        self.states: dict = {}

    def evaluate(self):
        super().evaluate()
        self.looked.append(dict(self.state))
        self.states[self.history.here] = dict(self.state)


def roll_out(world: World, start: dict, rates: dict, budget: Fraction, per_epoch: int = 4) -> list[Point]:
    """The start and every look up to the first at or past `budget` epochs of the tasks at these rates."""
    samples = sum(Fraction(rate) * world.tasks[task] for task, rate in rates.items())
    updates = max(1, math.ceil(samples / world.batch))
    looks = {math.ceil(Fraction(k * updates, per_epoch)) for k in range(1, per_epoch + 1)}
    points, update = [(Fraction(0), start)], 0
    while points[-1][0] < budget:
        update += 1
        if (update - 1) % updates + 1 in looks:
            done = Fraction(update, updates)
            trained = {task: start[task] + Fraction(rates.get(task, 0)) * done for task in start}
            points.append((done, trained))
    return points


def first_maximum(world: World, points: list[Point], task: str) -> int | None:
    """Which point; None where the score is undefined throughout."""
    values = [world.score(task, state).value for _, state in points]
    known = [value for value in values if value == value]
    return values.index(max(known)) if known else None


def best_pooled(world: World, points: list[Point], looked: list[dict]) -> dict | None:
    """The first state with the most right answers over the tasks that were ever measured; every task has as
    many items."""
    value = {(t, i): world.score(t, state).value for t in world.tasks for i, state in enumerate(looked)}
    measured = [t for t in world.tasks if any(value[t, i] == value[t, i] for i in range(len(looked)))]
    best, most = None, -1
    for _, state in points:
        scores = [world.score(t, state).value for t in measured]
        if scores and not any(s != s for s in scores):
            right = sum(round(s * 60) for s in scores)
            if right > most:
                best, most = state, right
    return best


def sft(world, base, budget, stages):
    points = roll_out(world, base, dict.fromkeys(world.tasks, 1), budget)
    return [sorted(world.tasks)], [p for _, p in points], best_pooled(world, points, [p for _, p in points])


def sft_resets(world, base, budget, stages):
    """The same, its epochs counted anew in every stage; a stage's first look is not made again."""
    points = roll_out(world, base, dict.fromkeys(world.tasks, 1), budget)
    for _ in range(stages - 1):
        points += roll_out(world, points[-1][1], dict.fromkeys(world.tasks, 1), budget)[1:]
    looked = [p for _, p in points]
    return [sorted(world.tasks)] * stages, looked, best_pooled(world, points, looked)


def continual(world, base, budget, stages):
    """Task after task by name; each goes on from the peak of the one before, undefined ones from their end."""
    here, looked = base, [base]
    for task in sorted(world.tasks):
        points = roll_out(world, here, {task: 1}, budget)
        looked += [p for _, p in points[1:]]
        peak = first_maximum(world, points, task)
        here = points[-1 if peak is None else peak][1]
    return [[task] for task in sorted(world.tasks)], looked, here


def peaks_of(world, points):
    found = {task: first_maximum(world, points, task) for task in world.tasks}
    return {task: Fraction(0) if at is None else points[at][0] for task, at in found.items()}


def sro(world, base, budget, stages):
    """A run finds the peaks; a second one from the base drops every task at its own, until none is left."""
    first = roll_out(world, base, dict.fromkeys(world.tasks, 1), budget)
    peaks, looked = peaks_of(world, first), [p for _, p in first]
    active, own, here, second, actives = sorted(world.tasks), Fraction(0), base, [], [sorted(world.tasks)]
    while active := [task for task in active if peaks[task] > own]:
        actives.append(active)
        points = roll_out(world, here, dict.fromkeys(active, 1), max(peaks[t] for t in active) - own)
        # On to the first look at which somebody's peak is reached.
        until = next(i for i, (done, _) in enumerate(points) if any(peaks[t] <= own + done for t in active))
        second += points[: until + 1]
        looked += [p for _, p in points[1 : until + 1]]
        own, here = own + points[until][0], points[until][1]
    return actives, looked, best_pooled(world, second, looked) if second else None


ORACLES = {f.__name__: f for f in (sft, sft_resets, continual, sro)}


def random_world(rng: random.Random, seed: int) -> World:
    tasks = {f"task{i}": rng.randint(1, 90) for i in range(rng.randint(1, 6))}
    levels, nan = rng.choice((2, 3, 7, 61)), rng.choice((0.0, 0.1, 0.6))
    return hashed(tasks, seed, levels=levels, nan=nan, batch=rng.choice((4, 16, 64)))


def settings(rng: random.Random) -> tuple[BaselineSettings, Fraction, int]:
    budget, stages = rng.choice((Fraction(1), Fraction(2), Fraction(3), Fraction(3, 2))), rng.randint(1, 4)
    return BaselineSettings(compute_budget=float(budget), max_stages=stages), budget, stages


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("count", [250, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_mixtures_are_decided_identically(name, count):
    rng = random.Random(f"{name} 20260321")
    several = results = 0
    for seed in range(count):
        world, (given, budget, stages) = random_world(rng, seed), settings(rng)
        run = Recording(POLICIES[name](given), world).run()
        base = dict.fromkeys(world.tasks, Fraction(0))
        actives, looked, best = ORACLES[name](world, base, budget, stages)
        assert [list(s.active) for s in run.history.stages] == actives
        assert run.looked == looked
        assert (None if run.result is None else run.states[run.result]) == best
        several += len(actives) > 2
        results += best is not None and best != base
    assert several > count / 4 or name == "sft"  # the test would be empty if few of the branches were taken
    assert results > count / 4


def test_every_stage_of_sft_resets_has_a_new_optimizer_and_the_clock_goes_on():
    run = Recording(
        POLICIES["sft_resets"](BaselineSettings(max_stages=3)), hashed({"a": 40, "b": 9}, 1, nan=0.0)
    ).run()
    stages = [d.reset for d in run.log if isinstance(d, NewStage)]
    assert [(r.optimizer, r.schedule) for r in stages] == [("reset", "continue")] * 3
    assert run.update == run.updates_trained


def test_soft_sro_draws_by_peak_epochs():
    """Its rates by the one-line description; what follows is a roll-out at those rates."""
    rng, seen = random.Random(6), 0
    for seed in range(250):
        world, (given, budget, _) = random_world(rng, seed), settings(rng)
        run = Recording(POLICIES["soft_sro"](given), world).run()
        base = dict.fromkeys(world.tasks, Fraction(0))
        first = roll_out(world, base, dict.fromkeys(world.tasks, 1), budget)
        peaks = {task: peak for task, peak in peaks_of(world, first).items() if peak > 0}
        looked = [p for _, p in first]
        if not peaks:
            assert run.looked == looked
            assert (len(run.history.stages), run.result) == (1, None)
            continue
        # As many samples an epoch as the tasks kept have, dealt in proportion to size × peak.
        samples = sum(world.tasks[t] for t in peaks)
        scale = samples / sum(world.tasks[t] * peak for t, peak in peaks.items())
        rates = run.history.stages[1].weights
        assert rates == pytest.approx({t: float(peak * scale) for t, peak in peaks.items()}, rel=1e-12)
        second = roll_out(world, base, rates, budget)
        assert run.looked == looked + [p for _, p in second[1:]]
        best = best_pooled(world, second, run.looked)
        assert (None if run.result is None else run.states[run.result]) == best
        seen += len(peaks) > 1
    assert seen > 100


def test_ies_skips_exactly_the_samples_whose_loss_moves_in_a_straight_line():
    rng, skipped = random.Random(7), 0
    for seed in range(100):
        draws = [round(rng.random() * 3) / 3e3 for _ in range(400)]  # few levels: many means below delta
        lost: list[dict[int, float]] = []

        def losses(state, skip, draws=draws, lost=lost):
            at = len(lost)
            lost.append({i: 1.0 - 0.1 * at * (i % 3) + draws[(at * 20 + i) % 400] for i in range(20)})
            if at % 9 == 8:
                del lost[-1][at % 20]  # a sample that was not drawn
            return lost[-1]

        world = replace(hashed({"a": 20}, seed, nan=0.0), losses=losses)
        run = Recording(Ies(BaselineSettings(compute_budget=9.0)), world).run()
        expected = []
        for end in range(6, 9):  # after six epochs at the earliest; after the ninth the run has ended
            five = lost[end - 5 : end]
            ids = []
            for i in range(20):
                if all(i in epoch for epoch in five):
                    a, b, c, d, e = (epoch[i] for epoch in five)
                    if (abs(c - 2 * b + a) + abs(d - 2 * c + b) + abs(e - 2 * d + c)) / 3 < 0.001:
                        ids.append(i)
            expected += [tuple(ids)] if ids else []
        assert [d.ids for d in run.log if isinstance(d, SkipSamples)] == expected
        skipped += sum(map(len, expected))
    assert skipped > 100


def test_dynamix_draws_by_the_bandits_formula():
    rng, weighed = random.Random(8), 0
    for seed in range(100):
        world, probes = random_world(rng, seed), []

        def probe(task, state, probes=probes, rng=rng):
            probes.append((task, rng.random() + 0.1, rng.choice((rng.random(), float("nan")))))
            return probes[-1][1:]

        given = BaselineSettings(compute_budget=3.0, every_updates=5, beta=rng.choice((1.0, 4.0)))
        run = Recording(Dynamix(given), replace(world, probe=probe)).run()
        tasks, total = sorted(world.tasks), sum(world.tasks.values())
        value, left, got = dict.fromkeys(tasks, 0.0), list(probes), []
        for decision in run.log:
            if isinstance(decision, Probe):
                drops = {}
                for _ in tasks:
                    task, before, after = left.pop(0)
                    if after == after:
                        drops[task] = (before - after) / before
                low, high = min(drops.values(), default=0.0), max(drops.values(), default=0.0)
                for task, drop in drops.items():
                    reward = (drop - low) / (high - low) if high > low else 0.0
                    value[task] = 0.95 * value[task] + 0.05 * reward
            elif isinstance(decision, Reweight):
                mass = {t: math.exp(given.beta * value[t]) * world.tasks[t] / total for t in tasks}
                share = {t: 0.7 * mass[t] / sum(mass.values()) + 0.3 / len(tasks) for t in tasks}
                rates = {t: share[t] * total / world.tasks[t] for t in tasks}
                assert dict(decision.weights) == pytest.approx(rates, rel=1e-9)
                got.append(rates)
        assert not left
        assert len(got) == sum(isinstance(d, Probe) for d in run.log)
        weighed += len(got)
    assert weighed > 200
