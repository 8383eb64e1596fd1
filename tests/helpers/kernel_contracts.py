"""What kernels that cannot run here demand of their arguments: our Triton ones by their ahead-of-time cases
and by the memory they touch, torch's CUDA ones where finding shapes asks for less than running does."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from csrc_triton import (
    adamw,
    adamw8bit,
    adamw8bit_count,
    cross_entropy,
    judge,
    kept_rows,
    state_hash,
    token_sums,
)
from csrc_triton.launch import AotCase

aten = torch.ops.aten
_HALF = (torch.bfloat16, torch.float16)
_TYPES = {
    "*fp64": torch.float64,
    "*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32,
    "*i64": torch.int64, "*i32": torch.int32, "*u8": torch.uint8,
}  # fmt: skip
_LARGEST_GRID = (2**31 - 1, 65535, 65535)
_CASES: dict[str, list[AotCase]] = {}
for _module in (adamw, adamw8bit, adamw8bit_count, cross_entropy, judge, kept_rows, state_hash, token_sums):
    for _case in _module.AOT_CASES:
        _CASES.setdefault(_case.kernel.fn.__name__, []).append(_case)

Named = dict[str, Any]
Touched = dict[str, int]  # pointer → elements behind it that the launch may read or write


def _rows_of_logits(a: Named, grid: tuple[int, ...]) -> Touched:
    rows = grid[0]
    return {
        "logits_ptr": (rows - 1) * a["row_stride"] + a["padded"],
        "targets_ptr": rows,
        "weights_ptr": rows,
        "table_ptr": 4 * a["table_stride"] + rows,
        "flags_ptr": a["table_stride"] + rows,
    }


def _kept(a: Named, grid: tuple[int, ...]) -> Touched:
    rows, size, block = a["order_ptr"].numel(), a["vocabulary"] * a["width"], a["BLOCK"]
    tall, wide = (rows - a["first"], rows * a["width"]) if "out_ptr" in a else (a["vocabulary"], size)
    _must(grid == (-(-tall // block), -(-a["width"] // block)), "a program for every tile", grid)
    others = (
        {"head_ptr": size, "out_ptr": wide}
        if "out_ptr" in a
        else {"hidden_ptr": rows * a["width"], "acc_ptr": wide}
    )
    return {
        "gradient_ptr": (rows - 1) * a["gradient_stride"] + a["vocabulary"],
        "order_ptr": rows,
        "count_ptr": 1,
        **others,
    }


def _tiles(a: Named, grid: tuple[int, ...]) -> Touched:
    _must(a["tiles_ptr"].numel() == grid[0], "a program for every tile", grid)
    return {"table_ptr": 16, "tiles_ptr": grid[0], "scalars_ptr": 4, "step_ptr": 1}


def _adamw(a: Named, grid: tuple[int, ...]) -> Touched:
    _must(a["tiles_ptr"].numel() == grid[0], "a program for every tile", grid)
    tensors = a["table_ptr"].numel() // 16
    ones = {"clip_ptr": 1, "veto_ptr": 1}
    return {"table_ptr": 16 * tensors, "tiles_ptr": grid[0], "corrections_ptr": 2 * tensors, **ones}


def _counts(a: Named, grid: tuple[int, ...]) -> Touched:
    _must(grid == (-(-a["tensors"] // a["BLOCK"]),), "a program for every block of tensors", grid)
    return {"table_ptr": 16 * a["tensors"], "corrections_ptr": 2 * a["tensors"], "veto_ptr": 1}


def _counted(a: Named, grid: tuple[int, ...]) -> Touched:
    _must(grid == (1,), "one program", grid)
    ones = dict.fromkeys(("step_ptr", "veto_ptr", "clip_ptr"), 1)
    return {**ones, "betas_ptr": 2 * a["pairs"], "scalars_ptr": 4 * a["pairs"]}


def _words(a: Named, grid: tuple[int, ...]) -> Touched:
    return {"words_ptr": a["blocks"] * a["BLOCK"], "partial_ptr": grid[0]}


def _squares(a: Named, grid: tuple[int, ...]) -> Touched:
    _must(a["tiles_ptr"].numel() == a["tiles"], "as many tiles as there are", a["tiles"])
    return {"table_ptr": 16, "tiles_ptr": a["tiles"], "partial_ptr": grid[0]}


def _judge(a: Named, grid: tuple[int, ...]) -> Touched:
    _must(grid == (1,), "one program", grid)
    window = {
        "ring_ptr": 2 * a["WINDOW"],
        "next_ring_ptr": 2 * a["WINDOW"],
        "bounds_ptr": 8,
        "numbers_ptr": 7,
    }
    ones = ("loss_ptr", "count_ptr", "next_count_ptr", "clip_ptr", "veto_ptr", "applied_ptr")
    return {**window, **dict.fromkeys(ones, 1), "partial_ptr": a["partials"], "told_ptr": 3}


def _token_sums(a: Named, grid: tuple[int, ...]) -> Touched:
    _must(grid == (-(-a["positions"] // a["BLOCK"]),), "a program for every block of positions", grid)
    names = ("loss_ptr", "correct_ptr", "entropy_ptr", "top1_ptr", "margin_ptr", "miss_ptr", "segments_ptr")
    return {**dict.fromkeys(names, a["positions"]), "table_ptr": 9, "owners_ptr": 1}


_TOUCHED: dict[str, Callable[[Named, tuple[int, ...]], Touched]] = {
    "cross_entropy_rows_kernel": _rows_of_logits,
    "kept_hidden_kernel": _kept,
    "kept_head_kernel": _kept,
    "adamw_kernel": _adamw,
    "adamw_count_kernel": _counts,
    "adamw_8bit_kernel": _tiles,
    "adamw_8bit_count_kernel": _counted,
    "adamw_32bit_kernel": _tiles,
    "_sum_kernel": _words,
    "squares_kernel": _squares,
    "judge_kernel": _judge,
    "token_sums_kernel": _token_sums,
}


def check_launch(kernel: Any, grid: Any, args: tuple[Any, ...], kwargs: Named) -> None:
    """AssertionError naming the kernel where a launch would fail, or touch what is not its own. Kernels of
    others: only that their tensors lie on the GPU."""
    name = kernel.fn.__name__
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    _must(
        all(t.device.type == "cuda" for t in tensors),
        f"{name}: tensors on the GPU",
        [str(t.device) for t in tensors],
    )
    if not kernel.fn.__module__.startswith("csrc_triton"):
        return
    options = {
        key: kwargs.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion") if key in kwargs
    }
    contraction = options.pop("enable_fp_fusion", True)
    a = inspect.signature(kernel.fn).bind(*args, **kwargs).arguments
    _must(
        set(options) <= {"num_warps", "num_stages"} and options.get("num_warps", 4) in (1, 2, 4, 8, 16),
        name,
        options,
    )
    _must(all(isinstance(n, int) for n in grid), f"{name}: a grid of whole numbers", grid)
    _must(
        all(0 < n <= most for n, most in zip(grid, _LARGEST_GRID)),
        f"{name}: a grid that can be launched",
        grid,
    )
    found = {key: _kind(value) for key, value in a.items()}
    fits = [case for case in _CASES[name] if all(found[key] == kind for key, kind in case.signature.items())]
    _must(bool(fits), f"{name}: types of a case that is compiled ahead of time", found)
    _must(fits[0].contraction == contraction, f"{name}: contracted as it is compiled ahead", contraction)
    _must(set(a) == set(fits[0].signature) | set(fits[0].constexprs), f"{name}: its arguments", sorted(a))
    for key, elements in _TOUCHED[name](a, tuple(grid)).items():
        storage, tensor = a[key].untyped_storage().nbytes(), a[key]
        room = storage // tensor.element_size() - tensor.storage_offset()
        _must(0 <= elements <= room, f"{name}: {key} with {elements} elements", room)


def _kind(value: Any) -> str | None:
    """The name a signature gives this argument's type."""
    if isinstance(value, Tensor):
        return next((name for name, dtype in _TYPES.items() if dtype == value.dtype), str(value.dtype))
    if isinstance(value, int) and not isinstance(value, bool):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32" if isinstance(value, float) else type(value).__name__


