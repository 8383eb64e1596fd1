"""The learning rate as a pure function of the update.

`update` counts from 0 and names the update about to be made, so a run of B updates asks for 0 … B-1. With w
warm-up updates the rate of update u is lr·(u+1)/(w+1) for u < w (never 0: an update at rate 0 is an update
lost), and then

    constant  lr
    linear    lr·(B-u)/(B-w)
    cosine    lr·(1 + cos(pi·(u-w)/(B-w)))/2                              (paper A's schedule)
    wsd       lr until the decay is *triggered* at update s, then over d updates lr(s)·(s+d-u)/(d+1)

Warm-up–stable–decay (wsd) needs no horizon: the decay's start is state, set when training has saturated. Each
of its d updates has a lower rate than the one before it, none has rate 0, and the run ends at s+d.
"""

import math
from dataclasses import dataclass
from typing import Any

from repsft_fast.errors import TrainingError, describe

NAMES = ("wsd", "cosine", "constant", "linear")
NEEDS_TOTAL = ("cosine", "linear")


def warmup(update: int, lr: float, warmup_updates: int) -> float:
    """Linear warm-up; full rate from update `warmup_updates` on."""
    return lr * (update + 1) / (warmup_updates + 1) if update < warmup_updates else lr


def constant(update: int, lr: float, warmup_updates: int = 0) -> float:
    return warmup(update, lr, warmup_updates)


def linear(update: int, lr: float, warmup_updates: int, total_updates: int) -> float:
    """Falls in a straight line to 0 at `total_updates`, and stays there."""
    if update < warmup_updates:
        return warmup(update, lr, warmup_updates)
    return lr * _left(update, warmup_updates, total_updates)


def cosine(update: int, lr: float, warmup_updates: int, total_updates: int) -> float:
    """Half a cosine to 0 at `total_updates`, and 0 from there on."""
    if update < warmup_updates:
        return warmup(update, lr, warmup_updates)
    return lr * 0.5 * (1.0 - math.cos(math.pi * _left(update, warmup_updates, total_updates)))


def wsd(update: int, lr: float, warmup_updates: int, decay_start: int | None, decay_updates: int) -> float:
    """Warm-up, then stable until `decay_start` (None: not triggered), then down from the rate reached
    there."""
    if decay_start is None or update < decay_start:
        return warmup(update, lr, warmup_updates)
    left = max(0, decay_start + decay_updates - update)
    return warmup(decay_start, lr, warmup_updates) * left / (decay_updates + 1)


def default_decay_updates(updates_done: int, fraction: float = 0.1) -> int:
    """Length of a decay triggered after `updates_done` updates: that share of them, at least 1."""
    return max(1, round(updates_done * fraction))


def problems(
    name: str,
    lr: float,
    warmup_updates: int,
    total_updates: int | None,
    decay_fraction: float = 0.1,
    decay_updates: int | None = None,
) -> list[str]:
    """What is wrong with these settings, in the settings' own names; empty when they can be used. For
    ConfigError, at start."""
    found = []
    if name not in NAMES:
        expected = f"one of {', '.join(NAMES)}"
        found.append(describe("schedule.name", "is not a schedule", expected=expected, got=name))
    if not (math.isfinite(lr) and lr > 0):
        todo = "at rate 0 nothing is learnt" if lr == 0 else None
        wrong, expected = "is not a learning rate", "a finite number above 0"
        found.append(describe("optim.lr", wrong, expected=expected, got=lr, todo=todo))
    found += _length_problems(name, warmup_updates, total_updates)
    if not 0.0 <= decay_fraction <= 1.0:
        wrong, expected = "is not a share", "between 0 and 1"
        found.append(describe("schedule.decay_fraction", wrong, expected=expected, got=decay_fraction))
    if decay_updates is not None and decay_updates < 1:
        wrong, expected = "is too short", "at least 1"
        found.append(describe("schedule.decay_updates", wrong, expected=expected, got=decay_updates))
    return found


