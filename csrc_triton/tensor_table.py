"""One launch over many tensors: a table on the device holds their addresses, a program looks up its tile's.

Lines are tensors, [tensors, 16] int64; which column holds what is the kernel's own. A second table,
[programs] int32, says which line a program works on. Both are made once and stay while nothing moves; a
gradient that comes back elsewhere costs its column, copied from pinned memory, asynchronously.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = tl.constexpr(16)
_address, _dtype = operator.methodcaller("data_ptr"), operator.attrgetter("dtype")
_NAN = tl.constexpr(0x7FC00000)


@triton.jit
def entry(table_ptr, line, COLUMN: tl.constexpr):
    return tl.load(table_ptr + line * COLUMNS + COLUMN)


@triton.jit
def address(table_ptr, line, COLUMN: tl.constexpr, TYPE: tl.constexpr, BYTES: tl.constexpr):
    """A pointer from the table. BYTES: what it is a multiple of; 1 = nothing is known."""
    pointer = tl.cast(tl.load(table_ptr + line * COLUMNS + COLUMN), tl.pointer_type(TYPE))
    if BYTES > 1:
        pointer = tl.multiple_of(pointer, BYTES)
    return pointer


@triton.jit
def load_floats(pointer, offsets, inside, BF16: tl.constexpr):
    """fp32; bf16 (behind an int16 pointer) is the upper half of its bits."""
    if BF16:
        bits = tl.cast(tl.load(pointer + offsets, mask=inside, other=0), tl.int32) << 16
        return tl.cast(bits, tl.float32, bitcast=True)
    else:
        return tl.load(pointer + offsets, mask=inside, other=0.0)


@triton.jit
def store_nearest(pointer, offsets, inside, value, BF16: tl.constexpr):
    """fp32 as it is, or as bf16 rounded to the nearest, ties to even; every NaN is stored as one."""
    if BF16:
        bits = tl.cast(value, tl.int32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(value == value, bits, _NAN)
        tl.store(pointer + offsets, tl.cast(bits >> 16, tl.int16), mask=inside)
    else:
        tl.store(pointer + offsets, value, mask=inside)


@triton.jit
def power(base, exponent, BITS: tl.constexpr):
    """base^exponent by squaring, in fp64: products alone, so the same bits everywhere."""
    result = base * 0 + 1.0
    for bit in range(BITS):
        result = tl.where(((exponent >> bit) & 1) == 1, result * base, result)
        base = base * base
    return result


@dataclasses.dataclass
class Line:
    """One tensor's line: its values by column, how many programs it takes, and which of `gradients` it
    reads."""

    kind: Hashable  # tensors of one kind share a launch
    values: dict[int, int]
    programs: int
    gradient: int
    aligned: int  # what the kind promises of the gradient's address, in bytes


@dataclasses.dataclass
class Plan:
    """The tables of one launch."""

    kind: Any
    host: Tensor  # [tensors, 16] int64
    table: Tensor  # the same on the device
    tiles: Tensor  # [programs] int32
    gradients: list[int]  # which gradient a line reads
    aligned: int
    extra: Any = None  # what a launcher keeps beside them


class Tables:
    """Plans of one set of tensors, kept while every address stays.

    first_tile, gradient: the columns of a line's first program and of the gradient's address.
    """

    def __init__(self, first_tile: int, gradient: int):
        self._first_tile, self._gradient = first_tile, gradient
        self._known: tuple[Any, ...] = ()
        self._addresses: list[int] = []
        self.plans: list[Plan] = []
        self.built = 0  # times that everything was made anew
        self.moved = 0  # times that gradients had moved and nothing else

    def of(
        self, fixed: Sequence[Tensor], gradients: Sequence[Tensor], lines: Callable[[], list[Line]]
    ) -> list[Plan]:
        """One plan per kind. fixed: every tensor whose address stands in the table but gradients, which may
        come and go; lines: makes them all, called only where something has changed.

        Gradients are contiguous. Every tensor lies on one device.
        """
        # Every update comes by here: 0.05 µs an address. dtypes too: another tensor may lie where one lay.
        known = (list(map(_address, fixed)), list(map(_dtype, gradients)))
        addresses = list(map(_address, gradients))
        if known == self._known:
            if addresses == self._addresses:
                return self.plans
            if self._follow(addresses):
                return self.plans
        device = gradients[0].device
        groups: dict[Hashable, list[Line]] = {}
        for line in lines():
            groups.setdefault(line.kind, []).append(line)
        self.plans = [self._plan(kind, members, device) for kind, members in groups.items()]
        self._known, self._addresses, self.built = known, addresses, self.built + 1
        return self.plans

    def _follow(self, addresses: list[int]) -> bool:
        """Gradients have moved: only their column is written. False where one has lost its alignment."""
        for plan in self.plans:
            if plan.aligned > 1 and any(addresses[number] % plan.aligned for number in plan.gradients):
                return False
        for plan in self.plans:
            plan.host[:, self._gradient] = torch.tensor([addresses[number] for number in plan.gradients])
            # pinned anew: the copy of an update before may still be under way
            plan.table.copy_(_pinned(plan.host, plan.table.device), non_blocking=True)
        self._addresses, self.moved = addresses, self.moved + 1
        return True

    def _plan(self, kind: Hashable, members: list[Line], device: torch.device) -> Plan:
        programs = [line.programs for line in members]
        rows = []
        for line, first in zip(members, itertools.accumulate(programs, initial=0)):
            values = {**line.values, self._first_tile: first}
            rows.append([values.get(column, 0) for column in range(COLUMNS.value)])
        host = torch.tensor(rows, dtype=torch.int64)
        numbers = torch.arange(len(members), dtype=torch.int32)
        tiles = torch.repeat_interleave(numbers, torch.tensor(programs), output_size=sum(programs))
        table, tiles = upload(host.clone(), device), upload(tiles, device)
        gradients = [line.gradient for line in members]
        return Plan(kind, host, table, tiles, gradients, min(line.aligned for line in members))


def upload(host: Tensor, device: torch.device) -> Tensor:
    """On the device without a wait; `host` itself on a CPU."""
    return _pinned(host, device).to(device, non_blocking=True)


def _pinned(host: Tensor, device: torch.device) -> Tensor:
    return host.pin_memory() if device.type == "cuda" else host