def _must(condition: bool, what: str, got: object) -> None:
    assert condition, f"expected {what}, got {got}"


def of_operator(func: Any, args: Any, kwargs: Any) -> list[str]:
    """What torch's CUDA kernel would object to."""
    if func in _PRODUCTS:
        return _product(args, kwargs)
    if func is aten._fused_adamw_.default:
        return _fused_adamw(args, kwargs)
    if func in (aten._flash_attention_forward.default, aten._flash_attention_backward.default):
        return _attention(args)
    return []


_PRODUCTS = {
    aten.mm.default, aten.mm.out, aten.mm.dtype, aten.mm.dtype_out, aten.bmm.default,
    aten.addmm.default, aten.addmm.out, aten.addmm_.default, aten.addmm.dtype, aten.addmm.dtype_out,
}  # fmt: skip


def _product(args: Any, kwargs: Any) -> list[str]:
    matrices = [arg for arg in args if isinstance(arg, Tensor)]
    left, right = matrices[-2:]
    wanted = next(
        (arg for arg in (*args, kwargs.get("out_dtype")) if isinstance(arg, torch.dtype)), left.dtype
    )
    wrong = []
    if left.dtype != right.dtype or left.shape[-1] != right.shape[-2]:
        wrong.append(f"{left.dtype} {list(left.shape)} times {right.dtype} {list(right.shape)}")
    if wanted != left.dtype and not (wanted == torch.float32 and left.dtype in _HALF):
        wrong.append(f"a product of {left.dtype} in {wanted}")
    if len(matrices) == 3 and matrices[0].dtype not in (wanted, left.dtype):
        wrong.append(f"added to {matrices[0].dtype}")
    out = kwargs.get("out")
    if out is not None and (out.dtype != wanted or tuple(out.shape) != (left.shape[0], right.shape[1])):
        wrong.append(f"{wanted} into {out.dtype} {list(out.shape)}")
    return wrong


