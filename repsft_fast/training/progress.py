"""Where a run stands: what a roll-back takes back (`Progress`) and what it does not (`Lasting`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from typing import Any

from repsft_fast.throughput import Work

GUESSES = 16  # values that kept_guess takes
# Names of fields in checkpoints, where the first versions wrote others.
_WRITTEN = {"evaluated": "looked"}


def crosses(before: Fraction, after: Fraction, every: float) -> bool:
    """Whether a multiple of `every` lies after `before` and not after `after`. Exact: no float adds up."""
    step = Fraction(str(every))
    return after // step > before // step


@dataclass
class Progress:
    """Of the kept branch: a roll-back puts all of it back.

    The cursor (stage, epoch, update) names the *next* update.
    """

    stage: int = 0  # key of the data order, as the plan takes it
    epoch: int = 0  # of the stage
    update: int = 0  # of the epoch
    updates_in_epoch: int = 1  # length of the epoch the cursor is in
    earlier: str = "0"  # epochs of this stage done before the current plan, as an exact fraction "a/b"
    past_epochs: float = 0.0  # of the kept branch, in stages before this one
    updates: int = 0  # applied on the kept branch: the schedule's clock
    active: list[int] | None = None  # task ids in training; None = all
    task_weights: dict[int, float] | None = None  # sampling weights; None = every sample once per epoch
    draws: int | None = None  # samples drawn per epoch under task_weights; None = as many as are active
    skip: list[int] = field(default_factory=list)  # samples left out of this epoch
    work: Work = field(default_factory=Work)
    kept_guess: float = (
        1.0  # share of a row's trained positions that the head expects loss.skip_below to keep
    )
    kept_most: float | None = None  # the largest such share seen in the running epoch; None = nothing counted
    reason: str | None = None  # set when the run has ended

    @property
    def stage_epochs(self) -> Fraction:
        """Epochs of the active mixture since the stage began. Exact."""
        return Fraction(self.earlier) + Fraction(self.update, self.updates_in_epoch)

    @property
    def epochs(self) -> float:
        """Epochs of the kept branch, all stages."""
        return self.past_epochs + float(self.stage_epochs)

    def ended_on(self, every_epochs: float) -> bool:
        """Whether the last update crossed a multiple of `every_epochs`, counted within the stage."""
        done = self.epoch + Fraction(self.update, self.updates_in_epoch)
        return crosses(done - Fraction(1, self.updates_in_epoch), done, every_epochs)

    def step_done(self, work: Work, updates_in_epoch: int) -> None:
        """One update was made: the cursor names the next."""
        self.advance(updates_in_epoch)
        self.updates += 1
        self.work.add(work)

    def advance(self, updates_in_epoch: int) -> None:
        """The cursor names the next update; the schedule's clock stands still, and nothing is counted."""
        self.update += 1
        self.updates_in_epoch = updates_in_epoch

    def record_kept_share(self, shares: Sequence[float]) -> None:
        """Shares of a row's trained positions that loss.skip_below kept, of updates of the running epoch."""
        if shares:
            self.kept_most = max(self.kept_most or 0.0, *shares)

    def next_epoch(self) -> None:
        """Close the running plan, finished or not; what was done of it stays counted."""
        self._guess_kept(self.update == self.updates_in_epoch)
        self.earlier = str(self.stage_epochs)
        self.epoch += 1
        self.update = 0
        self.skip = []

    def next_stage(self, data_key: int, updates: int) -> None:
        """Begin a stage at update `updates` of the schedule, in the order of samples that `data_key`
        gives."""
        self.past_epochs = self.epochs
        self.stage, self.epoch, self.update, self.earlier, self.updates = data_key, 0, 0, "0", updates
        self.skip = []
        self._guess_kept(False)

    def leave_out(self, samples: list[int]) -> None:
        """Leave these samples out of the epoch that begins."""
        self.skip = samples
        self._guess_kept(False)

    def _guess_kept(self, same_samples: bool) -> None:
        """From the epoch that ended to the one that begins, with an eighth of room and in sixteenths, so that
        shapes are few.

        Only here, where neither logging nor saving decides when: sizes of products decide the rounding, and a
        run must not depend on either. An epoch over other samples than the last begins with all rows.
        """
        known = same_samples and self.kept_most is not None
        room = math.ceil((self.kept_most or 0.0) * 1.125 * GUESSES) if known else GUESSES
        self.kept_guess = min(max(room, 1), GUESSES) / GUESSES
        self.kept_most = None


@dataclass
class Lasting:
    """Of the whole run, discarded branches too: a roll-back leaves it as it is, a resumption puts it back."""

    all_work: Work = field(default_factory=Work)
    # forward passes: of a mixture's evaluations, of samples that skip an epoch
    evaluated: Work = field(default_factory=Work)
    # updates made to look ahead and put back, two forward passes beside each
    probed: Work = field(default_factory=Work)
    vetoed: int = 0  # updates refused for non-finite numbers
    refused_in_a_row: int = 0  # updates not taken since the last that was, not finite or spikes
    spiked: int = 0  # updates that were loss spikes, applied or not
    # (stage, epoch, update) of updates refused before a revert
    passed_over: list[Any] = field(default_factory=list)
    row_tokens: int | None = None  # shorter rows than the settings', after memory ran out
    token_accuracy: float | None = None  # of the last judged epoch or probe
    best: dict[str, Any] | None = None  # best validation so far


def values_of(*both: Progress | Lasting) -> dict[str, Any]:
    """Both as one JSON object, as a checkpoint holds them; `load_values` takes it back."""
    values: dict[str, Any] = {}
    for half in both:
        values |= {_WRITTEN.get(name, name): value for name, value in asdict(half).items()}
    if (weights := values.get("task_weights")) is not None:
        values["task_weights"] = {str(task): weight for task, weight in weights.items()}
    return values


def load_values(values: Mapping[str, Any], *both: Progress | Lasting) -> None:
    """Put saved values back into these, each what is its own."""
    for half in both:
        for one in fields(half):
            name = _WRITTEN.get(one.name, one.name)
            if name not in values:  # an older version's checkpoint: as at the start
                continue
            value = values[name]
            if one.name in ("work", "all_work", "evaluated", "probed"):
                value = Work(**value)
            elif one.name == "task_weights" and value is not None:
                value = {int(task): weight for task, weight in value.items()}
            setattr(half, one.name, value)
