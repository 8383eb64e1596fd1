"""How time is taken here: interleaved, cold, with the session's own noise.

- Variants take turns in one process: A B B A is one round, B A A B the next. A round gives each variant one
  number, its better call (an interruption hits one of the two), so rounds are pairs.
- Every call finds its operands out of the cache: a buffer larger than the cache is written before it.
- A GPU is timed by events on its stream, a CPU by `perf_counter_ns`.
- The first variant also runs under a second name. What those two differ by is the noise of the session.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

SLOW_MS = 100.0  # where time is short, a call above this gets fewer rounds
COLD_BYTES_CPU = 32 << 20  # beyond the second-level cache of one core, and most third-level shares
NOISE_NAME = "A/A"

Call = Callable[[], Any]


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

    A round runs the variants in order and then backwards, the next the other way round, so a drift favours
    nobody. `budget_s` ends early, after at least eight rounds; where a call takes longer than SLOW_MS,
    `slow_rounds` are the most. An error in a variant is the caller's: nothing is left out silently.
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
    calls: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    budget_s: float | None = None,
    slow_rounds: int | None = None,
) -> dict[str, list[float]]:
    """`interleave` for calls that return their own milliseconds, another process's for one."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = None if budget_s is None else time.perf_counter() + budget_s
    for done in range(rounds):
        if (
            slow_rounds is not None
            and done >= slow_rounds
            and max(min(seen) for seen in times.values()) > SLOW_MS
        ):
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


def quantile(values: Sequence[float], q: float) -> float:
    """Linear-interpolated quantile of a non-empty sequence."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
