"""The ledger: exact counts of every update, kept on the device until somebody reads them.

`add` (and sums into `open_table`) once per row, `close` once per update: neither asks the device for a
number. `read` is the one place where the host waits (when logging, and before a snapshot, checkpoint or
decision).
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repsft_fast.distributed import World, all_max, all_sum
from repsft_fast.row import Row
from repsft_fast.stats import FRACTION_BITS, K, PositionStats, TokenStats

JUDGED = 5  # numbers of a judgement: spike, and of loss and norm the middles and the limits


@dataclass(frozen=True)
class UpdateRecord:
    """What one update did, as host numbers."""

    update: int
    loss: float  # the update's objective: weighted sum over its denominator
    grad_norm: float
    lr: float
    vetoed: bool  # refused, as not finite or as a spike: no weight was touched
    tasks: TokenStats  # [tasks, K] on the host
    # largest share of a row's trained positions that loss.skip_below kept (products.needed_share)
    kept: float = 0.0
    judged: tuple[float, ...] = (0.0,)  # 1.0 for a spike, then what it was judged by (training.spikes)

    @property
    def spike(self) -> bool:
        return self.judged[0] > 0.0


class Ledger:
    """Device ring of `capacity` updates × tasks × K. The epoch's totals are kept beside it."""

    def __init__(self, num_tasks: int, device: torch.device, world: World, capacity: int = 256):
        self.world = world
        self.capacity = capacity
        self._tables = torch.zeros(capacity, num_tasks, K, dtype=torch.int64, device=device)
        # loss, kept, grad norm, veto, …
        self._scalars = torch.zeros(capacity, 4 + JUDGED, dtype=torch.float64, device=device)
        self._epoch = torch.zeros(num_tasks, K, dtype=torch.int64, device=device)
        self._pending: list[tuple[int, float]] = []  # (update, lr) of every closed slot
        self._spilled: list[UpdateRecord] = []

    def open_table(self) -> Tensor:
        """[tasks, K] int64, the open update's sums; a view, to which the sums of its rows are added."""
        return self._tables[len(self._pending)]

    def add(self, loss: Tensor, kept: Tensor | None = None) -> None:
        """One row of the open update, whose sums are in `open_table`. loss: [] weighted sum; kept: [] fp64
        share that skip_below kept."""
        slot = len(self._pending)
        self._scalars[slot, 0].add_(loss.detach())
        if kept is not None:
            self._scalars[slot, 1].clamp_(min=kept)

    def open_loss(self) -> Tensor:
        """[] fp64, this rank's loss of the open update so far; a view that stays on the device."""
        return self._scalars[len(self._pending), 0]

    def close(self, update: int, lr: float, numbers: Tensor, applied: Tensor) -> None:
        """End the open update. numbers: [2 + JUDGED] fp64, norm before clipping, veto, and whether it is a
        spike and what that was judged by, the same on every rank; applied: [] int64, 0 when the step was
        refused. Both are copied."""
        slot = len(self._pending)
        self._scalars[slot, 2:].copy_(numbers)
        # A vetoed update trained nothing: its tokens do not count towards the epoch's accuracy.
        self._epoch.addcmul_(self._tables[slot], applied)
        self._pending.append((update, lr))
        if len(self._pending) == self.capacity:
            self._spilled += self._drain()

    def read(self) -> list[UpdateRecord]:
        """Every update since the last read, summed over ranks. All ranks must call it together. Waits for the
        device."""
        records = self._spilled + self._drain()
        self._spilled = []
        return records

    def epoch_totals(self) -> TokenStats:
        """[tasks, K] over the applied updates of this epoch so far, all ranks, on the host. Waits for the
        device."""
        return TokenStats(all_sum(self._epoch.to("cpu", copy=True)))

    def start_epoch(self) -> None:
        self._epoch.zero_()

    def drop_open(self) -> None:
        """Forget an update that was begun and not closed (out of memory in the middle of it)."""
        slot = len(self._pending)
        self._tables[slot].zero_()
        self._scalars[slot].zero_()

    def tensors(self) -> dict[str, Tensor]:
        """What belongs to the closed list of state: the epoch's totals. The ring is read out before any
        snapshot."""
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
            scalars[:, 1] = all_max(scalars[:, 1].contiguous())
        records = [
            UpdateRecord(update, row[0], row[2], lr, row[3] > 0, TokenStats(table), row[1], tuple(row[4:]))
            for (update, lr), row, table in zip(self._pending, scalars.tolist(), tables.clone(), strict=True)
        ]
        self._tables[:count].zero_()
        self._scalars[:count].zero_()
        self._pending.clear()
        return records