def _fused_adamw(args: Any, kwargs: Any) -> list[str]:
    weights, gradients, first, second, _, steps = args
    wrong = []
    for tensors in zip(weights, gradients, first, second, strict=True):
        if len({(t.dtype, t.shape, t.stride()) for t in tensors}) > 1:
            wrong.append(f"weight, gradient and moments {[str(t.dtype) for t in tensors]}")
    scalars = [*steps, kwargs.get("grad_scale"), kwargs.get("found_inf")]
    if any(
        t is not None and (t.dtype != torch.float32 or t.numel() != 1 or t.device.type != "cuda")
        for t in scalars
    ):
        wrong.append("counts and factors that are no single fp32 on the GPU")
    return wrong


def _attention(args: Any) -> list[str]:
    """FlashAttention 2 over packed rows: half precision, whole vectors of 8, heads that divide, int32
    borders."""
    floats = [arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point() and arg.ndim == 3]
    borders = [arg for arg in args if isinstance(arg, Tensor) and arg.dtype == torch.int32]
    wrong = [
        f"{t.dtype} {list(t.shape)}"
        for t in floats
        if t.dtype not in _HALF or t.shape[-1] % 8 or t.shape[-1] > 256
    ]
    wrong += [f"strides {t.stride()}" for t in floats if t.stride(-1) != 1]
    heads = sorted({t.shape[1] for t in floats if t.ndim == 3 and t.shape[0] == floats[0].shape[0]})
    wrong += (
        [f"{heads} heads"] if len({t.dtype for t in floats}) > 1 or any(heads[-1] % n for n in heads) else []
    )
    return wrong + (
        []
        if len(borders) >= 2 and all(b.is_contiguous() and b.ndim == 1 for b in borders)
        else ["its borders"]
    )
