"""Causal attention inside the segments of a packed row: no query sees a key of another document.

With segment borders c_0 = 0 < c_1 < … < c_S = T, position i of segment s attends to the keys j with
c_s ≤ j ≤ i and, in a sliding-window layer of width W, i − j < W.

One attention function, "repsft", is registered with transformers. It reads the keyword `packed`, which the
model's forward passes through to every layer. Without `packed` (generation, plain Hugging Face use) it *is*
transformers' own sdpa, mask and cache included, so the model that trains is the model that generates; only
sinks and soft-caps, which sdpa leaves out or refuses, are computed here then too.

Four ways to compute the same thing, chosen by device and type or by setting:

    varlen     torch.nn.attention.varlen (FlashAttention inside torch): CUDA, half precision, head dims ≤ 256
    flash2/3/4 the flash-attn packages (`ops.flash`)
    segments   one causal SDPA per segment: any device, the CPU's best (its flash kernel, no mask, no wasted
               block)
    mask       one SDPA under a document mask [T, T]: any device, quadratic in the row

"sdpa" stands for segments on CPU and CUDA and for mask elsewhere. "auto:NAME" is NAME wherever it serves the
call of a layer, else varlen, else sdpa; "auto" alone begins with varlen. Which NAME a run takes is decided
once (`ops.attention_choice`).

What depends on the row alone is made once a row, by `Packed.of` or by the first layer that needs it.

A layer with attention sinks (gpt-oss) weighs one more key, the same for every query of a head: its score is a
learned number and its value zero. Only segments and mask compute it, so "auto" and "sdpa" stand for them in
such a layer.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from repsft_fast.errors import ModelError, describe
from repsft_fast.ops import flash
from repsft_fast.ops.flash import left_right
from repsft_fast.ops.scores import (
    Rule,
    band,
    masked,
    refuse,
    refuse_sinks,
    sinks_of,
    unpacked,
)
from repsft_fast.ops.segments import Masks, by_segment, in_a_graph, kept, lengths_of
from repsft_fast.row import Row

NAME = "repsft"
# What auto may be decided to begin with, and what is left open.
AUTO = ("auto", "auto:varlen", *(f"auto:{name}" for name in flash.PACKAGES))
BACKENDS = (*AUTO, "varlen", *flash.PACKAGES, "sdpa", "segments", "mask")
# What layers pass and this function computes with, or may leave unread.
_UNDERSTOOD = {
    "s_aux",
    "is_causal",
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_router_logits",
}
_MAX_FLASH_HEAD_DIM = 256
# From 2.12 on torch refuses fewer key and value heads unless it is told; 2.11 hands them to the same kernels
# unasked.
_VARLEN_ASKS = "enable_gqa" in inspect.signature(varlen_attn).parameters
# by the index of the GPU: what `takes_grouped_heads` found, once a process
_grouped: dict[int | None, bool] = {}


# Not frozen: torch 2.11 looks into a frozen one where a graph breaks, and would make a graph for every number
# of segments.
@dataclass(eq=False)
class Packed:
    """Where the segments of a row lie, on the device for kernels and on the host for loops over segments."""

    cu_seqlens: Tensor  # [S'+1] int32, segment borders, the tail repeats T
    segment_lengths: tuple[int, ...]  # host; sums to T
    max_seqlen: int  # host; bound on the longest segment
    backend: str = "auto"  # one of BACKENDS
    # of varlen: it is given the key and value heads there are; False = one for every query head
    grouped: bool = True
    flash: flash.Kernels | None = None  # of the package that `backend` names, where it names one
    # [S'] int32 on the host: `segment_lengths` and zeros, for segments in a graph; None: it breaks the graph
    lengths: Tensor | None = None
    # of this row, made by the first layer that needs each
    masks: Masks = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def of(row: Row, backend: str = "auto") -> Packed:
        """Called once a forward pass, outside the layers and their graphs: what has to be tried is tried
        here.

        ModelError for borders that do not end with the row: kernels leave what lies behind them unwritten.
        """
        _check_borders(row)
        device, name = row.cu_seqlens.device, backend.removeprefix("auto:")
        grouped = backend not in (*AUTO, "varlen") or takes_grouped_heads(device)
        there = name in flash.PACKAGES and flash.importable(name)
        kernels = flash.kernels(name, flash.major_of(device)) if there else None
        lengths = lengths_of(row.segment_lengths, row.cu_seqlens.shape[0] - 1)
        return Packed(row.cu_seqlens, row.segment_lengths, row.max_seqlen, backend, grouped, kernels, lengths)


def _check_borders(row: Row) -> None:
    """By what the host knows of it: nothing is read back. Of a static row it knows no lengths; those that are
    copied into one are looked at there (`training.static_row`)."""
    if row.spare:
        return
    length, held = row.tokens.shape[-1], sum(row.segment_lengths)
    if held != length:
        wrong = f"the segments of a row of {length} tokens hold {held}, padding included"
        raise ModelError(describe("row", wrong, expected="borders that end with the row"))
    if max(row.segment_lengths, default=0) > row.max_seqlen:
        wrong = f"max_seqlen {row.max_seqlen} is smaller than a segment of {max(row.segment_lengths)}"
        raise ModelError(describe("row", wrong, expected="a bound on the longest segment"))


def register() -> str:
    """Make "repsft" known to transformers, as an attention and as a mask builder. Repeatable. Returns the
    name.

    The mask builder is sdpa's: it serves generation and plain forward calls. Training passes an empty 4-D
    mask (`no_mask`), which transformers hands on untouched, so no mask is built and nothing is read back from
    the device.
    """
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def no_mask(device: torch.device) -> Tensor:
    """[1, 1, 0, 0] bool: "the mask is ready", which keeps transformers from building one (and from
    `.item()`)."""
    return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)


def packed_attention(
    module: nn.Module,
    query: Tensor,  # [B, A, T, D]
    key: Tensor,  # [B, A_kv, T_kv, D]
    value: Tensor,  # [B, A_kv, T_kv, D_v]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed: Packed | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # [B, T, A, D_v]; transformers expects (output, attention weights or None)
    """The function transformers calls in every layer. With `packed`, B is 1 and `attention_mask` is not read.

    `s_aux` in kwargs is the layer's attention sinks [A], which receive their exact gradient.

    Raises ModelError for what would be computed wrongly: bidirectional layers, sinks by a flash kernel, and
    every keyword not known to leave the scores alone: a bias, a selection of keys (MiniMax-M3's
    `block_indices`), whatever comes next.
    """
    # What transformers' own function computes rightly is left to it.
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    rule = Rule(scale, sliding_window, softcap, dropout, sinks_of(module, kwargs.get("s_aux"), query))
    is_causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if packed is None and rule.sinks is None and softcap is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )

    # A keyword nobody here has heard of may change the scores: better no result than another one.
    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in _UNDERSTOOD)
    if unknown and (packed is not None or "position_bias" in unknown):
        wrong = f"{type(module).__name__} passes {', '.join(unknown)}, which packed rows do not support"
        raise ModelError(describe("attention", wrong))

    if packed is None:
        return unpacked(query, key, value, attention_mask, rule, causal=causal).transpose(1, 2), None
    if not causal:
        wrong = (
            f"{type(module).__name__} is not causal by itself, and the mask it would be given knows nothing"
            " of documents"
        )
        raise ModelError(describe("attention", wrong))

    # The call decides, not the model: layers differ in head width, dropout and sinks.
    backend = packed.backend
    if backend in AUTO or backend == "sdpa":
        backend = choose(query, value, rule, only_sdpa=backend == "sdpa", preferred=packed.flash)
    return _RUN[backend](query, key, value, packed, rule), None


def choose(
    query: Tensor,
    value: Tensor,
    rule: Rule,
    *,
    only_sdpa: bool = False,
    preferred: flash.Kernels | None = None,
) -> str:
    """The backend that "auto" or "sdpa" stands for in this call: the preferred package where it serves,
    varlen where torch's flash kernels do, else SDPA."""
    if query.device.type not in ("cpu", "cuda"):
        return "mask"
    if only_sdpa or not query.is_cuda:
        return "segments"
    if preferred is not None and flash.why_not_serve(preferred, query, value, rule) is None:
        return preferred.name
    width = query.shape[-1]
    fits = query.dtype in flash.HALF and width == value.shape[-1] and width <= _MAX_FLASH_HEAD_DIM
    plain = not rule.dropout and rule.softcap is None and rule.sinks is None
    return "varlen" if fits and plain else "segments"