class SampleStats:
    """Exact statistics of every sample over an epoch, on the device; kept only for policies that judge
    samples (IES)."""

    def __init__(self, num_samples: int, device: torch.device):
        self._table = torch.zeros(num_samples, K, dtype=torch.int64, device=device)

    def add(self, row: Row, stats: PositionStats) -> None:
        """One row's statistics, by sample. No host sync."""
        if row.num_segments:
            ids = row.sample_ids
            if ids is None:
                ids = torch.tensor(row.samples, dtype=torch.int64)
                if self._table.device.type == "cuda":
                    ids = ids.pin_memory().to(self._table.device, non_blocking=True)
            stats.add_to(self._table, row.position_segments, ids)

    def read(self) -> TokenStats:
        """[samples, K] on the host, all ranks, and begin anew. Waits for the device."""
        found = TokenStats(all_sum(self._table.to("cpu", copy=True)))
        self._table.zero_()
        return found

    def tensors(self) -> dict[str, Tensor]:
        return {"ledger.samples": self._table}


def summarise(stats: TokenStats, names: tuple[str, ...]) -> dict[str, Any]:
    """Means per trained token over all tasks and per task, as JSON numbers; None where nothing was
    trained."""
    line = _means(TokenStats(stats.table.sum(dim=0, keepdim=True)))[0]
    if len(names) > 1:
        line["tasks"] = {
            name: means for name, means in zip(names, _means(stats), strict=True) if means["total"]
        }
    return line


def _means(stats: TokenStats) -> list[dict[str, Any]]:
    """One line per task. A few torch calls whatever the number of tasks: this runs for every update that is
    read."""
    columns = {name: stats.mean(name).tolist() for name in FRACTION_BITS}
    lines = []
    for i, (total, correct, bad) in enumerate(
        zip(stats.total.tolist(), stats.correct.tolist(), stats.nonfinite.tolist(), strict=True)
    ):
        line: dict[str, Any] = {
            "total": total,
            "correct": correct,
            "token_accuracy": correct / total if total else None,
        }
        line |= {name: values[i] if math.isfinite(values[i]) else None for name, values in columns.items()}
        if bad:
            line["nonfinite"] = bad
        lines.append(line)
    return lines


