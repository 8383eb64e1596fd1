"""The plan: which samples make which update. A pure function of (seed, stage, epoch, active, weights, skip).

There is no iterator to save: an epoch's order is computed from its key, so the cursor is three integers, and
a resumed, reverted or repeated run asks the same question and gets the same answer, in any process and on any
number of ranks.

Random numbers are `seeded`, keyed by what names them: the run's seed, a stage, an epoch, a task.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from repsft_fast import seeded
from repsft_fast.data.draws import draw_tasks
from repsft_fast.data.packing import TOGETHER, Apart, check_lengths, pack, planned_row
from repsft_fast.data.planned import Cursor, PlannedRow, SampleIndex, Update
from repsft_fast.data.row_lengths import RowLengths
from repsft_fast.errors import ConfigError, DataError, describe

__all__ = [
    "AVERAGES", "Cursor", "EpochPlan", "Plan", "PlanSummary", "PlannedRow", "SampleIndex",
    "Update", "denominator", "summary",
]  # fmt: skip

AVERAGES = ("sample", "token")  # what an update's loss is the mean of


class Plan:
    """Same arguments, same answer; nothing is remembered between calls."""

    def __init__(
        self,
        index: SampleIndex,
        *,
        seed: int,
        row_tokens: int,
        bucket_tokens: int,
        ranks: int = 1,
        batch_samples: int | None = 16,
        batch_tokens: int | None = None,
        average: str = "sample",
        apart: Apart = TOGETHER,
        row_lengths: RowLengths | None = None,
    ):
        """`batch_tokens`, when given, replaces `batch_samples`: an update is then as many samples, in the
        epoch's order, as have at most that many positions together (always at least one). apart: samples that
        share no row. row_lengths: the shapes rows take, in place of multiples of `bucket_tokens`.

        Raises ConfigError with every impossible setting, DataError for samples that no row holds or weights
        no loss can have.
        """
        if batch_tokens is not None:
            batch_samples = None
        self.index, self.seed, self.ranks, self.average, self.apart = index, seed, ranks, average, apart
        self.row_tokens, self.bucket_tokens, self.row_lengths = row_tokens, bucket_tokens, row_lengths
        self.batch_samples, self.batch_tokens = batch_samples, batch_tokens
        problems = list(self._problems())
        if problems:
            raise ConfigError(problems)
        _check_index(index, row_tokens if row_lengths is None else row_lengths.capacity)

    def epoch(
        self,
        stage: int,
        epoch: int,
        *,
        active: Collection[int] | None = None,
        task_weights: Mapping[int, float] | None = None,
        skip: Collection[int] = (),
        draws: int | None = None,
    ) -> EpochPlan:
        """One pass over the active data.

        active: task ids, None = all. An epoch shrinks as tasks leave; the samples that stay keep their order.
        task_weights: None = every active sample exactly once. Otherwise `draws` samples (None = as many as
        are active): the task with probability in proportion to its weight, within a task every sample once
        before any comes again.
        skip: sample ids left out of this epoch (mastered ones). An epoch of which nothing is left has no
        updates.
        Raises ConfigError naming the argument. Cost: about 0.3 µs per sample of the index; packing comes
        later, by update.
        """
        tasks = self._active_tasks(active)
        # One order of all the data, thinned: so what stays keeps its order when a task leaves.
        order = seeded.permutation(seeded.key_of(self.seed, stage, epoch), len(self.index))
        keep = np.isin(self.index.tasks, tasks)
        if len(skip):
            keep[self._sample_ids(skip)] = False
        order = order[keep[order]]
        # Draws repeat samples and leave others out, which an even pass never does.
        if task_weights is not None:
            shares = self._shares(task_weights, tasks, order)
            count = len(order) if draws is None else draws
            order = draw_tasks(order, self.index.tasks, shares, (self.seed, stage, epoch), count)
        return EpochPlan(self, stage, epoch, order)

    def rows(self, samples: np.ndarray, lengths: np.ndarray) -> tuple[tuple[PlannedRow, ...], ...]:
        """By rank, the rows of an update of these samples. samples, lengths: [B] int64."""
        # nothing to weigh, and as many updates as samples: keep it cheap
        if len(samples) == 1 and self.ranks == 1:
            return ((self._row(samples, lengths),),)
        dealt = pack(
            lengths,
            self.row_tokens,
            bucket=self.bucket_tokens,
            ranks=self.ranks,
            apart=self.apart,
            to=self.row_lengths,
        )
        return tuple(tuple(self._row(samples[row], lengths[row]) for row in rows) for rows in dealt)

    def _row(self, samples: np.ndarray, lengths: np.ndarray) -> PlannedRow:
        real = lengths.item() if len(lengths) == 1 else int(np.add.reduce(lengths))
        return planned_row(samples, real, self.row_tokens, self.bucket_tokens, self.row_lengths)

    def _problems(self) -> Iterator[str]:
        """All at once: who mends one setting should not find the next one after another start."""
        sizes: dict[str, int | None] = {
            "batch.row_tokens": self.row_tokens,
            "batch.bucket_tokens": self.bucket_tokens,
            "ranks": self.ranks,
        }
        if self.batch_tokens is None:
            sizes["batch.samples"] = self.batch_samples
        else:
            sizes["batch.tokens"] = self.batch_tokens
        for name, value in sizes.items():
            if value is None:
                todo = "set batch.samples or batch.tokens"
                yield describe(name, "is not set", expected="a whole number", got=value, todo=todo)
            elif value < 1:
                yield describe(name, "is too small", expected="at least 1", got=value, todo="raise it")
        if self.average not in AVERAGES:
            yield describe("loss.average", "is not known", expected=" or ".join(AVERAGES), got=self.average)
        if len(self.index) == 0:
            yield describe(
                "data", "has no samples to plan", expected="at least 1", got=0, todo="check the sources"
            )
        elif self.ranks > 1:
            yield from self._idle_ranks()

    def _idle_ranks(self) -> Iterator[str]:
        """A rank without a sample in an update would cost its share of the hardware and compute padding."""
        per_update, name = len(self.index), "data.samples"
        if self.batch_samples is not None:
            per_update, name = min((self.batch_samples, "batch.samples"), (per_update, name))
        elif self.batch_tokens is not None:
            mean_fit = max(int(self.batch_tokens / self.index.lengths.mean()), 1)
            per_update, name = min((mean_fit, "batch.tokens"), (per_update, name))
        if per_update < self.ranks:
            wrong = "gives fewer samples per update than there are ranks, some would compute nothing"
            todo = f"raise {name} or use fewer ranks"
            yield describe(name, wrong, expected=f"at least {self.ranks} samples", got=per_update, todo=todo)

    def _active_tasks(self, active: Collection[int] | None) -> np.ndarray:
        known = len(self.index.task_names)
        tasks = sorted(range(known) if active is None else {int(task) for task in active})
        if not tasks:
            raise ConfigError(
                describe("active", "names no task", expected="at least one task id", got="none")
            )
        if tasks[0] < 0 or tasks[-1] >= known:
            raise ConfigError(
                describe("active", "names a task that is not there", expected=f"0 … {known - 1}", got=tasks)
            )
        return np.array(tasks)

    def _sample_ids(self, skip: Collection[int]) -> np.ndarray:
        ids = np.fromiter(skip, dtype=np.int64, count=len(skip))
        if ids.min() < 0 or ids.max() >= len(self.index):
            bad = ids[(ids < 0) | (ids >= len(self.index))][0]
            raise ConfigError(
                describe(
                    "skip", "names a sample that is not there", expected=f"0 … {len(self.index) - 1}", got=bad
                )
            )
        return ids

    def _shares(self, weights: Mapping[int, float], tasks: np.ndarray, order: np.ndarray) -> np.ndarray:
        """[tasks] float64 probability of every task; 0 where it is not active or has no samples left."""
        names = self.index.task_names
        shares = np.zeros(len(names))
        here = set(np.unique(self.index.tasks[order]).tolist())
        for task in tasks.tolist():
            if task not in weights:
                wrong = "is active and has no weight"
                todo = "give every active task a weight, 0 to leave it out"
                raise ConfigError(describe(f"task_weights[{names[task]}]", wrong, todo=todo))
            weight = float(weights[task])
            if not math.isfinite(weight) or weight < 0:
                where = f"task_weights[{names[task]}]"
                raise ConfigError(
                    describe(where, "is not a weight", expected="a finite number, at least 0", got=weight)
                )
            shares[task] = weight if task in here else 0.0
        # Scaled by the largest: weights near the largest float must not sum to infinity.
        largest = shares.max()
        if len(order) and largest == 0.0:
            wrong, todo = "sum to 0 over the active tasks that have samples", "raise one of them"
            raise ConfigError(
                describe("task_weights", wrong, expected="a sum above 0", got=dict(weights), todo=todo)
            )
        relative = shares / (largest or 1.0)  # at most 1 each, so their sum cannot overflow
        return relative / (math.fsum(relative) or 1.0)


class EpochPlan(Sequence[Update]):
    """The updates of one epoch. Their borders are known at once; each is packed when it is asked for, and not
    kept."""

    def __init__(self, plan: Plan, stage: int, epoch: int, order: np.ndarray):
        self.plan, self.stage, self.epoch = plan, stage, epoch
        self.order = order  # [num_samples] int64 sample ids
        self._borders = _borders(plan, order)
        self._lengths = plan.index.lengths[order]
        self._divisors = _divisors(plan.index, order, plan.average)

    @property
    def num_samples(self) -> int:
        return len(self.order)

    def __len__(self) -> int:
        return len(self._borders) - 1

    @overload
    def __getitem__(self, i: int) -> Update: ...
    @overload
    def __getitem__(self, i: slice) -> list[Update]: ...
    def __getitem__(self, i: int | slice) -> Update | list[Update]:
        if isinstance(i, slice):
            return [self.update(n) for n in range(*i.indices(len(self)))]
        return self.update(i)

    def update(self, i: int) -> Update:
        """Update `i` of the epoch, packed. IndexError past the end."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"update {i} of an epoch of {len(self)}")
        i %= len(self)
        plan = self.plan
        span = slice(self._borders[i], self._borders[i + 1])
        samples, lengths = self.order[span], self._lengths[span]
        ranks = plan.rows(samples, lengths)
        cursor = Cursor(self.stage, self.epoch, i)
        return Update(cursor, samples, math.fsum(self._divisors[span]), ranks)

    def samples_of(self, i: int) -> np.ndarray:
        """[B] int64 sample ids of update `i`, which is not packed for it."""
        return self.order[self._borders[i] : self._borders[i + 1]]

    def utilisation(self) -> float:
        """Real slots / computed slots over the whole epoch, all ranks. Packs the epoch."""
        real = computed = 0
        for update in self:
            real += update.real_tokens
            computed += update.padded_tokens
        return real / computed if computed else 1.0


