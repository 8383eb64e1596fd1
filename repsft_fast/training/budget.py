"""How long a run may last, as a number of updates: the smallest of the limits that are set."""

from __future__ import annotations

import math
from dataclasses import dataclass

from repsft_fast.config import Config
from repsft_fast.data.plan import Plan
from repsft_fast.errors import ConfigError, describe
from repsft_fast.schedule import problems

MOST_COUNTED = 2**53  # whole numbers that a float64 tells apart
MOST_DRAWN = 1_000_000  # epochs: 5 s where an epoch is the smallest there is


@dataclass(frozen=True)
class Budget:
    """The run ends at `updates`; `reason` names the setting that said so."""

    updates: int
    reason: str
    updates_per_epoch: int  # of the whole mixture, first epoch
    warmup_updates: int
    derived: bool = False  # from mixture.*: the schedule's horizon; the policy ends the run
    most: int = 0  # updates the run can make: under a mixture's policy often fewer than the horizon

    @property
    def epochs(self) -> float:
        return self.updates / self.updates_per_epoch


def budget_of(config: Config, plan: Plan) -> Budget:
    """Turn epochs and tokens into updates by asking the plan. ConfigError when the schedule cannot fit into the result."""
    per_epoch = len(plan.epoch(0, 0))
    limits: list[tuple[int, str]] = []
    if config.budget.updates is not None:
        _check_countable(config.budget.updates, "budget.updates", config.budget.updates)
        limits.append((config.budget.updates, f"budget.updates: {config.budget.updates}"))
    if config.budget.epochs is not None:
        limits.append(
            (_updates_of_epochs(plan, config.budget.epochs, "budget.epochs"), f"budget.epochs: {config.budget.epochs:g}")
        )
    if config.budget.tokens is not None:
        tokens = int(plan.index.lengths.sum())
        _check_countable(config.budget.tokens, "budget.tokens", config.budget.tokens)
        epochs = config.budget.tokens / tokens
        limits.append((_updates_of_epochs(plan, epochs, "budget.tokens"), f"budget.tokens: {config.budget.tokens}"))
    derived = not limits
    policy: list[tuple[int, str]] = []
    if derived or config.mixture.policy is not None:
        epochs, words = mixture_epochs(config, len(plan.index.task_names))
        policy.append((_updates_of_epochs(plan, epochs, "mixture.compute_budget"), words))
    updates, reason = min(limits or policy)
    warmup = config.optim.warmup_updates
    if warmup is None:
        warmup = math.ceil((config.optim.warmup_fraction or 0.0) * updates) if updates > 1 else 0
    found = problems(config.schedule.name, config.optim.lr, warmup, updates, config.schedule.decay_fraction)
    if found:
        raise ConfigError([f"{problem} (the run has {updates} updates by {reason})" for problem in found])
    return Budget(updates, reason, per_epoch, warmup, derived, most=min([updates, *(most for most, _ in policy)]))


def mixture_epochs(config: Config, tasks: int) -> tuple[float, str]:
    """(epochs of the whole mixture that the policy uses at most, in words) where no budget is set."""
    mixture = config.mixture
    budget = float(mixture.compute_budget)
    times, what = {
        "msft": (mixture.max_stages, f"max_stages {mixture.max_stages}"),
        "continual": (tasks, f"{tasks} tasks"),
        "sro": (2, "2 runs"),
        "soft_sro": (2, "2 runs"),
    }.get(str(mixture.policy), (1, "one run"))
    return budget * times, f"mixture.compute_budget {budget:g} × {what}"


def _check_countable(many: float, where: str, got: object) -> None:
    """ConfigError for numbers beyond those that floating-point numbers can count: a schedule has a value for every update."""
    if not many <= MOST_COUNTED:
        todo = "lower it: a rule of stop.* ends a run earlier"
        raise ConfigError(describe(where, "is more than can be counted", expected="at most 2⁵³ updates", got=got, todo=todo))


def _updates_of_epochs(plan: Plan, epochs: float, where: str) -> int:
    """Updates in that many epochs; the last, partial one rounded up. At least one. where: the setting that says so."""
    _check_countable(epochs * len(plan.epoch(0, 0)), where, f"{epochs:g} epochs")
    if plan.batch_samples is None and epochs > MOST_DRAWN:
        expected = f"at most {MOST_DRAWN} epochs with batch.tokens, where every epoch is drawn to count its updates"
        raise ConfigError(
            describe(where, "is too long", expected=expected, got=f"{epochs:g} epochs", todo="set budget.updates")
        )
    whole, part = int(epochs), epochs - int(epochs)
    # With batch.samples every epoch has the same number of updates; with batch.tokens the draw decides, so it is asked.
    if plan.batch_samples is not None:
        count = len(plan.epoch(0, 0))
        return max(1, whole * count + math.ceil(part * count))
    counts = [len(plan.epoch(0, e)) for e in range(whole + (part > 0))]
    return max(1, sum(counts[:whole]) + (math.ceil(part * counts[-1]) if part else 0))
