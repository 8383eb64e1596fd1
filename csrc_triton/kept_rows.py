"""The two gradient products of rows beyond a capacity, when there are any: the count is read on the device.

`order` lists rows, those with a gradient first; `count` says how many have one. The caller gives the first
`first` of them to cuBLAS, whose sizes the host must know; what is left, rows first … count − 1 of the order,
is done here:

    hidden: out[r] = G[r] @ W for every such row r          head: acc += Σ_r G[r]ᵀ ⊗ h[r]

A count at or below `first` (the usual case) costs two launches that read one number and end. Unmeasured on a
GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.launch import AotCase, require, require_vector

BLOCK = 64  # rows and columns of a tile
DEPTH = 32  # of the reduced dimension
NUM_WARPS = 4


@triton.jit(do_not_specialize=["first"])
def kept_hidden_kernel(
    gradient_ptr,  # [rows, V], rows gradient_stride apart
    head_ptr,  # [V, H]
    order_ptr,  # [rows] int64
    count_ptr,  # [1] int64
    out_ptr,  # [rows, H]
    first,
    vocabulary,
    width,
    gradient_stride,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # The grid is made for all rows, since the host does not know the count: most programs end here.
    count = tl.load(count_ptr)
    start = first + tl.program_id(0) * BLOCK
    if start < count:
        places = start + tl.arange(0, BLOCK)
        inside = places < count
        rows = tl.load(order_ptr + places, mask=inside, other=0)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        present = columns < width
        lanes = tl.arange(0, DEPTH)
        acc = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
        for k in range(0, vocabulary, DEPTH):
            v = k + lanes
            g_mask = inside[:, None] & (v < vocabulary)[None, :]
            g = tl.load(gradient_ptr + rows[:, None] * gradient_stride + v[None, :], mask=g_mask, other=0.0)
            w_mask = (v < vocabulary)[:, None] & present[None, :]
            w = tl.load(head_ptr + v.to(tl.int64)[:, None] * width + columns[None, :], mask=w_mask, other=0.0)
            acc = tl.dot(g, w, acc, input_precision="ieee")
        place = out_ptr + rows[:, None] * width + columns[None, :]
        tl.store(place, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & present[None, :])


@triton.jit(do_not_specialize=["first"])
def kept_head_kernel(
    gradient_ptr,  # [rows, V], rows gradient_stride apart
    hidden_ptr,  # [rows, H]
    order_ptr,  # [rows] int64
    count_ptr,  # [1] int64
    acc_ptr,  # [V, H] fp32, added to
    first,
    vocabulary,
    width,
    gradient_stride,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # In the usual case cuBLAS has had them all and nothing is read but this number.
    count = tl.load(count_ptr)
    if count > first:
        v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        present = columns < width
        known = v < vocabulary
        lanes = tl.arange(0, DEPTH)
        place = acc_ptr + v.to(tl.int64)[:, None] * width + columns[None, :]
        mask = known[:, None] & present[None, :]
        acc = tl.load(place, mask=mask, other=0.0)
        for k in range(first, count, DEPTH):
            inside = k + lanes < count
            rows = tl.load(order_ptr + k + lanes, mask=inside, other=0)
            g_mask = known[:, None] & inside[None, :]
            g = tl.load(gradient_ptr + rows[None, :] * gradient_stride + v[:, None], mask=g_mask, other=0.0)
            h_mask = inside[:, None] & present[None, :]
            h = tl.load(hidden_ptr + rows[:, None] * width + columns[None, :], mask=h_mask, other=0.0)
            acc = tl.dot(g, h, acc, input_precision="ieee")
        tl.store(place, acc, mask=mask)


def kept_hidden(
    gradient: Tensor, head: Tensor, order: Tensor, count: Tensor, first: int, out: Tensor
) -> None:
    """out[order[i]] = gradient[order[i]] @ head for first <= i < count; other rows of out stay. One
    launch."""
    rows, vocabulary = gradient.shape
    width = head.shape[1]
    _require(gradient, order, count, first)
    require(
        tuple(head.shape) == (vocabulary, width) and head.is_contiguous(), "head [V, H]", tuple(head.shape)
    )
    require(tuple(out.shape) == (rows, width) and out.is_contiguous(), "out [rows, H]", tuple(out.shape))
    if first < rows:
        grid = (triton.cdiv(rows - first, BLOCK), triton.cdiv(width, BLOCK))
        kept_hidden_kernel[grid](
            gradient, head, order, count, out, first, vocabulary, width, gradient.stride(0),
            BLOCK=BLOCK, DEPTH=DEPTH, num_warps=NUM_WARPS,
        )  # fmt: skip


def kept_head(
    gradient: Tensor, hidden: Tensor, order: Tensor, count: Tensor, first: int, accumulator: Tensor
) -> None:
    """accumulator += Σ gradient[order[i]]ᵀ hidden[order[i]] over first <= i < count. One launch."""
    rows, vocabulary = gradient.shape
    width = hidden.shape[1]
    _require(gradient, order, count, first)
    require(
        tuple(hidden.shape) == (rows, width) and hidden.is_contiguous(),
        "hidden [rows, H]",
        tuple(hidden.shape),
    )
    whole = tuple(accumulator.shape) == (vocabulary, width) and accumulator.is_contiguous()
    require(whole and accumulator.dtype == torch.float32, "accumulator [V, H] fp32", tuple(accumulator.shape))
    if first < rows:
        grid = (triton.cdiv(vocabulary, BLOCK), triton.cdiv(width, BLOCK))
        kept_head_kernel[grid](
            gradient, hidden, order, count, accumulator, first, vocabulary, width, gradient.stride(0),
            BLOCK=BLOCK, DEPTH=DEPTH, num_warps=NUM_WARPS,
        )  # fmt: skip


def _require(gradient: Tensor, order: Tensor, count: Tensor, first: int) -> None:
    require(gradient.stride(1) == 1, "gradient with contiguous rows", tuple(gradient.stride()))
    require_vector(order, "order", gradient.shape[0], torch.int64)
    require_vector(count, "count", 1, torch.int64)
    require(0 <= first <= gradient.shape[0], "first inside the rows", first)


def _case(name: str, dtype: str) -> AotCase:
    hidden = name == "hidden"
    return AotCase(
        name=f"kept_{name}/{dtype}",
        kernel=kept_hidden_kernel if hidden else kept_head_kernel,
        signature={
            "gradient_ptr": f"*{dtype}",
            ("head_ptr" if hidden else "hidden_ptr"): f"*{dtype}",
            "order_ptr": "*i64",
            "count_ptr": "*i64",
            ("out_ptr" if hidden else "acc_ptr"): f"*{dtype}" if hidden else "*fp32",
            "first": "i32",
            "vocabulary": "i32",
            "width": "i32",
            "gradient_stride": "i32",
        },
        constexprs={"BLOCK": BLOCK, "DEPTH": DEPTH},
        num_warps=NUM_WARPS,
        divisible=("gradient_ptr", ("head_ptr" if hidden else "hidden_ptr"), "width", "gradient_stride"),
        load_bytes=0,  # a fallback: not asserted
        store_bytes=0,
    )


AOT_CASES = [_case(name, "bf16") for name in ("hidden", "head")]