@dataclass(frozen=True)
class PlanSummary:
    """What a run would do. Counted over one epoch and multiplied: samples are exact, the rest as near as
    epochs are alike."""

    samples: int  # seen per epoch
    epochs: int
    updates: int
    rows: int  # over all ranks, padding-only rows included
    real_tokens: int
    trained_tokens: int
    computed_tokens: int  # slots, padding included
    notes: tuple[str, ...]

    @property
    def utilisation(self) -> float:
        return self.real_tokens / self.computed_tokens if self.computed_tokens else 1.0


def summary(plan: Plan, epochs: int, *, first: EpochPlan | None = None) -> PlanSummary:
    """The plan in figures, for `--dry-run`. Packs one epoch: `first`, or epoch 0 of stage 0 with all
    tasks."""
    first = plan.epoch(0, 0) if first is None else first
    rows = real = computed = 0
    for update in first:
        rows += sum(map(len, update.ranks))
        real += update.real_tokens
        computed += update.padded_tokens
    trained = int(plan.index.trained[first.order].sum())
    notes = []
    if len(first) and len(first) == first.num_samples:
        notes.append(
            f"one sample per update cannot be packed: {real / computed:.0%} of the computed slots are real; "
            + ("a smaller bucket" if plan.row_lengths is None else "more lengths (batch.row_lengths)")
            + " or more samples per update computes less padding"
        )
    if plan.batch_samples is not None and 0 < first.num_samples < plan.batch_samples:
        notes.append(
            f"an update of {plan.batch_samples} samples was asked for, an epoch has {first.num_samples}"
        )
    return PlanSummary(
        samples=first.num_samples,
        epochs=epochs,
        updates=len(first) * epochs,
        rows=rows * epochs,
        real_tokens=real * epochs,
        trained_tokens=trained * epochs,
        computed_tokens=computed * epochs,
        notes=tuple(notes),
    )


