"""Cross entropy of one row of logits per program: loss, statistics and gradient in one read and one
read-write.

With the target t set apart, M = max over j ≠ t, S = Σ_{j ≠ t} exp(x_j − M) and T = Σ_{j ≠ t} exp(x_j −
M)·(x_j − M) are kept online, with the runner-up and the first arg-max. From d = M + log S − x_t and u =
exp(−|d|) follow, all exact when p_t → 1,

    1 − p_t = sigmoid(d)     loss = max(d, 0) + log1p(u)     entropy = p·loss + (1 − p)·(log S − T/S − log(1 −
                             p))
    ∂loss/∂x_t = −(1 − p_t)  ∂loss/∂x_j = exp(x_j − M)·(1 − p_t)/S

(not exp(x − lse), which has two to three times the RMS error). The gradient, times the row's weight,
overwrites the logits. One exponential per logit and pass: the running sums are rescaled once per block, by
scalars. A row with 1 − p_t < skip_below is flagged and gets zeros without being read again.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.launch import (
    VECTOR_BYTES,
    AotCase,
    padded_columns,
    require,
    require_rows,
    require_vector,
    row_block,
)

LOSS, ENTROPY, TOP1_PROBABILITY, MARGIN, LOG10_MISS = range(5)  # lines of `table`
CORRECT, MEMORISED = range(2)  # lines of `flags`
INVERSE_LOG_10 = tl.constexpr(1.0 / math.log(10.0))


@triton.jit
def _log1p(u):
    """log(1 + u) for u in [0, 1] by 2·atanh(u / (2 + u)), to fp32 rounding: the hardware's log near 1 keeps
    no small u."""
    z = u / (2.0 + u)
    s = z * z
    series = 1.0 + s * (
        1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s * (1 / 13 + s * (1 / 15))))))
    )
    return 2.0 * z * series


@triton.jit
def _capped(x, softcap):
    """y = softcap · tanh(x / softcap) and its slope 1 − (y / softcap)², both from the exponential of a number
    ≤ 0."""
    e = tl.exp(-2.0 * tl.abs(x) / softcap)
    y = softcap * (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y), 4.0 * e / ((1.0 + e) * (1.0 + e))


# Chunks start anywhere in the per-row vectors and N' changes with every row: specialising on them would
# recompile.
@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["targets_ptr", "weights_ptr", "table_ptr", "flags_ptr"],
)
def cross_entropy_rows_kernel(
    logits_ptr,  # [rows, padded] 16-byte aligned rows; the gradient overwrites them
    targets_ptr,  # [rows] int64
    weights_ptr,  # [rows] fp32
    table_ptr,  # [5, table_stride] fp32
    flags_ptr,  # [2, table_stride] uint8
    row_stride,
    table_stride,
    vocabulary,
    padded,  # vocabulary rounded up to 16: masks on it keep every access 16 bytes wide
    softcap,
    skip_below,
    HAS_SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    # False: only loss, log10_miss and the memorised flag, to measure what the others cost
    STATISTICS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # A target outside the vocabulary must read nothing out of bounds, and yet not pass as a number.
    row = tl.program_id(0)
    line = logits_ptr + row.to(tl.int64) * row_stride
    target = tl.load(targets_ptr + row)
    inside = (target >= 0) & (target < vocabulary)
    target = tl.where(inside, target, 0).to(tl.int32)
    x_target = tl.load(line + target).to(tl.float32)
    if HAS_SOFTCAP:
        x_target, _ = _capped(x_target, softcap)
    x_target = tl.where(inside & (x_target != float("inf")), x_target, float("nan"))

    # One read of the row: everything is kept relative to the best of the others so far.
    best = tl.full((), float("-inf"), tl.float32)
    second = tl.full((), float("-inf"), tl.float32)
    first = tl.full((), 0, tl.int32)
    total = tl.full((), 0.0, tl.float32)
    weighted = tl.full((), 0.0, tl.float32)
    lanes = tl.arange(0, BLOCK_V)
    for start in range(0, padded, BLOCK_V):
        columns = start + lanes
        x = tl.load(line + columns, mask=columns < padded, other=0.0).to(tl.float32)
        if HAS_SOFTCAP:
            x, slope = _capped(x, softcap)
        x = tl.where((columns < vocabulary) & (columns != target), x, float("-inf"))
        block_best = tl.max(x, axis=0)
        if STATISTICS:
            block_first = tl.min(tl.where(x == block_best, columns, 2147483647), axis=0)
            block_second = tl.max(tl.where(columns == block_first, float("-inf"), x), axis=0)
            second = tl.maximum(tl.minimum(best, block_best), tl.maximum(second, block_second))
            first = tl.where(block_best > best, block_first, first)
        new_best = tl.maximum(best, block_best)
        # nothing but −inf yet: keep −inf − (−inf) out
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)
        moved = tl.where(best == float("-inf"), 0.0, best - shift)
        rescale = tl.where(best == float("-inf"), 0.0, tl.exp(moved))
        difference = x - shift
        e = tl.exp(difference)
        if STATISTICS:
            weighted = rescale * (weighted + total * moved) + tl.sum(
                tl.where(e == 0.0, 0.0, e * difference), axis=0
            )
        total = rescale * total + tl.sum(e, axis=0)
        best = new_best

    # From d alone, so that a memorised token keeps its full relative precision (see above).
    shift = tl.where(best == float("-inf"), 0.0, best)
    log_total = tl.log(total)
    d = shift - x_target + log_total
    u = tl.exp(-tl.abs(d))
    log1p_u = _log1p(u)
    loss = tl.maximum(d, 0.0) + log1p_u
    loss = tl.where(d == d, loss, float("nan"))
    log_miss = tl.minimum(d, 0.0) - log1p_u
    # of p and 1 − p; the larger by subtraction, which rounds half as much as 1 / (1 + u)
    smaller = u / (1.0 + u)
    hit = tl.where(d > 0, smaller, 1.0 - smaller)
    miss = tl.where(d > 0, 1.0 - smaller, smaller)
    memorised = miss < skip_below
    tl.store(table_ptr + row, loss)
    tl.store(table_ptr + 4 * table_stride + row, tl.where(d == d, log_miss, float("nan")) * INVERSE_LOG_10)
    tl.store(flags_ptr + table_stride + row, memorised.to(tl.uint8))
    # 0 · ∞ would be NaN where p is exactly 0 or 1; a NaN of d must reach every statistic.
    if STATISTICS:
        hit_term = tl.where(hit > 0, hit * loss, 0.0)
        miss_term = tl.where(miss > 0, miss * (log_total - weighted / total - log_miss), 0.0)
        correct = (d == d) & ((x_target > best) | ((x_target == best) & (target < first)))
        others_lead = best > x_target
        top = tl.maximum(best, x_target)
        runner_up = tl.where(others_lead, tl.maximum(second, x_target), best)
        tl.store(table_ptr + table_stride + row, tl.where(d == d, hit_term + miss_term, float("nan")))
        tl.store(table_ptr + 2 * table_stride + row, tl.where(others_lead, miss / total, hit))
        tl.store(table_ptr + 3 * table_stride + row, top - runner_up)
        tl.store(flags_ptr + row, correct.to(tl.uint8))

    # The second pass, in place: zeros of a memorised row are written without reading it again.
    if GRADIENT:
        scale = tl.load(weights_ptr + row) * tl.where(d == d, miss, float("nan"))
        if memorised:
            for start in range(0, padded, BLOCK_V):
                columns = start + lanes
                zeros = tl.zeros((BLOCK_V,), dtype=logits_ptr.dtype.element_ty)
                tl.store(line + columns, zeros, mask=columns < padded)
        else:
            factor = scale / tl.where(total > 0, total, 1.0)
            for start in range(0, padded, BLOCK_V):
                columns = start + lanes
                x = tl.load(line + columns, mask=columns < padded, other=0.0).to(tl.float32)
                if HAS_SOFTCAP:
                    x, slope = _capped(x, softcap)
                g = tl.where(columns == target, -scale, tl.exp(x - shift) * factor)
                if HAS_SOFTCAP:
                    g *= slope
                g = tl.where(columns < vocabulary, g, 0.0)
                tl.store(line + columns, g.to(logits_ptr.dtype.element_ty), mask=columns < padded)


def cross_entropy_rows_fwd(
    logits: Tensor,  # [c, V] bf16 | fp16 | fp32, rows padded to 16 columns; overwritten when `gradient`
    targets: Tensor,  # [c] int64; outside 0 … V-1 = NaN loss, NaN gradient, no access out of bounds
    weights: Tensor,  # [c] fp32
    table: Tensor,  # [5, N'] fp32 and
    flags: Tensor,  # [2, N'] uint8: columns start … start + c - 1 are filled
    start: int,
    *,
    gradient: bool,
    softcap: float | None = None,
    skip_below: float = 0.0,
    statistics: bool = True,  # False: only loss, log10_miss and the memorised flag are written
) -> None:
    """One launch. Reads c·V logits, twice with a gradient, and writes as many. Raises ValueError on a broken
    contract."""
    # The kernel trusts its addresses: what is wrong must be refused here.
    rows, vocabulary = logits.shape
    require_rows(logits, "logits")
    require_vector(targets, "targets", rows, torch.int64)
    require_vector(weights, "weights", rows, torch.float32)
    require(
        tuple(table.shape) == (5, flags.shape[1]) and table.is_contiguous(),
        "table [5, N']",
        tuple(table.shape),
    )
    require(flags.shape[0] == 2 and flags.is_contiguous(), "flags [2, N']", tuple(flags.shape))
    require(0 <= start <= flags.shape[1] - rows, "the chunk inside table", start)
    if rows == 0:  # which is no grid
        return
    block, warps = row_block(vocabulary)
    cross_entropy_rows_kernel[(rows,)](
        logits, targets, weights, table[0, start:], flags[0, start:],
        logits.stride(0), table.stride(0), vocabulary, padded_columns(vocabulary),
        1.0 if softcap is None else softcap, skip_below,
        HAS_SOFTCAP=softcap is not None, GRADIENT=gradient, STATISTICS=statistics,
        BLOCK_V=block, num_warps=warps,
    )  # fmt: skip


def _case(
    dtype: str, gradient: bool, softcap: bool, columns: int = 1 << 17, statistics: bool = True
) -> AotCase:
    block, warps = row_block(columns)
    parts = (dtype, f"block{block}", "gradient" if gradient else "forward", *(["softcap"] if softcap else []))
    parts += () if statistics else ("loss_only",)
    return AotCase(
        name="cross_entropy_rows/" + "/".join(parts),
        kernel=cross_entropy_rows_kernel,
        signature={
            "logits_ptr": f"*{dtype}",
            "targets_ptr": "*i64",
            "weights_ptr": "*fp32",
            "table_ptr": "*fp32",
            "flags_ptr": "*u8",
            "row_stride": "i32",
            "table_stride": "i32",
            "vocabulary": "i32",
            "padded": "i32",
            "softcap": "fp32",
            "skip_below": "fp32",
        },
        constexprs={"HAS_SOFTCAP": softcap, "GRADIENT": gradient, "STATISTICS": statistics, "BLOCK_V": block},
        num_warps=warps,
        divisible=("logits_ptr", "row_stride", "padded"),
        store_bytes=VECTOR_BYTES if gradient else 0,
    )


AOT_CASES = [
    *(_case(dtype, gradient, False) for dtype in ("bf16", "fp16", "fp32") for gradient in (True, False)),
    _case("bf16", True, True),
    _case("bf16", False, True),
    _case("bf16", True, False, columns=1024),
    _case("bf16", True, False, statistics=False),
]
