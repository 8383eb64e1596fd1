"""How things are measured here: interleaved, cold, against this machine's own ceilings and its own noise.

- Variants take turns in one process: A B B A is one round, B A A B the next. A round gives each variant one number, its
  better call (an interruption hits one of the two), so rounds are pairs.
- Every call finds its operands out of the cache: a buffer larger than the cache is written before it.
- A GPU is timed by events on its stream, a CPU by `perf_counter_ns`.
- The first variant also runs under a second name. What those two differ by is the noise of the session.
- `ceilings` measures what a copy and a matrix product reach on this machine; shares are of those, not of a datasheet.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
SLOW_MS = 100.0  # where time is short, a call above this gets fewer rounds
COLD_BYTES_CPU = 32 << 20  # beyond the second-level cache of one core, and most third-level shares
NOISE_NAME = "A/A"

Call = Callable[[], Any]


# Time ----------------------------------------------------------------------------------------------------------------


def interleave(
    variants: Mapping[str, Call],
    *,
    device: torch.device | str = "cpu",
    rounds: int = 30,
    warmup: int = 2,
    cold: bool = True,
    budget_s: float | None = None,
    slow_rounds: int | None = None,
) -> dict[str, list[float]]:
    """Milliseconds per call of each variant, one number per round; equal indices belong together.

    A round runs the variants in order and then backwards, the next the other way round, so a drift favours nobody.
    `budget_s` ends early, after at least eight rounds; where a call takes longer than SLOW_MS, `slow_rounds` are the most. An
    error in a variant is the caller's: nothing is left out silently.
    """
    device = torch.device(device)
    calls = dict(variants)
    for call in calls.values():
        for _ in range(warmup):
            call()
    flush = _flusher(device) if cold else lambda: None
    measured: dict[str, Callable[[], float]] = {
        name: functools.partial(_time, call, device, flush) for name, call in calls.items()
    }
    gc.collect()
    gc.disable()
    try:
        return interleave_measured(measured, rounds=rounds, budget_s=budget_s, slow_rounds=slow_rounds)
    finally:
        gc.enable()


def interleave_measured(
    calls: Mapping[str, Callable[[], float]], *, rounds: int, budget_s: float | None = None, slow_rounds: int | None = None
) -> dict[str, list[float]]:
    """`interleave` for calls that return their own milliseconds, another process's for one."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = None if budget_s is None else time.perf_counter() + budget_s
    for done in range(rounds):
        if slow_rounds is not None and done >= slow_rounds and max(min(seen) for seen in times.values()) > SLOW_MS:
            break
        order = list(calls)[:: 1 if done % 2 == 0 else -1]
        first = {name: calls[name]() for name in order}
        second = {name: calls[name]() for name in order[::-1]}
        for name in calls:
            times[name].append(min(first[name], second[name]))
        if end is not None and done >= 7 and time.perf_counter() > end:
            break
    return times


def with_noise(variants: Mapping[str, Call]) -> dict[str, Call]:
    """The variants, and the first one once more under the name `A/A`."""
    first = next(iter(variants.values()))
    return {**variants, NOISE_NAME: first}


def _time(call: Call, device: torch.device, flush: Call) -> float:
    flush()
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)
    begin = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - begin) / 1e6


def _flusher(device: torch.device) -> Call:
    size = COLD_BYTES_CPU
    if device.type == "cuda":
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    buffer = torch.empty(size, dtype=torch.uint8, device=device)
    # On a GPU the write is queued before the start event, so the launch gap is hidden as well.
    return lambda: buffer.fill_(1)


# Memory, operations, syncs -----------------------------------------------------------------------------------------------


def peak_bytes(call: Call, device: torch.device | str = "cpu") -> int:
    """Most bytes that torch's allocator holds during the call beyond what it held before. Exact, not sampled.

    What the call returns is dropped within. On a CPU the allocations come from the profiler's events.
    """
    device = torch.device(device)
    gc.collect()  # garbage that is found within the call would be taken for room that the call gives back
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    collects = gc.isenabled()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            call()
    finally:
        if collects:
            gc.enable()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held = max(0, held + event.nbytes())  # what was held before may be freed: that is no room gained
        peak = max(peak, held)
    return peak


