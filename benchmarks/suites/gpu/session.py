"""What every part of a GPU session writes with: records, checks and what was left out, each line whole and on
disk at once.

A part is a process of its own. Whatever ends it (a limit, a kill, an illegal memory access), the lines it has
written stay.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import counting, gate, records, timing

RECORDS, CHECKS, LEFT_OUT, FACTS = (
    "gpu_records.jsonl",
    "gpu_checks.jsonl",
    "gpu_left_out.jsonl",
    "gpu_facts.json",
)
SLOW_ROUNDS = 7
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


@dataclass
class Session:
    """One part's view: where to write, what the machine reaches, what must not be measured, when to end."""

    part: str
    out: Path
    device: str  # "cuda" or "cpu"
    rehearsal: bool  # toy sizes: everything runs, the figures mean nothing
    ends: float  # time.monotonic() at which the part is ended
    environment: Mapping[str, Any]
    # bytes_per_s, flops_per_s of this card, today
    ceilings: Mapping[str, float] = field(default_factory=dict)
    red: frozenset[tuple[str, str]] = frozenset()  # (operation, dtype) that failed a check

    @property
    def left_s(self) -> float:
        return self.ends - time.monotonic()

    def late(self, what: str, needs_s: float) -> bool:
        """Whether `what` no longer fits; it is then named as left out."""
        if self.left_s >= needs_s:
            return False
        self.leave_out(what, f"needs about {needs_s:.0f} s, {max(0.0, self.left_s):.0f} s are left")
        return True

    def blocked(self, what: str, *proofs: tuple[str, str]) -> bool:
        """Whether a check of one of these (operation, dtype) is red; `what` is then named as left out."""
        wrong = [f"{operation} in {dtype}" for operation, dtype in proofs if self.is_red(operation, dtype)]
        if wrong:
            self.leave_out(what, f"the check of {', '.join(wrong)} is red")
        return bool(wrong)

    def is_red(self, operation: str, dtype: str) -> bool:
        return bool({(operation, dtype), (operation, "any")} & self.red)

    def leave_out(self, what: str, why: str) -> None:
        append_line(
            self.out / LEFT_OUT, {"run": self.environment["run"], "part": self.part, "what": what, "why": why}
        )
        print(f"  left out: {what}: {why}", flush=True)

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """What raises inside is named as left out, its traceback is in the log, and the part goes on. A lost
        device ends it."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            sys.stderr.flush()
            self.leave_out(what, first_line(error))
            if device_is_lost(error):
                raise
        if self.device == "cuda":  # what failed may hold memory in its frames
            gc.collect()
            torch.cuda.empty_cache()

    def keep(self, record: dict[str, Any]) -> None:
        """The record on disk, and a line for who watches. BadRecord for one that cannot be true."""
        record = records.check({**record, "part": self.part, "rehearsal": self.rehearsal})
        append_line(self.out / RECORDS, record)
        print(line_of(record), flush=True)

    def record(
        self,
        op: str,
        implementation: str,
        times_ms: Sequence[float],
        shape: Mapping[str, int | float | str],
        *,
        dtype: str,
        peak_bytes: int = 0,
        moved_bytes: int | None = None,
        flops: int | None = None,
        **more: Any,
    ) -> None:
        """Keep one measurement. moved_bytes, flops: the least it must move or compute; shares are of today's
        ceilings.

        more: further fields of the record: numbers, strings, lists of them.
        """
        made = records.make(
            self.environment, op=op, implementation=implementation, shape=shape, dtype=dtype,
            times_ms=times_ms,
            peak_bytes=peak_bytes, moved_bytes=moved_bytes, flops=flops, ceilings=self.ceilings or None,
            **more,
        )  # fmt: skip
        self.keep(made)

    def measure(
        self,
        op: str,
        calls: Mapping[str, Callable[[], Any]],
        shape: Mapping[str, int | float | str],
        *,
        dtype: str,
        budget_s: float,
        rounds: int = 15,
        moved_bytes: int | None = None,
        flops: int | None = None,
        more: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> dict[str, list[float]]:
        """Times all calls side by side with an A/A pair of the first; a record of each, its verdict against
        the first.

        budget_s: of all calls together, kept as far as eight rounds allow (seven where a call takes 100 ms
        and more). more: fields of single implementations. Returns the rounds in milliseconds.
        """
        times = timing.interleave(
            timing.with_noise(calls), device=self.device, rounds=2 if self.rehearsal else rounds, warmup=1,
            budget_s=budget_s, slow_rounds=SLOW_ROUNDS,
        )  # fmt: skip
        first, effect = next(iter(calls)), gate.LEAST_EFFECT[self.device]
        noise = gate.judge_pairs(times[first], times[timing.NOISE_NAME], effect)
        for name, call in calls.items():
            judged = gate.judge_pairs(times[first], times[name], effect)
            self.record(
                op, name, times[name], shape, dtype=dtype, peak_bytes=counting.peak_bytes(call, self.device),
                moved_bytes=moved_bytes, flops=flops, noise=[noise.low, noise.high], against=first,
                verdict=judged.verdict.value, ratio=[judged.ratio, judged.low, judged.high],
                **((more or {}).get(name, {})),
            )  # fmt: skip
        return times


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """One whole JSON line at the end of a file, on disk when this returns. What a killed writer left torn
    there is cut off."""
    data = (json.dumps(line, sort_keys=True, allow_nan=False) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        if (size := os.fstat(descriptor).st_size) and os.pread(descriptor, 1, size - 1) != b"\n":
            os.ftruncate(descriptor, path.read_bytes().rfind(b"\n") + 1)
        written = os.write(descriptor, data)
        if written != len(data):
            raise OSError(f"{path.name}: {written} of {len(data)} bytes were written")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_lines(path: Path, run: str | None = None) -> list[dict[str, Any]]:
    """The lines of a file that may not exist; of one run, where it is named. A last line without its end is
    left out."""
    if not path.exists():
        return []
    whole = path.read_bytes().split(b"\n")[:-1]
    lines = [json.loads(line) for line in whole]
    return [line for line in lines if run is None or line.get("run", run) == run]


def line_of(record: Mapping[str, Any]) -> str:
    share = next((f"{record[key]:6.1%}" for key in record if key.startswith("share_of_")), "")
    shape = " ".join(f"{name}={value}" for name, value in record["shape"].items())
    return (
        f"  {record['op']:24s} {record['implementation']:34s} {record['p50_ms']:10.3f} ms"
        f"  {record['peak_bytes'] / 2**20:9.1f} MiB  {share:7s} {shape}"
    )


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


def device_is_lost(error: BaseException) -> bool:
    """Whether no further CUDA call of this process can succeed."""
    text = str(error).lower()
    return any(
        word in text for word in ("illegal memory access", "device-side assert", "unspecified launch failure")
    )


def die_with_parent() -> None:
    """This process is killed when the one that started it ends, however that ends. Linux; nothing
    elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
