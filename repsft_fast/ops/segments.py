"""One causal SDPA per segment of a row, and the operator that stands for it in a compiled layer's graph.

The loop over segments is another one in every row: traced, each row would be compiled anew, and a break would
cut every layer in pieces. So a graph holds one operator, `repsft::segments`, which takes the lengths as a
tensor of the host's, of one size in all rows (`lengths_of`), and reads them when it runs. Nothing waits for
the device, and the numbers are the loop's own: it is the loop that runs.

Its backward is an operator too, and computes the attention again, under autograd, before it goes backward
through it. Between the two a layer keeps q, k and v and none of what lies between the scores and the output,
which for a soft-cap or sinks is several times A·n² numbers a segment. The price is one more forward pass of
the attention: 29 to 54 % of a plain pass forward and backward on a CPU, of a pass with sinks up to 73 %.

Dropout stays outside: random numbers that are drawn again would be others.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from repsft_fast.ops.scores import Rule, band, masked, sdpa

# masks of one row by length, window and type (None: bool)
Masks = dict[tuple[int, int | None, torch.dtype | None], Tensor]

# graded: whether q, k, v and sinks need a gradient. SDPA takes its kernel by that, and is asked alike here.
_GIVEN = (
    "Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor? sinks, float scale, int? window, float? softcap,"
    " bool[] graded"
)
# It takes its kernel by the layout in memory too.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_LIBRARY = torch.library.Library("repsft", "DEF")
_LIBRARY.define(f"segments({_GIVEN}) -> Tensor", tags=_TAGS)
_LIBRARY.define(f"segments_backward(Tensor up, {_GIVEN}) -> (Tensor, Tensor, Tensor, Tensor)", tags=_TAGS)


def lengths_of(segments: Sequence[int], size: int) -> Tensor:
    """[size] int32 on the host, more where there are more segments: their lengths, then zeros."""
    if not segments:  # of a static row; made inside a capture, which is to read nothing from outside
        return torch.zeros(size, dtype=torch.int32, device="cpu")
    return torch.tensor([*segments, *[0] * (size - len(segments))], dtype=torch.int32, device="cpu")


def by_segment(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], masks: Masks, rule: Rule) -> Tensor:
    """[1, T, A, D_v] contiguous of q [1, A, T, D], k [1, A_kv, T, D], v [1, A_kv, T, D_v]; lengths sum to T.

    One call per segment. `split` rather than slices: its backward writes each gradient once, not S times T
    zeros. Calls of equal length are not batched: the copies into one batch cost more than the calls they
    save.
    """
    parts = zip(q.split(lengths, dim=2), k.split(lengths, dim=2), v.split(lengths, dim=2), strict=True)
    return torch.cat([_one(a, b, c, masks, rule).transpose(1, 2) for a, b, c in parts], dim=1)


# [1, A, n, D_v]
def _one(q: Tensor, k: Tensor, v: Tensor, masks: Masks, rule: Rule) -> Tensor:
    length = q.shape[2]
    plain = rule.window is None or length <= rule.window
    if plain and rule.softcap is None and rule.sinks is None:
        return sdpa(q, k, v, None, rule)
    mask = kept(masks, length, None if plain else rule.window, rule, lambda n, w: band(n, w, q.device))
    return masked(q, k, v, mask, rule)


def kept(
    masks: Masks,
    length: int,
    window: int | None,
    rule: Rule,
    make: Callable[[int, int | None], Tensor],
) -> Tensor:
    """The row's mask of this kind, [n, n] bool, or what is added to scores where sinks stand beside them.
    What is made inside a compiled layer stays there, and is made in each."""
    added = rule.sinks.dtype if rule.sinks is not None and rule.softcap is None else None
    known = None if torch.compiler.is_compiling() else masks.get((length, window, added))
    if known is not None:
        return known
    mask = make(length, window)
    if added is not None:
        mask = torch.zeros_like(mask, dtype=added).masked_fill(~mask, float("-inf"))
    if not torch.compiler.is_compiling():
        masks[length, window, added] = mask
    return mask


def in_a_graph(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, rule: Rule) -> Tensor:
    """`by_segment` for a layer that is being traced. lengths: `lengths_of` the row; no dropout.

    RuntimeError, of torch's, when it runs with lengths that do not sum to T: those of a static row are
    zeros.
    """
    on = torch.is_grad_enabled()
    graded = [on and x is not None and x.requires_grad for x in (q, k, v, rule.sinks)]
    found: Tensor = torch.ops.repsft.segments(
        q, k, v, lengths, rule.sinks, rule.scale, rule.window, rule.softcap, graded
    )
    return found


def _forward(*given: Any) -> Tensor:
    """given: as in `_GIVEN`."""
    with torch.set_grad_enabled(any(given[-1])), _autograd():
        return _computed(*given)[1].detach()


def _backward(up: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and sinks, empty where none is needed. up: [1, T, A, D_v]."""
    with torch.enable_grad(), _autograd():
        inputs, output = _computed(*given)
        asked = [x for x in inputs if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(output, asked, up))
    return tuple(next(found) if wanted else up.new_empty(0) for wanted in given[-1])


def _autograd() -> Any:
    """Autograd as it is outside of an operator, where torch shuts it off. So it is too where a mode of
    torch's looks on, as the compiler does at an operator's first call."""
    shut = torch._C._dispatch_tls_local_exclude_set() - _keys()
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), shut)


@functools.cache
def _keys() -> Any:
    names = "AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"
    each = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names)
    return functools.reduce(operator.or_, each)


def _computed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    graded: Sequence[bool],
) -> tuple[list[Tensor | None], Tensor]:
    """(q, k, v and sinks as leaves, the attention computed of them). The row's masks live as long as its
    lengths, which the backward of every layer holds."""
    leaves: list[Any] = [
        None if x is None else x.detach().requires_grad_(wanted)
        for x, wanted in zip((q, k, v, sinks), graded, strict=True)
    ]
    masks: Masks = lengths.__dict__.setdefault("masks", {})
    q, k, v, sinks = leaves
    rule = Rule(scale, window, softcap, sinks=sinks)
    return leaves, by_segment(q, k, v, [n for n in lengths.tolist() if n], masks, rule)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])


def _fake_backward(
    up: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, sinks: Any, *rule: Any
) -> Any:
    wanted = zip((q, k, v, sinks), rule[-1], strict=True)
    return tuple(x.new_empty(x.shape) if graded else q.new_empty(0) for x, graded in wanted)


def _keep(ctx: Any, inputs: Any, output: Tensor) -> None:
    *tensors, ctx.scale, ctx.window, ctx.softcap, ctx.graded = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, up: Tensor) -> Any:
    rule = ctx.scale, ctx.window, ctx.softcap, ctx.graded
    found = torch.ops.repsft.segments_backward(up, *ctx.saved_tensors, *rule)
    q, k, v, sinks = (x if wanted else None for x, wanted in zip(found, ctx.graded, strict=True))
    return q, k, v, None, sinks, None, None, None, None


_LIBRARY.impl("segments", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("segments_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("repsft::segments", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("repsft::segments_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd("repsft::segments", _differentiate, setup_context=_keep, lib=_LIBRARY)