@dataclass
class Counts:
    """What one call dispatches. `operations`: aten calls that do work (no views); `syncs`: those the host waits for."""

    operations: int = 0
    syncs: int = 0
    by_name: dict[str, int] = field(default_factory=dict)


# Operations whose result's size or value the host must read: each waits for the device.
_SYNCING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero", "equal", "repeat_interleave")


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[-1]
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view:
            self.counts.operations += 1
            self.counts.by_name[name] = self.counts.by_name.get(name, 0) + 1
        target = (kwargs or {}).get("device")
        by_mask = name in ("index", "index_put_", "index_put") and any(m is not None and m.dtype == torch.bool for m in args[1])
        leaves = name == "_to_copy" and target is not None and torch.device(target).type == "cpu" and not args[0].is_cpu
        if name in _SYNCING or leaves or by_mask:
            self.counts.syncs += 1
        return func(*args, **(kwargs or {}))


def count(call: Call) -> Counts:
    """Dispatched operations and host syncs of one call. The same on every machine for the same torch."""
    with _Counter() as counter:
        call()
    return counter.counts


# The machine -----------------------------------------------------------------------------------------------------------


class NoCommit(ValueError):
    """Which code was measured is not known, or two answers differ."""


def code() -> dict[str, Any]:
    """commit, dirty and source of the tree this file is in.

    commit: of git, or of the variable COMMIT where the tree was copied without its history. dirty: None there, since nobody
    knows; `source`, a digest of the code itself, is then what can be compared with the commit (`source_digest`).
    """
    head, given = _git("rev-parse", "HEAD"), os.environ.get("COMMIT", "").strip().lower()
    if given and (len(given) != 40 or set(given) - set("0123456789abcdef")):
        raise NoCommit(f"COMMIT: expected the 40 hexadecimal digits of a commit, got {given!r}")
    if head and given and head != given:
        raise NoCommit(f"COMMIT is {given}, but this checkout is at {head}; leave COMMIT out, or check that commit out")
    if not head and not given:
        raise NoCommit("no git history here and no COMMIT: set COMMIT (or --commit) to the commit that was copied")
    dirty = bool(_git("status", "--porcelain", "--untracked-files=no")) if head else None
    return {"commit": head or given, "dirty": dirty, "source": source_digest()}


def source_digest(root: Path = ROOT) -> str:
    """16 hexadecimal digits over the names and contents of the Python files that a measurement runs."""
    digest = hashlib.blake2b(digest_size=8)
    for folder in ("benchmarks", "csrc_triton", "repsft_fast"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def environment(device: str = "cpu") -> dict[str, Any]:
    """The fields every record of this process shares. NoCommit where neither git nor COMMIT says which code this is."""
    return {**code(), **machine(device)}


def machine(device: str = "cpu") -> dict[str, Any]:
    """What is measured on."""
    import triton

    place = torch.device(device)
    cuda = place.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(place) if cuda else _cpu_model(),
        "device_class": place.type,
        "driver": _driver() if cuda else platform.release(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def ceilings(device: torch.device | str, dtype: torch.dtype, *, small: bool = False) -> dict[str, float]:
    """What this machine reaches: `bytes_per_s` of a large copy (read + write), `flops_per_s` of a large matrix product."""
    device = torch.device(device)
    cuda = device.type == "cuda" and not small
    elements, side = (1 << 30, 8192) if cuda else (1 << 23, 384) if small else (1 << 26, 1024)
    source = torch.empty(elements, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    calls: dict[str, Call] = {"copy": lambda: target.copy_(source), "gemm": lambda: torch.mm(a, b, out=out)}
    times = interleave(calls, device=device, rounds=5 if small else 15)
    return {
        "bytes_per_s": 2 * elements / (quantile(times["copy"], 0.2) / 1e3),
        "flops_per_s": 2 * side**3 / (quantile(times["gemm"], 0.2) / 1e3),
    }


def quantile(values: Sequence[float], q: float) -> float:
    """Linear-interpolated quantile of a non-empty sequence."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""  # a copy of the tree without its history
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x{len(names)}" if names else platform.machine()


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""
