"""What a row keeps for its backward pass, counted on the real modules over tensors that have shapes and no
memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from repsft_fast.memory.peak import Peak
from repsft_fast.models.load import load_model
from repsft_fast.models.loss import hidden_states
from repsft_fast.ops.row_pass import drop_workspace
from repsft_fast.row import Row

T = TypeVar("T")
# One for all rehearsals: torch 2.11 ends with a segmentation fault when a second thread enters a fake mode.
_THREAD = ThreadPoolExecutor(1, thread_name_prefix="rehearsal")


@dataclass(frozen=True)
class Saved:
    """Bytes the backward pass keeps for every token: of one decoder layer, and of everything else; and what
    the backward pass of one layer holds beside them while it runs."""

    layer: float
    rest: float
    passing: float = 0.0


def saved_per_token(
    config: Any,
    *,
    compute_dtype: str = "bfloat16",
    attention: str = "varlen",
    tokens: int = 512,
    lora: dict[str, Any] | None = None,
) -> Saved:
    """Counted on the real module, as what one layer more keeps, over fake tensors. config: a
    PreTrainedConfig; lora: adapters as `load_model` takes them.

    For plain layers; Liger's and compiled ones keep less (of a norm its input alone, of a gated MLP no
    product of the gate).
    """

    # each brings its own rotary tables
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or [""]))

    def model_of(layers: int) -> Any:
        shape = copy.deepcopy(config)
        shape.num_hidden_layers = layers
        if kinds != [""]:
            shape.layer_types = [*kinds, *kinds[-1:] * (layers - len(kinds))]
            shape.sliding_window = tokens  # a window changes what is computed, not what is kept
        model = load_model(
            shape,
            device="meta",
            param_dtype=compute_dtype,
            attention=attention,
            layer_kernels="none",
            random_weights=True,
            lora=lora,
        )
        return model.to(getattr(torch, compute_dtype))  # adapters are computed with in it too

    def count(layers: int) -> int:
        model = model_of(layers)
        return rehearsed(lambda: saved_bytes(model, fake_row([tokens])))

    def passing(row_tokens: int) -> int:
        model = model_of(len(kinds))
        return rehearsed(lambda: passing_bytes(model, fake_row([row_tokens])))

    fewer, more = count(len(kinds)), count(len(kinds) + 1)
    # Gradients of the weights pass as well, and do not grow with the row: rows so long that they do not
    # decide where the peak is, and the difference of two of them.
    long = 1 << 16
    return Saved(
        layer=(more - fewer) / tokens,
        rest=(fewer - len(kinds) * (more - fewer)) / tokens,
        passing=max(0.0, (passing(2 * long) - passing(long)) / long),
    )


def saved_bytes(model: Any, row: Row) -> int:
    """Bytes of all tensors kept for the backward pass of one row by the backbone, parameters apart, each
    storage once.

    The head keeps its own in place of saved tensors: `sizing.ModelSize.row` and `head`.
    """
    materialise(model)
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_states(model, row, model.loss_settings.attention)
    held = [*model.parameters(), *model.buffers(), *(t for t in vars(row).values() if isinstance(t, Tensor))]
    own = {tensor.untyped_storage()._cdata for tensor in held}
    return sum(storage.nbytes() for key, storage in storages.items() if key not in own)


def passing_bytes(model: Any, row: Row) -> int:
    """The most bytes that the backbone's backward pass of one row holds beside what its forward pass kept.
    Gradients of weights are dropped as they are made."""
    materialise(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop)
    with Peak() as peak:
        hidden = hidden_states(model, row, model.loss_settings.attention)
        arriving = torch.empty_like(hidden)
        peak.forget()
        before = peak.most
        hidden.backward(arriving)  # type: ignore[no-untyped-call]
    return peak.most - before


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def rehearsed(call: Callable[[], T]) -> T:
    """`call()` with tensors that have shapes and no memory. In a thread of its own: buffers that are kept per
    thread (ops.row_pass.workspace) must not outlive the rehearsal."""

    def run() -> T:
        try:
            with FakeTensorMode():
                return call()
        finally:
            drop_workspace()

    return _THREAD.submit(run).result()


def materialise(model: nn.Module) -> None:
    """Parameters and buffers of the meta device become the fake mode's, tied ones stay tied. Others are left
    alone."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or tensor.device.type != "meta":
                    continue
                if id(tensor) not in made:
                    fresh = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fresh, tensor.requires_grad) if is_parameter else fresh
                tensors[name] = made[id(tensor)]


def fake_row(lengths: Sequence[int]) -> Row:
    """A row of these segments, every position trained."""
    total = sum(lengths)

    def whole() -> Tensor:
        return torch.empty(total, dtype=torch.int64)

    return Row(
        tokens=torch.empty(1, total, dtype=torch.int64),
        positions=torch.empty(1, total, dtype=torch.int64),
        weights=torch.empty(total, dtype=torch.float32),
        cu_seqlens=torch.empty(len(lengths) + 1, dtype=torch.int32),
        segment_lengths=tuple(lengths),
        max_seqlen=max(lengths),
        samples=tuple(range(len(lengths))),
        real_tokens=total,
        targets=whole(),
        trained_positions=whole(),
        position_tasks=whole(),
        position_segments=whole(),
    )