def _length_problems(name: str, warmup_updates: int, total_updates: int | None) -> list[str]:
    found = []
    if total_updates is not None and total_updates < 1:
        wrong = "leaves nothing to do"
        found.append(describe("budget.updates", wrong, expected="at least 1", got=total_updates))
    elif total_updates is None and name in NEEDS_TOTAL:
        wrong, todo = f"{name} needs the run's length", "set budget.updates, or use wsd"
        found.append(describe("schedule.name", wrong, todo=todo))
    if warmup_updates < 0:
        found.append(
            describe("optim.warmup_updates", "is negative", expected="at least 0", got=warmup_updates)
        )
    elif total_updates is not None and 1 <= total_updates <= warmup_updates:
        wrong, expected = "the warm-up is as long as the run or longer", f"below {total_updates}"
        todo = "lower it, or raise budget.updates"
        found.append(
            describe("optim.warmup_updates", wrong, expected=expected, got=warmup_updates, todo=todo)
        )
    return found


@dataclass
class Schedule:
    """One run's schedule. All but the last two fields are settings; those two are state (`values`,
    `load`)."""

    name: str
    peak_lr: float
    warmup_updates: int = 0
    total_updates: int | None = None  # the horizon of cosine and linear; wsd and constant have none
    # wsd: length of the decay, as a share of the updates done when it is triggered
    decay_fraction: float = 0.1
    decay_updates: int | None = None  # wsd: that length in updates instead

    decay_start: int | None = None  # wsd: the first update of the decay; None = not triggered
    decay_length: int | None = None  # wsd: its length, fixed when it is triggered

    def lr(self, update: int) -> float:
        """The rate of update `update` (0, 1, …). Pure: the same state gives the same rate."""
        if self.name == "wsd":
            return wsd(update, self.peak_lr, self.warmup_updates, self.decay_start, self.decay_length or 1)
        if self.name == "constant":
            return constant(update, self.peak_lr, self.warmup_updates)
        if self.total_updates is None:
            raise TrainingError(
                describe(
                    "schedule", f"{self.name} needs the run's length", expected="total_updates", got=None
                )
            )
        fall = cosine if self.name == "cosine" else linear
        return fall(update, self.peak_lr, self.warmup_updates, self.total_updates)

    @property
    def decays_on_demand(self) -> bool:
        """Whether a rule that fires should start a decay (wsd) or simply end the run (the others)."""
        return self.name == "wsd"

    def length_of_decay(self, updates_done: int) -> int:
        """How long the decay would be, were it triggered now. Policies ask this to end a decay at the
        budget's end."""
        return self.decay_updates or default_decay_updates(updates_done, self.decay_fraction)

    def trigger_decay(self, update: int, updates: int | None = None) -> int:
        """Start the decay at `update` (= updates done). The first trigger stands. Returns the update at which
        the run ends.

        `updates` overrides the length. Raises TrainingError where nothing can be triggered.
        """
        if not self.decays_on_demand:
            raise TrainingError(
                describe("schedule", f"{self.name} has no decay to trigger", expected="wsd", got=self.name)
            )
        if updates is not None and updates < 1:
            raise TrainingError(
                describe("schedule", "a decay needs an update", expected="at least 1", got=updates)
            )
        if self.decay_start is None:
            self.decay_start = update
            self.decay_length = updates if updates is not None else self.length_of_decay(update)
        assert self.decay_length is not None
        return self.decay_start + self.decay_length

    def end(self) -> int | None:
        """The update before which the run ends by schedule: the horizon, or the end of a triggered decay;
        None = open."""
        if self.name == "wsd":
            return None if self.decay_start is None else self.decay_start + (self.decay_length or 1)
        return self.total_updates if self.name in NEEDS_TOTAL else None

    def finished(self, update: int) -> bool:
        """True when `update` is past the last one this schedule has a rate for."""
        end = self.end()
        return end is not None and update >= end

    def values(self) -> dict[str, Any]:
        """The state as JSON; part of the closed list."""
        return {"decay_start": self.decay_start, "decay_length": self.decay_length}

    def load(self, values: dict[str, Any]) -> None:
        """Put a saved state back, also an earlier one (a roll-back undoes a trigger)."""
        start, length = values["decay_start"], values["decay_length"]
        given = [value for value in (start, length) if value is not None]
        if len(given) == 1:
            raise TrainingError(
                describe("schedule", "saved state contradicts itself", expected="both or neither", got=values)
            )
        self.decay_start, self.decay_length = start, length


def _left(update: int, warmup_updates: int, total_updates: int) -> float:
    """Share of the way from the warm-up's end to the horizon that is still ahead, 1 … 0."""
    return max(0, total_updates - update) / max(1, total_updates - warmup_updates)
