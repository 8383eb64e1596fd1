"""What a compiled layer is called with: as far as its graph depends on it, and the tensors that it reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repsft_fast.ops.attention import Packed

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class NotRecorded(Exception):
    """Why a layer's compiled functions are not called by hand, in words."""


@dataclass(frozen=True)
class Given:
    """A layer's arguments beside its hidden state, as far as a graph depends on them.

    like    types, shapes, strides and plain values
    places  where in them the tensors lie that the graph reads
    """

    like: Any
    places: tuple[tuple[Any, ...], ...]

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...] | None:
        """The tensors that the graph reads; None: these arguments are others than those recorded."""
        try:
            if likeness((args, kwargs)) != self.like:
                return None
        except NotRecorded:
            return None
        tensors = dict(tensors_in((args, kwargs)))
        return tuple(tensors[place] for place in self.places)


def likeness(value: Any) -> Any:
    """Everything of arguments that a graph may depend on, and that can be compared. NotRecorded for a value
    of a kind that is not known here."""
    if type(value) in (Tensor, nn.Parameter):
        return likeness_of(value)
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, tuple | list):
        return type(value), *map(likeness, value)
    if isinstance(value, dict):
        return dict, *((name, likeness(each)) for name, each in value.items())
    if isinstance(value, Packed):
        # Not the documents' lengths, which differ from row to row: what a graph reads of them is a tensor.
        rest = value.max_seqlen, value.backend, value.grouped, value.flash
        return Packed, likeness(value.cu_seqlens), likeness(value.lengths), rest
    raise NotRecorded(f"layers are given a {type(value).__name__}")


def likeness_of(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.device, tensor.requires_grad


def tensors_in(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, tuple | list):
        for at, each in enumerate(value):
            yield from tensors_in(each, (*place, at))
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from tensors_in(each, (*place, name))
    elif isinstance(value, Packed):
        yield (*place, "cu_seqlens"), value.cu_seqlens
        if value.lengths is not None:
            yield (*place, "lengths"), value.lengths
