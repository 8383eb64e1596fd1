"""Which policy a run has: from settings to one of `policies`, and what it needs of the run.

Only `build_policy` needs the run's data. All else is answered from the settings, before there is a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from repsft_fast.config import Config
from repsft_fast.errors import ConfigError, DataError, describe
from repsft_fast.memory.model_size import ModelSize
from repsft_fast.policies import History, Policy, Saturation, SaturationSettings, policy_class
from repsft_fast.training.parts import Data, Parts


def build_policy(parts: Parts) -> Policy:
    """The policy of the settings; without `mixture.policy` the saturation rule over everything. ConfigError
    when impossible."""
    config = parts.config
    if config.mixture.policy is None:
        decays = parts.schedule.decays_on_demand
        return _checked(Saturation, _saturation(config, budget_updates=parts.budget.updates, decays=decays))
    _check_validation(parts)
    rates = sampling_rates(config, parts.data.task_names, parts.data.train.index.tasks)
    return _checked(policy_class(config.mixture.policy), _of_mixture(config, rates))


def policy_of(config: Config) -> Policy:
    """The policy of the settings as far as they alone say it: neither checked nor with the data's sampling
    rates. What it decides is not the run's; what it would keep, need and name as the result is."""
    kind: Any = policy_class(config.mixture.policy)
    settings = _saturation(config) if config.mixture.policy is None else _of_mixture(config, {})
    policy: Policy = kind(settings)
    return policy


def said_at_start(config: Config, data: Data) -> list[str]:
    """What is told before training of what the mixture's policy can decide with these validation rows."""
    if config.mixture.policy is None or data.validation is None:
        return []
    names = data.task_names
    rows = np.bincount(data.validation.index.tasks, minlength=len(names))
    rates = sampling_rates(config, names, data.train.index.tasks)
    policy: Policy = policy_class(config.mixture.policy)(_of_mixture(config, rates))
    found = policy.at_start(
        {name: int(n) for name, n in zip(names, rows, strict=True)},
        shares=config.mixture.metric in ("exact_match", "answer"),
    )
    return [f"mixture: {text}" for text in found]


def named_result(config: Config, history: History) -> str | None:
    """The snapshot that the policy names as the result at this point of its table; None: the state. No data
    is needed for it."""
    return policy_of(config).result(history) if history.stages else None


def accuracy_target(config: Config) -> float | None:
    """The training pass's token accuracy at which the run, or a task's training, ends; None where none
    does."""
    return policy_of(config).accuracy_target


def snapshots_needed(parts: Parts, policy: Policy) -> int:
    """Snapshots held at once, at most; 0 when none is gone back to."""
    before_probe = 1 if policy.looks_ahead else 0
    return policy.most_kept(len(parts.data.task_names)) + before_probe


def weights_are_enough(config: Config) -> bool:
    """Whether a snapshot is only weights: roll-backs reset the optimizer, and nobody looks one update
    ahead."""
    return config.mixture.optimizer == "reset" and not policy_class(config.mixture.policy).looks_ahead


