"""AdamW over every tensor in one launch: gradient, fp32 master and moments read, master, moments and the bf16
weight written.

The formula stands in `repsft_fast/optim/adamw_reference.py`, which is this kernel's truth; the arithmetic is
the same, operation by operation, and is compiled without contracting a product and a sum: the bits are the
truth's on a GPU too. bf16 is moved as the upper half of an fp32's bits. Clip factor and veto are read from
device memory; a first, small launch counts the updates of every parameter and makes its bias corrections.

Bytes moved per element: gradient 4, master 4 + 4, moments 8 + 8, bf16 weight 2 written = 30; without a master
28 in fp32, 14 in bf16. Floor per 10⁹ parameters with masters: 10.0 ms (H100, 3.0 TB/s), 7.0 (H200, 4.3).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.launch import VECTOR_BYTES, AotCase, require
from csrc_triton.tensor_table import (
    COLUMNS,
    Line,
    Plan,
    Tables,
    address,
    entry,
    load_floats,
    power,
    store_nearest,
)

TILE = 1024  # elements per program
NUM_WARPS = 4
COUNT_BLOCK = 128  # tensors per program of the counts
COUNT_BITS = 25  # an fp32 counts to 2²⁴

# Columns of the table, one line per tensor, int64; of betas and decay the bits of their doubles.
WEIGHT, COPY, GRAD, M, V, SIZE, FIRST_TILE, COUNT, BETA1, BETA2, DECAY = range(11)


@triton.jit
def adamw_count_kernel(
    table_ptr,  # [tensors, 16] int64
    corrections_ptr,  # [tensors, 2] fp32: 1/(1 - b1^t), 1/√(1 - b2^t)
    veto_ptr,  # [] fp32
    tensors,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
):
    lines = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    present = lines < tensors
    row_ptr = table_ptr + tl.cast(lines, tl.int64) * COLUMNS
    count_ptr = tl.cast(tl.load(row_ptr + 7, mask=present, other=0), tl.pointer_type(tl.float32))
    count = tl.load(count_ptr, mask=present, other=0.0)
    if tl.load(veto_ptr) == 0.0:
        count = count + 1.0
        tl.store(count_ptr, count, mask=present)
    # at 0 (a first update vetoed) any finite number
    exponent = tl.maximum(tl.cast(count, tl.int32), 1)
    beta1 = tl.cast(tl.load(row_ptr + 8, mask=present, other=0), tl.float64, bitcast=True)
    beta2 = tl.cast(tl.load(row_ptr + 9, mask=present, other=0), tl.float64, bitcast=True)
    first = 1.0 / (1.0 - power(beta1, exponent, BITS))
    second = 1.0 / tl.sqrt(1.0 - power(beta2, exponent, BITS))
    tl.store(corrections_ptr + lines * 2, tl.cast(first, tl.float32), mask=present)
    tl.store(corrections_ptr + lines * 2 + 1, tl.cast(second, tl.float32), mask=present)


@triton.jit
def adamw_kernel(
    table_ptr,  # [tensors, 16] int64
    tiles_ptr,  # [programs] int32, the table line of each tile
    corrections_ptr,  # [tensors, 2] fp32
    clip_ptr,  # [] fp32
    veto_ptr,  # [] fp32; nothing is written unless 0
    lr,
    eps,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    WEIGHT_BF16: tl.constexpr,  # the weight itself, and then its moments
    GRAD_BF16: tl.constexpr,
    HAS_COPY: tl.constexpr,  # a bf16 copy of an fp32 weight is written
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    line = tl.load(tiles_ptr + tl.program_id(0))
    tile = tl.program_id(0) - tl.cast(entry(table_ptr, line, 6), tl.int32)
    offsets = tl.cast(tile, tl.int64) * TILE + tl.arange(0, TILE)
    size = entry(table_ptr, line, 5)
    if ALIGNED:
        # A mask that never splits 16 elements keeps the accesses wide. Triton 3.6 forgets what it is promised
        # of a loaded number and sees it in a product.
        size = (size // 16) * 16
    inside = offsets < size
    if tl.load(veto_ptr) == 0.0:
        # Four elements a thread beside fp32, which is 8 bytes of bf16: promised more, the compiler would take
        # eight and move every fp32 through shared memory.
        WIDE: tl.constexpr = 16 if ALIGNED else 1
        HALF: tl.constexpr = (16 if WEIGHT_BF16 and GRAD_BF16 else 8) if ALIGNED else 1
        w_ptr = address(
            table_ptr, line, 0, tl.int16 if WEIGHT_BF16 else tl.float32, HALF if WEIGHT_BF16 else WIDE
        )
        g_ptr = address(
            table_ptr, line, 2, tl.int16 if GRAD_BF16 else tl.float32, HALF if GRAD_BF16 else WIDE
        )
        m_ptr = address(
            table_ptr, line, 3, tl.int16 if WEIGHT_BF16 else tl.float32, HALF if WEIGHT_BF16 else WIDE
        )
        v_ptr = address(
            table_ptr, line, 4, tl.int16 if WEIGHT_BF16 else tl.float32, HALF if WEIGHT_BF16 else WIDE
        )
        g = load_floats(g_ptr, offsets, inside, GRAD_BF16) * tl.load(clip_ptr)
        m = load_floats(m_ptr, offsets, inside, WEIGHT_BF16)
        v = load_floats(v_ptr, offsets, inside, WEIGHT_BF16)
        w = load_floats(w_ptr, offsets, inside, WEIGHT_BF16)
        correction1 = tl.load(corrections_ptr + line * 2)
        correction2 = tl.load(corrections_ptr + line * 2 + 1)
        decay = lr * tl.cast(tl.cast(entry(table_ptr, line, 10), tl.float64, bitcast=True), tl.float32)
        m = m + one_minus_beta1 * (g - m)
        v = beta2 * v + one_minus_beta2 * (g * g)
        w = w - decay * w
        w = w - (lr * correction1) * tl.div_rn(m, tl.sqrt_rn(v) * correction2 + eps)
        store_nearest(w_ptr, offsets, inside, w, WEIGHT_BF16)
        store_nearest(m_ptr, offsets, inside, m, WEIGHT_BF16)
        store_nearest(v_ptr, offsets, inside, v, WEIGHT_BF16)
        if HAS_COPY:
            copy_ptr = address(table_ptr, line, 1, tl.int16, HALF)
            store_nearest(copy_ptr, offsets, inside, w, True)


class Part(NamedTuple):
    """One tensor of an update, flat or of any shape, contiguous, all on one device."""

    weight: Tensor  # fp32 | bf16: the master where there is one
    copy: Tensor | None  # bf16, of an fp32 weight: the weight that the model computes with
    exp_avg: Tensor  # in the weight's dtype
    exp_avg_sq: Tensor
    updates: Tensor  # [] fp32, how many were made
    betas: tuple[float, float]
    weight_decay: float


class Launcher:
    """Updates many tensors: one launch per (weight dtype, gradient dtype, copy or none, alignment), and
    before it one of the counts."""

    def __init__(self) -> None:
        self._tables = Tables(FIRST_TILE, GRAD)
        self._fixed: list[Tensor] = []
        self._parts: Sequence[Part] = ()
        self._one: Tensor | None = None

    def __call__(
        self,
        parts: Sequence[Part],
        gradients: Sequence[Tensor],
        *,
        lr: float,
        eps: float,
        betas: tuple[float, float],
        clip: Tensor | None,
        veto: Tensor | None,
    ) -> int:
        """One update. gradients: fp32 | bf16, of the weights' shapes; clip, veto: [] fp32 on the device, None
        = 1, 0. betas are those of every part. Returns the number of launches.

        `parts` is looked at anew only where it is another object than at the call before, or one of its
        tensors has moved.
        """
        if not parts:
            return 0
        # a copy of a strided one lives until it is launched upon
        gradients = [g if g.is_contiguous() else g.contiguous() for g in gradients]
        if self._parts is not parts:
            self._parts, self._fixed, self._tables = parts, _tensors_of(parts), Tables(FIRST_TILE, GRAD)
        plans = self._tables.of(self._fixed, gradients, lambda: _lines(parts, gradients))
        if self._one is None:
            self._one = torch.ones((), device=gradients[0].device)
            self._zero = torch.zeros((), device=gradients[0].device)
        clip, veto = self._one if clip is None else clip, self._zero if veto is None else veto
        for plan in plans:
            _launch(plan, lr, eps, betas, clip, veto)
        return 2 * len(plans)


def _launch(
    plan: Plan, lr: float, eps: float, betas: tuple[float, float], clip: Tensor, veto: Tensor
) -> None:
    weight_bf16, grad_bf16, has_copy, aligned = plan.kind
    tensors = plan.host.shape[0]
    if plan.extra is None:
        plan.extra = torch.empty(tensors, 2, dtype=torch.float32, device=plan.table.device)
    adamw_count_kernel[(-(-tensors // COUNT_BLOCK),)](
        plan.table, plan.extra, veto, tensors, BLOCK=COUNT_BLOCK, BITS=COUNT_BITS, num_warps=4
    )
    if plan.tiles.shape[0]:  # else tensors of no elements, which are counted all the same
        adamw_kernel[(plan.tiles.shape[0],)](
            plan.table, plan.tiles, plan.extra, clip, veto,
            lr, eps, 1 - betas[0], betas[1], 1 - betas[1],
            WEIGHT_BF16=weight_bf16, GRAD_BF16=grad_bf16, HAS_COPY=has_copy, ALIGNED=aligned,
            TILE=TILE, num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def _tensors_of(parts: Sequence[Part]) -> list[Tensor]:
    copies = [part.copy for part in parts if part.copy is not None]
    return [*(tensor for part in parts for tensor in (part[0], *part[2:5])), *copies]


def _lines(parts: Sequence[Part], gradients: Sequence[Tensor]) -> list[Line]:
    return [_line(number, part, gradient) for number, (part, gradient) in enumerate(zip(parts, gradients))]


def _line(number: int, part: Part, gradient: Tensor) -> Line:
    _check(part, gradient)
    copied = part.copy is not None
    tensors = {WEIGHT: part.weight, GRAD: gradient, M: part.exp_avg, V: part.exp_avg_sq}
    if part.copy is not None:
        tensors[COPY] = part.copy
    size = part.weight.numel()
    aligned = size % 16 == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in tensors.values())
    values = {column: tensor.data_ptr() for column, tensor in tensors.items()}
    values |= {SIZE: size, COUNT: part.updates.data_ptr()}
    values |= {BETA1: _bits(part.betas[0]), BETA2: _bits(part.betas[1]), DECAY: _bits(part.weight_decay)}
    kind = (part.weight.dtype == torch.bfloat16, gradient.dtype == torch.bfloat16, copied, aligned)
    return Line(kind, values, -(-size // TILE), number, 16 if aligned else 1)


def _check(part: Part, gradient: Tensor) -> None:
    floats, shape = (torch.float32, torch.bfloat16), tuple(part.weight.shape)
    require(part.weight.dtype in floats, "weight float32 or bfloat16", part.weight.dtype)
    require(gradient.dtype in floats, "gradient float32 or bfloat16", gradient.dtype)
    require(tuple(gradient.shape) == shape, f"a gradient of shape {shape}", tuple(gradient.shape))
    for name, tensor in (("exp_avg", part.exp_avg), ("exp_avg_sq", part.exp_avg_sq)):
        require(tensor.dtype == part.weight.dtype, f"{name} in the weight's dtype", tensor.dtype)
        require(tuple(tensor.shape) == shape, f"{name} of shape {shape}", tuple(tensor.shape))
    require(
        part.updates.dtype == torch.float32 and part.updates.numel() == 1,
        "one fp32 count",
        part.updates.dtype,
    )
    if part.copy is not None:
        require(part.weight.dtype == torch.float32, "a copy of an fp32 weight", part.weight.dtype)
        require(part.copy.dtype == torch.bfloat16, "copy bfloat16", part.copy.dtype)
        require(tuple(part.copy.shape) == shape, f"a copy of shape {shape}", tuple(part.copy.shape))
    for tensor in (*part[:1], gradient, *part[2:4], *([] if part.copy is None else [part.copy])):
        require(tensor.is_contiguous(), "weight, copy and moments contiguous", tuple(tensor.stride()))


def _bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]


_SIGNATURE = {
    "table_ptr": "*i64", "tiles_ptr": "*i32", "corrections_ptr": "*fp32", "clip_ptr": "*fp32",
    "veto_ptr": "*fp32",
    **dict.fromkeys(("lr", "eps", "one_minus_beta1", "beta2", "one_minus_beta2"), "fp32"),
}  # fmt: skip


def _case(weight: str, gradient: str, copied: bool) -> AotCase:
    return AotCase(
        name=f"adamw/{weight}/{gradient}{'/copy' if copied else ''}",
        kernel=adamw_kernel,
        signature=_SIGNATURE,
        constexprs={
            "WEIGHT_BF16": weight == "bf16",
            "GRAD_BF16": gradient == "bf16",
            "HAS_COPY": copied,
            "ALIGNED": True,
            "TILE": TILE,
        },
        num_warps=NUM_WARPS,
        divisible=("table_ptr", "tiles_ptr", "corrections_ptr"),
        store_bytes=8 if (weight, gradient) == ("bf16", "fp32") else VECTOR_BYTES,  # four elements a thread
        contraction=False,
    )


AOT_CASES = [
    _case("fp32", "fp32", True),
    _case("fp32", "bf16", True),
    _case("fp32", "fp32", False),
    _case("fp32", "bf16", False),
    _case("bf16", "bf16", False),
    _case("bf16", "fp32", False),
    AotCase(
        name="adamw_count",
        kernel=adamw_count_kernel,
        signature={
            "table_ptr": "*i64",
            "corrections_ptr": "*fp32",
            "veto_ptr": "*fp32",
            "tensors": "i32",
        },
        constexprs={"BLOCK": COUNT_BLOCK, "BITS": COUNT_BITS},
        num_warps=4,
        divisible=("table_ptr", "corrections_ptr"),
        load_bytes=8,  # a line's columns, one of every 128 bytes
        store_bytes=4,
    ),
]
