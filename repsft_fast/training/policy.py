"""Which policy a run has: from settings to one of `policies`, and how many moments it may ask for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from repsft_fast.config import Config
from repsft_fast.errors import ConfigError, DataError, describe
from repsft_fast.policies import BASELINES, BaselineSettings, History, Msft, MsftSettings, Saturation, SaturationSettings
from repsft_fast.training.parts import Parts


def build_policy(parts: Parts) -> Any:
    """The policy of the settings; without `mixture.policy` the saturation rule over everything. ConfigError when impossible."""
    mixture = parts.config.mixture
    settings: Any
    kind: Any
    if mixture.policy is None:
        settings, kind = _saturation(parts), Saturation
    else:
        _check_validation(parts)
        rates = sampling_rates(parts.config, parts.data.task_names, parts.data.train.index.tasks)
        settings, kind = _of_mixture(parts.config, rates)
    if problems := settings.problems():
        raise ConfigError(problems)
    return kind(settings)


def named_result(config: Config, history: History) -> str | None:
    """The moment that the policy names as the result at this point of its table; None: the state. No data is needed for it."""
    if config.mixture.policy is None or not history.stages:
        return None
    settings, kind = _of_mixture(config, {})
    name: str | None = kind(settings).result(history)
    return name


def moments_needed(parts: Parts, policy: Any) -> int:
    """Snapshots held at once, at most; 0 when none is gone back to."""
    if parts.config.mixture.policy is None:
        return 0
    return policy.most_kept(len(parts.data.task_names)) + (parts.config.mixture.policy == "dynamix")


def weights_are_enough(config: Config) -> bool:
    """Whether a moment is only its weights: roll-backs reset the optimizer, and nobody looks one update ahead."""
    return config.mixture.optimizer == "reset" and config.mixture.policy != "dynamix"


def sampling_rates(config: Config, names: tuple[str, ...], tasks: np.ndarray) -> dict[str, float]:
    """Rate of every task relative to its own size (1 = each sample once per epoch); empty for the natural mixture."""
    mixture = config.mixture
    sizes = {name: int((tasks == i).sum()) for i, name in enumerate(names)}
    if mixture.weights is not None:
        missing = sorted(set(names) - set(mixture.weights))
        if missing:
            raise ConfigError(
                describe(
                    "mixture.weights", "some tasks have none", got=missing, todo="give every task a weight, 0 to leave it out"
                )
            )
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


def _of_mixture(config: Config, rates: dict[str, float]) -> tuple[Any, Any]:
    """(settings, kind) of the mixture's policy."""
    mixture = config.mixture
    common: dict[str, Any] = {
        "compute_budget": float(mixture.compute_budget),
        "evaluations_per_epoch": mixture.evaluations_per_epoch,
        "weights": rates,
    }
    if mixture.policy == "msft":
        return _msft(config, common), Msft
    return BaselineSettings(**common), BASELINES[str(mixture.policy)]


def _saturation(parts: Parts) -> SaturationSettings:
    config = parts.config
    return SaturationSettings(
        token_accuracy=config.stop.token_accuracy,
        plateau_epochs=config.stop.plateau_epochs,
        plateau_min_delta=config.stop.plateau_min_delta,
        budget_updates=parts.budget.updates,
        budget_tokens=config.budget.tokens,
        decays=parts.schedule.decays_on_demand,
        decay_fraction=config.schedule.decay_fraction,
    )


def _msft(config: Config, common: dict[str, Any]) -> MsftSettings:
    mixture = config.mixture
    names = (
        "rule",
        "max_stages",
        "exclude_on",
        "optimizer",
        "schedule",
        "data",
        "rehearsal",
        "min_delta",
        "min_progress",
        "patience",
        "z",
    )
    accuracy = config.stop.token_accuracy
    given: dict[str, Any] = {name: getattr(mixture, name) for name in names}
    if accuracy is not None:
        given["token_accuracy"] = accuracy
    return MsftSettings(**common, **given)


def _check_validation(parts: Parts) -> None:
    if parts.validation is None:
        wrong = f"mixture.policy: {parts.config.mixture.policy} scores tasks and has no rows to score them on"
        raise DataError(describe("data.validation", wrong, todo="set data.validation or data.validation_fraction"))
