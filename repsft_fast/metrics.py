"""The ledger: exact counts of every update, kept on the device until somebody reads them.

`add` once per row, `close` once per update: neither asks the device for a number. `read` is the one place where the
host waits (when logging, and before a snapshot, checkpoint or decision).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repsft_fast.distributed import World, all_max, all_sum
from repsft_fast.row import Row
from repsft_fast.stats import FRACTION_BITS, K, RowStats, TokenStats


@dataclass(frozen=True)
class UpdateRecord:
    """What one update did, as host numbers."""

    update: int
    loss: float  # the update's objective: weighted sum over its denominator
    grad_norm: float
    lr: float
    vetoed: bool  # non-finite: no weight was touched
    tasks: TokenStats  # [tasks, K] on the host
    kept: float = 0.0  # largest share of a row's trained positions that loss.skip_below kept (products.needed_share)


class Ledger:
    """Device ring of `capacity` updates × tasks × K. The epoch's totals are kept beside it."""

    def __init__(self, num_tasks: int, device: torch.device, world: World, capacity: int = 256):
        self.world = world
        self.capacity = capacity
        self._tables = torch.zeros(capacity, num_tasks, K, dtype=torch.int64, device=device)
        self._scalars = torch.zeros(capacity, 4, dtype=torch.float64, device=device)  # loss, grad norm, veto, kept
        self._epoch = torch.zeros(num_tasks, K, dtype=torch.int64, device=device)
        self._pending: list[tuple[int, float]] = []  # (update, lr) of every closed slot
        self._spilled: list[UpdateRecord] = []

    def add(self, loss: Tensor, stats: TokenStats, kept: Tensor | None = None) -> None:
        """One row of the open update. loss: [] weighted sum; stats: by task; kept: [] fp64 share that skip_below kept."""
        slot = len(self._pending)
        self._tables[slot] += stats.table
        self._scalars[slot, 0] += loss.detach()
        if kept is not None:
            self._scalars[slot, 3].clamp_(min=kept)

    def open_loss(self) -> Tensor:
        """[] fp64, this rank's loss of the open update so far; a view that stays on the device."""
        return self._scalars[len(self._pending), 0]

    def close(self, update: int, lr: float, grad_norm: Tensor, veto: Tensor) -> None:
        """End the open update. grad_norm: [] before clipping; veto: [] 1.0 when the step was refused."""
        slot = len(self._pending)
        self._scalars[slot, 1] = grad_norm
        self._scalars[slot, 2] = veto
        # A vetoed update trained nothing: its tokens do not count towards the epoch's accuracy.
        self._epoch += self._tables[slot] * (1 - veto).to(torch.int64)
        self._pending.append((update, lr))
        if len(self._pending) == self.capacity:
            self._spilled += self._drain()

    def read(self) -> list[UpdateRecord]:
        """Every update since the last read, summed over ranks. All ranks must call it together. Waits for the device."""
        records = self._spilled + self._drain()
        self._spilled = []
        return records

    def epoch_totals(self) -> TokenStats:
        """[tasks, K] over the applied updates of this epoch so far, all ranks, on the host. Waits for the device."""
        return TokenStats(all_sum(self._epoch.to("cpu", copy=True)))

    def start_epoch(self) -> None:
        self._epoch.zero_()

    def drop_open(self) -> None:
        """Forget an update that was begun and not closed (out of memory in the middle of it)."""
        slot = len(self._pending)
        self._tables[slot].zero_()
        self._scalars[slot].zero_()

    def tensors(self) -> dict[str, Tensor]:
        """What belongs to the closed list of state: the epoch's totals. The ring is read out before any snapshot."""
        return {"ledger.epoch": self._epoch}

    def _drain(self) -> list[UpdateRecord]:
        count = len(self._pending)
        if count == 0:
            return []
        tables = all_sum(self._tables[:count].to("cpu", copy=True))
        scalars = self._scalars[:count].to("cpu", copy=True)
        if self.world.size > 1:
            # fp64 losses of the ranks as fixed point: the sum is the same whatever the order.
            fixed = torch.nan_to_num(scalars[:, 0] * 2.0**32).round().to(torch.int64)
            finite = all_sum((~torch.isfinite(scalars[:, 0])).to(torch.int64)) == 0
            summed = all_sum(fixed).double() / 2.0**32
            scalars[:, 0] = torch.where(finite, summed, float("nan"))
            scalars[:, 3] = all_max(scalars[:, 3].contiguous())
        records = [
            UpdateRecord(update, float(row[0]), float(row[1]), lr, bool(row[2] > 0), TokenStats(table), float(row[3]))
            for (update, lr), row, table in zip(self._pending, scalars, tables.clone(), strict=True)
        ]
        self._tables[:count].zero_()
        self._scalars[:count].zero_()
        self._pending.clear()
        return records


class SampleStats:
    """Exact statistics of every sample over an epoch, on the device; kept only for policies that judge samples (IES)."""

    def __init__(self, num_samples: int, device: torch.device):
        self._table = torch.zeros(num_samples, K, dtype=torch.int64, device=device)

    def add(self, row: Row, stats: RowStats) -> None:
        """One row's statistics, by sample. No host sync."""
        if row.num_segments:
            ids = torch.tensor(row.samples, dtype=torch.int64)
            if self._table.device.type == "cuda":
                ids = ids.pin_memory().to(self._table.device, non_blocking=True)
            self._table.index_add_(0, ids, stats.by(row.row_segments, row.num_segments).table)

    def read(self) -> TokenStats:
        """[samples, K] on the host, all ranks, and begin anew. Waits for the device."""
        found = TokenStats(all_sum(self._table.to("cpu", copy=True)))
        self._table.zero_()
        return found

    def tensors(self) -> dict[str, Tensor]:
        return {"ledger.samples": self._table}


def summarise(stats: TokenStats, names: tuple[str, ...]) -> dict[str, Any]:
    """Means per trained token over all tasks and per task, as JSON numbers; None where nothing was trained."""
    line = _means(TokenStats(stats.table.sum(dim=0, keepdim=True)))[0]
    if len(names) > 1:
        line["tasks"] = {name: means for name, means in zip(names, _means(stats), strict=True) if means["total"]}
    return line


def _means(stats: TokenStats) -> list[dict[str, Any]]:
    """One line per task. A few torch calls whatever the number of tasks: this runs for every update that is read."""
    columns = {name: stats.mean(name).tolist() for name in FRACTION_BITS}
    lines = []
    for i, (total, correct, bad) in enumerate(
        zip(stats.total.tolist(), stats.correct.tolist(), stats.nonfinite.tolist(), strict=True)
    ):
        line: dict[str, Any] = {"total": total, "correct": correct, "token_accuracy": correct / total if total else None}
        line |= {name: values[i] if math.isfinite(values[i]) else None for name, values in columns.items()}
        if bad:
            line["nonfinite"] = bad
        lines.append(line)
    return lines


class JsonLines:
    """metrics.jsonl: one JSON object a line, flushed at once, so a killed run keeps what it had."""

    def __init__(self, path: Path | None):
        self._file = path.open("a", encoding="utf-8") if path is not None else None

    def write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record, allow_nan=False, default=_plain) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"metrics.jsonl: {type(value).__name__} is not a JSON value")
