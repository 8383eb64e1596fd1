"""Stand-ins for the flash-attn packages, by their documented meaning: plain torch on any device."""

import importlib.machinery
import sys
import types
from itertools import pairwise

import torch
from torch import Tensor

from repsft_fast.ops import flash


def attend(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, scale: float, left: int
) -> tuple[Tensor, Tensor]:
    """[T, A, D], [T, A_kv, D] twice → ([T, A, D], [A, T] logarithms of the sums); left: keys left of the query,
    −1 = all."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    outputs, sums = [], []
    for first, end in pairwise(borders.tolist()):
        at = slice(first, end)
        scores = torch.einsum("iad,jad->aij", q[at].float(), k[at].float()) * scale
        place = torch.arange(end - first)
        distance = place[:, None] - place[None, :]
        seen = (distance >= 0) & (distance <= left if left >= 0 else distance >= 0)
        scores = scores.masked_fill(~seen, float("-inf"))
        sums.append(scores.logsumexp(-1))
        outputs.append(torch.einsum("aij,jad->iad", scores.softmax(-1), v[at].float()))
    return torch.cat(outputs).to(q.dtype), torch.cat(sums, dim=1)


def gradients(
    q: Tensor, k: Tensor, v: Tensor, up: Tensor, borders: Tensor, scale: float, left: int
) -> list[Tensor]:
    """The three inputs', by hand: an operator's inside is not differentiated."""
    many, groups = q.shape[1], q.shape[1] // k.shape[1]
    wide = [x.float().repeat_interleave(many // x.shape[1], dim=1) for x in (q, k, v, up)]
    found = [torch.zeros_like(x) for x in wide[:3]]
    for first, end in pairwise(borders.tolist()):
        at = slice(first, end)
        a, b, c, u = (x[at] for x in wide)
        place = torch.arange(end - first)
        distance = place[:, None] - place[None, :]
        seen = (distance >= 0) & (distance <= left if left >= 0 else distance >= 0)
        scores = torch.einsum("iad,jad->aij", a, b) * scale
        p = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        dp = torch.einsum("iad,jad->aij", u, c)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
        for whole, part, one in zip(
            found, (ds, ds.transpose(1, 2), p.transpose(1, 2)), (b, a, u), strict=True
        ):
            whole[at] = torch.einsum("aij,jad->iad", part, one)
    summed = [found[0], *(x.view(len(x), -1, groups, x.shape[-1]).sum(2) for x in found[1:])]
    return [x.to(like.dtype) for x, like in zip(summed, (q, k, v), strict=True)]


class Calls(list):
    """What the packages were handed: one dictionary a call."""


def fa3(wrong=None, **lacks):
    """The module of FA3. wrong: what a broken build makes of its output. lacks: names of keywords it does not have."""
    calls = Calls()

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None,
                               causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False):  # fmt: skip
        assert (causal, window_size[1] in (0, -1)) == (True, True)
        calls.append({"deterministic": deterministic, "softcap": softcap, "window": window_size, "q": q})
        output = attend(q, k, v, cu_seqlens_q, softmax_scale, window_size[0])[0]
        return output if wrong is None else wrong(output)

    def older(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
              window_size=(-1, -1)):  # fmt: skip
        return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
                                      causal, window_size)  # fmt: skip

    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_varlen_func = older if lacks else flash_attn_varlen_func
    module.calls = calls
    return module


def fa4(inner=True):
    """The module of FA4, whose kernels no trace can see; inner: with the two functions below its public one."""
    module, calls = types.ModuleType("flash_attn.cute"), Calls()

    def forward(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
                window_size_left, window_size_right, softcap, return_lse):  # fmt: skip
        assert (causal, return_lse, window_size_right) == (True, True, 0)
        assert not torch.compiler.is_compiling(), "a trace looked inside"
        left = -1 if window_size_left is None else window_size_left
        calls.append({"window": left})
        return (*attend(q, k, v, cu_seqlens_q, softmax_scale, left), None, None, None)

    def backward(q, k, v, output, up, sums, softmax_scale, causal, softcap, *, window_size_left, window_size_right,
                 cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic):  # fmt: skip
        calls.append({"deterministic": deterministic})
        left = -1 if window_size_left is None else window_size_left
        return gradients(q, k, v, up, cu_seqlens_q, softmax_scale, left)

    def flash_attn_varlen_func(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
                               max_seqlen_k=None, softmax_scale=None, causal=False, window_size=(None, None),
                               softcap=0.0, deterministic=False):  # fmt: skip
        left = -1 if window_size[0] is None else window_size[0]
        calls.append({"window": left, "deterministic": deterministic})
        return attend(q, k, v, cu_seqlens_q, softmax_scale, left)

    module.flash_attn_varlen_func, module.calls = flash_attn_varlen_func, calls
    if inner:
        module.interface = types.SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward)
    return module


def install(monkeypatch, *modules):
    """They can be imported until the test ends, and no others."""
    names = {module.__name__ for module in modules}
    for module in modules:
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    if "flash_attn.cute" in names:
        monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setattr(flash, "importable", lambda name: flash.PACKAGES[name].module in names)
    flash.kernels.cache_clear()
    monkeypatch.setattr(flash, "kernels", flash.kernels.__wrapped__)
