"""Updates that were refused, or that would train nothing: counted, named by their samples, and met as
numbers.on_nonfinite and numbers.on_spike say.

    stop      the run ends at the first one (non-finite numbers only)
    skip      no weight was changed by it; on with the next
    revert    `Refused` goes up to `training.recovery`, which goes back to before it
    log       a spike is applied, and said

A run in which no update is taken any more ends after REFUSED_IN_A_ROW of them, whatever goes back or is
passed over meanwhile, and one that reaches its end without a finite update fails.

A missing gradient looks like a quiet run: the norm is 0.0 or a little small, nothing is vetoed, and the
weights stand still. What the host knows (which gradients are there) is asked in every update; what only the
device knows (that all of them are zero) when the ledger is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from repsft_fast.config import Config
from repsft_fast.data.plan import PlannedRow, Update
from repsft_fast.distributed import held_parameters, max_over_hosts, unfinished
from repsft_fast.errors import TrainingError, describe
from repsft_fast.metrics import UpdateRecord
from repsft_fast.state import local
from repsft_fast.training.parts import Parts
from repsft_fast.training.reporter import Reporter
from repsft_fast.training.spikes import SIGMAS, verdict

RESUME = "--resume goes on from the last checkpoint"
UNREACHED = (
    "if it comes again, the loss does not reach the weights that are trained (model.lora, the model's own"
    " code)"
)

RAN_AWAY = (
    "updates before it had gradients, so the weights have run away: begin in another folder with a lower"
    " optim.lr"
)
# one after the other: more, and none will be taken (spikes are accepted as a new level before)
REFUSED_IN_A_ROW = 64
_NAMED_IN_A_ROW = 8  # of these the samples are passed through the model one by one, to find the guilty
_NAMED = 8  # samples named of an update


class Refused(Exception):
    """Updates were refused and the run goes back to before them (numbers.on_nonfinite or on_spike:
    revert)."""

    def __init__(self, cursors: list[tuple[int, int, int]], *, spikes_alone: bool = False):
        super().__init__(f"{len(cursors)} updates were refused")
        self.cursors, self.spikes_alone = cursors, spikes_alone  # (stage, epoch, update) of each


def reverts(config: Config) -> bool:
    """Whether a refused update makes the run go back."""
    return "revert" in (config.numbers.on_nonfinite, config.numbers.on_spike)


class Refusals:
    """What becomes of every update that was read. go_back_on_spikes: while false, spikes are skipped where
    revert is set."""

    def __init__(self, parts: Parts, reporter: Reporter):
        self.parts, self.reporter, self.go_back_on_spikes = parts, reporter, True

    def look(self, records: Iterable[UpdateRecord], updates: Mapping[int, Update]) -> None:
        """Records as the ledger gave them, the same on every rank. updates: by number, those whose samples
        are known.

        TrainingError (code nonfinite) where the run ends by it; Refused where it goes back.
        """
        numbers, progress, lasting = self.parts.config.numbers, self.parts.progress, self.parts.lasting
        back: list[UpdateRecord] = []
        for record in records:
            lasting.refused_in_a_row = lasting.refused_in_a_row + 1 if record.vetoed else 0
            if record.spike:
                lasting.spiked += 1
                back += [record] * (numbers.on_spike == "revert" and self.go_back_on_spikes)
                self.reporter.note(self._spike(record, updates.get(record.update)))
            elif record.vetoed:
                lasting.vetoed += 1
                back += [record] * (numbers.on_nonfinite == "revert")
                self._nonfinite(record, updates.get(record.update))
            if lasting.refused_in_a_row >= REFUSED_IN_A_ROW:
                raise never_finite(self.parts, f"{lasting.refused_in_a_row} updates in a row were refused")
        if progress.reason is not None and 0 < lasting.all_work.updates <= lasting.vetoed:
            raise never_finite(
                self.parts, f"none of the run's {lasting.vetoed} updates was finite: nothing was trained"
            )
        at = [updates[record.update].cursor for record in back if record.update in updates]
        if at and progress.reason is None:
            raise Refused([(c.stage, c.epoch, c.update) for c in at], spikes_alone=all(r.spike for r in back))

    def _nonfinite(self, record: UpdateRecord, update: Update | None) -> None:
        """Say which samples, and end the run where that is the setting."""
        in_a_row = self.parts.lasting.refused_in_a_row
        text = name_culprits(
            self.parts, record, update.samples if update else None, alone=in_a_row <= _NAMED_IN_A_ROW
        )
        self.reporter.note(text)
        if self.parts.config.numbers.on_nonfinite == "stop":
            raise _error(
                f"{text}; no weight was changed by it; --resume with numbers.on_nonfinite: skip goes on"
            )

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
            self.parts.config.numbers.on_spike,
            "refused" if self.go_back_on_spikes else "skipped: went back too often already",
        )
        among = f"; in one of {_named(self.parts, update.samples)}" if update is not None else ""
        return f"update {record.update + 1}: a spike, {done}: {'; '.join(figures)}{among}"


def never_finite(parts: Parts, wrong: str) -> TrainingError:
    """The error of a run that cannot go on, with the likely cause. Every rank must call it."""
    lr = parts.config.optim.lr
    weight = weight_not_finite(parts)
    if weight is not None:
        todo = (
            f"in another folder begin with a model whose weights are, or with a lower optim.lr (it is {lr:g})"
        )
        return _error(describe("training", wrong, got=f"the weight {weight} is not finite", todo=todo))
    todo = (
        f"look at the samples named above, or begin in another folder with a lower optim.lr (it is {lr:g}) or"
        " in float32"
    )
    return _error(describe("training", wrong, got="every weight is finite", todo=todo))


def check_weights(parts: Parts) -> None:
    """TrainingError (code nonfinite) when a trained weight is NaN or infinite: such a model is no result. All
    ranks call it."""
    weight = weight_not_finite(parts, trained_only=True)
    if weight is not None:
        todo = (
            f"begin in another folder with a lower optim.lr (it is {parts.config.optim.lr:g}); where a"
            f" checkpoint has finite weights, `repsft export {parts.folder} --to FOLDER` writes its model"
        )
        raise _error(
            describe(
                "training", f"the trained weight {weight} is not finite: such a model is no result", todo=todo
            )
        )


def weight_not_finite(parts: Parts, *, trained_only: bool = False) -> str | None:
    """The name of a weight that is not finite on some rank, the same on every rank; None when all are. Waits
    for the device."""
    named = [(n, p) for n, p in held_parameters(parts.model) if p.requires_grad or not trained_only]
    bad = 0
    for number, (_, parameter) in enumerate(named, 1):
        value = local(parameter.detach())
        if value.numel() and value.is_floating_point():
            # NaN where there is one, and no second copy of the weight
            ends = torch.stack(torch.aminmax(value))
            bad = bad or (0 if bool(torch.isfinite(ends).all()) else number)
    (bad,) = max_over_hosts(parts.world, bad)
    return named[bad - 1][0] if bad else None


def name_culprits(
    parts: Parts, record: UpdateRecord, samples: np.ndarray | None, *, alone: bool = True
) -> str:
    """One sentence. Each sample of the update is passed alone through the model as it is now (the update
    changed nothing).

    Under several ranks the samples are not run again, since every rank would have to; the whole update is
    named, as it is where `alone` is false.
    """
    where = f"update {record.update + 1}"
    what = "the loss" if not np.isfinite(record.loss) else "a gradient"
    if samples is None:
        return describe(where, f"{what} was not finite")
    whole = parts.world.size > 1 or not alone
    guilty = (
        samples
        if whole
        else np.array([s for s in samples if not _finite_alone(parts, int(s))], dtype=np.int64)
    )
    words = "in" if len(guilty) else "though every sample's own loss is finite, in one of"
    return describe(
        where, f"{what} was not finite {words} {_named(parts, guilty if len(guilty) else samples)}"
    )


def _named(parts: Parts, samples: np.ndarray) -> str:
    sources = [parts.data.train.sources[int(s)] or f"sample {int(s)}" for s in samples[:_NAMED]]
    more = f" and {len(samples) - _NAMED} more" if len(samples) > _NAMED else ""
    return f"{', '.join(sources)}{more}"


@torch.no_grad()
def _finite_alone(parts: Parts, sample: int) -> bool:
    length = int(parts.data.train.index.lengths[sample])
    row = parts.data.train.row(
        PlannedRow(np.array([sample]), length, length), denominator=1.0, average="token"
    )
    loss, _ = parts.model.loss(row)
    return bool(torch.isfinite(loss))


def _error(text: str) -> TrainingError:
    return TrainingError(text, code="nonfinite")


# Updates that train nothing ----------------------------------------------------------------------


def check_gradients(parts: Parts, update: Update) -> None:
    """Called when every row of the update has been passed backward. TrainingError when its gradients have not
    come.

    Waits for nothing and asks no other rank: FSDP2 gives every rank its part of every gradient, also one with
    padding alone. An update without a weighted position (`denominator` 0) may have none.
    """
    where = f"update {parts.progress.updates + 1}"
    if unfinished(parts.model):
        wrong = (
            "FSDP2 has not ended its backward pass, so some gradients are missing; no weight was changed"
            " by it"
        )
        raise TrainingError(describe(where, wrong, todo=RESUME))
    if update.denominator > 0.0 and all(p.grad is None for p in parts.optimizer.names.values()):
        wrong = (
            f"its {len(update.samples)} samples have left no gradient: nothing would be learned, and nothing"
            " was changed"
        )
        raise TrainingError(describe(where, wrong, todo=f"{RESUME}; {UNREACHED}"))


class ZeroGradients:
    """Counts updates whose gradients were all exactly zero for a reason, and ends the run at the first
    without one.

    Reasons: loss.skip_below left out every position; every weight is 0, or every position is learned to the
    last bit, and then the loss is exactly 0 too.
    """

    def __init__(self, skip_below: float, reporter: Reporter):
        self.skip_below, self.reporter = skip_below, reporter
        self.count = 0
        self.had_some = False  # an update of this process had a gradient: the loss does reach the weights

    def look(self, records: Iterable[UpdateRecord]) -> None:
        """What the ledger told, the same on every rank. TrainingError when a norm is 0.0 and something was to
        be learned."""
        found: dict[str, list[int]] = {}
        for record in records:
            self.had_some = self.had_some or (not record.vetoed and record.grad_norm > 0.0)
            if record.vetoed or record.grad_norm != 0.0 or not int(record.tasks.total.sum()):
                continue
            number = record.update + 1
            if self.skip_below > 0.0 and record.kept == 0.0:
                found.setdefault("every position was below loss.skip_below", []).append(number)
            elif record.loss == 0.0:
                found.setdefault("the loss is exactly 0", []).append(number)
            else:
                wrong = "every gradient was exactly 0 although there was something to learn"
                todo = RAN_AWAY if self.had_some else f"{RESUME}; {UNREACHED}"
                raise TrainingError(
                    describe(f"update {number}", wrong, got=f"a loss of {record.loss:.6g}", todo=todo)
                )
        for reason, updates in found.items():
            if not self.count:
                self.reporter.note(
                    f"update {updates[0]} has no gradient: {reason}; such updates are counted from here on"
                )
            self.count += len(updates)
            self.reporter.event("no_gradient", {"updates": updates, "reason": reason, "so_far": self.count})