class JsonLines:
    """metrics.jsonl: one JSON object a line, handed to the system at once, so a killed run keeps what it had.

    Nothing that goes wrong here is raised. Lines that cannot be written wait in memory and go first with the
    next one; `tell` hears of it. A line that a kill cut short is ended, so that the next one does not hang on
    to it.
    """

    MOST_WAITING_BYTES = 1 << 24  # what is beyond is left out, and counted

    def __init__(self, path: Path | None, tell: Callable[[str], None] = lambda text: None):
        """Appends to a plain file, which is made where none is; None writes nothing."""
        self.path, self.left_out = path, 0
        self._tell = tell
        self._file: int | None = None
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = self._written = 0  # of the first line that waits, so many bytes are in the file
        self._closed = False
        self._size = 0  # of the file when a line was last written
        self._lock = threading.Lock()  # the watch of the ranks says its last words from a thread of its own
        self._give()

    @property
    def missing(self) -> str:
        """What is not in the file, in words; "" when it holds every line."""
        lost = len(self._waiting) + self.left_out
        return f"{lost} lines of metrics.jsonl could not be written" if lost else ""

    def write(self, record: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        line = self._line(record)
        with self._lock:
            if self._waiting_bytes + len(line) > self.MOST_WAITING_BYTES:
                self.left_out += 1
            else:
                self._waiting.append(line)
                self._waiting_bytes += len(line)
        self._give()
        if self._closed:
            self.close()

    def close(self) -> None:
        """Lets the file go, once it takes no more. A line that comes later opens it again."""
        least = self._waiting_bytes + 1
        while (left := self._waiting_bytes - self._written) and left < least:
            least = left
            self._give()
        self._closed = True
        file, self._file = self._file, None
        if file is None or self.path is None:
            return
        try:
            mine = os.fstat(file)
            os.close(file)  # where a network's disk says what it did not take
            there = os.lstat(self.path)
        except OSError as error:
            self._tell(f"metrics.jsonl: is not all there ({_why(error)})")
        else:
            if mine.st_size < self._size:
                self._tell(_CUT)
            if (mine.st_dev, mine.st_ino) != (there.st_dev, there.st_ino):
                self._tell(
                    "metrics.jsonl: was replaced while the run wrote it; its lines went to the file it was"
                    " before"
                )

    def cut_to(self, size: int) -> None:
        """The run takes back what stands beyond so many bytes. Raises OSError."""
        if self.path is not None:
            with self._lock:
                os.truncate(self.path, size)
                self._size = min(self._size, size)

    def _give(self) -> None:
        """Writes what waits, as far as it goes."""
        if self.path is None:
            return
        cut, why = False, ""
        with self._lock:
            try:
                if self._file is None:
                    self._file = _append_to(self.path)
                    self._size = self._written = 0
                size = os.fstat(self._file).st_size
                if size < self._size:
                    cut, self._size = True, size
                    if not self._written:  # else the rest of a line follows, and that one is spoilt
                        _end_line(self._file)
                self._write_waiting(self._file)
                self._size = os.fstat(self._file).st_size
            except OSError as error:
                why = _why(error)
                if error.errno == errno.ESTALE and self._file is not None:  # NFS: only opening it again helps
                    with suppress(OSError):
                        os.close(self._file)
                    self._file = None
        # Told without the lock: who is told may write a line of its own.
        if cut:
            self._tell(_CUT)
        if why:
            self._tell(
                f"metrics.jsonl: cannot be written ({why}); the lines wait in memory and are tried again"
            )

    def _write_waiting(self, file: int) -> None:
        while self._waiting:
            line = self._waiting[0]
            while self._written < len(line):
                self._written += os.write(file, memoryview(line)[self._written :])
            self._waiting.popleft()
            self._waiting_bytes -= len(line)
            self._written = 0

    def _line(self, record: Mapping[str, Any]) -> bytes:
        try:
            text = json.dumps(record, allow_nan=False, default=_plain)
        except (ValueError, TypeError):
            kind = record.get("kind")
            self._tell(
                f"metrics.jsonl: a value in a line of kind {kind} has no JSON of its own: null where it is"
                " not a number"
            )
            text = json.dumps(_finite(record), allow_nan=False, default=str)
        return text.encode() + b"\n"


_CUT = "metrics.jsonl: was cut short while the run wrote it: lines before this one are gone"


def _end_line(file: int) -> None:
    """Ends the last line of a file that was cut anywhere."""
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":
        os.write(file, b"\n")


def _append_to(path: Path) -> int:
    """A descriptor of the plain file at `path`, whose last line is ended. Raises OSError: nothing is written
    through a link."""
    file = os.open(
        path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666
    )
    try:
        facts = os.fstat(file)
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "it is not a plain file")
        _end_line(file)
    except BaseException:
        os.close(file)
        raise
    return file


def _why(error: OSError) -> str:
    return "it is a link" if error.errno == errno.ELOOP else error.strerror or str(error)


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"metrics.jsonl: {type(value).__name__} is not a JSON value")


def _finite(value: Any) -> Any:
    """The value with None for every number that is not finite, and texts for keys."""
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if hasattr(value, "item"):
        with suppress(Exception):  # of several numbers: their text will do
            value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
