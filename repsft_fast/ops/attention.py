"""Causal attention inside the segments of a packed row: no query sees a key of another document.

With segment borders c_0 = 0 < c_1 < … < c_S = T, position i of segment s attends to the keys j with
c_s ≤ j ≤ i and, in a sliding-window layer of width W, i − j < W.

One attention function, "repsft", is registered with transformers. It reads the keyword `packed`, which the
model's forward passes through to every layer. Without `packed` (generation, plain Hugging Face use) it *is*
transformers' own sdpa, mask and cache included, so the model that trains is the model that generates; only
sinks and soft-caps, which sdpa leaves out or refuses, are computed here then too.

Four ways to compute the same thing, chosen by device and type or by setting:

    varlen     torch.nn.attention.varlen (FlashAttention inside torch): CUDA, half precision, head dims ≤ 256
    flash2/3/4 the flash-attn packages, when importable and asked for
    segments   one causal SDPA per segment: any device, the CPU's best (its flash kernel, no mask, no wasted
               block)
    mask       one SDPA under a document mask [T, T]: any device, quadratic in the row

"sdpa" stands for segments on CPU and CUDA and for mask elsewhere.

A layer with attention sinks (gpt-oss) weighs one more key, the same for every query of a head: its score is a
learned number and its value zero. Only segments and mask compute it, so "auto" and "sdpa" stand for them in
such a layer.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from repsft_fast.errors import ModelError, describe
from repsft_fast.ops.scores import Rule, band, masked, sdpa, sinks_of, unpacked
from repsft_fast.row import Row

NAME = "repsft"
BACKENDS = ("auto", "varlen", "flash2", "flash3", "flash4", "sdpa", "segments", "mask")
_FLASH_MODULES = {"flash2": "flash_attn", "flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}
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
_HALF = (torch.float16, torch.bfloat16)
_MAX_FLASH_HEAD_DIM = 256
# From 2.12 on torch refuses fewer key and value heads unless it is told; 2.11 hands them to the same kernels
# unasked.
_VARLEN_ASKS = "enable_gqa" in inspect.signature(varlen_attn).parameters
# by the index of the GPU: what `takes_grouped_heads` found, once a process
_grouped: dict[int | None, bool] = {}


@dataclass(frozen=True)
class Packed:
    """Where the segments of a row lie, on the device for kernels and on the host for loops over segments."""

    cu_seqlens: Tensor  # [S'+1] int32, segment borders, the tail repeats T
    segment_lengths: tuple[int, ...]  # host; sums to T
    max_seqlen: int  # host; bound on the longest segment
    backend: str = "auto"  # one of BACKENDS
    # of varlen: it is given the key and value heads there are; False = one for every query head
    grouped: bool = True

    @staticmethod
    def of(row: Row, backend: str = "auto") -> Packed:
        """Called once a forward pass, outside the layers and their graphs: what has to be tried is tried
        here."""
        grouped = backend not in ("auto", "varlen") or takes_grouped_heads(row.cu_seqlens.device)
        return Packed(row.cu_seqlens, row.segment_lengths, row.max_seqlen, backend, grouped)


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


def own_attention(backend: str) -> str | None:
    """transformers' name of an attention for rows of one document; None = what it takes by itself. ModelError
    without one."""
    names = {"auto": None, "sdpa": "sdpa", "flash2": "flash_attention_2", "flash3": "flash_attention_3"}
    if backend not in names:
        expected = f"{', '.join(names)} with batch.pack: false"
        raise ModelError(describe("model.attention", "needs packed rows", expected=expected, got=backend))
    return names[backend]


def check_backend(backend: str) -> str:
    """`backend` if it can be used here, else ModelError saying what is missing."""
    if backend not in BACKENDS:
        raise ModelError(
            describe("model.attention", "is not known", expected=f"one of {', '.join(BACKENDS)}", got=backend)
        )
    module = _FLASH_MODULES.get(backend)
    if module is not None and not _importable(module):
        wrong = f"{backend} needs the module {module}, which cannot be imported"
        raise ModelError(describe("model.attention", wrong, todo="install it or choose varlen"))
    return backend


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
    if backend in ("auto", "sdpa"):
        backend = choose(query, value, rule, only_sdpa=backend == "sdpa")
    return _RUN[backend](query, key, value, packed, rule), None


def choose(query: Tensor, value: Tensor, rule: Rule, *, only_sdpa: bool = False) -> str:
    """The backend "auto" or "sdpa" stands for: varlen where torch's flash kernels can take the call, else
    SDPA."""
    if query.device.type not in ("cpu", "cuda"):
        return "mask"
    width = query.shape[-1]
    fits = query.dtype in _HALF and width == value.shape[-1] and width <= _MAX_FLASH_HEAD_DIM
    plain = not rule.dropout and rule.softcap is None and rule.sinks is None
    if query.is_cuda and fits and plain and not only_sdpa:
        return "varlen"
    return "segments"


def _segments(q: Tensor, k: Tensor, v: Tensor, packed: Packed, rule: Rule) -> Tensor:
    """One call per segment. `split` rather than slices: its backward writes each gradient once, not S times T
    zeros.

    Calls of equal length are not batched: the copies into one batch cost more than the calls they save.
    """
    lengths = list(packed.segment_lengths)
    parts = zip(q.split(lengths, dim=2), k.split(lengths, dim=2), v.split(lengths, dim=2), strict=True)
    return torch.cat([_one_segment(a, b, c, rule).transpose(1, 2) for a, b, c in parts], dim=1)


def _one_segment(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:  # [1, A, n, D_v]
    length = q.shape[2]
    if rule.softcap is None and (rule.window is None or length <= rule.window):
        return sdpa(q, k, v, None, rule)
    return masked(q, k, v, band(length, rule.window, q.device), rule)


def _document_mask(q: Tensor, k: Tensor, v: Tensor, packed: Packed, rule: Rule) -> Tensor:
    length = q.shape[2]
    positions = torch.arange(length, device=q.device)
    # [T], equal within a segment
    document = torch.searchsorted(packed.cu_seqlens.to(torch.int64), positions, right=True)
    mask = band(length, rule.window, q.device) & (document[:, None] == document[None, :])
    return masked(q, k, v, mask, rule).transpose(1, 2).contiguous()


def _varlen(q: Tensor, k: Tensor, v: Tensor, packed: Packed, rule: Rule) -> Tensor:
    _refuse_sinks("varlen", rule)
    _refuse("varlen", dropout=rule.dropout, softcap=rule.softcap)
    options: dict[str, Any] = {"scale": rule.scale, "window_size": _left_right(rule.window)}
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
        q, k, v, up = (
            _waves(heads, step, device) for heads, step in ((4, 0.7), (2, 1.1), (2, 1.9), (4, 2.3))
        )
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
    return "" if all(map(_alike, *found)) else "grouped ones give other results"


def _waves(heads: int, step: float, device: torch.device) -> Tensor:  # [1, heads, 64, 64] bf16
    """Numbers that differ from head to head, without drawing any: the random streams are state."""
    return (
        torch.arange(heads * 64 * 64, device=device).mul(step).sin().view(1, heads, 64, 64).to(torch.bfloat16)
    )


def _alike(a: Tensor, b: Tensor) -> bool:
    """Equal within bf16, whose step is 2⁻⁸: a head too many or the wrong one differs by about its own size.
    NaN never is."""
    a, b = a.float(), b.float()
    return a.shape == b.shape and bool((a - b).abs().max() <= b.abs().max() * 2**-6)


def _flash(name: str) -> Callable[..., Tensor]:
    """The varlen function of one flash-attn generation; their signatures differ, so only what they take is
    passed."""

    def run(q: Tensor, k: Tensor, v: Tensor, packed: Packed, rule: Rule) -> Tensor:
        _refuse_sinks(name, rule)
        attend, parameters = _flash_function(name)
        borders, longest = packed.cu_seqlens, packed.max_seqlen
        places = {
            "cu_seqlens_q": borders,
            "cu_seqlens_k": borders,
            "max_seqlen_q": longest,
            "max_seqlen_k": longest,
        }
        options: dict[str, Any] = {n: x for n, x in places.items() if n in parameters}
        if rule.window is not None:
            options["window_size"] = _left_right(rule.window)
        for keyword, wanted in (("softcap", rule.softcap), ("dropout_p", rule.dropout)):
            if wanted and keyword not in parameters:
                _refuse(name, **{keyword: wanted})
            if wanted:
                options[keyword] = wanted
        output = attend(_flat(q), _flat(k), _flat(v), softmax_scale=rule.scale, causal=True, **options)
        return (output[0] if isinstance(output, tuple) else output).unsqueeze(0)

    return run


@cache
def _flash_function(name: str) -> tuple[Callable[..., Any], frozenset[str]]:
    attend = importlib.import_module(_FLASH_MODULES[name]).flash_attn_varlen_func
    return attend, frozenset(inspect.signature(attend).parameters)


def _flat(x: Tensor) -> Tensor:
    """[1, A, T, D] → [T, A, D], the layout of the varlen kernels."""
    return x.transpose(1, 2).squeeze(0).contiguous()


def _left_right(window: int | None) -> tuple[int, int]:
    """The flash kernels count the keys *left of* the query; a window of W keys includes the query itself."""
    return (-1, 0) if window is None else (window - 1, 0)


def _refuse(backend: str, **unsupported: float | None) -> None:
    for name, value in unsupported.items():
        if value:
            wrong = f"{backend} does not compute attention with {name} {value}"
            raise ModelError(describe("model.attention", wrong, todo="choose sdpa"))


def _refuse_sinks(backend: str, rule: Rule) -> None:
    """Whatever the package: one that takes sinks is not known to give their gradient."""
    if rule.sinks is not None:
        wrong = f"{backend} does not compute attention sinks (s_aux)"
        raise ModelError(
            describe("model.attention", wrong, expected="auto, sdpa, segments or mask", todo="choose auto")
        )


@cache
def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a missing parent package
        return False


_RUN: dict[str, Callable[..., Tensor]] = {
    # lengths differ in every row: traced, each row would recompile
    "segments": torch.compiler.disable(_segments),
    "mask": _document_mask,
    "varlen": _varlen,
    **{name: _flash(name) for name in _FLASH_MODULES},
}
