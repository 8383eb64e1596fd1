"""`FakeCapture`: a CUDA graph's stand-in on a CPU, that forgets what a CUDA graph forgets.

A capture runs the function and notes every operator of torch with the tensors it read and wrote, autograd's
backward pass included. A replay makes the same operators again on the same storages: nothing of Python runs, so
whatever Python decided or read in the capture is stale, as on a GPU. Captures share a pool: before a replay all
that any of them has made in its capture is filled with NaN (an unlikely number where there is none), so that
what is read too late, or of another replay, shows.

A number that the host reads (item, nonzero, a mask as an index) cannot be captured there, and raises here.
`foreign` are the storages that a capture reads and has not made: on a GPU somebody must keep them alive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from repsft_fast.selftest.syncs import READS

WARM_UPS = 3
_UNDEFINED = (
    "aten::empty",
    "aten::new_empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty_strided",
)
_POISON = {torch.bool: True, torch.uint8: 213}


class FakeCapture:
    """`capture(function) → FakeGraph`. fail_at: the number of the capture that fails."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.graphs: list[FakeGraph] = []
        self.fail_at, self.captures = fail_at, 0

    def __call__(self, function: Callable[[], Any]) -> FakeGraph:
        for _ in range(WARM_UPS):
            function()
        self.captures += 1
        if self.captures == self.fail_at:
            raise RuntimeError("operation not permitted when stream is capturing\nand more lines of it")
        recorder = _Recorder()
        with recorder:
            outputs = function()
        graph = FakeGraph(self, recorder, outputs)
        self.graphs.append(graph)
        return graph


class FakeGraph:
    def __init__(self, pool: FakeCapture, recorder: _Recorder, outputs: Any):
        self.pool, self.outputs = pool, outputs
        self.calls, self.made, self.foreign = recorder.calls, recorder.made, recorder.foreign
        self.replays = 0

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for graph in self.pool.graphs:
            graph.poison()
        for function, args, kwargs, outputs in self.calls:
            again = function(*args, **kwargs)
            if function._schema.name in _UNDEFINED:
                continue
            for old, new in zip(pytree.tree_leaves(outputs), pytree.tree_leaves(again), strict=True):
                if (
                    isinstance(old, Tensor)
                    and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr()
                ):
                    old.copy_(new)

    def poison(self) -> None:
        for tensor in self.made:
            whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            whole.fill_(
                _POISON.get(tensor.dtype, float("nan") if tensor.dtype.is_floating_point else -(1 << 30))
            )


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.made: list[Tensor] = []  # one tensor of every storage that began in the capture
        self.foreign: dict[int, Tensor] = {}  # by address, those that did not
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        masks = name in (
            "aten::index",
            "aten::index_put",
            "aten::index_put_",
            "aten::_index_put_impl_",
        ) and any(i is not None and i.dtype is torch.bool for i in args[1])
        if name in READS or masks:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        for tensor in _tensors((args, kwargs)):
            address = tensor.untyped_storage().data_ptr()
            if address not in self._known:
                self._known.add(address)
                self.foreign[address] = tensor
        found = func(*args, **kwargs)
        for tensor in _tensors(found):
            address = tensor.untyped_storage().data_ptr()
            if address and address not in self._known:
                self._known.add(address)
                self.made.append(tensor.detach())
        self.calls.append((func, args, kwargs, found))
        return found


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


class Again:
    """No capture at all: a replay makes the same call again. What a captured run has to equal bit for bit."""

    def __init__(self, function: Callable[[], Any] | None = None):
        self.function = function
        self.outputs = function() if function is not None else None

    def __call__(self, function: Callable[[], Any]) -> Again:
        return Again(function)

    def replay(self) -> None:
        assert self.function is not None
        self.outputs = self.function()
