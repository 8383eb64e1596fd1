"""AdamW with 8-bit moments: one launch per kind of tensor, whatever the number of tensors.

The formula, the codes and their reasons stand in `repsft_fast/optim/adamw8bit_reference.py`, which is this
kernel's truth; the arithmetic is the same, operation by operation. bf16 is read and written as the upper half
of an fp32's bits, by integers: the rounding is ours anyway. A table on the device holds every tensor's
addresses; a program looks up the tensor of its tile. Step, clip factor, veto and bias corrections are read
from device memory.

Bytes moved per element, bf16 weight and gradient, 8-bit moments: 2 + 2 weight, 2 gradient, 1 + 1 and 1 + 1
moments, 4/256 scales = 10.02; fp32 weight and gradient 16.02. Floor per 10⁹ bf16 parameters: 3.3 ms (H100),
2.3 (H200).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.launch import AotCase, require

BLOCK = 256  # elements that share a scale
TILE_BLOCKS = 8  # blocks per program
TILE = BLOCK * TILE_BLOCKS
NUM_WARPS = 4
_NAN = tl.constexpr(0x7FC00000)
_GOLDEN = tl.constexpr(0x9E3779B9)
_LEAST = tl.constexpr(16)  # exponent field of a block of zeros; scale bytes count from it
_SPAN = tl.constexpr(15)  # octaves below a block's largest element

# Columns of the table, one line per tensor, int64.
WEIGHT, GRAD, M, M_SCALE, V, V_SCALE, SIZE, FIRST, KEY0, KEY1, FIRST_TILE = range(11)
COLUMNS = tl.constexpr(16)


@triton.jit
def _mix(x):
    """A 32-bit integer hash. x: uint32."""
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD
    x = x ^ (x >> 15)
    x = x * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def _entry(table_ptr, line, COLUMN: tl.constexpr):
    return tl.load(table_ptr + line * COLUMNS + COLUMN)


@triton.jit
def _address(table_ptr, line, COLUMN: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.cast(_entry(table_ptr, line, COLUMN), tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _keys(table_ptr, line, step_ptr):
    count = tl.cast(tl.load(step_ptr), tl.uint32) * _GOLDEN
    key0 = _mix(count ^ tl.cast(_entry(table_ptr, line, 8), tl.uint32))
    key1 = _mix(count + tl.cast(_entry(table_ptr, line, 9), tl.uint32))
    return key0, key1


@triton.jit
def _load(pointer, offsets, inside, BF16: tl.constexpr):
    if BF16:
        bits = tl.cast(tl.load(pointer + offsets, mask=inside, other=0), tl.int32) << 16
        return tl.cast(bits, tl.float32, bitcast=True)
    else:
        return tl.load(pointer + offsets, mask=inside, other=0.0)


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
    ALIGNED: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):
    line = tl.load(tiles_ptr + tl.program_id(0))
    tile = tl.program_id(0) - tl.cast(_entry(table_ptr, line, 10), tl.int32)
    blocks = tl.cast(tile, tl.int64) * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    lanes = tl.arange(0, 256)
    present = blocks < _entry(table_ptr, line, 6)
    inside = present[:, None] & (lanes >= 0)[None, :]
    offsets = blocks[:, None] * 256 + lanes[None, :]
    if tl.load(scalars_ptr + 3) == 0.0:
        w_ptr = _address(table_ptr, line, 0, tl.int16 if WEIGHT_BF16 else tl.float32, ALIGNED)
        g_ptr = _address(table_ptr, line, 1, tl.int16 if GRAD_BF16 else tl.float32, ALIGNED)
        m_ptr = _address(table_ptr, line, 2, tl.uint8, ALIGNED)
        v_ptr = _address(table_ptr, line, 4, tl.uint8, ALIGNED)
        m_scale_ptr = _address(table_ptr, line, 3, tl.uint8, False)
        v_scale_ptr = _address(table_ptr, line, 5, tl.uint8, False)

        # One word an element serves all three roundings; the reference says why that is no bias.
        key0, key1 = _keys(table_ptr, line, step_ptr)
        first_block = _entry(table_ptr, line, 7) >> 8
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
        g = _load(g_ptr, offsets, inside, GRAD_BF16) * tl.load(scalars_ptr + 2)
        m = tl.cast(m_bits, tl.float32, bitcast=True)
        m, v = _moments(m, root * root, g, beta1, one_minus_beta1, beta2, one_minus_beta2)
        root = tl.sqrt_rn(v)
        w = _load(w_ptr, offsets, inside, WEIGHT_BF16)
        w = _step(w, m, root, lr, decay, eps, tl.load(scalars_ptr), tl.load(scalars_ptr + 1))
        _store_weight(w_ptr, offsets, inside, w, random, WEIGHT_BF16)

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
    ALIGNED: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):
    line = tl.load(tiles_ptr + tl.program_id(0))
    tile = tl.program_id(0) - tl.cast(_entry(table_ptr, line, 10), tl.int32)
    offsets = tl.cast(tile, tl.int64) * (TILE_BLOCKS * 256) + tl.arange(0, TILE_BLOCKS * 256)
    size = _entry(table_ptr, line, 6)
    if ALIGNED:
        size = tl.multiple_of(size, 16)  # a mask that never splits 16 elements keeps the accesses wide
    inside = offsets < size
    if tl.load(scalars_ptr + 3) == 0.0:
        w_ptr = _address(table_ptr, line, 0, tl.int16 if WEIGHT_BF16 else tl.float32, ALIGNED)
        g_ptr = _address(table_ptr, line, 1, tl.int16 if GRAD_BF16 else tl.float32, ALIGNED)
        m_ptr = _address(table_ptr, line, 2, tl.float32, ALIGNED)
        v_ptr = _address(table_ptr, line, 4, tl.float32, ALIGNED)
        # Small tensors: the same update on fp32 moments, which need no coding.
        g = _load(g_ptr, offsets, inside, GRAD_BF16) * tl.load(scalars_ptr + 2)
        m = tl.load(m_ptr + offsets, mask=inside, other=0.0)
        v = tl.load(v_ptr + offsets, mask=inside, other=0.0)
        m, v = _moments(m, v, g, beta1, one_minus_beta1, beta2, one_minus_beta2)
        w = _load(w_ptr, offsets, inside, WEIGHT_BF16)
        w = _step(w, m, tl.sqrt_rn(v), lr, decay, eps, tl.load(scalars_ptr), tl.load(scalars_ptr + 1))
        # An fp32 weight is not rounded, so it draws nothing.
        random = tl.zeros([TILE_BLOCKS * 256], tl.uint32)
        if WEIGHT_BF16:
            key0, key1 = _keys(table_ptr, line, step_ptr)
            element = offsets + _entry(table_ptr, line, 7)
            lane = tl.cast(element & 0xFF, tl.uint32) * _GOLDEN
            random = _mix((_mix(tl.cast(element >> 8, tl.uint32) ^ key0) + lane) ^ key1)
        _store_weight(w_ptr, offsets, inside, w, random, WEIGHT_BF16)
        tl.store(m_ptr + offsets, m, mask=inside)
        tl.store(v_ptr + offsets, v, mask=inside)


# weight, grad, moments, key, first global element
Part = tuple[Tensor, Tensor, dict[str, Tensor], tuple[int, int], int]


@dataclasses.dataclass
class _Plan:
    """The device tables of one launch, rebuilt when an address has changed."""

    lines: list[int]
    table: Tensor  # [tensors, 16] int64
    tiles: Tensor  # [programs] int32


class Launcher:
    """Updates many tensors in one launch per (8 or 32 bits, weight dtype, gradient dtype, alignment).

    Gradients that stay where they are (or come back to the same addresses) reuse the device tables; otherwise
    the table, 128 bytes per tensor, is copied from pinned memory, asynchronously.
    """

    def __init__(self) -> None:
        self._plans: dict[Any, _Plan] = {}

    def __call__(self, parts: Sequence[Part], scalars: Any, step: Tensor) -> int:
        """`scalars` as `repsft_fast.optim.adamw8bit_reference.Scalars`; step: [] int64, the count after this
        update, on the device. Returns the number of launches."""
        if not parts:
            return 0
        values = [scalars.inverse_correction1, scalars.inverse_correction2, scalars.clip, scalars.veto]
        device_scalars = torch.stack([value.reshape(()) for value in values])
        groups: dict[Any, list[Part]] = {}
        for weight, gradient, moments, key, first in parts:
            part = (weight, gradient.contiguous(), moments, key, first)
            groups.setdefault(_kind(part), []).append(part)
        for kind, members in groups.items():
            eight_bit, weight_bf16, grad_bf16, aligned = kind
            plan = self._plan(kind, members, eight_bit)
            kernel = adamw_8bit_kernel if eight_bit else adamw_32bit_kernel
            kernel[(plan.tiles.numel(),)](
                plan.table, plan.tiles, device_scalars, step,
                scalars.lr, scalars.lr * scalars.weight_decay, scalars.eps,
                scalars.beta1, 1 - scalars.beta1, scalars.beta2, 1 - scalars.beta2,
                WEIGHT_BF16=weight_bf16, GRAD_BF16=grad_bf16, ALIGNED=aligned,
                TILE_BLOCKS=TILE_BLOCKS, num_warps=NUM_WARPS,
            )  # fmt: skip
        return len(groups)

    def _plan(self, kind: Any, members: list[Part], eight_bit: bool) -> _Plan:
        lines: list[int] = []
        tiles: list[int] = []
        for weight, gradient, moments, key, first in members:
            empty = moments["exp_avg"]  # 32-bit moments have no scales; any address does
            size = weight.numel() // BLOCK if eight_bit else weight.numel()
            names = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
            tensors = [weight, gradient, *(moments.get(name, empty) for name in names)]
            lines += (
                [t.data_ptr() for t in tensors] + [size, first, *key, sum(tiles)] + [0] * (COLUMNS.value - 11)
            )
            tiles.append(-(-weight.numel() // TILE))
        # Two groups of one optimizer may be of one kind: the first weight's address tells them apart.
        known = self._plans.get((kind, lines[WEIGHT]))
        if known is not None and known.lines == lines:
            return known
        device = members[0][0].device
        numbers = torch.arange(len(tiles), dtype=torch.int32)
        line_of_tile = torch.repeat_interleave(numbers, torch.tensor(tiles), output_size=sum(tiles))
        plan = _Plan(
            lines, _upload(torch.tensor(lines, dtype=torch.int64), device), _upload(line_of_tile, device)
        )
        self._plans[(kind, lines[WEIGHT])] = plan
        return plan


def _kind(part: Part) -> tuple[bool, bool, bool, bool]:
    weight, gradient, moments, _, first = part
    eight_bit = moments["exp_avg"].dtype == torch.uint8
    for name, tensor in (("weight", weight), ("gradient", gradient)):
        require(tensor.dtype in (torch.float32, torch.bfloat16), f"{name} float32 or bfloat16", tensor.dtype)
        require(tensor.is_contiguous(), f"{name} contiguous", tuple(tensor.stride()))
    require(
        weight.shape == gradient.shape, f"a gradient of shape {tuple(weight.shape)}", tuple(gradient.shape)
    )
    require(
        not eight_bit or (weight.shape[-1] % BLOCK == 0 and first % BLOCK == 0),
        "rows of whole blocks",
        tuple(weight.shape),
    )
    wide = (weight, gradient, moments["exp_avg"], moments["exp_avg_sq"])
    aligned = all(t.data_ptr() % 16 == 0 for t in wide) and weight.numel() % 16 == 0
    return eight_bit, weight.dtype == torch.bfloat16, gradient.dtype == torch.bfloat16, aligned


def _upload(host: Tensor, device: torch.device) -> Tensor:
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


_SIGNATURE = {"table_ptr": "*i64", "tiles_ptr": "*i32", "scalars_ptr": "*fp32", "step_ptr": "*i64"} | {
    name: "fp32" for name in ("lr", "decay", "eps", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2")
}


def _case(bits: int, weight: str, gradient: str) -> AotCase:
    return AotCase(
        name=f"adamw_{bits}bit/{weight}/{gradient}",
        kernel=adamw_8bit_kernel if bits == 8 else adamw_32bit_kernel,
        signature=_SIGNATURE,
        constexprs={
            "WEIGHT_BF16": weight == "bf16",
            "GRAD_BF16": gradient == "bf16",
            "ALIGNED": True,
            "TILE_BLOCKS": TILE_BLOCKS,
        },
        num_warps=NUM_WARPS,
        divisible=("table_ptr", "tiles_ptr", "scalars_ptr", "step_ptr"),
        # 32-bit moments are for small tensors; Triton 3.6 reads them narrower than 3.9 does: the table says
        # how
        **({} if bits == 8 else {"load_bytes": 4, "store_bytes": 2}),
    )


AOT_CASES = [
    _case(bits, weight, gradient)
    for bits in (8, 32)
    for weight, gradient in (("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32"))
]
