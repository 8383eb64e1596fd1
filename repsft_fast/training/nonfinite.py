"""Updates that were refused: counted, named by their samples, and met as numbers.on_nonfinite and numbers.on_spike say.

    stop      the run ends at the first one (non-finite numbers only)
    skip      no weight was changed by it; on with the next
    revert    `Refused` goes up to `training.recovery`, which goes back to before it
    log       a spike is applied, and said

A run in which no update is taken any more ends after REFUSED_IN_A_ROW of them, whatever goes back or is passed over meanwhile,
and one that reaches its end without a finite update fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from repsft_fast.config import Config
from repsft_fast.data.plan import PlannedRow, Update
from repsft_fast.distributed import largest
from repsft_fast.errors import TrainingError, describe
from repsft_fast.metrics import UpdateRecord
from repsft_fast.state import local
from repsft_fast.training.parts import Parts
from repsft_fast.training.spikes import SIGMAS, verdict

if TYPE_CHECKING:
    from repsft_fast.training.reporter import Reporter

REFUSED_IN_A_ROW = 64  # one after the other: more, and none will be taken (spikes are accepted as a new level before)
_NAMED_IN_A_ROW = 8  # of these the samples are passed through the model one by one, to find the guilty
_NAMED = 8  # samples named of an update


class Refused(Exception):
    """Updates were refused and the run goes back to before them (numbers.on_nonfinite or on_spike: revert)."""

    def __init__(self, cursors: list[tuple[int, int, int]], *, spikes_alone: bool = False):
        super().__init__(f"{len(cursors)} updates were refused")
        self.cursors, self.spikes_alone = cursors, spikes_alone  # (stage, epoch, update) of each


def reverts(config: Config) -> bool:
    """Whether a refused update makes the run go back."""
    return "revert" in (config.numbers.on_nonfinite, config.numbers.on_spike)


class Refusals:
    """What becomes of every update that was read. go_back_on_spikes: while false, spikes are skipped where revert is set."""

    def __init__(self, parts: Parts, reporter: Reporter):
        self.parts, self.reporter, self.go_back_on_spikes = parts, reporter, True

    def look(self, records: Iterable[UpdateRecord], updates: Mapping[int, Update]) -> None:
        """Records as the ledger gave them, the same on every rank. updates: by number, those whose samples are known.

        TrainingError (code nonfinite) where the run ends by it; Refused where it goes back.
        """
        numbers, progress = self.parts.config.numbers, self.parts.progress
        back: list[UpdateRecord] = []
        for record in records:
            progress.refused_in_a_row = progress.refused_in_a_row + 1 if record.vetoed else 0
            if record.spike:
                progress.spiked += 1
                back += [record] * (numbers.on_spike == "revert" and self.go_back_on_spikes)
                self.reporter.note(self._spike(record, updates.get(record.update)))
            elif record.vetoed:
                progress.vetoed += 1
                back += [record] * (numbers.on_nonfinite == "revert")
                self._nonfinite(record, updates.get(record.update))
            if progress.refused_in_a_row >= REFUSED_IN_A_ROW:
                raise never_finite(self.parts, f"{progress.refused_in_a_row} updates in a row were refused")
        if progress.reason is not None and 0 < progress.all_work.updates <= progress.vetoed:
            raise never_finite(self.parts, f"none of the run's {progress.vetoed} updates was finite: nothing was trained")
        at = [updates[record.update].cursor for record in back if record.update in updates]
        if at and progress.reason is None:
            raise Refused([(c.stage, c.epoch, c.update) for c in at], spikes_alone=all(r.spike for r in back))

    def _nonfinite(self, record: UpdateRecord, update: Update | None) -> None:
        """Say which samples, and end the run where that is the setting."""
        in_a_row = self.parts.progress.refused_in_a_row
        text = name_culprits(self.parts, record, update.samples if update else None, alone=in_a_row <= _NAMED_IN_A_ROW)
        self.reporter.note(text)
        if self.parts.config.numbers.on_nonfinite == "stop":
            raise _error(f"{text}; no weight was changed by it; --resume with numbers.on_nonfinite: skip goes on")

    def _spike(self, record: UpdateRecord, update: Update | None) -> str:
        found = verdict(record.judged)
        assert found is not None
        figures = []
        for name, value, middle, limit in zip(
            ("loss", "gradient norm"), (record.loss, record.grad_norm), found.middle, found.limit, strict=True
        ):
            above = f"> {limit:.4g}, {SIGMAS:g} deviations above the last updates' {middle:.4g}"
            figures.append(f"{name} {value:.4g} {above if value > limit else f'(limit {limit:.4g})'}")
        done = {"log": "applied", "skip": "skipped"}.get(
            self.parts.config.numbers.on_spike, "refused" if self.go_back_on_spikes else "skipped: went back too often already"
        )
        among = f"; in one of {_named(self.parts, update.samples)}" if update is not None else ""
        return f"update {record.update + 1}: a spike, {done}: {'; '.join(figures)}{among}"


def never_finite(parts: Parts, wrong: str) -> TrainingError:
    """The error of a run that cannot go on, with the likely cause. Every rank must call it."""
    lr = parts.config.optim.lr
    weight = weight_not_finite(parts)
    if weight is not None:
        todo = f"in another folder begin with a model whose weights are, or with a lower optim.lr (it is {lr:g})"
        return _error(describe("training", wrong, got=f"the weight {weight} is not finite", todo=todo))
    todo = f"look at the samples named above, or begin in another folder with a lower optim.lr (it is {lr:g}) or in float32"
    return _error(describe("training", wrong, got="every weight is finite", todo=todo))


def check_weights(parts: Parts) -> None:
    """TrainingError (code nonfinite) when a trained weight is NaN or infinite: such a model is no result. All ranks call it."""
    weight = weight_not_finite(parts, trained_only=True)
    if weight is not None:
        todo = (
            f"begin in another folder with a lower optim.lr (it is {parts.config.optim.lr:g}); where a checkpoint has finite "
            f"weights, `repsft export {parts.folder} --to FOLDER` writes its model"
        )
        raise _error(describe("training", f"the trained weight {weight} is not finite: such a model is no result", todo=todo))


def weight_not_finite(parts: Parts, *, trained_only: bool = False) -> str | None:
    """The name of a weight that is not finite on some rank, the same on every rank; None when all are. Waits for the device."""
    named = [(n, p) for n, p in parts.model.named_parameters() if p.requires_grad or not trained_only]
    bad = 0
    for number, (_, parameter) in enumerate(named, 1):
        value = local(parameter.detach())
        if value.numel() and value.is_floating_point():
            ends = torch.stack(torch.aminmax(value))  # NaN where there is one, and no second copy of the weight
            bad = bad or (0 if bool(torch.isfinite(ends).all()) else number)
    (bad,) = largest(bad)
    return named[bad - 1][0] if bad else None


def name_culprits(parts: Parts, record: UpdateRecord, samples: np.ndarray | None, *, alone: bool = True) -> str:
    """One sentence. Each sample of the update is passed alone through the model as it is now (the update changed nothing).

    Under several ranks the samples are not run again, since every rank would have to; the whole update is named, as it is
    where `alone` is false.
    """
    where = f"update {record.update + 1}"
    what = "the loss" if not np.isfinite(record.loss) else "a gradient"
    if samples is None:
        return describe(where, f"{what} was not finite")
    whole = parts.world.size > 1 or not alone
    guilty = samples if whole else np.array([s for s in samples if not _finite_alone(parts, int(s))], dtype=np.int64)
    words = "in" if len(guilty) else "though every sample's own loss is finite, in one of"
    return describe(where, f"{what} was not finite {words} {_named(parts, guilty if len(guilty) else samples)}")


def _named(parts: Parts, samples: np.ndarray) -> str:
    sources = [parts.data.train.sources[int(s)] or f"sample {int(s)}" for s in samples[:_NAMED]]
    more = f" and {len(samples) - _NAMED} more" if len(samples) > _NAMED else ""
    return f"{', '.join(sources)}{more}"


@torch.no_grad()
def _finite_alone(parts: Parts, sample: int) -> bool:
    length = int(parts.data.train.index.lengths[sample])
    row = parts.data.train.row(PlannedRow(np.array([sample]), length, length), denominator=1.0, average="token")
    loss, _ = parts.model.loss(row)
    return bool(torch.isfinite(loss))


def _error(text: str) -> TrainingError:
    error = TrainingError(text)
    error.code = "nonfinite"  # type: ignore[attr-defined]
    return error
