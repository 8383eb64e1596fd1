"""What a plan is made of: the index of the data it plans, cursors, updates and their rows. Types alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SampleIndex:
    """What the plan needs to know of the data. Host memory."""

    lengths: np.ndarray  # [M] int64 positions
    trained: np.ndarray  # [M] int64 trained positions
    tasks: np.ndarray  # [M] int32
    weights: np.ndarray  # [M] float64, of the loss; finite, not negative
    task_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True, order=True)
class Cursor:
    """Where a run is: the next update to do."""

    stage: int
    epoch: int
    update: int


@dataclass(frozen=True)
class PlannedRow:
    """One row to compute. No samples: padding only, so that every rank has the same number of rows."""

    samples: np.ndarray  # [S] int64 sample ids
    real_tokens: int
    padded_tokens: int  # slots computed
    # where rows take few shapes, what else has one: length of `Row.cu_seqlens` without the leading 0, and the
    # bound on the longest segment; None: by what is in the row
    segments: int | None = None
    max_seqlen: int | None = None


@dataclass(frozen=True)
class Update:
    """One step of the optimizer: its samples, and the rows that every rank computes for it."""

    cursor: Cursor
    samples: np.ndarray  # [B] int64 sample ids; this, not the rows, is the update
    denominator: float  # of the weighted loss sum, over all ranks; 0.0 when nothing in it is trained
    ranks: tuple[tuple[PlannedRow, ...], ...]

    @property
    def real_tokens(self) -> int:
        return sum(row.real_tokens for rows in self.ranks for row in rows)

    @property
    def padded_tokens(self) -> int:
        return sum(row.padded_tokens for rows in self.ranks for row in rows)
