"""Adapters added into the weights they stand beside: W + what peft says the adapter adds, for every kind of
layer it has.

The addition is peft's own `get_delta_weight`, called on stand-ins that hold whole weights in fp32 or wider,
so it is exact for linear layers, GPT-2's transposed ones, embeddings, convolutions and experts in one
parameter, and works where the model's own weights are sharded: the stand-ins get theirs from the gathered
state.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from repsft_fast.errors import ModelError, describe

ADAPTER = "default"
_MOST_EXPERTS = 2  # of a stack, when merging is tried
_CLOSE = 1e-4  # of the largest number: fp32, one layer


def merged_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the plain model with the adapters added in, from a gathered `state` of the adapted
    model.

    W + delta in fp32 (fp64 stays fp64), cast back to W's type once. The model itself is not touched.
    """
    layers = adapted_layers(model, every_name=True)
    merged = {
        plain_name(name, layers): value for name, value in state.items() if not is_adapters(name, layers)
    }
    done: dict[int, Tensor] = {}
    for name, layer in layers.items():
        target = plain_name(f"{name}.base_layer.{parameter_of(layer)}", layers)
        if id(layer) in done:  # one layer in several places: one weight, added to once
            merged[target] = done[id(layer)]
            continue
        weight = merged[target]
        wide = torch.promote_types(weight.dtype, torch.float32)
        values = {key: state[f"{name}.{key}"].to(wide) for key in _adapter_keys(layer)}
        twin = _stand_in(layer, values, {parameter_of(layer): weight.to(wide)})
        with torch.no_grad():
            merged[target] = (weight.to(wide) + twin.get_delta_weight(ADAPTER).to(weight.device)).to(
                weight.dtype
            )
        done[id(layer)] = merged[target]
    return merged


def check_merge(model: nn.Module) -> None:
    """Merge one layer of each kind, with numbers of its own, and compare with peft's forward. ModelError
    where they differ.

    Layers are stand-ins of the same sizes on the CPU: nothing of the model is read or drawn from its
    generator, so sharded models and those on meta are checked too. A weight that another layer has too
    (Zamba's shared block) has one adapter here, and another or none there: refused.
    """
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), set()).add(id(module))
    for name, layer in adapted_layers(model).items():
        if len(holders[id(getattr(_base(layer), parameter_of(layer)))]) > 1:
            wrong = f"{name} shares its weight with another layer, which the merged weight would change too"
            raise ModelError(
                describe("model.lora.merge", wrong, todo="set it to false, or leave the layer out")
            )
    # One of each kind, the smallest, says what all of them do.
    smallest: dict[Any, tuple[int, str, Any]] = {}
    for name, layer in adapted_layers(model).items():
        kind = _kind(layer)
        size = sum(p.numel() for p in _base(layer).parameters(recurse=False))
        if kind not in smallest or size < smallest[kind][0]:
            smallest[kind] = (size, name, layer)
    for _, name, layer in smallest.values():
        described = f"{name} ({type(_base(layer)).__name__})"
        try:
            with torch.device("cpu"):
                ours, theirs = _merged_and_not(layer)
        except Exception as error:  # whatever a kind of layer that nobody tried does
            wrong = f"a layer cannot be merged: {described}: {type(error).__name__}: {error}"
            raise ModelError(
                describe("model.lora.merge", wrong, todo="set it to false, or leave the layer out")
            ) from error
        # Written so that NaN is no agreement.
        difference = (ours - theirs).abs().max().item()
        if not difference <= _CLOSE * theirs.abs().max().item():
            wrong = f"{described} computes something else when merged: off by {difference:.2g}"
            raise ModelError(
                describe("model.lora.merge", wrong, todo="set it to false, or leave the layer out")
            )


def adapted_layers(model: nn.Module, *, every_name: bool = False) -> dict[str, Any]:
    """Name → peft's layer, for every one; nested ones (two parameters of one module) each by its own name.

    every_name: a layer that stands in several places by all its names, as `state_dict` does, else by the
    first.
    """
    from peft.tuners.lora import LoraLayer

    named = model.named_modules(remove_duplicate=not every_name)
    return {name: module for name, module in named if isinstance(module, LoraLayer)}


def plain_name(name: str, layers: Mapping[str, Any]) -> str:
    """A weight's name in the model without adapters: `q_proj.base_layer.weight` is `q_proj.weight`."""
    parts = name.split(".")
    return ".".join(
        p for n, p in enumerate(parts) if not (p == "base_layer" and ".".join(parts[:n]) in layers)
    )


