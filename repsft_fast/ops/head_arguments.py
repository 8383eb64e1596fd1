"""What the fused head takes: arguments refused by name, cast as autocast would, gathered where sharded."""

import functools
from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from repsft_fast.errors import describe

P = ParamSpec("P")
R = TypeVar("R")
# Other kinds of device have no autocast, and asking fails; torch's own question is not traceable in 2.11.
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")
_HALF = (torch.float16, torch.bfloat16)


def as_autocast(hidden: Tensor, lm_head: Tensor) -> tuple[Tensor, Tensor]:
    """Cast as F.linear would under the autocast in force: to its type, but fp64, and nothing where none is in
    force.

    An fp32 `lm_head` stays: `head_pass` rounds it, so that its gradient need not be rounded. ValueError for
    half precision of the other kind, here or in `check`: fp16 does not hold what bf16 holds, nor the reverse.
    """
    kind = hidden.device.type
    if not (kind in _AUTOCAST and torch.is_autocast_enabled(kind)):
        return hidden, lm_head
    dtype = torch.get_autocast_dtype(kind)
    if hidden.dtype not in (torch.float64, torch.float32, dtype):
        where, wrong = "linear_cross_entropy: hidden", "has another half precision than the autocast in force"
        raise ValueError(describe(where, wrong, expected=dtype, got=hidden.dtype))
    return hidden.to(dtype) if hidden.dtype == torch.float32 else hidden, lm_head


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Its products choose their types themselves: under autocast some would be rounded once more."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        kind = args[0].device.type  # type: ignore[attr-defined]
        if not (kind in _AUTOCAST and torch.is_autocast_enabled(kind)):
            return function(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return run


def gathered(lm_head: DTensor) -> Tensor:
    """[V, H] whole. All-gather forward, reduce-scatter (a sum) backward: every rank's gradient is of its own
    rows."""
    if lm_head.device_mesh.ndim != 1:
        raise ValueError(
            describe(
                "linear_cross_entropy: lm_head",
                "is sharded over a mesh of several dimensions, of which some may see the same rows",
                expected="one dimension, or a plain tensor",
                got=f"{lm_head.placements}",
                todo="gather it as the mesh demands, or call this inside a method that FSDP2 unshards",
            )
        )
    return lm_head.full_tensor(grad_placements=[Partial()])


def check(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    rows: Tensor | None,
    *,
    skip_below: float,
    softcap: float | None,
    chunk_bytes: int | None,
    kept_share: float,
) -> None:
    """Raises ValueError for the first argument that cannot be meant, by its name."""
    _check_products(hidden, lm_head)
    _check_lines(len(hidden), targets, weights, rows)
    for name, value in (("lm_head", lm_head), ("targets", targets), ("weights", weights), ("rows", rows)):
        if value is not None and value.device != hidden.device:
            _refuse(name, "is on another device than hidden", hidden.device, value.device)
    if not 0.0 <= skip_below < 1.0:
        _refuse("skip_below", "is out of range", "0 <= τ < 1", skip_below)
    if not 0.0 <= kept_share <= 1.0:
        _refuse("kept_share", "is out of range", "0 <= share <= 1", kept_share)
    if softcap is not None and not 0.0 < softcap < float("inf"):
        _refuse("softcap", "is out of range", "a positive number, or None", softcap)
    if chunk_bytes is not None and chunk_bytes < 1:
        _refuse("chunk_bytes", "is out of range", "at least 1", chunk_bytes)


def check_inside(rows: Tensor, n: int) -> None:
    """IndexError, where looking costs nothing: rows are places in hidden, not counted from its end."""
    if rows.device.type != "cpu" or type(rows) is not Tensor or not rows.numel():
        return
    low, high = int(rows.numpy().min()), int(rows.numpy().max())
    if low < 0 or high >= n:
        wrong = "has an index that hidden has no row for"
        got = low if low < 0 else high
        raise IndexError(describe("linear_cross_entropy: rows", wrong, expected=f"0 … {n - 1}", got=got))


def _check_products(hidden: Tensor, lm_head: Tensor) -> None:
    """What is multiplied: two matrices of one width, in types the products take."""
    if isinstance(hidden, DTensor):
        _refuse(
            "hidden", "is a sharded DTensor", "this rank's rows as a plain tensor", f"{hidden.placements}"
        )
    if hidden.ndim != 2:
        todo = "flatten it: hidden.flatten(0, -2), and targets and weights alike"
        _refuse("hidden", "has the wrong shape", "two dimensions", tuple(hidden.shape), todo)
    if lm_head.ndim != 2:
        _refuse("lm_head", "has the wrong shape", "two dimensions", tuple(lm_head.shape))
    if hidden.dtype not in (torch.float64, torch.float32, *_HALF):
        _refuse("hidden", "has an unusable dtype", "bf16, fp16, fp32 or fp64", hidden.dtype)
    rounded_here = hidden.dtype in _HALF and lm_head.dtype == torch.float32
    if lm_head.dtype != hidden.dtype and not rounded_here:
        _refuse("lm_head", "has another dtype than hidden", hidden.dtype, lm_head.dtype)
    width = hidden.shape[1]
    if lm_head.shape[1] != width or lm_head.shape[0] < 2:
        _refuse("lm_head", "has the wrong shape", f"(V >= 2, {width})", tuple(lm_head.shape))


def _check_lines(n: int, targets: Tensor, weights: Tensor | None, rows: Tensor | None) -> None:
    """What stands beside the n lines of hidden."""
    wrong = "has the wrong shape or dtype"
    if tuple(targets.shape) != (n,) or targets.dtype != torch.int64:
        _refuse("targets", wrong, f"({n},) int64", f"{tuple(targets.shape)} {targets.dtype}")
    if weights is not None:
        if tuple(weights.shape) != (n,) or not weights.dtype.is_floating_point:
            _refuse("weights", wrong, f"({n},) fp32", f"{tuple(weights.shape)} {weights.dtype}")
        if weights.requires_grad:
            _refuse("weights", "requires grad, which this head does not give", "requires_grad=False", True)
    if rows is not None and (rows.ndim != 1 or rows.dtype != torch.int64):
        _refuse("rows", wrong, "(N',) int64", f"{tuple(rows.shape)} {rows.dtype}")


def _refuse(name: str, wrong: str, expected: object, got: object, todo: str | None = None) -> NoReturn:
    raise ValueError(describe(f"linear_cross_entropy: {name}", wrong, expected=expected, got=got, todo=todo))