def device_snapshot_bytes(config: Config, model: ModelSize, *, tasks: int, shards: int, room: int) -> int:
    """Bytes of a GPU that snapshots take and keep, as `training.snapshots` makes their pools: each what it
    wants, up to its budget, in whole snapshots.

    shards: ranks that share a copy of the weights. room: bytes that are free before there is a state.
    """
    held = model.held(config.optim.name, shards, tasks=tasks, momentum=config.optim.betas[0] > 0)
    whole, weights, given = held.snapshot, held.gradients, config.snapshot.device_bytes
    kind, policy = policy_class(config.mixture.policy), policy_of(config)
    kept = policy.most_kept(tasks) + (1 if kind.looks_ahead else 0)
    pools = [(weights if weights_are_enough(config) else whole, kept)]
    if config.evaluate.keep == "best" and not kind.names_result:
        pools.append((weights, 1))
    if given is not None:  # else copies of the whole state lie in pinned memory
        pools.append((whole, 2 if "revert" in (config.numbers.on_nonfinite, config.numbers.on_spike) else 1))
    free, taken = max(0, room - held.weights - held.masters - held.moments), 0
    for each, count in pools:
        budget = (free - taken) // 2 if given is None else min(int(given), free - taken)
        taken += min(count, budget // max(each, 1)) * each
    return taken


def sampling_rates(config: Config, names: tuple[str, ...], tasks: np.ndarray) -> dict[str, float]:
    """Rate of every task relative to its own size (1 = each sample once per epoch); empty for the natural
    mixture."""
    mixture = config.mixture
    sizes = {name: int((tasks == i).sum()) for i, name in enumerate(names)}
    if mixture.weights is not None:
        missing = sorted(set(names) - set(mixture.weights))
        if missing:
            wrong, todo = "some tasks have none", "give every task a weight, 0 to leave it out"
            raise ConfigError(describe("mixture.weights", wrong, got=missing, todo=todo))
        mass = dict(mixture.weights)
    elif mixture.temperature is not None:
        mass = _powers(sizes, mixture.temperature)
    else:
        return {}
    samples = sum(sizes.values())
    try:
        total = math.fsum(mass.values())
    except OverflowError:  # each can be written, and their sum cannot
        most = max(mass.values())
        mass = {name: one / most for name, one in mass.items()}
        total = math.fsum(mass.values())
    return {name: mass[name] / total * samples / size for name, size in sizes.items()}


def _powers(sizes: dict[str, int], temperature: float) -> dict[str, float]:
    """size ** (1 / temperature), up to a common factor."""
    try:
        if math.isfinite(1.0 / temperature):
            return {name: size ** (1.0 / temperature) for name, size in sizes.items()}
    except OverflowError:
        pass
    largest = math.log(max(sizes.values()))
    return {name: math.exp((math.log(size) - largest) / temperature) for name, size in sizes.items()}


def _checked(kind: Any, settings: Any) -> Policy:
    """ConfigError with everything that the settings say and cannot mean."""
    if problems := settings.problems():
        raise ConfigError(problems)
    policy: Policy = kind(settings)
    return policy


def _of_mixture(config: Config, rates: Mapping[str, float]) -> Any:
    """The settings of the mixture's policy: its fields that `mixture.*` has under the same name.

    Two mean something else there: `weights` are the rates that the data makes of mixture.weights, and the
    accuracy at which training data is memorised is stop's.
    """
    mixture, settings_type = config.mixture, policy_class(config.mixture.policy).settings_type
    known = {field.name for field in fields(settings_type)}
    given = {name: getattr(mixture, name) for name in known & set(type(mixture).model_fields)}
    given["weights"] = dict(rates)
    accuracy = config.stop.token_accuracy
    if accuracy is not None and "token_accuracy" in known:
        given["token_accuracy"] = accuracy
    return settings_type(**given)


def _saturation(config: Config, budget_updates: int | None = None, decays: bool = True) -> SaturationSettings:
    """budget_updates and decays are known only with the run's data: without them, not what the run has."""
    return SaturationSettings(
        token_accuracy=config.stop.token_accuracy,
        decay_token_accuracy=config.stop.decay_token_accuracy,
        plateau_epochs=config.stop.plateau_epochs,
        plateau_min_delta=config.stop.plateau_min_delta,
        budget_updates=budget_updates,
        budget_tokens=config.budget.tokens,
        decays=decays,
        decay_fraction=config.schedule.decay_fraction,
    )


def _check_validation(parts: Parts) -> None:
    if parts.validation is None:
        wrong = f"mixture.policy: {parts.config.mixture.policy} scores tasks and has no rows to score them on"
        raise DataError(
            describe("data.validation", wrong, todo="set data.validation or data.validation_fraction")
        )
