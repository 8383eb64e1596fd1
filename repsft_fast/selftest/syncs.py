"""Count what would make the host wait for the device: numbers read, sizes that depend on data, copies that
block.

Counted at dispatch, so what is read back counts the same on a CPU, where nothing waits, as on a GPU, where
everything does. Two reads are invisible on a CPU and copies to the host on a GPU: tolist() and numpy().
Copies to the device are there only where there is one; a fake one is enough. Those that torch makes below
dispatch, of Python's numbers and numpy's, are seen where they are asked for: torch.tensor([…], device=…),
x[[0, 2]].
"""

from __future__ import annotations

import collections
import sys
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
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
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_MADE = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
_SUBSCRIPTS = {Tensor.__getitem__, Tensor.__setitem__}


class SyncCounter(TorchDispatchMode):
    """`with SyncCounter() as syncs: ...; assert syncs.total == 0, syncs.found`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()
        self.theirs = 0  # of these, those that an architecture's own code asked for
        self._pins = torch.cuda.is_available()  # where no memory can be pinned, none can be asked for
        self._asked = _Asked(self)

    @property
    def total(self) -> int:
        return sum(self.found.values())

    def count(self, name: str) -> None:
        self.found[name] += 1
        self.theirs += _is_theirs(sys._getframe(1))

    def __enter__(self) -> SyncCounter:
        self._asked.__enter__()
        return super().__enter__()

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        self._asked.__exit__(*reason)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in READS:
            self.count(name)
        elif name in _INDEXED:
            self._index(name, args)
        elif name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
            self.count(name)
        elif (
            name.startswith("aten::masked_fill")
            and isinstance(args[2], Tensor)
            and not _on_host(args[2].device)
        ):
            self.count(f"{name} by a number on the device")
        elif name == "aten::_to_copy":
            target = torch.device(kwargs.get("device") or args[0].device)
            self._copy(name, target, args[0], kwargs.get("non_blocking"))
        elif name in ("aten::copy_", "aten::_foreach_copy_"):
            asked = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            for target, source in [args[:2]] if name == "aten::copy_" else zip(*args[:2], strict=True):
                self._copy(name, target.device, source, asked)
        return func(*args, **kwargs)

    def _index(self, name: str, args: Any) -> None:
        indices = [i for i in args[1] if i is not None]
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            self.count(f"{name} by a mask")
        if not _on_host(args[0].device) and any(_on_host(t.device) for t in [*indices, *args[2:3]]):
            self.count(f"{name} of host numbers")

    def _copy(self, name: str, target: torch.device, source: Tensor, non_blocking: Any) -> None:
        if not _on_host(source.device) and source.device.type != "meta" and _on_host(target):
            if not non_blocking:
                self.count(f"{name} to the host")
        elif _on_host(source.device) and not _on_host(target) and not self._asked.making:
            if not non_blocking:
                self.count(f"{name} to the device, blocking")
            elif self._pins and not source.is_pinned():
                self.count(f"{name} to the device, of pageable memory")


class _Asked(TorchFunctionMode):
    """Tensors made on a device from numbers of Python or numpy. `making`: what is dispatched meanwhile is
    that."""

    def __init__(self, counter: SyncCounter):
        super().__init__()
        self.counter, self.making = counter, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _MADE and not isinstance(_data(func, args, kwargs), Tensor):
            self.making = True
            try:
                made = func(*args, **kwargs)
            finally:
                self.making = False
            if not _on_host(made.device):
                self.counter.count(f"{func.__name__} on the device")
            return made
        if func in _SUBSCRIPTS and not _on_host(args[0].device):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(place, list | np.ndarray) for place in places):
                self.counter.count("subscripts of host numbers")
        return func(*args, **kwargs)


def _is_theirs(frame: FrameType | None) -> bool:
    """Whether an architecture's own code is nearer than ours: the attention that its layers call is ours."""
    while frame is not None:
        module = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if module in ("transformers", "transformers_modules"):
            return True
        if module in ("repsft_fast", "csrc_triton") and frame.f_globals["__name__"] != __name__:
            return False
        frame = frame.f_back
    return False


def _data(func: Any, args: Any, kwargs: Any) -> Any:
    given = args[1:] if func is Tensor.new_tensor else args
    return given[0] if given else kwargs.get("data", kwargs.get("obj"))


def _on_host(device: torch.device) -> bool:
    return device.type == "cpu"