def denominator(index: SampleIndex, samples: np.ndarray, average: str) -> float:
    """Divisor of an update's weighted loss sum, the same for any order of the samples (exactly rounded sum).

    "sample": Σ weight, over samples that train anything (one without targets has no mean loss to average).
    "token": Σ weight · trained positions.
    """
    return math.fsum(_divisors(index, samples, average))


def _divisors(index: SampleIndex, samples: np.ndarray, average: str) -> list[float]:
    """[S] what each sample adds to its update's denominator."""
    trained = index.trained[samples]
    return (index.weights[samples] * (trained if average == "token" else trained > 0)).tolist()


def _check_index(index: SampleIndex, row_tokens: int) -> None:
    check_lengths(index.lengths, row_tokens)
    bad = ~np.isfinite(index.weights) | (index.weights < 0)
    if bad.any():
        i = int(np.argmax(bad))
        expected = "a finite number, at least 0"
        raise DataError(
            describe(f"sample {i}", "has no usable weight", expected=expected, got=float(index.weights[i]))
        )


def _borders(plan: Plan, order: np.ndarray) -> list[int]:
    """Where updates begin, and the end."""
    n = len(order)
    if plan.batch_samples is not None:
        return [*range(0, n, plan.batch_samples), n]
    assert plan.batch_tokens is not None
    # At least one sample each, however long: a bound cannot leave data out.
    ends = np.cumsum(plan.index.lengths[order])
    borders, before = [0], 0
    while borders[-1] < n:
        fit = int(np.searchsorted(ends, before + plan.batch_tokens, side="right"))
        borders.append(max(fit, borders[-1] + 1))
        before = int(ends[borders[-1] - 1])
    return borders
