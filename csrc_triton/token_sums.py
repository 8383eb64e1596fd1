"""Statistics of a row's trained positions, summed per task or sample in fixed point, in one launch.

`PositionStats.sum_by` in plain torch (`repsft_fast/stats.py`) is the truth, bit for bit: every operation is
exact or rounded once, and integers are added, in any order. A block of positions that all count for one
segment is added up first and costs nine atomic additions; any other nine for each position.

Bytes per position: 5 · 4 + 1 + 8 = 29 read. Floor at N' = 8,192: below a microsecond; it is a launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.launch import AotCase, require

BLOCK = 256  # positions per program
NUM_WARPS = 4
COLUMNS = 9
# 2**CLAMP is the most a position may add, 2**FRACTION what it is multiplied by: of loss, its square, entropy,
# top1_probability, margin, log10_miss
CLAMP = (12, 20, 8, 1, 16, 8)
FRACTION = (32, 24, 32, 32, 24, 32)


@triton.jit
def _fixed(x, finite, BOUND: tl.constexpr, SCALE: tl.constexpr):
    """fp64 → int64: NaN as 0, clamped, scaled, rounded to nearest, ties to even; 0 where not `finite`."""
    x = tl.where(x == x, x, 0.0)
    x = tl.where(x < -BOUND, -BOUND, tl.where(x > BOUND, BOUND, x)) * SCALE
    # adding and taking away 1.5 · 2⁵² rounds what is below 2⁵¹ to a whole number
    x = (x + 6755399441055744.0) - 6755399441055744.0
    return tl.cast(tl.where(finite, x, 0.0), tl.int64)


@triton.jit
def _add(table_ptr, segments, present, first, alike, value, COLUMN: tl.constexpr):
    if alike:
        tl.atomic_add(table_ptr + first * 9 + COLUMN, tl.sum(value, axis=0), sem="relaxed")
    else:
        tl.atomic_add(table_ptr + segments * 9 + COLUMN, value, mask=present, sem="relaxed")


# N' changes with every row, and rows' vectors begin anywhere in theirs: nothing is specialised on
@triton.jit(
    do_not_specialize=["positions"],
    do_not_specialize_on_alignment=[
        "loss_ptr", "correct_ptr", "entropy_ptr", "top1_ptr", "margin_ptr", "miss_ptr", "segments_ptr",
        "table_ptr", "owners_ptr",
    ],
)  # fmt: skip
def token_sums_kernel(
    loss_ptr,  # [positions] fp32, as those without a type
    correct_ptr,  # uint8, 0 or 1
    entropy_ptr,
    top1_ptr,
    margin_ptr,
    miss_ptr,
    segments_ptr,  # int64
    table_ptr,  # [segments, 9] int64, added to
    owners_ptr,  # int64, the table's line of each segment; not read unless OWNED
    positions,
    OWNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    present = lanes < positions
    # what is beyond the last counts for the segment of the block's first, and adds zeros
    first = tl.load(segments_ptr + tl.program_id(0) * BLOCK)
    segments = tl.load(segments_ptr + lanes, mask=present, other=0)
    if OWNED:
        first = tl.load(owners_ptr + first)
        segments = tl.load(owners_ptr + segments, mask=present, other=0)
    segments = tl.where(present, segments, first)
    alike = tl.min(tl.where(segments == first, 1, 0), axis=0) == 1
    loss = tl.load(loss_ptr + lanes, mask=present, other=0.0)
    finite = tl.abs(loss) < float("inf")
    wide = tl.cast(loss, tl.float64)
    one = tl.cast(present, tl.int64)
    correct = tl.cast(tl.load(correct_ptr + lanes, mask=present, other=0), tl.int64)
    entropy = tl.cast(tl.load(entropy_ptr + lanes, mask=present, other=0.0), tl.float64)
    top1 = tl.cast(tl.load(top1_ptr + lanes, mask=present, other=0.0), tl.float64)
    margin = tl.cast(tl.load(margin_ptr + lanes, mask=present, other=0.0), tl.float64)
    miss = tl.cast(tl.load(miss_ptr + lanes, mask=present, other=0.0), tl.float64)
    _add(table_ptr, segments, present, first, alike, one, 0)
    _add(table_ptr, segments, present, first, alike, correct, 1)
    _add(table_ptr, segments, present, first, alike, tl.where(finite, 0, one), 2)
    _add(table_ptr, segments, present, first, alike, _fixed(wide, finite, 4096.0, 4294967296.0), 3)
    _add(table_ptr, segments, present, first, alike, _fixed(wide * wide, finite, 1048576.0, 16777216.0), 4)
    _add(table_ptr, segments, present, first, alike, _fixed(entropy, finite, 256.0, 4294967296.0), 5)
    _add(table_ptr, segments, present, first, alike, _fixed(top1, finite, 2.0, 4294967296.0), 6)
    _add(table_ptr, segments, present, first, alike, _fixed(margin, finite, 65536.0, 16777216.0), 7)
    _add(table_ptr, segments, present, first, alike, _fixed(miss, finite, 256.0, 4294967296.0), 8)


def takes(values: Sequence[Tensor]) -> bool:
    """Whether these are what the kernel reads: contiguous fp32."""
    return all(value.dtype == torch.float32 and value.is_contiguous() for value in values)


def add_sums(
    table: Tensor,
    values: Sequence[Tensor],
    correct: Tensor,
    segments: Tensor,
    owners: Tensor | None = None,
) -> None:
    """table: [n, 9] int64, added to; values: loss, entropy, top1_probability, margin, log10_miss, [N'] fp32;
    correct: [N'] bool; segments: [N'] int64, lines of the table, or with owners, [S] int64, places in them,
    which are lines. One launch, no host sync."""
    count = segments.numel()
    require(table.dtype == torch.int64 and table.is_contiguous(), "a contiguous int64 table", table.dtype)
    require(table.shape[-1] == COLUMNS, f"a table of {COLUMNS} columns", tuple(table.shape))
    require(segments.dtype == torch.int64 and segments.is_contiguous(), "int64 segments", segments.dtype)
    if owners is not None:
        fits = owners.dtype == torch.int64 and owners.is_contiguous()
        require(fits, "int64 owners", owners.dtype)
    sizes = [value.numel() for value in (*values, correct)]
    require(sizes == [count] * 6, f"{count} numbers of each statistic", sizes)
    require(correct.dtype == torch.bool and correct.is_contiguous(), "correct as bool", correct.dtype)
    if count:
        loss, *others = values
        token_sums_kernel[(-(-count // BLOCK),)](
            loss, correct.view(torch.uint8), *others, segments, table,
            segments if owners is None else owners, count,
            OWNED=owners is not None, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip


_FLOATS = ("loss_ptr", "entropy_ptr", "top1_ptr", "margin_ptr", "miss_ptr")
AOT_CASES = [
    AotCase(
        name=f"token_sums/{'samples' if owned else 'tasks'}",
        kernel=token_sums_kernel,
        signature={
            **dict.fromkeys(_FLOATS, "*fp32"),
            "correct_ptr": "*u8",
            "segments_ptr": "*i64",
            "table_ptr": "*i64",
            "owners_ptr": "*i64",
            "positions": "i32",
        },
        constexprs={"OWNED": owned, "BLOCK": BLOCK},
        num_warps=NUM_WARPS,
        load_bytes=8,  # two positions a thread, read anywhere
        store_bytes=0,  # atomic additions
    )
    for owned in (False, True)
]
