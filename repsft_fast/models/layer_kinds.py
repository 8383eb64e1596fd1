"""What a layer is to an adapter: linear, a router, read by the model's own code, a stack of experts.

Told by classes, by names, by the source of the architecture's classes, and by numbers where a class computes
a product of its own.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from repsft_fast.models.merge import copied

_ROUTER_CLASS = re.compile(r"Router|Indexer|Top_?[kK]|TokenChoice|Gating$|MoE\w*Gate$")
_ROUTER_NAME = re.compile(r"router(_?gate)?|gate|wg|shared_expert_gate")
# classes of linear layers with a forward of their own → whether it is a plain product
_ASKED: dict[type, bool] = {}
_FEW = 8  # outputs of a layer that is asked
_TOP_K = re.compile(r"\btopk\(")
_READS_WEIGHT = r"\bself\.{name}\.(?:weight|bias)\b(?!\.(?:dtype|device|shape|size|ndim|data_ptr))"


def routers(model: PreTrainedModel) -> Iterator[str]:
    """Linear layers whose output feeds a top-k: the experts', and those of sparse attention's indexers."""
    named = dict(model.named_modules())
    for name, module in named.items():
        if not is_linear(module):
            continue
        above = [named[part] for part in _above(name)]
        if any(_ROUTER_CLASS.search(type(each).__name__) for each in (module, *above[-3:])):
            yield name
            continue
        # A class that only its code or its sizes give away: as many outputs as experts, or a router's name.
        leaf = name.rpartition(".")[2]
        experts = [count for each in above[-2:] if (count := _experts_of(each))]
        decides = bool(experts) or any(_TOP_K.search(_code(each)) for each in above[-2:])
        is_expert = ".experts." in f".{name}."
        if decides and not is_expert and (_ROUTER_NAME.fullmatch(leaf) or _outputs(module) in experts):
            yield name


def is_linear(module: nn.Module) -> bool:
    """A linear layer, of torch or of transformers (GPT-2's Conv1D)."""
    return isinstance(module, nn.Linear | Conv1D)


def is_plain(module: Any) -> bool:
    """Whether a linear layer computes W x + b and no more; a class with a product of its own is asked with
    numbers."""
    kind = type(module)
    if kind.forward in (nn.Linear.forward, Conv1D.forward):
        return True
    if kind not in _ASKED:
        _ASKED[kind] = _computes_product(module)
    return _ASKED[kind]


def _computes_product(module: Any) -> bool:
    """Whether a copy of the layer, with few outputs and random weights, gives W x + b of three inputs."""
    rows = min(module.out_features, _FEW)
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, module.in_features, generator=draw, device="cpu")
    bias = None if module.bias is None else torch.randn(rows, generator=draw, device="cpu")
    given = torch.randn(3, module.in_features, generator=draw, device="cpu")
    twin = copied(module)
    twin._parameters |= {
        "weight": nn.Parameter(weight),
        "bias": None if bias is None else nn.Parameter(bias),
    }
    try:
        with torch.no_grad(), torch.device("cpu"):
            return torch.allclose(twin(given), F.linear(given, weight, bias), rtol=1e-4, atol=1e-4)
    except Exception:  # it wants other inputs, other sizes, gives more than one output …
        return False


def _above(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts))]


def stacked_experts(model: PreTrainedModel) -> list[str]:
    """Experts that are one parameter of [experts, ., .]."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3
        and not isinstance(_holder(model, name), nn.Conv1d)
        and "expert" in _home(model, name)
    ]


def _home(model: nn.Module, name: str) -> str:
    """The words a parameter's place is known by: its name and its module's class."""
    return f"{name} {type(_holder(model, name)).__name__}".lower()


def _holder(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _experts_of(module: nn.Module) -> int:
    """How many experts a module has right inside it; 0 for one that has none."""
    for name, child in module.named_children():
        if "expert" in name and "shared" not in name:
            if isinstance(child, nn.ModuleList):
                return len(child)
            stacked = [p.shape[0] for p in child.parameters(recurse=False) if p.ndim == 3]
            return stacked[0] if stacked else int(getattr(child, "num_experts", 0) or 0)
    return 0


def _outputs(module: Any) -> int:
    return int(module.nf if isinstance(module, Conv1D) else module.out_features)


def reads_weight(model: nn.Module, name: str) -> bool:
    """Whether the class around a layer reads its weight, beside asking for its type or place."""
    above, _, leaf = name.rpartition(".")
    # BLOOM's, read for a slower, exacter product alone
    if getattr(model.get_submodule(above), "pretraining_tp", 0) == 1:
        return False
    reads = _READS_WEIGHT.format(name=re.escape(leaf))
    return re.search(reads, _code(model.get_submodule(above))) is not None


def _code(module: nn.Module) -> str:
    """The source of a module's class, where it is the architecture's."""
    kind: Any = type(module)
    return _source(kind)


@functools.cache
def _source(kind: Any) -> str:
    try:
        return inspect.getsource(kind) if kind.__module__.split(".")[0] not in ("torch", "peft") else ""
    except (OSError, TypeError):  # made while running: nothing to read
        return ""


def can_be_adapted(module: nn.Module) -> bool:
    """The kinds of layers that peft has low-rank adapters for."""
    return is_linear(module) or isinstance(module, nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d)
