"""The flash-attn packages: what each is known to compute, forward and backward, and how each is called.

What is written here of a package holds for every release of it that has a varlen function; a call that it may
not serve goes elsewhere under auto (`attention.choose`) and is refused where the package was asked for.
Sources: the `flash_api.cpp` and `flash_attn_interface.py` of github.com/Dao-AILab/flash-attention (FA2: root,
FA3: `hopper/`), `flash_attn/cute/interface.py` of flash-attn-4 4.0.0b36 on PyPI (FA4).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from repsft_fast.errors import ModelError, describe
from repsft_fast.ops.scores import Rule, refuse

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Package:
    """What of one generation of flash-attn can be relied on, whatever its release.

    module   what is imported
    majors   GPUs by the first number of their compute capability: 8 Ampere and Ada, 9 Hopper, 10 and 11
             Blackwell in servers, 12 Blackwell on desks
    width    widest head, keys' and values' alike, that has a backward pass with documents of no length
    softcap, dropout   whether its backward pass knows them
    fixed_width        widest head whose backward pass can add in a fixed order (run.deterministic)
    """

    module: str
    majors: tuple[int, ...]
    width: int
    softcap: bool
    dropout: bool
    fixed_width: int


# FA3 is built for Hopper; heads of 193 and more have no deterministic backward ("not supported for hdim
# 256"). FA4: 8.x has no backward, 12.x none that is deterministic; its heads of 129 to 256 are kernels of
# their own, which on Blackwell crash in backward where a document has no length (issue 2562), as the tail of
# our borders always does, and on Hopper came late; its soft-cap had no backward in early releases.
PACKAGES = {
    "flash2": Package("flash_attn", (8, 9, 10, 12), 256, softcap=True, dropout=True, fixed_width=256),
    "flash3": Package("flash_attn_interface", (9,), 256, softcap=True, dropout=False, fixed_width=192),
    "flash4": Package("flash_attn.cute", (9, 10, 11), 128, softcap=False, dropout=False, fixed_width=128),
}
# Which of them auto asks for, the fastest first: FA3 comes compiled, FA4 is made in the first update and is
# as fast on Hopper (their own figures; not measured here). FA2 is what torch's varlen has inside: it is worth
# taking only for a soft-cap, which varlen does not know.
PREFERENCE = ("flash3", "flash4", "flash2")


@dataclass(frozen=True)
class Kernels:
    """One package as it is installed here: found outside of layers, so that their graphs see constants.

    major    of the GPU's compute capability; None: no GPU that was asked
    takes_…  keywords of its varlen function
    """

    name: str
    attend: Callable[..., Any]
    major: int | None
    takes_borders: tuple[str, ...]
    takes_window: bool
    takes_softcap: bool
    takes_dropout: bool
    takes_deterministic: bool


@cache
def importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(PACKAGES[name].module) is not None
    except (ModuleNotFoundError, ValueError):  # a missing parent package; a module that nobody found
        return False


@cache
def kernels(name: str, major: int | None) -> Kernels:
    """Raises whatever importing the package raises. Signatures differ, so only what one takes is passed."""
    module = importlib.import_module(PACKAGES[name].module)
    takes = frozenset(inspect.signature(module.flash_attn_varlen_func).parameters)
    attend = _as_operator(module) if name == "flash4" else module.flash_attn_varlen_func
    borders = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return Kernels(
        name,
        attend,
        major,
        tuple(n for n in borders if n in takes),
        "window_size" in takes,
        "softcap" in takes,
        "dropout_p" in takes,
        "deterministic" in takes,
    )


def major_of(device: torch.device) -> int | None:
    return int(torch.cuda.get_device_capability(device)[0]) if device.type == "cuda" else None


def why_not_serve(has: Kernels, query: Tensor, value: Tensor, rule: Rule) -> str | None:
    """Why this call, [B, A, T, D] and [B, A_kv, T, D_v], is not one that the package is known to compute,
    with gradients; None: it is. Under auto such a call goes elsewhere."""
    package, width = PACKAGES[has.name], query.shape[-1]
    if has.major not in package.majors:
        return f"compute capability {has.major}"
    if query.dtype not in HALF:
        return f"type {query.dtype}"
    if width != value.shape[-1] or width % 8 or width > package.width:
        return f"heads of {width} and {value.shape[-1]}"
    if rule.sinks is not None:
        return "sinks"
    if rule.window is not None and not has.takes_window:
        return "a window"
    if rule.softcap is not None and not (package.softcap and has.takes_softcap and not rule.dropout):
        return "a soft-cap"
    if rule.dropout and not (package.dropout and has.takes_dropout):
        return "dropout"
    if _fixed_order() and not (has.takes_deterministic and width <= package.fixed_width):
        return "run.deterministic"
    return None


def run(has: Kernels, q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, rule: Rule) -> Tensor:
    """[T, A, D] each → [T, A, D_v]. ModelError for what the package is known not to take."""
    name = has.name
    if rule.softcap and not has.takes_softcap:
        refuse(name, softcap=rule.softcap)
    if rule.dropout and not has.takes_dropout:
        refuse(name, dropout_p=rule.dropout)
    if name == "flash4" and q.shape[-1] > PACKAGES[name].width:
        wrong = f"flash4 with heads of {q.shape[-1]} crashes where a document has no length"
        todo = "choose auto or varlen"
        raise ModelError(
            describe("model.attention", wrong, expected=f"at most {PACKAGES[name].width}", todo=todo)
        )
    if _fixed_order() and not has.takes_deterministic:
        wrong = f"this {name} cannot add gradients in a fixed order, as run.deterministic asks for"
        raise ModelError(describe("model.attention", wrong, todo="choose auto or varlen, or a newer release"))
    places = (borders, borders, longest, longest)
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    options: dict[str, Any] = {n: x for n, x in zip(names, places, strict=True) if n in has.takes_borders}
    if rule.window is not None:
        options["window_size"] = left_right(rule.window)
    if rule.softcap:
        options["softcap"] = rule.softcap
    if rule.dropout:
        options["dropout_p"] = rule.dropout
    if has.takes_deterministic:  # torch's own switch is not asked by packages
        options["deterministic"] = _fixed_order()
    output = has.attend(q, k, v, softmax_scale=rule.scale, causal=True, **options)
    return output[0] if isinstance(output, tuple) else output


def left_right(window: int | None) -> tuple[int, int]:
    """The flash kernels count the keys *left of* the query; a window of W keys includes the query itself."""
    return (-1, 0) if window is None else (window - 1, 0)


def _fixed_order() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def _as_operator(module: Any) -> Callable[..., Any]:
    """FA4 makes its kernels while Python runs, which no trace can see: without an operator every compiled
    layer would fall into pieces around it."""
    inner = getattr(module, "interface", None)
    if not (hasattr(inner, "_flash_attn_fwd") and hasattr(inner, "_flash_attn_bwd")):
        return torch.compiler.disable(module.flash_attn_varlen_func)
    _cute.append(inner)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, max_seqlen_q: int, softmax_scale: float,
        window_size: tuple[int, int] = (-1, 0), softcap: float = 0.0, deterministic: bool = False, **_: Any,
    ) -> Tensor:  # fmt: skip
        return flash4(
            q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, window_size[0], softcap, deterministic
        )[0]

    return attend


_cute: list[Any] = []  # the package's interface, once it is imported


@torch.library.custom_op("repsft::flash4", mutates_args=())
def flash4(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, scale: float, left: int, softcap: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[T, A, D], [T, A_kv, D] twice, [S'+1] int32 → ([T, A, D], [A, T] fp32 logarithms of the sums). left:
    keys seen left of the query, −1 = all."""
    output, sums = _cute[-1]._flash_attn_fwd(
        q, k, v, cu_seqlens_q=borders, cu_seqlens_k=borders, max_seqlen_q=longest, max_seqlen_k=longest,
        softmax_scale=scale, causal=True, window_size_left=left if left >= 0 else None, window_size_right=0,
        softcap=softcap, return_lse=True,
    )[:2]  # fmt: skip
    return output, sums


