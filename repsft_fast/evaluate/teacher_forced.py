"""Evaluation by one forward pass: loss, token accuracy and exact match of every sample, from packed rows.

For a direct answer, greedy exact match *is* "every teacher-forced arg-max of the response is right, its end
token included": if all are right, greedy decoding walks the very same tokens. The converse needs one word of
care: another tokenisation of the same string counts as wrong here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from repsft_fast.data.packing import TOGETHER, Apart, pack, planned_row
from repsft_fast.data.planned import PlannedRow
from repsft_fast.data.row_lengths import RowLengths
from repsft_fast.data.store import TokenStore
from repsft_fast.distributed import Pace, World, all_sum
from repsft_fast.stats import TokenStats

DOCUMENTS = 16  # least of a row that takes few shapes: one number for the whole run


@dataclass(frozen=True)
class SampleScores:
    """Exact statistics of every evaluated sample, on the host, the same on every rank."""

    samples: np.ndarray  # [n] int64 ids in the store
    tasks: np.ndarray  # [n] int32
    stats: TokenStats  # [n, K], line i belongs to samples[i]
    tokens: int  # real tokens passed through the model
    trained: int  # positions that reached the head
    sum_squared_lengths: int

    def by_task(self, num_tasks: int) -> TokenStats:
        """[tasks, K] sums."""
        table = torch.zeros(num_tasks, self.stats.table.shape[1], dtype=torch.int64)
        table.index_add_(0, torch.from_numpy(self.tasks.astype(np.int64)), self.stats.table)
        return TokenStats(table)

    def items(self, metric: str) -> np.ndarray:
        """[n] float64 score of every sample, higher is better: exact_match 0/1, token_accuracy, or nll as its
        negative mean.

        NaN where a sample's numbers were not finite.
        """
        if metric == "exact_match":
            value = self.stats.all_correct.double()
        elif metric == "token_accuracy":
            value = self.stats.correct.double() / self.stats.total.double()
        elif metric == "nll":
            value = -self.stats.mean("loss")
        else:
            raise ValueError(f"metric: expected exact_match, token_accuracy or nll, got {metric!r}")
        return value.masked_fill(self.stats.nonfinite > 0, float("nan")).numpy()


class TeacherForced:
    """A fixed set of samples, packed once, evaluated as often as wanted.

    Every rank computes its share of the rows; the int64 statistics are summed, so all ranks hold the same
    numbers.
    """

    def __init__(
        self,
        store: TokenStore,
        samples: Sequence[int],
        *,
        row_tokens: int,
        bucket_tokens: int,
        world: World,
        apart: Apart = TOGETHER,
        to: RowLengths | None = None,
    ):
        """apart: samples that share no row, as in training. to: the few lengths of the training's rows.

        Leaves `shapes`, the same on every rank: (slots, segments, bound on the longest) of the rows of all
        ranks, where they take few.
        """
        self.store = store
        self.world = world
        self.samples = np.asarray(samples, dtype=np.int64)
        lengths = store.index.lengths[self.samples]
        # Updates of few samples need few places for documents; what is evaluated is many.
        to = to and replace(to, documents=max(to.documents, DOCUMENTS))
        dealt = pack(lengths, row_tokens, bucket=bucket_tokens, ranks=world.size, apart=apart, to=to)
        bins = dealt[world.rank]
        lines_of_all = [line for rows in dealt for line in rows]
        slots = {to.slots(int(lengths[line].sum())) for line in lines_of_all} if to is not None else set()
        self.shapes = {(n, to.segments, to.max_seqlen(n)) for n in slots} if to is not None else set()
        # Per row the indices into self.samples, on the device once and for all: in every pass they would be a
        # wait a row.
        lines = torch.from_numpy(np.concatenate([*bins, []]).astype(np.int64)).to(store.device)
        self._lines = lines.split([len(line) for line in bins])
        self._rows = [
            planned_row(self.samples[line], int(lengths[line].sum()), row_tokens, bucket_tokens, to)
            for line in bins
        ]
        self._sum_squared = int((lengths.astype(np.int64) ** 2).sum())

    @property
    def planned(self) -> list[PlannedRow]:
        """This rank's rows, the same in every pass."""
        return self._rows

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> SampleScores:
        """Run the model (in eval mode, restored afterwards) over all rows. Waits for the device once, at the
        end. torch.OutOfMemoryError on every rank where memory runs out on one."""
        # One line more than samples: the ranks whose memory ran out.
        table = TokenStats.zeros(len(self.samples) + 1, self.store.device).table
        was_training = model.training
        model.eval()
        try:
            problem = self._add_rows(model, table)
        finally:
            model.train(was_training)
        sums = table.cpu()
        sums[-1, 0] = problem is not None
        sums = all_sum(sums)
        if ranks := int(sums.numpy()[-1, 0]):
            raise torch.OutOfMemoryError(problem or f"memory ran out on {ranks} of {self.world.size} ranks")
        index = self.store.index
        return SampleScores(
            samples=self.samples,
            tasks=index.tasks[self.samples],
            stats=TokenStats(sums[:-1]),
            tokens=int(index.lengths[self.samples].sum()),
            trained=int(index.trained[self.samples].sum()),
            sum_squared_lengths=self._sum_squared,
        )

    def _add_rows(self, model: nn.Module, table: Tensor) -> str | None:
        """This rank's rows. Where memory runs out: why, once the others can be met at the end of theirs."""
        problem = None
        with Pace(model) as pace:
            for planned, line in zip(self._rows, self._lines, strict=True):
                pace.begin_row()
                if problem is None:
                    try:
                        self._add_row(model, planned, line, table)
                    except torch.OutOfMemoryError as error:
                        problem = str(error) or "no words"
                # Not above: the error would keep what its frames hold.
                if problem is not None:
                    pace.finish_row()
        return problem

    def _add_row(self, model: nn.Module, planned: PlannedRow, line: Tensor, table: Tensor) -> None:
        row = self.store.row(planned, denominator=1.0, average="token")
        _, stats = model.loss(row)  # type: ignore[operator]
        if row.num_segments:
            table.index_add_(0, line, stats.sum_by(row.position_segments, row.num_segments).table)
