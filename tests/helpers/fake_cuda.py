"""A GPU that is not there: FakeTensor storage on `cuda:0`, real tensors on the host, and what a real one
would object to.

`with fake_cuda(monkeypatch) as gpu:` runs the product's CUDA branches on a machine without CUDA, in a torch
built with it or without. Tensors on the GPU have shapes, dtypes and storages and no content; tensors on the
host are real ones. Triton kernels are not run: what they are launched with is checked against their
ahead-of-time cases (`kernel_contracts`).

Seen on the way, in `gpu`:
    operators   what ran on the GPU, by name
    waits       what would make the host wait: copies that block or leave pageable memory, streams and events
                waited for. A number read from the GPU raises (DataDependentOutputException): there is none
    strangers   what would raise there: a host tensor among a kernel's operands, dtypes that a product does
                not take, an operator without a CUDA kernel (known where torch is built with CUDA)
    launches    Triton kernels, by name
    live(), peak    storages on the GPU: how many and their bytes; the most bytes since `forget`

torch's autograd asks every gradient's device for a stream, in C++, which ends a process without CUDA. There,
and only there, the GPU calls itself `lazy:0`, a device every torch has a guard for; Python always sees
`cuda:0`. What C++ decides by the kind of device is therefore not seen (which kernel
`scaled_dot_product_attention` would take), and a torch without CUDA takes some operators apart that CUDA has
a kernel of (`silu_backward`): `operators` and `peak` are those of a torch with CUDA only there. Not seen
either: what a kernel computes, how long it takes, what its workspaces need, and orders between streams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import varlen
from torch.utils import _pytree as pytree
from triton.runtime.jit import JITFunction

from tests.helpers import kernel_contracts

GPU = torch.device("cuda", 0)
ALIAS = torch.device("lazy", 0)  # what C++ is told
MEMORY_BYTES = 80 << 30
ADDRESS_SHIFT = 12  # of a storage's address on the host: makes one that is as aligned as the allocator's
_HALF = (torch.bfloat16, torch.float16)
aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
_COPIES = {aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default}
_KEYS = (
    "CUDA",
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
    "CompositeImplicitAutograd",
)
_WRAPPED: dict[Any, Any] = {op._opoverload: op for op in (varlen._varlen_attn, varlen._varlen_attn_backward)}


class FakeCuda(FakeTensorMode):
    """The mode behind `fake_cuda`. `every`: the peak is looked at after every so many operators."""

    avoid_device_init = True  # though torch.cuda.is_available() says yes

    def __init__(self, every: int = 8) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.every = every
        self.operators: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.strangers: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.peak = 0
        # called with the name of what is to run: a test may raise there
        self.before: Callable[[str], None] = lambda name: None
        self._depth = 0
        self._storages: dict[int, StorageWeakRef] = {}
        self._pinned: dict[int, StorageWeakRef] = {}

    def forget(self) -> None:
        """Count anew."""
        for counter in (self.operators, self.waits, self.strangers, self.launches):
            counter.clear()
        self.peak = self.live()[1]

    def live(self) -> tuple[int, int]:
        """Storages that somebody holds on the GPU and their bytes."""
        self._storages = {key: storage for key, storage in self._storages.items() if not storage.expired()}
        found = [
            torch.UntypedStorage._new_with_weak_ptr(storage.cdata) for storage in self._storages.values()
        ]
        return len(found), sum(storage.nbytes() for storage in found if storage is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return self.told(args[0])
        if any(
            kind not in (Tensor, torch.nn.Parameter) and not issubclass(kind, FakeTensor) for kind in types
        ):
            return NotImplemented  # a DTensor takes itself apart
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device(kwargs["device"])
            if kwargs["device"].type in (ALIAS.type, "cuda"):
                kwargs["device"] = GPU
        tensors = [leaf for leaf in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(leaf, Tensor)]
        if kwargs.get("device") != GPU and not any(isinstance(t, FakeTensor) for t in tensors):
            return self._on_the_host(func, args, kwargs)
        if self._depth:  # inside what torch takes an operator apart into to find shapes
            return super().__torch_dispatch__(func, types, args, kwargs)
        self._depth = 1
        try:
            if func is aten._to_copy.default and _moves_nothing(args[0], kwargs):
                return super().__torch_dispatch__(aten.alias.default, types, args[:1])
            self._judge(func, args, kwargs, tensors)
            # torch's wrapper in Python: what it calls is looked at, and not its stand-in
            if func in _WRAPPED:
                self._depth = 0
                with self:
                    return _WRAPPED[func]._init_fn(*args, **kwargs)
            if func is aten.addmm.dtype_out:  # torch 2.11 cannot find its shape
                return kwargs["out"]
            found = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._depth = 0
        self._see(func, found)
        return found

    def told(self, tensor: Any) -> torch.device:
        """The device as C++ is told it."""
        if self.in_kernel_invocation:
            return torch.device("meta")
        return ALIAS if tensor.fake_device.type == "cuda" else tensor.fake_device

    def _on_the_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is aten.is_pinned.default:
            return self._is_pinned(args[0])
        pin = kwargs.pop("pin_memory", None) or func is aten._pin_memory.default
        found = args[0].clone() if func is aten._pin_memory.default else func(*args, **kwargs)
        if pin:
            self._pinned[found.untyped_storage()._cdata] = StorageWeakRef(found.untyped_storage())
        return found

    def _is_pinned(self, tensor: Tensor) -> bool:
        known = self._pinned.get(tensor.untyped_storage()._cdata)
        return known is not None and not known.expired()

    def _judge(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        name = func.name()
        self.before(name)
        self.operators[name] += 1
        if func in _COPIES:
            self._judge_copy(func, name, args, kwargs)
            return
        for tensor in tensors:
            if tensor.device.type == "cpu" and tensor.ndim:  # one number travels with the launch
                self.strangers[f"{name}: an operand on the host {list(tensor.shape)}"] += 1
        for wrong in kernel_contracts.of_operator(func, args, kwargs):
            self.strangers[f"{name}: {wrong}"] += 1
        if torch.version.cuda and not any(
            torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in _KEYS
        ):
            self.strangers[f"{name}: no CUDA kernel"] += 1

    def _judge_copy(self, func: Any, name: str, args: Any, kwargs: Any) -> None:
        if func is aten._to_copy.default:
            pairs = [(kwargs.get("device") or args[0].device, args[0])]
        elif func is aten.copy_.default:
            pairs = [args[:2]]
        else:
            pairs = list(zip(*args[:2], strict=True))
        asked = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        for into, source in pairs:
            target = into if isinstance(into, torch.device) else into.device
            if target.type == source.device.type:
                continue
            host = source if source.device.type == "cpu" else into
            where = "to the GPU" if target.type == "cuda" else "to the host"
            if not asked:
                self.waits[f"{name} {where}, blocking"] += 1
            elif not isinstance(host, Tensor) or not self._is_pinned(host):
                self.waits[f"{name} {where}, of pageable memory"] += 1

    def _see(self, func: Any, found: Any) -> None:
        for leaf in pytree.tree_leaves(found):
            if isinstance(leaf, FakeTensor) and leaf.fake_device.type == "cuda":
                storage = leaf.untyped_storage()
                # a weak reference keeps the key from being used again
                if storage._cdata not in self._storages:
                    self._storages[storage._cdata] = StorageWeakRef(storage)
        if self.operators.total() % self.every == 0:
            self.peak = max(self.peak, self.live()[1])


def _moves_nothing(tensor: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether C++ asks for this copy only because it takes `cuda` for another device than `lazy`."""
    wanted = (kwargs.get("device"), kwargs.get("dtype") or tensor.dtype, kwargs.get("memory_format"))
    return wanted == (tensor.device, tensor.dtype, None)


