"""AdamW with 8-bit moments: one launch per kind of tensor, whatever the number of tensors.

The formula, the codes and their reasons stand in `repsft_fast/optim/adamw8bit_reference.py`, which is this
kernel's truth; the arithmetic is the same, operation by operation. bf16 is read and written as the upper half
of an fp32's bits, by integers: the rounding is ours anyway. A table on the device holds every tensor's
addresses; a program looks up the tensor of its tile. Step, clip factor, veto and bias corrections are read
from device memory.

Where the weight is an fp32 master, the bf16 weight it is of is written too, rounded to the nearest: it is
made anew from the master each time, so it draws nothing.

Bytes moved per element, bf16 weight and gradient, 8-bit moments: 2 + 2 weight, 2 gradient, 1 + 1 and 1 + 1
moments, 4/256 scales = 10.02; fp32 weight and gradient 16.02, and with a bf16 copy 18.02. Floor per 10⁹ bf16
parameters: 3.3 ms (H100), 2.3 (H200); masters and copies 6.0 and 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.launch import AotCase, require
from csrc_triton.tensor_table import Line, Plan, Tables, address, entry, load_floats, store_nearest

BLOCK = 256  # elements that share a scale
TILE_BLOCKS = 8  # blocks per program
TILE = BLOCK * TILE_BLOCKS
NUM_WARPS = 4
_NAN = tl.constexpr(0x7FC00000)
_GOLDEN = tl.constexpr(0x9E3779B9)
_LEAST = tl.constexpr(16)  # exponent field of a block of zeros; scale bytes count from it
_SPAN = tl.constexpr(15)  # octaves below a block's largest element

# Columns of the table, one line per tensor, int64.
WEIGHT, GRAD, M, M_SCALE, V, V_SCALE, SIZE, FIRST, KEY0, KEY1, FIRST_TILE, COPY = range(12)


@triton.jit
def _mix(x):
    """A 32-bit integer hash. x: uint32."""
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD
    x = x ^ (x >> 15)
    x = x * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def _keys(table_ptr, line, step_ptr):
    count = tl.cast(tl.load(step_ptr), tl.uint32) * _GOLDEN
    key0 = _mix(count ^ tl.cast(entry(table_ptr, line, 8), tl.uint32))
    key1 = _mix(count + tl.cast(entry(table_ptr, line, 9), tl.uint32))
    return key0, key1


@triton.jit
def _store_weight(pointer, offsets, inside, value, random, BF16: tl.constexpr):
    if BF16:
        # an infinity's lower half is zero: no draw carries into the half that is kept
        bits = tl.cast(value, tl.int32, bitcast=True) + tl.cast(random >> 16, tl.int32)
        bits = tl.where(value == value, bits, _NAN)
        tl.store(pointer + offsets, tl.cast(bits >> 16, tl.int16), mask=inside)
    else:
        tl.store(pointer + offsets, value, mask=inside)


@triton.jit
def _moments(m, v, g, beta1, one_minus_beta1, beta2, one_minus_beta2):
    return beta1 * m + one_minus_beta1 * g, beta2 * v + one_minus_beta2 * (g * g)


@triton.jit
def _step(w, m, root, lr, decay, eps, correction1, correction2):
    w = w - decay * w
    return w - (lr * correction1) * tl.div_rn(m, root * correction2 + eps)


@triton.jit
def adamw_8bit_kernel(
    table_ptr,  # [tensors, 16] int64
    tiles_ptr,  # [programs] int32, the table line of each tile
    scalars_ptr,  # [4] fp32: 1/(1 - b1^t), 1/√(1 - b2^t), clip, veto
    step_ptr,  # [] int64
    lr,
    decay,  # lr · weight_decay
    eps,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    WEIGHT_BF16: tl.constexpr,
    GRAD_BF16: tl.constexpr,
    HAS_COPY: tl.constexpr,  # a bf16 copy of an fp32 weight is written
    ALIGNED: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):
    line = tl.load(tiles_ptr + tl.program_id(0))
    tile = tl.program_id(0) - tl.cast(entry(table_ptr, line, 10), tl.int32)
    blocks = tl.cast(tile, tl.int64) * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    lanes = tl.arange(0, 256)
    present = blocks < entry(table_ptr, line, 6)
    inside = present[:, None] & (lanes >= 0)[None, :]
    offsets = blocks[:, None] * 256 + lanes[None, :]
    if tl.load(scalars_ptr + 3) == 0.0:
        WIDE: tl.constexpr = 16 if ALIGNED else 1
        w_ptr = address(table_ptr, line, 0, tl.int16 if WEIGHT_BF16 else tl.float32, WIDE)
        g_ptr = address(table_ptr, line, 1, tl.int16 if GRAD_BF16 else tl.float32, WIDE)
        m_ptr = address(table_ptr, line, 2, tl.uint8, WIDE)
        v_ptr = address(table_ptr, line, 4, tl.uint8, WIDE)
        m_scale_ptr = address(table_ptr, line, 3, tl.uint8, 1)
        v_scale_ptr = address(table_ptr, line, 5, tl.uint8, 1)

        # One word an element serves all three roundings; the reference says why that is no bias.
        key0, key1 = _keys(table_ptr, line, step_ptr)
        first_block = entry(table_ptr, line, 7) >> 8
        block_bits = _mix(tl.cast(blocks + first_block, tl.uint32) ^ key0)
        random = _mix((block_bits[:, None] + (tl.cast(lanes, tl.uint32) * _GOLDEN)[None, :]) ^ key1)

        # Codes become floats by integer arithmetic on their bits: no table, the same on every device.
        m_code = tl.cast(tl.load(m_ptr + offsets, mask=inside, other=0), tl.int32)
        m_base = (
            tl.cast(tl.load(m_scale_ptr + blocks, mask=present, other=0), tl.int32) + (_LEAST - _SPAN)
        ) << 3
        m_bits = tl.where((m_code & 0x7F) > 0, ((m_code & 0x7F) + m_base[:, None]) << 20, 0) | (
            (m_code & 0x80) << 24
        )
        v_code = tl.cast(tl.load(v_ptr + offsets, mask=inside, other=0), tl.int32)
        v_base = (
            tl.cast(tl.load(v_scale_ptr + blocks, mask=present, other=0), tl.int32) + (_LEAST - _SPAN)
        ) << 4
        root = tl.cast((v_code + v_base[:, None]) << 19, tl.float32, bitcast=True)

        # The weight takes both moments before they are rounded to codes again.
        g = load_floats(g_ptr, offsets, inside, GRAD_BF16) * tl.load(scalars_ptr + 2)
        m = tl.cast(m_bits, tl.float32, bitcast=True)
        m, v = _moments(m, root * root, g, beta1, one_minus_beta1, beta2, one_minus_beta2)
        root = tl.sqrt_rn(v)
        w = load_floats(w_ptr, offsets, inside, WEIGHT_BF16)
        w = _step(w, m, root, lr, decay, eps, tl.load(scalars_ptr), tl.load(scalars_ptr + 1))
        _store_weight(w_ptr, offsets, inside, w, random, WEIGHT_BF16)
        if HAS_COPY:
            copy_ptr = address(table_ptr, line, 11, tl.int16, WIDE)
            store_nearest(copy_ptr, offsets, inside, w, True)

        # The scale is what the block's largest element can be *rounded up* to: else a block of equal values
        # could never grow past a power of two.
        bits = tl.cast(m, tl.int32, bitcast=True)
        magnitude = tl.minimum(bits & 0x7FFFFFFF, _NAN)
        top = tl.maximum((tl.max(magnitude, axis=1) + 0xFFFFF) >> 23, _LEAST)
        remainder = tl.cast((random * _GOLDEN) >> 12, tl.int32)
        code = ((magnitude + remainder) >> 20) - ((top - _SPAN) << 3)[:, None]
        code = tl.minimum(tl.maximum(code, 0), 127) | ((bits >> 24) & 0x80)
        tl.store(m_ptr + offsets, tl.cast(code, tl.uint8), mask=inside)
        tl.store(m_scale_ptr + blocks, tl.cast(top - _LEAST, tl.uint8), mask=present)

        # √v is coded, not v: the same range in half the exponent's octaves. It has no sign.
        magnitude = tl.minimum(tl.cast(root, tl.int32, bitcast=True) & 0x7FFFFFFF, _NAN)
        top = tl.maximum((tl.max(magnitude, axis=1) + 0x7FFFF) >> 23, _LEAST)
        code = ((magnitude + tl.cast(random & 0x7FFFF, tl.int32)) >> 19) - ((top - _SPAN) << 4)[:, None]
        tl.store(v_ptr + offsets, tl.cast(tl.minimum(tl.maximum(code, 0), 255), tl.uint8), mask=inside)
        tl.store(v_scale_ptr + blocks, tl.cast(top - _LEAST, tl.uint8), mask=present)


@triton.jit
def adamw_32bit_kernel(
    table_ptr,  # as above; M and V are fp32, no scales, SIZE in elements
    tiles_ptr,
    scalars_ptr,
    step_ptr,
    lr,
    decay,
    eps,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    WEIGHT_BF16: tl.constexpr,
    GRAD_BF16: tl.constexpr,
    HAS_COPY: tl.constexpr,  # a bf16 copy of an fp32 weight is written
    ALIGNED: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):
    line = tl.load(tiles_ptr + tl.program_id(0))
    tile = tl.program_id(0) - tl.cast(entry(table_ptr, line, 10), tl.int32)
    offsets = tl.cast(tile, tl.int64) * (TILE_BLOCKS * 256) + tl.arange(0, TILE_BLOCKS * 256)
    size = entry(table_ptr, line, 6)
    if ALIGNED:
        # A mask that never splits 16 elements keeps the accesses wide. Triton 3.6 forgets what it is promised
        # of a loaded number and sees it in a product.
        size = (size // 16) * 16
    inside = offsets < size
    if tl.load(scalars_ptr + 3) == 0.0:
        WIDE: tl.constexpr = 16 if ALIGNED else 1
        w_ptr = address(table_ptr, line, 0, tl.int16 if WEIGHT_BF16 else tl.float32, WIDE)
        g_ptr = address(table_ptr, line, 1, tl.int16 if GRAD_BF16 else tl.float32, WIDE)
        m_ptr = address(table_ptr, line, 2, tl.float32, WIDE)
        v_ptr = address(table_ptr, line, 4, tl.float32, WIDE)
        # Small tensors: the same update on fp32 moments, which need no coding.
        g = load_floats(g_ptr, offsets, inside, GRAD_BF16) * tl.load(scalars_ptr + 2)
        m = tl.load(m_ptr + offsets, mask=inside, other=0.0)
        v = tl.load(v_ptr + offsets, mask=inside, other=0.0)
        m, v = _moments(m, v, g, beta1, one_minus_beta1, beta2, one_minus_beta2)
        w = load_floats(w_ptr, offsets, inside, WEIGHT_BF16)
        w = _step(w, m, tl.sqrt_rn(v), lr, decay, eps, tl.load(scalars_ptr), tl.load(scalars_ptr + 1))
        # An fp32 weight is not rounded, so it draws nothing.
        random = tl.zeros([TILE_BLOCKS * 256], tl.uint32)
        if WEIGHT_BF16:
            key0, key1 = _keys(table_ptr, line, step_ptr)
            element = offsets + entry(table_ptr, line, 7)
            lane = tl.cast(element & 0xFF, tl.uint32) * _GOLDEN
            random = _mix((_mix(tl.cast(element >> 8, tl.uint32) ^ key0) + lane) ^ key1)
        _store_weight(w_ptr, offsets, inside, w, random, WEIGHT_BF16)
        if HAS_COPY:
            # as many elements a thread as of fp32: no value changes threads
            copy_ptr = address(table_ptr, line, 11, tl.int16, 8 if ALIGNED else 1)
            store_nearest(copy_ptr, offsets, inside, w, True)
        tl.store(m_ptr + offsets, m, mask=inside)
        tl.store(v_ptr + offsets, v, mask=inside)


class Part(NamedTuple):
    """One tensor of an update; everything contiguous."""

    weight: Tensor  # fp32 | bf16: the master where there is one
    moments: dict[str, Tensor]
    key: tuple[int, int]
    first: int  # global index of the first element
    copy: Tensor | None = None  # bf16, of an fp32 weight: the weight that the model computes with


class Launcher:
    """Updates many tensors in one launch per (8 or 32 bits, weight dtype, gradient dtype, copy or none,
    alignment)."""

    def __init__(self) -> None:
        # a group of parameters has its own tables: they share no launch
        self._tables: dict[int, tuple[Sequence[Part], list[Tensor], Tables]] = {}

    def __call__(
        self,
        parts: Sequence[Part],
        gradients: Sequence[Tensor],
        scalars: Any,
        step: Tensor,
        *,
        group: int = 0,
        shared: Tensor | None = None,
    ) -> int:
        """One update. gradients: fp32 | bf16, of the weights' shapes; `scalars` as
        `repsft_fast.optim.adamw8bit_reference.Scalars`, of which `shared`, [4] fp32 of `Counter`, holds the
        tensors where it is given; step: [] int64, the count after this update, on the
        device. group: calls of one are for the same parameters. Returns the number of launches.

        `parts` is looked at anew only where it is another object than at the group's call before, or one of
        its tensors has moved.
        """
        if not parts:
            return 0
        device_scalars = shared
        if device_scalars is None:
            values = [scalars.inverse_correction1, scalars.inverse_correction2, scalars.clip, scalars.veto]
            device_scalars = torch.stack([value.reshape(()) for value in values])
        # a copy of a strided one lives until it is launched upon
        gradients = [g if g.is_contiguous() else g.contiguous() for g in gradients]
        plans = self._plans(parts, gradients, group)
        for plan in plans:
            eight_bit, weight_bf16, grad_bf16, has_copy, aligned = plan.kind
            kernel = adamw_8bit_kernel if eight_bit else adamw_32bit_kernel
            kernel[(plan.tiles.shape[0],)](
                plan.table, plan.tiles, device_scalars, step,
                scalars.lr, scalars.lr * scalars.weight_decay, scalars.eps,
                scalars.beta1, 1 - scalars.beta1, scalars.beta2, 1 - scalars.beta2,
                WEIGHT_BF16=weight_bf16, GRAD_BF16=grad_bf16, HAS_COPY=has_copy, ALIGNED=aligned,
                TILE_BLOCKS=TILE_BLOCKS, num_warps=NUM_WARPS,
            )  # fmt: skip
        return len(plans)

    def _plans(self, parts: Sequence[Part], gradients: Sequence[Tensor], group: int) -> list[Plan]:
        known = self._tables.get(group)
        if known is None or known[0] is not parts:
            known = (parts, _tensors_of(parts), Tables(FIRST_TILE, GRAD))
            self._tables[group] = known
        return known[2].of(known[1], gradients, lambda: _lines(parts, gradients))


def _tensors_of(parts: Sequence[Part]) -> list[Tensor]:
    moments = [tensor for part in parts for tensor in part.moments.values()]
    copies = [part.copy for part in parts if part.copy is not None]
    return [*(part.weight for part in parts), *moments, *copies]


def _lines(parts: Sequence[Part], gradients: Sequence[Tensor]) -> list[Line]:
    return [_line(number, part, gradient) for number, (part, gradient) in enumerate(zip(parts, gradients))]


def _line(number: int, part: Part, gradient: Tensor) -> Line:
    kind = _kind(part, gradient)
    moments, size = part.moments, part.weight.numel()
    tensors = {WEIGHT: part.weight, GRAD: gradient, M: moments["exp_avg"], V: moments["exp_avg_sq"]}
    if kind[0]:
        tensors |= {M_SCALE: moments["exp_avg_scale"], V_SCALE: moments["exp_avg_sq_scale"]}
    if part.copy is not None:
        tensors[COPY] = part.copy
    values = {column: tensor.data_ptr() for column, tensor in tensors.items()}
    values |= {SIZE: size // BLOCK if kind[0] else size, FIRST: part.first}
    values |= {KEY0: part.key[0], KEY1: part.key[1]}
    return Line(kind, values, -(-size // TILE), number, 16 if kind[-1] else 1)


def _kind(part: Part, gradient: Tensor) -> tuple[bool, bool, bool, bool, bool]:
    """(8-bit moments, bf16 weight, bf16 gradient, a copy, wide accesses)."""
    weight, moments, copy = part.weight, part.moments, part.copy
    eight_bit, shape = moments["exp_avg"].dtype == torch.uint8, tuple(weight.shape)
    for name, tensor in (("weight", weight), ("gradient", gradient)):
        require(tensor.dtype in (torch.float32, torch.bfloat16), f"{name} float32 or bfloat16", tensor.dtype)
        require(tensor.is_contiguous(), f"{name} contiguous", tuple(tensor.stride()))
    require(tuple(gradient.shape) == shape, f"a gradient of shape {shape}", tuple(gradient.shape))
    whole = not eight_bit or (shape[-1] % BLOCK == 0 and part.first % BLOCK == 0)
    require(whole, "rows of whole blocks", shape)
    wide = [weight, gradient, moments["exp_avg"], moments["exp_avg_sq"]]
    if copy is not None:
        require(weight.dtype == torch.float32, "a copy of an fp32 weight", weight.dtype)
        fits = copy.dtype == torch.bfloat16 and tuple(copy.shape) == shape and copy.is_contiguous()
        require(fits, f"a contiguous bf16 copy of shape {shape}", (copy.dtype, tuple(copy.shape)))
        wide.append(copy)
    aligned = all(t.data_ptr() % 16 == 0 for t in wide) and weight.numel() % 16 == 0
    bf16 = torch.bfloat16
    return eight_bit, weight.dtype == bf16, gradient.dtype == bf16, copy is not None, aligned


_SIGNATURE = {
    "table_ptr": "*i64",
    "tiles_ptr": "*i32",
    "scalars_ptr": "*fp32",
    "step_ptr": "*i64",
} | dict.fromkeys(("lr", "decay", "eps", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2"), "fp32")


def _case(bits: int, weight: str, gradient: str, copied: bool = False) -> AotCase:
    return AotCase(
        name=f"adamw_{bits}bit/{weight}/{gradient}{'/copy' if copied else ''}",
        kernel=adamw_8bit_kernel if bits == 8 else adamw_32bit_kernel,
        signature=_SIGNATURE,
        constexprs={
            "WEIGHT_BF16": weight == "bf16",
            "GRAD_BF16": gradient == "bf16",
            "HAS_COPY": copied,
            "ALIGNED": True,
            "TILE_BLOCKS": TILE_BLOCKS,
        },
        num_warps=NUM_WARPS,
        divisible=("table_ptr", "tiles_ptr", "scalars_ptr", "step_ptr"),
    )


AOT_CASES = [
    _case(bits, weight, gradient, copied)
    for bits in (8, 32)
    for weight, gradient, copied in (
        ("bf16", "bf16", False),
        ("bf16", "fp32", False),
        ("fp32", "fp32", False),
        ("fp32", "fp32", True),
    )
]
