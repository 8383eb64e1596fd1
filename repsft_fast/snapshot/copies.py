"""Copies between the live tensors and a slot, by as few kernels as they can be made.

On a GPU `torch._foreach_copy_` copies dozens of tensors by one kernel, where all sources have one dtype, all
targets one, all lie on one device without holes, and the two of a pair have the same strides
(ATen/native/ForeachUtils.h, ForeachBinaryOpList.cu of torch 2.11). A single pair that differs sends the whole
list to one copy a pair, at 4 to 5 µs of the host each. So pairs are grouped once: by device and width, and
those that no kernel takes together in a group of their own.

Bits are copied, so a tensor is seen as integers of its width. That makes one group of all dtypes of a width;
and a NaN keeps its bits, which it would not in half precision, where that kernel goes through fp32 and back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


def as_bits(tensor: Tensor) -> Tensor:
    """The same memory, shape and strides as integers of the element's width; complex128, which has none, as
    it is."""
    word = _WORDS.get(tensor.element_size())
    return tensor if word is None or tensor.dtype == word else tensor.view(word)


def dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory without holes or overlaps, in some order of the
    dimensions."""
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(tensor.stride(), tensor.shape) if n > 1):
        if stride != expected:
            return False
        expected = stride * size
    return True


def alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the tensors whose copies one kernel takes together; the odd ones, which would spoil a group,
    together too."""
    groups: dict[tuple, list[int]] = {}
    for i, tensor in enumerate(tensors):
        width = tensor.element_size() if dense(tensor) and tensor.element_size() in _WORDS else None
        groups.setdefault((tensor.device, width), []).append(i)
    return list(groups.values())


def in_groups(tensors: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> list[list[Tensor]]:
    """Their bits, group by group."""
    return [[as_bits(tensors[i]) for i in group] for group in groups]


def copy(targets: Sequence[list[Tensor]], sources: Sequence[list[Tensor]], *, non_blocking: bool) -> None:
    """Both in the same groups. On a GPU on the current stream; no host sync where non_blocking, and any host
    memory pinned."""
    for group_of_targets, group_of_sources in zip(targets, sources, strict=True):
        torch._foreach_copy_(group_of_targets, group_of_sources, non_blocking=non_blocking)