def address(tensor: Tensor) -> int:
    """An address of its own for every storage, aligned as the allocator's are, plus the tensor's place in
    it."""
    return (
        tensor.untyped_storage()._cdata << ADDRESS_SHIFT
    ) + tensor.storage_offset() * tensor.element_size()


class _Stream:
    """One stream on which everything runs in order."""

    def __init__(self, gpu: FakeCuda):
        self.gpu, self.device, self.stream_id = gpu, GPU, 0

    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or _Event(self.gpu)

    def synchronize(self) -> None:
        self.gpu.waits["Stream.synchronize"] += 1


class _Event:
    def __init__(self, gpu: FakeCuda):
        self.gpu = gpu

    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.gpu.waits["Event.synchronize"] += 1

    def elapsed_time(self, other: Any) -> float:
        self.gpu.waits["Event.elapsed_time"] += 1
        return 1.0


@contextmanager
def fake_cuda(monkeypatch: Any, *, every: int = 8) -> Iterator[FakeCuda]:
    """Tensors on `cuda` are fakes inside, `torch.cuda` answers for one H100, Triton launches are checked and
    not made."""
    gpu = FakeCuda(every)
    stream = _Stream(gpu)
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "is_current_stream_capturing": False,
        "device_count": 1,
        "current_device": 0,
        "current_stream": stream,
        "default_stream": stream,
        "get_device_name": "NVIDIA H100 80GB HBM3",
        "get_device_capability": (9, 0),
        "get_device_properties": SimpleNamespace(
            total_memory=MEMORY_BYTES, major=9, minor=0, multi_processor_count=132
        ),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        **dict.fromkeys(("max_memory_allocated", "memory_allocated", "memory_reserved"), 0),
        "memory_reserved": 0,
        "memory_allocated": 0,
        "stream": nullcontext(),
        "device": nullcontext(),
        **dict.fromkeys(("_lazy_init", "set_device", "set_rng_state", "manual_seed", "manual_seed_all")),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: _Stream(gpu))
    monkeypatch.setattr(torch.cuda, "Event", lambda *_, **__: _Event(gpu))
    for name, answer in (
        ("synchronize", None),
        ("empty_cache", None),
        ("mem_get_info", (MEMORY_BYTES * 7 // 8, MEMORY_BYTES)),
    ):

        def wait(*_: Any, _name: str = name, _answer: Any = answer) -> Any:
            gpu.waits[f"torch.cuda.{_name}"] += 1
            return _answer

        monkeypatch.setattr(torch.cuda, name, wait)

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        gpu.before(kernel.fn.__name__)
        gpu.launches[kernel.fn.__name__] += 1
        kernel_contracts.check_launch(kernel, grid, args, kwargs)

    plain, plain_swap = FakeTensor.__torch_dispatch__.__func__, torch.utils.swap_tensors

    def dispatch(kind: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (
            args[0].fake_mode.told(args[0])
            if func is _DEVICE and isinstance(args[0].fake_mode, FakeCuda)
            else plain(kind, func, types, args, kwargs or {})
        )

    def swap(ours: Tensor, moved: Tensor) -> None:  # of Module.to, which on a real GPU would leave ours alone
        if (ours.device, ours.dtype) != (moved.device, moved.dtype):
            plain_swap(ours, moved)

    monkeypatch.setattr(JITFunction, "run", launch)
    monkeypatch.setattr(torch.utils, "swap_tensors", swap)
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)
    # no guard is asked for; it would outlive us
    monkeypatch.setattr(torch._C, "_ensureCUDADeviceGuardSet", lambda: None)
    monkeypatch.setattr(FakeTensor, "__torch_dispatch__", classmethod(dispatch))
    monkeypatch.setattr(
        FakeTensor, "is_cuda", property(lambda tensor: tensor.fake_device.type == "cuda"), raising=False
    )
    monkeypatch.setattr(FakeTensor, "data_ptr", address, raising=False)
    with gpu:
        yield gpu
