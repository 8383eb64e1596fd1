"""What every launcher needs: block sizes, contract checks, and the record of a case to compile ahead of
time."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

VECTOR_BYTES = 16
DIVISIBLE = 16  # what Triton assumes of an argument marked tt.divisibility = 16


@dataclasses.dataclass(frozen=True)
class AotCase:
    """One kernel × dtype × configuration that `python -m csrc_triton.aot` compiles and compares with the
    committed table.

    A kernel module lists its own in `AOT_CASES`. `divisible` names the arguments that the JIT would find
    divisible by 16 (pointers of fresh allocations, padded sizes): leaving them out measures another kernel
    than the one that runs.
    """

    name: str
    kernel: Any  # the @triton.jit function
    signature: Mapping[str, str]  # every non-constexpr argument → "*bf16", "i32", "fp32", …
    constexprs: Mapping[str, Any]
    num_warps: int
    divisible: tuple[str, ...] = ()
    # the widest global load (store) must have this many bytes per thread; 0 = not asserted
    load_bytes: int = VECTOR_BYTES
    store_bytes: int = VECTOR_BYTES
    contraction: bool = True  # whether a · b + c may be rounded once, as its launcher asks


def padded_columns(columns: int) -> int:
    """Columns of a logits buffer: a multiple of 16, so that rows of an odd vocabulary still start on 16-byte
    borders."""
    return -(-columns // DIVISIBLE) * DIVISIBLE


def row_block(columns: int) -> tuple[int, int]:
    """(BLOCK, num_warps) of a kernel that walks one row per program.

    2,048 columns on 4 warps: no spills on sm_80, sm_90 and sm_100, 16-byte accesses, eight rows in flight per
    multiprocessor on sm_90 to hide each other's reductions (README.md says what else was compiled). Fixed,
    not autotuned: a choice by timing may differ after a restart, and with it the rounding.
    """
    block = min(2048, max(128, triton.next_power_of_2(columns)))
    return block, max(1, block // 512)


def require(condition: bool, what: str, got: object) -> None:
    """Contract of a launcher, checked on the host without a sync."""
    if not condition:
        raise ValueError(f"csrc_triton: expected {what}, got {got}")


def require_rows(tensor: Tensor, name: str) -> None:
    """[rows, columns] whose rows start on 16-byte borders and are padded to a multiple of 16 columns."""
    require(
        tensor.ndim == 2 and tensor.stride(1) == 1, f"{name} with contiguous rows", tuple(tensor.stride())
    )
    require(
        tensor.stride(0) % DIVISIBLE == 0 and tensor.stride(0) >= padded_columns(tensor.shape[1]),
        f"{name} with rows padded to a multiple of {DIVISIBLE} columns",
        tuple(tensor.stride()),
    )
    require(
        tensor.data_ptr() % VECTOR_BYTES == 0, f"{name} aligned to {VECTOR_BYTES} bytes", tensor.data_ptr()
    )


def require_vector(tensor: Tensor, name: str, length: int, dtype: torch.dtype) -> None:
    require(
        tuple(tensor.shape) == (length,) and tensor.dtype == dtype and tensor.is_contiguous(),
        f"{name} contiguous ({length},) {dtype}",
        f"{tuple(tensor.shape)} {tensor.dtype}",
    )