def _segments(q: Tensor, k: Tensor, v: Tensor, packed: Packed, rule: Rule) -> Tensor:
    if torch.compiler.is_compiling() and packed.lengths is not None and not rule.dropout:
        return in_a_graph(q, k, v, packed.lengths, rule)
    return _loop(q, k, v, packed, rule)


# lengths differ in every row: traced, each row would recompile
@torch.compiler.disable
def _loop(q: Tensor, k: Tensor, v: Tensor, packed: Packed, rule: Rule) -> Tensor:
    return by_segment(q, k, v, list(packed.segment_lengths), packed.masks, rule)


def _document_mask(q: Tensor, k: Tensor, v: Tensor, packed: Packed, rule: Rule) -> Tensor:
    length, borders = q.shape[2], packed.cu_seqlens
    mask = kept(packed.masks, length, rule.window, rule, lambda n, w: _documents(borders, n, w))
    return masked(q, k, v, mask, rule).transpose(1, 2).contiguous()


def _documents(borders: Tensor, length: int, window: int | None) -> Tensor:  # [T, T] bool
    positions = torch.arange(length, device=borders.device)
    # [T], equal within a segment
    document = torch.searchsorted(borders.to(torch.int64), positions, right=True)
    return band(length, window, borders.device) & (document[:, None] == document[None, :])


