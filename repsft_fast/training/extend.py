"""A larger budget for a run that has begun or ended: from which checkpoint it goes on, and whether it can.

A run with a larger budget from the start would have made the same updates up to the point at which the smaller one began to
matter. So an extended run goes back to that point and equals, bit for bit, the run that had the larger budget all along.

    wsd             the decay ends with the budget: back to before its first update
    constant        nothing falls: on from the last state, its end taken back
    cosine, linear  every update's rate depends on the budget: there is no such point
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from repsft_fast import checkpoint
from repsft_fast.errors import CheckpointError, ConfigError, describe
from repsft_fast.schedule import NEEDS_TOTAL

if TYPE_CHECKING:
    from pathlib import Path

    from repsft_fast.training.parts import Parts

_OTHER_FOLDER = "choose another folder for a run of its own"


def record(parts: Parts) -> dict[str, Any]:
    """What a checkpoint keeps of the budget, as JSON. The warm-up is the schedule's: an extended run keeps the one it had."""
    settings = parts.config.budget.model_dump(mode="json")
    return {"updates": parts.budget.updates, "warmup_updates": parts.schedule.warmup_updates, "settings": settings}


def is_raised(saved: Mapping[str, Any] | None, parts: Parts) -> bool:
    """Whether the settings ask for a larger budget than the checkpoint's. ConfigError where it cannot be had.

    saved: `record` of the run before; None where an older version wrote none, and its settings are part of its identity.
    """
    now = record(parts)
    if saved is None or saved["settings"] == now["settings"]:
        return False
    before, after = saved["updates"], now["updates"]
    words = f"{_words(saved['settings'])} ({before:,} updates)", f"{_words(now['settings'])} ({after:,} updates)"
    if after == before:
        return False
    if after < before:
        todo = f"a run is not shortened: leave the budget as it was, or {_OTHER_FOLDER}"
        raise ConfigError(describe("budget", "is smaller than the one the run has", expected=words[0], got=words[1], todo=todo))
    if (name := parts.config.schedule.name) in NEEDS_TOTAL:
        wrong = f"cannot be raised under schedule.name: {name}, whose rate at every update depends on the budget"
        todo = f"{_OTHER_FOLDER}; wsd and constant can be extended"
        raise ConfigError(describe("budget", wrong, expected=words[0], got=words[1], todo=todo))
    return True


def origin(folder: Path, parts: Parts) -> Path:
    """The newest whole generation from which a run with a larger budget would have gone on alike.

    ConfigError when the run ended by something other than its budget, or when no such generation was kept.
    """
    paths, _ = checkpoint.candidates(folder)
    for path in paths:
        try:
            values = checkpoint.values_of(path)
        except CheckpointError:
            continue
        state, rule = values["state"], values.get("ended_by")
        if rule is not None and rule != "budget":
            words = state["progress"]["reason"]
            wrong = f"does not end this run, which ended by its rule ({words})"
            todo = f"a larger budget changes nothing: leave it as it was, or {_OTHER_FOLDER} with another rule"
            raise ConfigError(describe("budget", wrong, todo=todo))
        as_if = state["schedule"]["decay_start"] is None and not values.get("validated", False)
        if as_if and not checkpoint.verify(path):
            return path
    wrong = "cannot be raised: no whole checkpoint from before the decay of the learning rate is there"
    if parts.config.schedule.name == "constant":
        wrong = "cannot be raised: no whole checkpoint is there that the longer run would have had"
    todo = f"checkpoint.keep_extendable: true keeps one; {_OTHER_FOLDER}"
    raise ConfigError(describe("budget", wrong, got=str(folder), todo=todo))


def keep_warmup(saved: Mapping[str, Any], parts: Parts) -> str | None:
    """Let the schedule warm up as the run began, which is past by now; what is to be said where the settings mean another."""
    before, now = saved["warmup_updates"], parts.schedule.warmup_updates
    parts.schedule.warmup_updates = before
    parts.budget = replace(parts.budget, warmup_updates=before)
    if before == now:
        return None
    return (
        f"the warm-up stays at {before:,} updates, as the run began, where optim.warmup_fraction of the larger budget would be "
        f"{now:,}: the run equals one that had this budget and optim.warmup_updates: {before} from the start"
    )


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"budget.{name}: {value}" for name, value in settings.items() if value is not None) or "no budget"
