"""The protocol of docs/policies.md as a program: simulated learning curves in place of a model.

A world has tasks and says what they score in a state; a state is the number of epochs each task has been
trained, as exact fractions, so that two programs that train the same reach the same state.
"""

import functools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from repsft_fast.policies import History, Policy, Score, decisions, due
from repsft_fast.policies.decisions import Decision
from repsft_fast.schedule import Schedule

State = dict[str, Fraction]


@dataclass
class World:
    """tasks: name → training samples. score(task, state) → Score; tokens(task, state) → (correct, total) of a
    training pass."""

    tasks: dict[str, int]
    score: Callable[[str, State], Score]
    tokens: Callable[[str, State], tuple[int, int]] = lambda task, state: (0, 1)
    losses: Callable[[State, tuple[int, ...]], dict[int, float]] | None = None
    probe: Callable[[str, State], tuple[float, float]] = lambda task, state: (1.0, 0.9)
    batch: int = 16


@dataclass
class Driver:
    """One run. What the trainer does with tensors is done with a dictionary of fractions."""

    policy: Policy
    world: World
    schedule: Schedule = field(default_factory=lambda: Schedule("wsd", 1.0))
    max_updates: int = 10**5

    def __post_init__(self) -> None:
        self.history = History.start(self.world.tasks.items())
        self.state: State = dict.fromkeys(self.world.tasks, Fraction(0))
        self.held: dict[str, State] = {}
        self.most_held = 0
        self.log: list[Decision] = []
        self.stopped = False
        self.update = 0  # the schedule's
        self.epochs = Fraction(0)  # since the stage's start
        self.weights: Mapping[str, float] = {}
        self.skipped: tuple[int, ...] = ()
        self.updates_trained = 0
        self.unseen = 0  # updates the state has not been told of yet
        self.tokens = 0

    def run(self) -> "Driver":
        self.ask()  # the first answer is a NewStage
        self.evaluate()
        self.ask()
        while not self.stopped:
            self.train_one_update()
            assert self.updates_trained < self.max_updates, "the policy never ends"
        return self

    def train_one_update(self) -> None:
        before, call = self.epochs, self.policy.next_call(self.history)
        self.epochs += Fraction(1, self.length)
        self.unseen += 1
        self.update += 1
        self.updates_trained += 1
        self.tokens += 100
        self.history.tick(self.update, float(self.epochs), self.tokens, self.schedule.finished(self.update))
        epoch_ended = due(before, self.epochs, 1)
        evaluation_due = due(before, self.epochs, self.policy.evaluations_per_epoch)
        if epoch_ended or evaluation_due or (call is not None and self.update >= call):
            self.settle_state()
        if epoch_ended:
            counts = {task: self.world.tokens(task, self.state) for task in self.weights}
            losses = self.world.losses(self.state, self.skipped) if self.world.losses else None
            self.history.epoch_ended(counts, losses)
            self.skipped = ()
        if evaluation_due:
            self.evaluate()
        if (
            epoch_ended
            or evaluation_due
            or self.schedule.finished(self.update)
            or (call is not None and self.update >= call)
        ):
            self.ask()

    def ask(self) -> None:
        for _ in range(100):
            decision = self.policy.decide(self.history, self.history.active)
            if isinstance(decision, decisions.Continue):
                return
            self.obey(decision)
            self.release()
            self.check_kept()
            self.log.append(decision)
            if self.stopped:
                return
        raise AssertionError("the policy never says Continue")

    def obey(self, decision: Decision) -> None:
        before = self.history.here
        self.history.took(decision)
        match decision:
            case decisions.RollBack(to):
                self.state = dict(self.held[to])
            case decisions.NewStage(start, active, weights):
                if start is not None and start != before:
                    self.state = dict(self.held[start])
                self.update = self.history.stage.update
                self.epochs = Fraction(0)
                self.draw_from(dict.fromkeys(active, 1.0) if weights is None else weights)
            case decisions.Reweight(weights):
                self.draw_from(weights)
            case decisions.SkipSamples(ids):
                self.skipped = ids
            case decisions.Probe(tasks):
                self.history.probed({task: self.world.probe(task, self.state) for task in tasks})
            case decisions.Decay(updates=updates):
                self.schedule.trigger_decay(self.update, updates)
            case decisions.Stop():
                self.stopped = True

    def evaluate(self) -> None:
        if self.policy.evaluations_per_epoch > 0:
            moment = f"s{self.history.stage.number}-e{len(self.history.evaluations)}"
            self.history.evaluated(
                moment, {task: self.world.score(task, self.state) for task in self.world.tasks}
            )
            self.release()  # first, so that the budget holds the new one
            # Before the decision: it may leave the moment that has just become the best.
            if moment in self.policy.kept(self.history, self.history.active):
                self.held[moment] = dict(self.state)
            self.most_held = max(self.most_held, len(self.held))
            self.check_kept()

    def release(self) -> None:
        keep = self.policy.kept(self.history, self.history.active)
        self.held = {moment: state for moment, state in self.held.items() if moment in keep}

    def check_kept(self) -> None:
        keep = self.policy.kept(self.history, self.history.active)
        assert keep == set(self.held), f"wanted {keep}, held {set(self.held)}"
        assert len(self.held) <= self.policy.most_kept(len(self.world.tasks))

    def draw_from(self, weights: Mapping[str, float]) -> None:
        self.weights = weights
        drawn = sum(Fraction(rate) * self.world.tasks[task] for task, rate in weights.items())
        # updates in an epoch
        self.length = max(1, -(-drawn.numerator // (drawn.denominator * self.world.batch)))

    def settle_state(self) -> None:
        """Bring the state up to date. Done when it is looked at only: fractions are slow."""
        if self.unseen:
            for task, rate in self.weights.items():
                self.state[task] += Fraction(rate) * self.unseen / self.length
            self.unseen = 0

    @property
    def result(self) -> str | None:
        return self.policy.result(self.history)


def simulate(policy: Policy, world: World, **options: Any) -> Driver:
    """Run a policy on a world to its end."""
    return Driver(policy, world, **options).run()


def script(scores: Mapping[str, list[float]], samples: int = 64, n: int = 100, batch: int = 16) -> World:
    """A world where the k-th quarter epoch of a task's own training scores scores[task][k] (the last one
    holds from there on).

    With `samples` and `batch` as they are, every task has 4 updates per epoch of its own.
    """

    def score(task: str, state: State) -> Score:
        listed = scores[task]
        return Score(listed[min(int(state[task] * 4), len(listed) - 1)], n)

    return World(dict.fromkeys(scores, samples), score, batch=batch)


@dataclass(frozen=True)
class Curve:
    """Rises from base to top over `peak` own epochs, then falls by `fall` per epoch; others move the peak by
    `shift`."""

    base: float
    top: float
    peak: float
    fall: float
    shift: float = 0.0

    def at(self, own: float, others: float) -> float:
        peak = max(0.05, self.peak + self.shift * others)
        if own <= peak:
            return self.base + (self.top - self.base) * (1 - (1 - own / peak) ** 2)
        return max(0.0, self.top - self.fall * (own - peak))


def curves(
    tasks: Mapping[str, Curve], n: int, seed: int, churn: float = 0.3, sizes: Mapping[str, int] | None = None
) -> World:
    """0/1 items: an item is right when its number lies below the curve.

    A share `churn` of the numbers is redrawn at every evaluation, the rest belongs to the item, as in real
    validation sets, where most items stay right or wrong.
    """
    own = {task: [random.Random(f"{seed}|{task}|{i}").random() for i in range(n)] for task in tasks}
    fresh = random.Random(f"{seed}|noise")

    def score(task: str, state: State) -> Score:
        total = float(sum(state.values()))
        level = tasks[task].at(float(state[task]), total - float(state[task]))
        draws = (fresh.random() if fresh.random() < churn else number for number in own[task])
        return Score.of(1.0 if number < level else 0.0 for number in draws)

    return World(dict(sizes) if sizes else dict.fromkeys(tasks, 64), score)


def hashed(tasks: Mapping[str, int], seed: int, levels: int = 7, nan: float = 0.1, batch: int = 16) -> World:
    """Arbitrary scores that depend on the state alone: few levels (many ties), some undefined."""

    @functools.cache
    def draw(task: str, state: tuple[tuple[str, Fraction], ...]) -> Score:
        rng = random.Random(f"{seed}|{task}|{[(t, x.numerator, x.denominator) for t, x in state]}")
        value = float("nan") if rng.random() < nan else rng.randrange(levels) / (levels - 1)
        return Score(value, 60)

    return World(dict(tasks), lambda task, state: draw(task, tuple(sorted(state.items()))), batch=batch)
