"""The parts of a run and its data, as types: what `build` makes and everything else in this room works on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repsft_fast.config import Config
from repsft_fast.data.ends import Ends
from repsft_fast.data.plan import EpochPlan, Plan, PlannedRow, Update
from repsft_fast.data.row_lengths import RowLengths
from repsft_fast.data.rows_ahead import RowsAhead
from repsft_fast.data.sample import Sample
from repsft_fast.data.store import TokenStore
from repsft_fast.distributed import World
from repsft_fast.evaluate.replies import Asked
from repsft_fast.evaluate.teacher_forced import TeacherForced
from repsft_fast.metrics import Ledger, SampleStats
from repsft_fast.optim import Optimizer
from repsft_fast.row import Row
from repsft_fast.schedule import Schedule
from repsft_fast.throughput import ModelShape, Work
from repsft_fast.training.graphs import RowGraphs
from repsft_fast.training.progress import Lasting, Progress
from repsft_fast.training.sizes import Sizes
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
    # last tokens before the first trained one, of some training samples
    before_replies: list[list[int]] = field(default_factory=list)


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
    plan: Plan  # in use: of shorter rows, once memory ran out
    budget: Budget
    optimizer: Optimizer
    schedule: Schedule
    ledger: Ledger = field(init=False)  # of each task's counts
    spikes: Spikes = field(init=False)  # of the last updates
    # digests of what the run begins with (identity.base_of)
    base: dict[str, str] = field(default_factory=dict)
    sizes: Sizes | None = None  # bytes of the model, where a device's memory decides something
    row_tokens: int = field(init=False)  # of the rows that the run begins with
    validation: TeacherForced | None = None
    probe: TeacherForced | None = None
    asked: list[Asked] = field(default_factory=list)  # evaluate.tasks, as the tokenizer spells them
    # the few shapes rows take, as the run began with them, and evaluations' rows; None: padded to a bucket
    row_lengths: RowLengths | None = field(init=False)
    progress: Progress = field(default_factory=Progress)  # what a roll-back takes back
    lasting: Lasting = field(default_factory=Lasting)  # and what it does not
    on_update: Callable[[Work], None] | None = None
    sample_stats: SampleStats | None = None  # made for policies that judge samples
    ahead: RowsAhead | None = None  # of the running epoch
    copy_stream: Any = None  # torch.cuda.Stream of rows; one for the run, whose memory the allocator keeps
    cuda_graphs: Any = None  # as training.graph_choice decided; None: not yet
    graphs: RowGraphs | None = None  # passes of rows, captured

    _one: Tensor | None = field(init=False, default=None)  # `one_like`

    def __post_init__(self) -> None:
        self.row_tokens = self.plan.row_tokens
        self.ledger = Ledger(self.num_tasks, self.world.device, self.world)
        self.spikes = Spikes(
            self.world.device,
            self.world,
            self.config.optim.max_norm,
            veto_spikes=self.config.numbers.on_spike != "log",
        )
        self.row_lengths = self.plan.row_lengths

    def one_like(self, loss: Tensor) -> Tensor:
        """The gradient of a loss by itself, which a backward pass would make anew."""
        if self._one is None or (self._one.dtype, self._one.device) != (loss.dtype, loss.device):
            self._one = torch.ones_like(loss, requires_grad=False)
        return self._one

    @property
    def num_tasks(self) -> int:
        return len(self.data.task_names)

    def make_scorers(self) -> None:
        """Validation and probe, in rows of the shapes that hold now."""
        if self.data.validation is not None:
            self.validation = self.scorer(self.data.validation)
        probed = self.config.stop.probe_samples
        if probed is not None:
            self.probe = self.scorer(self.data.train, range(min(probed, len(self.data.train.index))))

    def scorer(self, store: TokenStore, samples: Sequence[int] | None = None) -> TeacherForced:
        """Forward-only evaluation of these samples of a store (None = all), in rows like the training's."""
        chosen = range(len(store.index)) if samples is None else samples
        return TeacherForced(
            store,
            chosen,
            row_tokens=self.row_tokens,
            bucket_tokens=self.plan.bucket_tokens,
            world=self.world,
            apart=self.plan.apart,
            to=self.row_lengths,
        )

    def row(self, update: Update, planned: PlannedRow) -> Row:
        """One row of the update, weights holding 1 / the update's one denominator. Any thread may call it."""
        return self.data.train.row(planned, denominator=update.denominator, average=self.config.loss.average)

    def rows(self, update: Update) -> Iterator[Row]:
        """This rank's rows of the update: those that were made ahead, or made as they are asked for."""
        rows = self.ahead.rows_of(update) if self.ahead is not None else None
        if rows is None:
            rows = (self.row(update, planned) for planned in update.ranks[self.world.rank])
        guess = self.progress.kept_guess  # as it is now, not as it was when the row was made
        for row in rows:
            yield row if guess == row.kept_share else replace(row, kept_share=guess)

    @contextmanager
    def rows_ahead(self, epoch: EpochPlan, start: int) -> Iterator[RowsAhead]:
        """The epoch's updates from `start` on. Inside, `rows` gives what a thread has made of them."""
        device = self.world.device
        if device.type == "cuda" and self.copy_stream is None:
            self.copy_stream = torch.cuda.Stream(device)
        ahead = RowsAhead(epoch, start, self.row, rank=self.world.rank, stream=self.copy_stream)
        with ahead:
            self.ahead = ahead
            try:
                yield ahead
            finally:
                self.ahead = None

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
