"""The most bytes that fake tensors would hold at once, to the byte and operator by operator.

Every operator's results are counted, and who is gone is looked up wherever there would be a new peak, so that
none is missed. What an operator takes inside itself (workspaces) is not seen, nor what an allocator rounds up
to. Sums of gradients are made in place on a device and beside both on fake tensors, so that here one of them
more may live for a moment.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Peak(TorchDispatchMode):
    """Enter it inside a fake mode; `see` what is there already. device: the kind that is counted."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.most, self.at = 0, ""  # bytes; the operator behind which they lived
        self._counted = 0
        self._alive: dict[int, StorageWeakRef] = {}

    @property
    def live(self) -> int:
        """Bytes that somebody holds now."""
        self._alive = {key: known for key, known in self._alive.items() if not known.expired()}
        found = [torch.UntypedStorage._new_with_weak_ptr(known.cdata) for known in self._alive.values()]
        self._counted = sum(storage.nbytes() for storage in found if storage is not None)
        return self._counted

    def forget(self) -> None:
        """From here on the most is what lives now."""
        self.most, self.at = self.live, ""

    def see(self, tensors: Any, name: str = "") -> None:
        """Count the storages of these that are not counted yet."""
        for leaf in pytree.tree_leaves(tensors):
            if isinstance(leaf, FakeTensor) and leaf.fake_device.type == self.device:
                storage = leaf.untyped_storage()
                # a weak reference keeps the key from being used again
                if storage._cdata not in self._alive:
                    self._alive[storage._cdata] = StorageWeakRef(storage)
                    self._counted += storage.nbytes()
        if self._counted > self.most and self.live > self.most:
            self.most, self.at = self._counted, name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.see(found, func.name())
        return found
