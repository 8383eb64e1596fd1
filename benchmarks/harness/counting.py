"""What one call needs, counted: bytes, dispatched operations, waits of the host."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness.timing import Call


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
    """What one call dispatches. `operations`: aten calls that do work (no views); `syncs`: those the host
    waits for; `allocations`: results that lie in memory of their own."""

    operations: int = 0
    syncs: int = 0
    allocations: int = 0
    by_name: dict[str, int] = field(default_factory=dict)


# Operations whose result's size or value the host must read: each waits for the device.
_SYNCING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "is_nonzero",
    "equal",
    "repeat_interleave",
)


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
        by_mask = name in ("index", "index_put_", "index_put") and any(
            m is not None and m.dtype == torch.bool for m in args[1]
        )
        leaves = (
            name == "_to_copy"
            and target is not None
            and torch.device(target).type == "cpu"
            and not args[0].is_cpu
        )
        if name in _SYNCING or leaves or by_mask:
            self.counts.syncs += 1
        given = _memory((args, kwargs))  # before: what runs in place may move
        found = func(*args, **(kwargs or {}))
        self.counts.allocations += len(_memory(found) - given)
        return found


def _memory(tree: object) -> set[int]:
    """The storages of its tensors. An empty one holds no memory."""
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
    return {tensor.untyped_storage()._cdata for tensor in tensors if tensor.numel()}


def count(call: Call) -> Counts:
    """Dispatched operations and host syncs of one call. The same on every machine for the same torch."""
    with _Counter() as counter:
        call()
    return counter.counts