def _varlen(q: Tensor, k: Tensor, v: Tensor, packed: Packed, rule: Rule) -> Tensor:
    refuse_sinks("varlen", rule)
    refuse("varlen", dropout=rule.dropout, softcap=rule.softcap)
    options: dict[str, Any] = {"scale": rule.scale, "window_size": left_right(rule.window)}
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and not packed.grouped:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    elif groups > 1 and _VARLEN_ASKS:
        options["enable_gqa"] = True
    borders, longest = packed.cu_seqlens, packed.max_seqlen
    output = varlen_attn(_flat(q), _flat(k), _flat(v), borders, borders, longest, longest, **options)
    assert isinstance(output, Tensor)  # a tuple only when auxiliary outputs are asked for
    return output.unsqueeze(0)


def takes_grouped_heads(device: torch.device) -> bool:
    """Whether torch's varlen kernels on this GPU take fewer key and value heads than query heads and mean the
    right ones.

    Tried once a process and GPU by a call of 64 tokens, forward and backward, beside the same call with
    repeated heads; a dictionary afterwards, which a trace reads as a constant. Repeating costs 7 kernels and,
    at 8,192 tokens of a Qwen3-0.6B, 370 MB a layer. True on other devices, whose backends all take grouped
    heads.

    The two ways may round the sums over a group's gradients differently, so a run must not change between
    them (law 12). It does not: the answer depends on torch's version and the kind of GPU alone, for
    nothing is timed and no free memory is asked, and want of memory is an error and no answer. Every rank and
    every resume on the same kind of machine, which is what law 6 promises for, finds the same. Raises
    ModelError while a CUDA graph is captured, where nothing can be tried.
    """
    if device.type != "cuda":
        return True
    known = _grouped.get(device.index)
    return known if known is not None else _try_grouped_heads(device)


@torch.compiler.disable
def _try_grouped_heads(device: torch.device) -> bool:
    with torch.inference_mode(False), torch.enable_grad():
        q, k, v, up = (waves(heads, step, device) for heads, step in ((4, 0.7), (2, 1.1), (2, 1.9), (4, 2.3)))
        if isinstance(q, FakeTensor):
            return True  # a rehearsal has shapes and no values: nothing was tried, so nothing is remembered
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            wrong = "cannot be tried while a CUDA graph is captured"
            raise ModelError(
                describe("attention: grouped heads", wrong, todo="run one forward pass before the capture")
            )
        why = _difference([x.requires_grad_() for x in (q, k, v)], up)
    if why:
        wrong = f"torch {torch.__version__} is given repeated key and value heads on {device}, because {why}"
        warnings.warn(describe("attention", wrong), stacklevel=2)
    _grouped[device.index] = not why
    return not why


def _difference(inputs: list[Tensor], up: Tensor) -> str:
    """What is wrong with the results of grouped heads beside those of repeated ones; nothing where varlen
    itself does not run.

    Two documents and a tail of empty ones, 5 keys seen: borders, window and the tail all matter.
    """
    borders = torch.tensor([0, 40, 64, 64, 64], dtype=torch.int32, device=up.device)
    found: list[list[Tensor]] = []
    q, k, v = inputs
    for grouped in (False, True):
        try:
            output = _varlen(q, k, v, Packed(borders, (40, 24), 64, "varlen", grouped), Rule(0.125, window=5))
            found.append([output.detach(), *torch.autograd.grad(output, inputs, up.transpose(1, 2))])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            # Without grouped heads it is no matter of groups: the first layer that needs varlen will say so
            # itself.
            first_line = str(error).partition("\n")[0] or type(error).__name__
            return f"grouped ones fail: {first_line}" if grouped else ""
    return "" if all(map(alike, *found)) else "grouped ones give other results"


# [1, heads, 64, width] bf16
def waves(heads: int, step: float, device: torch.device, width: int = 64) -> Tensor:
    """Numbers that differ from head to head, without drawing any: the random streams are state."""
    flat = torch.arange(heads * 64 * width, device=device).mul(step).sin()
    return flat.view(1, heads, 64, width).to(torch.bfloat16)


def alike(a: Tensor, b: Tensor, bound: float = 2**-6) -> bool:
    """Equal within bf16, whose step is 2⁻⁸: a head too many or the wrong one differs by about its own size.
    NaN never is."""
    a, b = a.float(), b.float()
    return a.shape == b.shape and bool((a - b).abs().max() <= b.abs().max() * bound)


def _flash(name: str) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, packed: Packed, rule: Rule) -> Tensor:
        refuse_sinks(name, rule)
        has = packed.flash
        if has is None:
            has = flash.kernels(name, flash.major_of(q.device))
        borders, longest = packed.cu_seqlens, packed.max_seqlen
        return flash.run(has, _flat(q), _flat(k), _flat(v), borders, longest, rule).unsqueeze(0)

    return run


def _flat(x: Tensor) -> Tensor:
    """[1, A, T, D] → [T, A, D], the layout of the varlen kernels."""
    return x.transpose(1, 2).squeeze(0).contiguous()


_RUN: dict[str, Callable[..., Tensor]] = {
    "segments": _segments,
    "mask": _document_mask,
    "varlen": _varlen,
    **{name: _flash(name) for name in flash.PACKAGES},
}
