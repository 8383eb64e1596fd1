"""Who broke the numbers: the samples of a vetoed update whose own loss is not finite."""

from __future__ import annotations

import numpy as np
import torch

from repsft_fast.data.plan import PlannedRow
from repsft_fast.errors import describe
from repsft_fast.metrics import UpdateRecord
from repsft_fast.training.parts import Parts


class Refused(Exception):
    """Updates were vetoed and the run goes back to before them (numbers.on_nonfinite: revert)."""

    def __init__(self, cursors: list[tuple[int, int, int]]):
        super().__init__(f"{len(cursors)} updates were refused")
        self.cursors = cursors  # (stage, epoch, update) of each


def name_culprits(parts: Parts, record: UpdateRecord, samples: np.ndarray | None) -> str:
    """One sentence. Each sample of the update is passed alone through the model as it is now (the update changed nothing).

    Under several ranks the samples are not run again, since every rank would have to; the whole update is named.
    """
    where = f"update {record.update + 1}"
    what = "the loss" if not np.isfinite(record.loss) else "a gradient"
    if samples is None:
        return describe(where, f"{what} was not finite")
    guilty = (
        samples if parts.world.size > 1 else np.array([s for s in samples if not _finite_alone(parts, int(s))], dtype=np.int64)
    )
    words = "in" if len(guilty) else "though every sample's own loss is finite, in one of"
    named = guilty if len(guilty) else samples
    sources = [parts.data.train.sources[int(s)] or f"sample {int(s)}" for s in named[:8]]
    more = f" and {len(named) - 8} more" if len(named) > 8 else ""
    return describe(where, f"{what} was not finite {words} {', '.join(sources)}{more}")


@torch.no_grad()
def _finite_alone(parts: Parts, sample: int) -> bool:
    length = int(parts.data.train.index.lengths[sample])
    row = parts.data.train.row(PlannedRow(np.array([sample]), length, length), denominator=1.0, average="token")
    loss, _ = parts.model.loss(row)
    return bool(torch.isfinite(loss))
