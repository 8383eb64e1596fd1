"""From an update's gradients to its verdict: norm, clip factor, spike and veto, without a number read by the
host and without a tensor made.

Two launches. `squares_kernel`: a fixed number of programs walks over all gradients (a table on the device
holds their addresses) and leaves partial sums of squares. `judge_kernel`, one program: the norm from these,
what `repsft_fast/training/spikes.py` decides, and all that follows from it. That module in plain torch is the
truth of both; the arithmetic is the same, operation by operation, but for the order of sums. Everything is
written into buffers that stay: `Verdict`.

Bytes of `squares_kernel`: the gradients once, 4 or 2 an element. Floor per 10⁹ fp32 gradients: 1.3 ms (H100,
3.0 TB/s), 0.9 (H200, 4.3). Elements are squared and added in fp32 within a tile and in fp64 over tiles; by a
number of programs that does not depend on the GPU, so the bits do not either.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.launch import AotCase, require
from csrc_triton.tensor_table import Line, Tables, address, entry, load_floats

TILE = 4096  # elements a program adds up at a time
NUM_WARPS = 8
PROGRAMS = 1024  # partial sums of a launch: four of its eight warps fill a multiprocessor 16 deep
WINDOW = 128  # updates that a spike is judged by

# Columns of the table, one line per gradient, int64.
GRAD, SIZE, FIRST_TILE = range(3)


@triton.jit(do_not_specialize=["tiles"])
def squares_kernel(
    table_ptr,  # [gradients, 16] int64
    tiles_ptr,  # [tiles] int32, the table line of each tile
    partial_ptr,  # [programs] fp64
    tiles,
    BF16: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0)
    lanes = tl.arange(0, TILE)
    total = tl.full((), 0.0, tl.float64)
    for tile in range(program, tiles, tl.num_programs(0)):
        line = tl.load(tiles_ptr + tile)
        first = tl.cast(entry(table_ptr, line, 2), tl.int32)
        offsets = tl.cast(tile - first, tl.int64) * TILE + lanes
        size = entry(table_ptr, line, 1)
        if ALIGNED:
            # A mask that never splits 16 elements keeps the accesses wide.
            size = (size // 16) * 16
        WIDE: tl.constexpr = 16 if ALIGNED else 1
        pointer = address(table_ptr, line, 0, tl.int16 if BF16 else tl.float32, WIDE)
        x = load_floats(pointer, offsets, offsets < size, BF16)
        total += tl.cast(tl.sum(x * x, axis=0), tl.float64)
    tl.store(partial_ptr + program, total)


# the open update's loss lies anywhere in the ledger
@triton.jit(do_not_specialize_on_alignment=["loss_ptr"])
def judge_kernel(
    loss_ptr,  # [] fp64, of this rank's rows
    partial_ptr,  # [partials] fp64, sums of squares
    told_ptr,  # [3] int64 if TOLD: what the ranks sent each other (Spikes), in place of the two above
    bounds_ptr,  # [8] fp64: of loss and norm least values, variances and loud logarithms; clip, its epsilon
    ring_ptr,  # [WINDOW, 2] fp64, logarithms of loss and norm, the newest last
    count_ptr,  # [] fp64, how many are known
    next_ring_ptr,  # the two above after this update
    next_count_ptr,
    numbers_ptr,  # [7] fp64: norm, veto, spike, means of loss and norm, their limits
    clip_ptr,  # [] fp32
    veto_ptr,  # [] fp32
    applied_ptr,  # [] int64, 1 - veto
    partials,
    TOLD: tl.constexpr,
    VETO_SPIKES: tl.constexpr,
    KNOWN: tl.constexpr,
    SIGMAS: tl.constexpr,
    MOST: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    infinite = float("inf")
    if TOLD:
        loss = tl.cast(tl.load(told_ptr), tl.float64) / 4294967296.0
        norm = tl.cast(tl.load(told_ptr + 2), tl.float64, bitcast=True)
        finite = tl.load(told_ptr + 1) == 0
    else:
        loss = tl.load(loss_ptr)
        lanes = tl.arange(0, BLOCK)
        norm = tl.sqrt(tl.sum(tl.load(partial_ptr + lanes, mask=lanes < partials, other=0.0), axis=0))
        finite = (tl.abs(loss) < infinite) & (norm < infinite)

    column = tl.arange(0, 2)
    values = tl.where(column == 0, loss, norm)
    least = tl.load(bounds_ptr + column)
    floor = tl.load(bounds_ptr + 2 + column)
    loud = tl.load(bounds_ptr + 4 + column)
    rows = tl.arange(0, WINDOW)
    places = rows[:, None] * 2 + column[None, :]
    ring = tl.load(ring_ptr + places)
    count = tl.load(count_ptr)

    # Comparisons are chosen so that a NaN stays one, as in torch: nothing is known yet, and no comparison
    # with it is true.
    here = tl.log(tl.where(values < least, least, values))
    mean = tl.sum(ring, axis=0) / count
    variance = tl.sum(ring * ring, axis=0) / count - mean * mean
    deviation = tl.sqrt(tl.where(variance < floor, floor, variance))
    limit = mean + SIGMAS * deviation
    limit = tl.where(limit < loud, loud, limit)
    above = tl.max(tl.where(here > limit, 1, 0), axis=0)
    spike = (above > 0) & finite & (count >= KNOWN)
    most = mean + MOST * deviation
    here = tl.where(spike & (here > most), most, here)

    enters = finite & (norm > 0.0)
    newest = rows[:, None] == WINDOW - 1
    older = tl.load(ring_ptr + places + 2, mask=places + 2 < 2 * WINDOW, other=0.0)
    shifted = tl.where(newest, here[None, :], older)
    tl.store(next_ring_ptr + places, tl.where(enters, shifted, ring))
    more = count + tl.where(enters, 1.0, 0.0)
    tl.store(next_count_ptr, tl.where(more > WINDOW, tl.cast(WINDOW, tl.float64), more))

    refused = finite == 0
    if VETO_SPIKES:
        refused = refused | spike
    factor = 1.0 / (norm + tl.load(bounds_ptr + 7)) * tl.load(bounds_ptr + 6)
    tl.store(clip_ptr, tl.cast(tl.where(factor > 1.0, 1.0, factor), tl.float32))
    tl.store(veto_ptr, tl.where(refused, 1.0, 0.0))
    tl.store(applied_ptr, tl.where(refused, 0, 1))
    tl.store(numbers_ptr, norm)
    tl.store(numbers_ptr + 1, tl.where(refused, 1.0, 0.0))
    tl.store(numbers_ptr + 2, tl.where(spike, 1.0, 0.0))
    tl.store(numbers_ptr + 3 + column, mean)
    tl.store(numbers_ptr + 5 + column, limit)


class Squares:
    """Partial sums of the squares of many gradients, whose addresses stand in a table that is kept."""

    def __init__(self) -> None:
        self._tables = Tables(FIRST_TILE, GRAD)
        self._partial: Tensor | None = None

    def __call__(self, gradients: Sequence[Tensor]) -> Tensor:
        """[n] fp64 in memory that the next call overwrites; its sum is that of all squares. One launch per
        (dtype, alignment). gradients: at least one, fp32 | bf16, contiguous, on one device. No host sync."""
        plans = self._tables.of((), gradients, lambda: [_line(n, g) for n, g in enumerate(gradients)])
        size = PROGRAMS * len(plans)
        if self._partial is None or self._partial.numel() != size:
            self._partial = torch.zeros(size, dtype=torch.float64, device=gradients[0].device)
        for number, plan in enumerate(plans):
            bf16, aligned = plan.kind
            # as many as ever, some of which may have no tile and write 0
            partial = self._partial[number * PROGRAMS :] if number else self._partial
            squares_kernel[(PROGRAMS,)](
                plan.table, plan.tiles, partial, plan.tiles.shape[0],
                BF16=bf16, ALIGNED=aligned, TILE=TILE, num_warps=NUM_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
        return self._partial


def _line(number: int, gradient: Tensor) -> Line:
    require(
        gradient.dtype in (torch.float32, torch.bfloat16), "gradients float32 or bfloat16", gradient.dtype
    )
    require(gradient.is_contiguous(), "gradients contiguous", tuple(gradient.stride()))
    size = gradient.numel()
    aligned = size % 16 == 0 and gradient.data_ptr() % 16 == 0
    values = {GRAD: gradient.data_ptr(), SIZE: size}
    kind = (gradient.dtype == torch.bfloat16, aligned)
    return Line(kind, values, -(-size // TILE), number, 16 if aligned else 1)


def judge(
    loss: Tensor,
    partial: Tensor,
    told: Tensor | None,
    bounds: Tensor,
    window: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
    numbers: Tensor,
    outcome: tuple[Tensor, Tensor, Tensor],
    *,
    veto_spikes: bool,
    known: int,
    sigmas: float,
    most: float,
) -> None:
    """One launch; what each tensor holds stands at `judge_kernel`. window, after: (ring, count); outcome:
    (clip, veto, applied). told: None on one rank, else loss and partial are not read."""
    judge_kernel[(1,)](
        loss, partial, numbers if told is None else told, bounds, *window, *after, numbers, *outcome,
        partial.numel(),
        TOLD=told is not None, VETO_SPIKES=veto_spikes, KNOWN=known, SIGMAS=sigmas, MOST=most, WINDOW=WINDOW,
        BLOCK=triton.next_power_of_2(partial.numel()), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


_POINTERS = {
    "loss_ptr": "*fp64", "partial_ptr": "*fp64", "bounds_ptr": "*fp64", "ring_ptr": "*fp64",
    "count_ptr": "*fp64", "next_ring_ptr": "*fp64", "next_count_ptr": "*fp64", "numbers_ptr": "*fp64",
    "clip_ptr": "*fp32", "veto_ptr": "*fp32", "applied_ptr": "*i64",
}  # fmt: skip


def _judge_case(told: bool) -> AotCase:
    signature = {**_POINTERS, "told_ptr": "*i64" if told else "*fp64", "partials": "i32"}
    return AotCase(
        name=f"judge/{'ranks' if told else 'one rank'}",
        kernel=judge_kernel,
        signature=signature,
        constexprs={
            "TOLD": told, "VETO_SPIKES": True, "KNOWN": 64, "SIGMAS": 6.0, "MOST": 18.0, "WINDOW": WINDOW,
            "BLOCK": PROGRAMS,
        },
        num_warps=4,
        divisible=tuple(name for name in signature if name != "loss_ptr"),
        load_bytes=8,
        store_bytes=8,
        contraction=False,
    )  # fmt: skip


def _squares_case(gradient: str) -> AotCase:
    return AotCase(
        name=f"squares/{gradient}",
        kernel=squares_kernel,
        signature={"table_ptr": "*i64", "tiles_ptr": "*i32", "partial_ptr": "*fp64", "tiles": "i32"},
        constexprs={"BF16": gradient == "bf16", "ALIGNED": True, "TILE": TILE},
        num_warps=NUM_WARPS,
        divisible=("table_ptr", "tiles_ptr", "partial_ptr"),
        store_bytes=8,  # one partial sum per program
        contraction=False,
    )


AOT_CASES = [_squares_case("fp32"), _squares_case("bf16"), _judge_case(False), _judge_case(True)]
