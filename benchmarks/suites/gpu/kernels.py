"""Kernels of one call by time, as torch's profiler saw them, sorted into the lines of the budget that was
predicted.

Where the profiler cannot see a device (no CUPTI, no permission) it records nothing and raises nothing;
`NoKernels` says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# A kernel belongs to the first class with one of these words in its name, lower case. Order matters: a fused
# AdamW and a copy of many tensors are both `multi_tensor_apply_kernel`.
WORDS = {
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "head": ("cross_entropy", "kept_hidden", "kept_head"),
    "products": (
        "gemm", "nvjet", "cutlass", "xmma", "gemv", "splitk", "triton_tem", "cublas", "aten::mm",
        "aten::addmm", "aten::bmm",
    ),
    "optimizer": ("adam", "lpnorm", "foreach_norm"),
    "sharding": (
        "nccl", "chunk_cat", "split_with_sizes", "copyfunctor", "foreach_copy", "memcpy dtod", "catarray",
    ),
    "transfers": ("memcpy", "memset"),
    "copies": ("copy_kernel", "aten::copy_", "aten::_to_copy", "aten::contiguous", "aten::clone"),
    "elementwise": (
        "elementwise", "rope", "rms_norm", "swiglu", "reduce", "softmax", "index", "gather", "scatter",
        "fill", "scan", "sort",
        "embedding", "multi_tensor_apply", "arange", "distribution", "segment", "searchsorted", "unrolled",
        "vectorized", "aten::",
    ),
}  # fmt: skip
CLASSES = (*WORDS, "other")
LAUNCHES = ("cudaLaunch", "cuLaunch")
# shown on the device, no kernels
WAITS = ("Stream Wait Event", "Event Sync", "Stream Sync", "Context Sync", "Unknown Sync")


# the device's clock may lag: kernels that seem to begin before the profiler did are dropped without a word
LEAD_S = 0.05


class NoKernels(RuntimeError):
    """The profiler ran and saw nothing on the device."""


@dataclass(frozen=True)
class Kernel:
    """One name, all its calls."""

    name: str
    calls: int
    ms: float
    kind: str  # one of CLASSES


@dataclass(frozen=True)
class Trace:
    """What ran on the device during one call."""

    # longest first; a name with calls of two kinds (head and layers) is there twice
    kernels: tuple[Kernel, ...]
    busy_ms: float  # the device had something to do: overlapping kernels count once
    span_ms: float  # from the first kernel's beginning to the last one's end; the profiler slows the host
    launches: int  # what the host asked for, where that was seen; 0 = not

    @property
    def calls(self) -> int:
        return sum(kernel.calls for kernel in self.kernels)

    @property
    def ms(self) -> float:
        return sum(kernel.ms for kernel in self.kernels)

    def by_class(self) -> dict[str, float]:
        """Milliseconds of every class, 0 where nothing was of it."""
        return {kind: sum(kernel.ms for kernel in self.kernels if kernel.kind == kind) for kind in CLASSES}

    def table(self, title: str, rows: int = 40) -> str:
        """The longest kernels, one a line: share, ms, calls, class, name."""
        lines = [
            title,
            (
                f"{self.calls:,} kernels, {self.ms:.2f} ms, device busy {self.busy_ms:.2f} ms of"
                f" {self.span_ms:.2f} ms"
            ),
        ]
        lines += [
            f"{kind:12s} {ms:9.3f} ms {ms / self.ms:6.1%}" for kind, ms in self.by_class().items() if ms
        ]
        lines += [f"{'share':>6s} {'ms':>9s} {'calls':>6s}  class        name"]
        lines += [
            f"{k.ms / self.ms:6.1%} {k.ms:9.3f} {k.calls:6d}  {k.kind:12s} {k.name[:160]}"
            for k in self.kernels[:rows]
        ]
        return "\n".join(lines) + "\n\n"


def traced(call: Callable[[], Any], device: str, *, long_product_ms: float = float("inf")) -> Trace:
    """The kernels of `call()`, which must be warm. NoKernels where none was seen. Waits for the device.

    long_product_ms: a matrix product that takes longer is the head's; its shape is not in its name.
    """
    cuda = device == "cuda"
    with profile(
        activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU], acc_events=True
    ) as recorded:
        if cuda:
            torch.cuda.synchronize()
            time.sleep(LEAD_S)
        call()
        if cuda:
            torch.cuda.synchronize()
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    return trace_of(events, "CUDA" if cuda else "CPU", long_product_ms=long_product_ms)


def trace_of(events: Iterable[Any], device_type: str, *, long_product_ms: float = float("inf")) -> Trace:
    """From the profiler's own events. Annotations and waits are shown among a device's kernels and are
    none."""
    times: dict[tuple[str, str], list[float]] = {}
    spans: list[tuple[int, int]] = []
    launches = 0
    for event in events:
        name, length = event.name(), event.duration_ns()
        launches += name.startswith(LAUNCHES)
        on_device = str(event.device_type()).rsplit(".", 1)[-1] == device_type
        if not on_device or event.is_user_annotation() or name in WAITS or length <= 0 or name == "[memory]":
            continue
        kind = class_of(name)
        if kind == "products" and length / 1e6 > long_product_ms:
            kind = "head"
        times.setdefault((name, kind), []).append(length / 1e6)
        spans.append((event.start_ns(), event.start_ns() + length))
    if not spans:
        raise NoKernels(f"torch's profiler saw no {device_type} kernels here")
    kernels = [Kernel(name, len(each), sum(each), kind) for (name, kind), each in times.items()]
    spans.sort()
    span_ms = (max(end for _, end in spans) - spans[0][0]) / 1e6
    return Trace(tuple(sorted(kernels, key=lambda k: -k.ms)), _union_ns(spans) / 1e6, span_ms, launches)


def class_of(name: str) -> str:
    """One of CLASSES, by the words in a kernel's name."""
    low = name.lower()
    # What a compiler has fused is named after every operator that went into it.
    if low.startswith("triton_") and not low.startswith("triton_tem"):
        return "elementwise"
    return next((kind for kind, words in WORDS.items() if any(word in low for word in words)), "other")


def _union_ns(spans: Sequence[tuple[int, int]]) -> int:
    """Nanoseconds covered by at least one of these, which are sorted by their beginnings."""
    covered, until = 0, 0
    for begin, end in spans:
        covered += max(0, end - max(begin, until))
        until = max(until, end)
    return covered
