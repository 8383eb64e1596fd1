"""Before an update of the 8-bit AdamW: it is counted, and what all elements share is made, in one launch.

Corrections are powers by squaring in fp64, as AdamW's (`repsft_fast/optim/adamw_reference.py`), rounded to
fp32 once; the reference of the 8-bit one takes `expm1`, which is within fp32's rounding of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.launch import AotCase, require
from csrc_triton.tensor_table import power, upload

MOST_BETAS = 16  # pairs that one program counts for


# One warp: a thread that wrote the count before another read it would be a race.
@triton.jit
def adamw_8bit_count_kernel(
    step_ptr,  # [] int64, updates made; counted on
    veto_ptr,  # [] fp32
    clip_ptr,  # [] fp32
    betas_ptr,  # [pairs, 2] fp64
    scalars_ptr,  # [pairs, 4] fp32, as the kernels above read them
    pairs,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
):
    lines = tl.arange(0, BLOCK)
    present = lines < pairs
    refused = tl.load(veto_ptr) != 0.0
    step = tl.load(step_ptr) + tl.where(refused, 0, 1)
    tl.store(step_ptr, step)
    # at 0 (a first update vetoed) any finite number; past what 32 bits hold every power is 0
    exponent = tl.cast(tl.minimum(tl.maximum(step, 1), 2147483647), tl.int32)
    beta1 = tl.load(betas_ptr + lines * 2, mask=present, other=0.0)
    beta2 = tl.load(betas_ptr + lines * 2 + 1, mask=present, other=0.0)
    first = 1.0 / (1.0 - power(beta1, exponent, BITS))
    second = 1.0 / tl.sqrt(1.0 - power(beta2, exponent, BITS))
    tl.store(scalars_ptr + lines * 4, tl.cast(first, tl.float32), mask=present)
    tl.store(scalars_ptr + lines * 4 + 1, tl.cast(second, tl.float32), mask=present)
    tl.store(scalars_ptr + lines * 4 + 2, tl.load(clip_ptr) + lines * 0.0, mask=present)
    tl.store(scalars_ptr + lines * 4 + 3, tl.where(refused, 1.0, 0.0) + lines * 0.0, mask=present)


class Counter:
    """The update counted, and what every element of it shares, in memory that stays."""

    def __init__(self, betas: Sequence[tuple[float, float]], device: torch.device):
        """betas: pairs of them, each once."""
        require(0 < len(betas) <= MOST_BETAS, f"1 to {MOST_BETAS} pairs of betas", len(betas))
        self._betas = upload(torch.tensor(betas, dtype=torch.float64).reshape(-1, 2), device)
        self._scalars = torch.zeros(len(betas), 4, dtype=torch.float32, device=device)
        self._one = torch.ones((), dtype=torch.float32, device=device)
        self._zero = torch.zeros((), dtype=torch.float32, device=device)
        self._lines = [(line, *line.unbind()) for line in self._scalars.unbind()]

    def __call__(self, step: Tensor, veto: Tensor | None, clip: Tensor | None) -> Sequence[Sequence[Tensor]]:
        """Of each pair [4] fp32, and its elements: 1/(1 - b1^t), 1/√(1 - b2^t), clip, veto. The next call
        overwrites them.

        step: [] int64, updates made, counted on unless vetoed; veto, clip: [] fp32 on the device, None = 0
        and 1.
        One launch.
        """
        veto, clip = self._zero if veto is None else veto, self._one if clip is None else clip
        for name, tensor in (("veto", veto), ("clip", clip)):
            require(tensor.dtype == torch.float32 and tensor.numel() == 1, f"{name} one fp32", tensor.dtype)
        adamw_8bit_count_kernel[(1,)](
            step, veto, clip, self._betas, self._scalars, len(self._lines),
            BLOCK=MOST_BETAS, BITS=31, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
        return self._lines


AOT_CASES = [
    AotCase(
        name="adamw_8bit_count",
        kernel=adamw_8bit_count_kernel,
        signature={
            "step_ptr": "*i64", "veto_ptr": "*fp32", "clip_ptr": "*fp32", "betas_ptr": "*fp64",
            "scalars_ptr": "*fp32", "pairs": "i32",
        },
        constexprs={"BLOCK": MOST_BETAS, "BITS": 31},
        num_warps=1,
        divisible=("step_ptr", "veto_ptr", "clip_ptr", "betas_ptr", "scalars_ptr"),
        load_bytes=8,
        store_bytes=4,
        contraction=False,
    )
]  # fmt: skip