@flash4.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, scale: float, left: int, softcap: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("repsft::flash4_backward", mutates_args=())
def flash4_backward(
    up: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, sums: Tensor, borders: Tensor, longest: int,
    scale: float, left: int, softcap: float, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = _cute[-1]._flash_attn_bwd(
        q, k, v, output, up.contiguous(), sums, scale, True, softcap,
        window_size_left=left if left >= 0 else None, window_size_right=0, cu_seqlens_q=borders,
        cu_seqlens_k=borders, max_seqlen_q=longest, max_seqlen_k=longest, deterministic=deterministic,
    )[:3]  # fmt: skip
    return dq, dk, dv


@flash4_backward.register_fake
def _(
    up: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, sums: Tensor, borders: Tensor, longest: int,
    scale: float, left: int, softcap: float, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, borders, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, borders)
    ctx.set_materialize_grads(False)  # nobody asks for the sums' gradient: no zeros for it


def _back(ctx: Any, up: Tensor, up_sums: Tensor | None) -> tuple[Any, ...]:
    q, k, v, output, sums, borders = ctx.saved_tensors
    found = flash4_backward(up, q, k, v, output, sums, borders, *ctx.rest)
    return (*found, None, None, None, None, None, None)


flash4.register_autograd(_back, setup_context=_keep)
