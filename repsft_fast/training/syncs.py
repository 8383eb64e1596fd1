"""Count what would make the host wait for the device: numbers read, sizes that depend on data, copies to the host.

Counted at dispatch, so the count means the same on a CPU, where nothing waits, as on a GPU, where everything does. Two reads
are invisible on a CPU and copies to the host on a GPU: tolist() and numpy().
"""

from __future__ import annotations

import collections
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = {
    "aten::_local_scalar_dense",  # item(), float(), bool()
    "aten::equal",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_consecutive",
}


class SyncCounter(TorchDispatchMode):
    """`with SyncCounter() as syncs: ...; assert syncs.total == 0, syncs.found`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    @property
    def total(self) -> int:
        return sum(self.found.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in READS:
            self.found[name] += 1
        elif name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
            if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
                self.found[f"{name} by a mask"] += 1
        elif name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
            self.found[name] += 1
        elif name in ("aten::_to_copy", "aten::copy_", "aten::_copy_from"):
            self._copy(name, args, kwargs)
        return func(*args, **kwargs)

    def _copy(self, name: str, args: Any, kwargs: Any) -> None:
        if name == "aten::_to_copy":
            source, target = args[0].device, torch.device(kwargs.get("device") or args[0].device)
        else:
            source, target = args[1].device, args[0].device
        if source.type not in ("cpu", "meta") and target.type == "cpu" and not kwargs.get("non_blocking"):
            self.found[f"{name} to the host"] += 1
