"""The parts of a run and its data, as types: what `build` makes and everything else in this room works on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from repsft_fast.config import Config
from repsft_fast.data.ends import Ends
from repsft_fast.data.plan import Plan, Update
from repsft_fast.data.sample import Sample
from repsft_fast.data.store import TokenStore
from repsft_fast.distributed import World
from repsft_fast.evaluate.teacher_forced import TeacherForced
from repsft_fast.metrics import Ledger, SampleStats
from repsft_fast.optim import Optimizer
from repsft_fast.row import Row
from repsft_fast.schedule import Schedule
from repsft_fast.throughput import ModelShape, Work
from repsft_fast.training.progress import Lasting, Progress
from repsft_fast.training.spikes import Spikes


@dataclass
class Data:
    """What was loaded: training samples resident, held-out ones beside them, and what was dropped."""

    train: TokenStore
    validation: TokenStore | None
    test: TokenStore | None
    task_names: tuple[str, ...]
    dropped: dict[str, int]
    warnings: list[str]
    # a few training samples whose prompts are answered at the end: memorised or not, one sees it
    seen: list[Sample]
    held_out: list[Sample]  # a few held-out samples whose prompts are answered at evaluations and at the end
    digest: str  # of tokens and targets: ranks and resumed runs must agree on it
    ends: Ends = field(default_factory=Ends)  # which tokens end the trained turns
    files: dict[str, int] = field(default_factory=dict)  # what was read → rows


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


@dataclass
class Parts:
    """Everything the loop touches. What is mutable here is on the closed list of state or derived from it."""

    config: Config
    world: World
    folder: Path
    tokenizer: Any
    model: Any
    shape: ModelShape
    peak_flops: float | None
    data: Data
    plan: Plan
    budget: Budget
    optimizer: Optimizer
    schedule: Schedule
    ledger: Ledger = field(init=False)  # of each task's counts
    spikes: Spikes = field(init=False)  # of the last updates
    # digests of what the run begins with (identity.base_of)
    base: dict[str, str] = field(default_factory=dict)
    validation: TeacherForced | None = None
    probe: TeacherForced | None = None
    progress: Progress = field(default_factory=Progress)  # what a roll-back takes back
    lasting: Lasting = field(default_factory=Lasting)  # and what it does not
    on_update: Callable[[Work], None] | None = None
    sample_stats: SampleStats | None = None  # made for policies that judge samples

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.num_tasks, self.world.device, self.world)
        self.spikes = Spikes(self.world.device, self.world, self.config.optim.max_norm)

    @property
    def num_tasks(self) -> int:
        return len(self.data.task_names)

    def scorer(self, store: TokenStore, samples: Sequence[int] | None = None) -> TeacherForced:
        """Forward-only evaluation of these samples of a store (None = all), in rows like the training's."""
        chosen = range(len(store.index)) if samples is None else samples
        return TeacherForced(
            store,
            chosen,
            row_tokens=self.config.batch.row_tokens,
            bucket_tokens=self.plan.bucket_tokens,
            world=self.world,
            apart=self.plan.apart,
        )

    def rows(self, update: Update) -> Iterator[Row]:
        """This rank's rows of the update, weights holding 1 / the update's one denominator."""
        for planned in update.ranks[self.world.rank]:
            row = self.data.train.row(
                planned, denominator=update.denominator, average=self.config.loss.average
            )
            yield replace(row, kept_share=self.progress.kept_guess)

    def step_done(self, update: Update, updates_in_epoch: int) -> None:
        """One update was made: counted on the kept branch and for the whole run."""
        work = self.work_of(update)
        self.progress.step_done(work, updates_in_epoch)
        self.lasting.all_work.add(work)

    def work_of(self, update: Update) -> Work:
        """Host counts of one update, all ranks; from the plan, so they cost nothing on the device."""
        index, ids = self.data.train.index, update.samples
        lengths = index.lengths[ids]
        return Work(
            updates=1,
            samples=len(ids),
            slots=sum(row.padded_tokens for rows in update.ranks for row in rows),
            tokens=int(lengths.sum()),
            trained=int(index.trained[ids].sum()),
            sum_squared_lengths=int(np.dot(lengths, lengths)),
        )
