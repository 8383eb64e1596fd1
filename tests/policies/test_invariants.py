"""What must hold for every policy on every mixture: it ends, it goes back to kept moments only, its state is
its history."""

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repsft_fast.policies import BaselineSettings, History, Msft, MsftSettings, NewStage, RollBack
from repsft_fast.policies.baselines import SftResets
from repsft_fast.policies.decisions import from_json, to_json
from repsft_fast.policies.registry import POLICIES as REGISTERED
from tests.helpers.policies_simulation import Curve, Driver, World, curves, hashed, simulate

POLICIES = {
    "paper": lambda c: Msft(MsftSettings(rule="paper", compute_budget=c)),
    "paper_rewind": lambda c: Msft(
        MsftSettings(rule="paper", compute_budget=c, optimizer="restore", schedule="rewind", data="rewind")
    ),
    "tested": lambda c: Msft(MsftSettings(rule="tested", compute_budget=c, alpha=0.9)),
    "tested_eager": lambda c: Msft(
        MsftSettings(rule="tested", compute_budget=c, patience=1, z=0.0, min_looks=1)
    ),
    "rehearsed": lambda c: Msft(
        MsftSettings(rule="tested", compute_budget=c, rehearsal=0.05, z=0.0, patience=1, min_looks=3)
    ),
    "saturation": lambda c: Msft(
        MsftSettings(rule="paper", compute_budget=c, exclude_on="saturation", token_accuracy=0.9)
    ),
    **{
        name: (lambda c, kind=kind: kind(BaselineSettings(compute_budget=c, every_updates=7)))
        for name, kind in REGISTERED.items()
        if kind is not Msft
    },
}


def world_of(seed: int) -> World:
    rng = random.Random(seed)
    tasks = {f"task{i}": rng.randint(1, 90) for i in range(rng.randint(1, 6))}
    world = hashed(tasks, seed, levels=rng.choice((1, 2, 5, 61)) + 1, nan=rng.choice((0.0, 0.2, 1.0)))
    accuracy = lambda task, state: (min(100, int(state[task] * rng.choice((10, 40)))), 100)  # noqa: E731
    return replace(
        world,
        tokens=accuracy,
        losses=lambda state, skipped: {i: rng.choice((0.5, rng.random(), float("nan"))) for i in range(20)},
        probe=lambda task, state: (rng.random() + 0.1, rng.choice((rng.random(), float("nan")))),
    )


class Watched(Driver):
    """Checks at every decision what the trainer relies on."""

    def obey(self, decision):
        before = self.history.active if self.history.stages else frozenset(self.world.tasks)
        assert self.policy.decide(self.history, self.history.active) == decision, (
            "not a pure function of the history"
        )
        again = History.load(json.loads(json.dumps(self.history.values(), allow_nan=False)))
        assert self.policy.decide(again, again.active) == decision, (
            "the history does not hold all of the state"
        )
        assert again.values() == self.history.values()
        first_form = {name: value for name, value in to_json(decision).items() if name != "code"}
        assert from_json(first_form) == decision, (
            "a checkpoint of the first versions would be read as another"
        )
        if isinstance(decision, RollBack):
            assert decision.to in self.held
            assert decision.drop is None or decision.drop in before
        if isinstance(decision, NewStage) and decision.start not in (None, self.history.here):
            assert decision.start in self.held
        super().obey(decision)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), c=st.sampled_from((0.25, 0.5, 1.0, 2.0, 7.0)))
def test_it_ends_keeps_what_it_goes_back_to_and_its_state_is_its_history(name, seed, c):
    run = Watched(POLICIES[name](c), world_of(seed)).run()
    assert run.result is None or run.result in run.held or run.result == run.history.here
    stages = run.history.stages
    assert len(stages) <= (10 if isinstance(run.policy, Msft | SftResets) else len(run.world.tasks) + 1)
    assert run.history.ended_by == run.log[-1].code == "policy"
    # an epoch may be a single update
    assert all(run.history.of_stage(s.number)[-1].epochs < c + 1 for s in stages)


@pytest.mark.parametrize("name", ["paper", "paper_rewind", "tested_eager", "rehearsed", "saturation"])
def test_an_excluded_task_never_returns(name):
    returned = 0
    for seed in range(60):
        run = simulate(POLICIES[name](1.0), world_of(seed))
        gone: set[str] = set()
        for stage in run.history.stages:
            assert not gone & set(stage.active)
            gone |= set(run.world.tasks) - set(stage.active)
        returned += len(gone)
    assert returned > 20


@pytest.mark.parametrize("name", ["sft", "paper", "tested"])
def test_the_result_is_the_best_of_everything_seen_discarded_branches_included(name):
    tasks = {f"t{i}": Curve(0.1, 0.9, 0.5 + i, 0.1) for i in range(4)}
    run = simulate(POLICIES[name](2.0), curves(tasks, 80, 3))
    pooled = {e.snapshot_id: sum(s.total for s in e.scores.values()) for e in run.history.evaluations}
    assert pooled[run.result] == max(pooled.values())


def test_an_undefined_task_never_wins_and_never_leaves():
    for seed in range(40):
        world = hashed({"a": 30, "b": 30, "c": 30}, seed, levels=5, nan=0.0)
        score = world.score
        world.score = lambda task, state, score=score: (
            replace(score(task, state), value=float("nan")) if task == "b" else score(task, state)
        )
        for name in ("paper", "tested_eager"):
            run = simulate(POLICIES[name](1.0), world)
            assert all(d.drop != "b" for d in run.log if isinstance(d, RollBack))
            assert run.result is not None  # a task that is never defined does not make every moment undefined