def is_adapters(name: str, layers: Mapping[str, Any]) -> bool:
    """Whether a weight belongs to an adapter: `q_proj.lora_A.default.weight`."""
    parts = name.split(".")
    return any(p.startswith("lora_") and ".".join(parts[:n]) in layers for n, p in enumerate(parts))


def parameter_of(layer: Any) -> str:
    """The parameter a layer of peft's adapts."""
    return str(getattr(layer, "parameter_name", "weight"))


def _adapter_keys(layer: Any) -> list[str]:
    """Its adapter's weights, by their names inside the layer."""
    return [
        name
        for name, _ in layer.named_parameters()
        if name.startswith("lora_") and ADAPTER in name.split(".")
    ]


def _base(layer: Any) -> nn.Module:
    return layer.get_base_layer()


def _kind(layer: Any) -> tuple[Any, ...]:
    shapes = len(getattr(_base(layer), parameter_of(layer)).shape)
    return (
        type(layer),
        type(_base(layer)),
        layer.fan_in_fan_out,
        getattr(layer, "_did_swap_in_out_features", None),
        shapes,
    )


def _stand_in(layer: Any, adapter: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Any:
    """A copy of peft's layer that holds these weights; it shares nothing with the layer that could be changed
    through it."""
    twin = copied(layer)
    inside = copied(_base(layer))
    for name, value in base.items():
        inside._parameters[name] = nn.Parameter(value, requires_grad=False)
    twin._modules["base_layer"] = inside
    for child in {key.partition(".")[0] for key in adapter}:
        made = twin._modules[child] = copied(layer._modules[child])
        for key, value in adapter.items():
            first, *path = key.split(".")
            if first != child:
                continue
            holder = made
            for step in path[:-1]:
                holder._modules[step] = copied(holder._modules[step])
                holder = holder._modules[step]
            holder._parameters[path[-1]] = nn.Parameter(value, requires_grad=False)
    return twin


def copied(module: Any) -> Any:
    """A module of the same class and settings whose parameters, modules and buffers can be set without
    changing this one's."""
    twin = copy.copy(module)
    for name in ("_parameters", "_modules", "_buffers"):
        twin.__dict__[name] = dict(module.__dict__[name])
    return twin


def _merged_and_not(layer: Any) -> tuple[Tensor, Tensor]:
    """(with the delta in the weight, as peft computes it) of one layer, for the same random input and
    weights."""
    draw = torch.Generator().manual_seed(0)
    name = parameter_of(layer)
    experts = min(getattr(layer, "num_experts", 1), _MOST_EXPERTS)
    cut = getattr(layer, "num_experts", 1) // experts  # a stack of two says what one of 256 does

    def random(shape: Any) -> Tensor:
        return torch.randn(shape, generator=draw, device="cpu") / max(shape[-1], 1) ** 0.5

    # Random numbers in every weight: adapters as they begin add nothing, and would agree with anything.
    base = {}
    for key, value in _base(layer).named_parameters(recurse=False):
        shape = list(value.shape)
        if cut > 1 and key == name:
            shape[0] = experts
        base[key] = random(shape)
    adapter = {}
    for key, value in layer.named_parameters():
        if key in _adapter_keys(layer):
            shape = list(value.shape)
            if cut > 1:
                at = 0 if key.startswith("lora_A") else 1
                shape[at] = shape[at] // layer.num_experts * experts
            adapter[key] = random(shape)
    # Dropout is of training, not of what is merged.
    twin = _stand_in(layer, adapter, base)
    twin._modules["lora_dropout"] = nn.ModuleDict()
    twin._modules["lora_dropout"][ADAPTER] = nn.Identity()
    if experts > 1:
        twin.num_experts = experts
    with torch.no_grad():
        merged = base[name] + twin.get_delta_weight(ADAPTER)
        if hasattr(layer, "parameter_name"):  # what the module does with it is its own affair
            with twin._activate_lora([ADAPTER]):
                return merged, getattr(_base(twin), name).clone()
        given = _input(_base(twin), random)
        theirs = twin(given)
        plain = _stand_in(layer, adapter, {**base, name: merged}).base_layer
        return plain(given), theirs


def _input(module: Any, random: Callable[[Any], Tensor]) -> Tensor:
    if isinstance(module, nn.Embedding):
        return torch.arange(min(module.num_embeddings, 5))
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return random([1, module.in_channels, *(3 * size for size in module.kernel_size)])
    # transformers' Conv1D
    width = module.in_features if hasattr(module, "in_features") else module.weight.shape[0]
    return random([3, width])
