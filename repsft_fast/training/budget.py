"""How long a run may last, as a number of updates: the smallest of the limits that are set."""

from __future__ import annotations

import math
from typing import Any

from repsft_fast.config import Config
from repsft_fast.data.plan import Plan
from repsft_fast.errors import ConfigError, describe
from repsft_fast.schedule import Schedule, problems
from repsft_fast.training.parts import Budget
from repsft_fast.training.policy import policy_of

MOST_COUNTED = 2**53  # whole numbers that a float64 tells apart
MOST_DRAWN = 1_000_000  # epochs: 5 s where an epoch is the smallest there is


def budget_of(config: Config, plan: Plan) -> Budget:
    """Turn epochs and tokens into updates by asking the plan. ConfigError when the schedule cannot fit into
    the result."""
    # Only the plan knows how many updates epochs and tokens are; all in one unit, the first limit binds.
    per_epoch = len(plan.epoch(0, 0))
    limits: list[tuple[int, str]] = []
    if config.budget.updates is not None:
        _check_countable(config.budget.updates, "budget.updates", config.budget.updates)
        limits.append((config.budget.updates, f"budget.updates: {config.budget.updates}"))
    if config.budget.epochs is not None:
        updates = _updates_of_epochs(plan, config.budget.epochs, "budget.epochs")
        limits.append((updates, f"budget.epochs: {config.budget.epochs:g}"))
    if config.budget.tokens is not None:
        tokens = int(plan.index.lengths.sum())
        _check_countable(config.budget.tokens, "budget.tokens", config.budget.tokens)
        epochs = config.budget.tokens / tokens
        updates = _updates_of_epochs(plan, epochs, "budget.tokens")
        limits.append((updates, f"budget.tokens: {config.budget.tokens}"))

    # A mixture's policy ends the run by itself. What it can last at most is the schedule's horizon only where
    # no budget is set, since a limit that the user wrote is what the learning rate is to fall towards.
    derived = not limits
    of_policy: list[tuple[int, str]] = []
    if derived or config.mixture.policy is not None:
        epochs, words = mixture_epochs(config, len(plan.index.task_names))
        of_policy.append((_updates_of_epochs(plan, epochs, "mixture.compute_budget"), words))
    updates, reason = min(limits or of_policy)

    # A warm-up that does not fit is told with the budget it was judged by, which may be a derived one.
    warmup = config.optim.warmup_updates
    if warmup is None:
        warmup = math.ceil((config.optim.warmup_fraction or 0.0) * updates) if updates > 1 else 0
    found = problems(config.schedule.name, config.optim.lr, warmup, updates, config.schedule.decay_fraction)
    if found:
        raise ConfigError([f"{problem} (the run has {updates} updates by {reason})" for problem in found])
    most = min(updates, *(most for most, _ in of_policy)) if of_policy else updates
    return Budget(updates, reason, per_epoch, warmup, derived, most)


def record(config: Config, budget: Budget, schedule: Schedule) -> dict[str, Any]:
    """What a checkpoint keeps of the budget, as JSON. The warm-up is the schedule's: an extended run keeps
    the one it had."""
    return {
        "updates": budget.updates,
        "warmup_updates": schedule.warmup_updates,
        "settings": config.budget.model_dump(mode="json"),
    }


def mixture_epochs(config: Config, tasks: int) -> tuple[float, str]:
    """(epochs of the whole mixture that the policy uses at most, in words) where no budget is set."""
    budget = float(config.mixture.compute_budget)
    times, what = policy_of(config).most_rollouts(tasks)
    return budget * times, f"mixture.compute_budget {budget:g} × {what}"


def _check_countable(many: float, where: str, got: object) -> None:
    """ConfigError for numbers beyond those that floating-point numbers can count: a schedule has a value for
    every update."""
    if not many <= MOST_COUNTED:
        todo = "lower it: a rule of stop.* ends a run earlier"
        raise ConfigError(
            describe(where, "is more than can be counted", expected="at most 2⁵³ updates", got=got, todo=todo)
        )


def _updates_of_epochs(plan: Plan, epochs: float, where: str) -> int:
    """Updates in that many epochs; the last, partial one rounded up. At least one. where: the setting that
    says so."""
    _check_countable(epochs * len(plan.epoch(0, 0)), where, f"{epochs:g} epochs")
    if plan.batch_samples is None and epochs > MOST_DRAWN:
        expected = (
            f"at most {MOST_DRAWN} epochs with batch.tokens, where every epoch is drawn to count its updates"
        )
        raise ConfigError(
            describe(
                where, "is too long", expected=expected, got=f"{epochs:g} epochs", todo="set budget.updates"
            )
        )
    whole, part = int(epochs), epochs - int(epochs)
    # With batch.samples every epoch has the same number of updates; with batch.tokens the draw decides, so it
    # is asked.
    if plan.batch_samples is not None:
        count = len(plan.epoch(0, 0))
        return max(1, whole * count + math.ceil(part * count))
    counts = [len(plan.epoch(0, e)) for e in range(whole + (part > 0))]
    return max(1, sum(counts[:whole]) + (math.ceil(part * counts[-1]) if part else 0))
