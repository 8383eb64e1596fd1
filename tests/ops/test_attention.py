"""Packed attention against a loop over queries in float64."""

import sys
import types
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from repsft_fast.errors import ModelError
from repsft_fast.ops import attention, attention_choice, flash
from repsft_fast.ops.attention import Packed, Rule, packed_attention

LENGTHS = (1, 7, 7, 19, 2)
TOTAL = sum(LENGTHS)
HEADS, DIM = 4, 8
BACKENDS = ("segments", "mask")


class Layer(nn.Module):
    is_causal = True
    num_key_value_groups = 2


def packed(backend="segments", tail=2, lengths=LENGTHS):
    borders = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    cu = torch.tensor(borders + [sum(lengths)] * tail, dtype=torch.int32)
    return Packed(cu, tuple(lengths), max(lengths) + 3, backend)


def inputs(kv_heads=2, dtype=torch.float64, value_dim=DIM, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, DIM), (kv_heads, DIM), (kv_heads, value_dim))
    return [
        torch.randn(1, a, TOTAL, d, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
        for a, d in shapes
    ]


def by_hand(q, k, v, scale, window=None, softcap=None):
    """[1, T, A, D_v]: one query at a time, straight from the definition."""
    groups = q.shape[1] // k.shape[1]
    output = torch.zeros(1, TOTAL, q.shape[1], v.shape[-1], dtype=q.dtype)
    rows = []
    for first, end in pairwise(packed(tail=0).cu_seqlens.tolist()):
        for i in range(first, end):
            start = first if window is None else max(first, i - window + 1)
            heads = []
            for a in range(q.shape[1]):
                scores = (k[0, a // groups, start : i + 1] @ q[0, a, i]) * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                heads.append(scores.softmax(0) @ v[0, a // groups, start : i + 1])
            rows.append(torch.stack(heads))
    output = torch.stack(rows)[None]
    return output


def call(tensors, where, **options):
    return packed_attention(Layer(), *tensors, None, packed=where, **options)[0]


def gradients(output, tensors):
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(
        output.dtype
    )
    return torch.autograd.grad((output * weights).sum(), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 5}, {"sliding_window": 100}, {"softcap": 1.5}, {"scaling": 0.3}],
                         ids=str)  # fmt: skip
def test_output_and_gradients_are_those_of_the_definition(backend, kv_heads, options):
    tensors = inputs(kv_heads)
    scale = options.get("scaling") or DIM**-0.5
    expected = by_hand(*tensors, scale, options.get("sliding_window"), options.get("softcap"))
    output = call(tensors, packed(backend), **options)
    assert output.shape == (1, TOTAL, HEADS, DIM)
    assert output.is_contiguous()
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for got, want in zip(gradients(output, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_value_heads_may_have_another_size(backend):
    tensors = inputs(value_dim=6)
    torch.testing.assert_close(
        call(tensors, packed(backend)), by_hand(*tensors, DIM**-0.5), rtol=0, atol=5e-15
    )


@pytest.mark.parametrize("window", [None, 5])
def test_fp32_error_is_that_of_plain_torch(window):
    """Law 3's bound: RMS error against float64 at most 1.5 times that of the masked SDPA in fp32, plus a
    floor."""
    exact = inputs()
    truth = by_hand(*exact, DIM**-0.5, window)
    single = [x.detach().float().requires_grad_() for x in exact]
    errors = [
        (call(single, packed(b), sliding_window=window).double() - truth).square().mean().sqrt()
        for b in BACKENDS
    ]
    assert errors[0] <= 1.5 * errors[1] + 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_document_sees_another_bit_for_bit(backend):
    tensors = inputs(dtype=torch.float32)
    before = call(tensors, packed(backend))
    first, end = 8, 15  # the third document
    changed = [x.detach().clone() for x in tensors]
    for x in changed:
        x[:, :, :first] += 1
        x[:, :, end:] -= 1
    assert torch.equal(call(changed, packed(backend))[:, first:end], before[:, first:end])
    assert not torch.equal(call(changed, packed(backend))[:, :first], before[:, :first])


def test_without_packed_it_is_transformers_own_sdpa():
    """Generation: one query against a cache of keys, and a padded batch under a mask."""
    tensors = inputs()
    query = tensors[0][:, :, -1:]
    expected = by_hand(*tensors, DIM**-0.5)  # the last document only, so compare with one document instead
    output = packed_attention(Layer(), query, tensors[1], tensors[2], None)[0]
    k, v = (x.repeat_interleave(2, dim=1) for x in tensors[1:])
    scores = (query @ k.transpose(-1, -2) * DIM**-0.5).softmax(-1)
    torch.testing.assert_close(output, (scores @ v).transpose(1, 2), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(output[:, -1], expected[:, -1])
    mask = torch.ones(1, 1, 1, TOTAL, dtype=torch.bool)
    mask[..., :10] = False
    masked = packed_attention(Layer(), query, tensors[1], tensors[2], mask)[0]
    without = packed_attention(Layer(), query, tensors[1][:, :, 10:], tensors[2][:, :, 10:], None)[0]
    torch.testing.assert_close(masked, without, rtol=1e-12, atol=1e-12)


class TestFlashKernels:
    """The kernels need a GPU; here a stand-in with their documented meaning checks what they are handed."""

    @staticmethod
    # [T, A, D]; window_left keys left of the query, -1 = all
    def kernel(q, k, v, borders, window_left, scale):
        assert q.is_contiguous()
        assert q.shape == (TOTAL, HEADS, DIM)
        assert borders.dtype == torch.int32
        window = None if window_left < 0 else window_left + 1
        return by_hand(*(x.transpose(0, 1)[None] for x in (q, k, v)), scale, window)[0]

    @pytest.mark.parametrize("asks", [True, False], ids=["torch 2.12", "torch 2.11"])
    @pytest.mark.parametrize("grouped", [True, False])
    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    @pytest.mark.parametrize("window", [None, 5])
    def test_varlen(self, monkeypatch, asks, grouped, kv_heads, window):
        def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), **more):
            assert more == ({"enable_gqa": True} if asks and grouped and kv_heads < HEADS else {})
            assert k.shape[1] == v.shape[1] == (kv_heads if grouped else HEADS)
            assert max_q == max_k == max(LENGTHS) + 3
            assert window_size[1] == 0, "not causal"
            return self.kernel(q, k, v, cu_q, window_size[0], scale)

        monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
        monkeypatch.setattr(attention, "_VARLEN_ASKS", asks)
        tensors = inputs(kv_heads)
        output = call(tensors, replace(packed("varlen"), grouped=grouped), sliding_window=window)
        torch.testing.assert_close(output, by_hand(*tensors, DIM**-0.5, window), rtol=0, atol=5e-15)

    @pytest.mark.parametrize("window", [None, 5])
    def test_flash_attn(self, monkeypatch, window):
        def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None,
                                   causal=False, window_size=(-1, -1), deterministic=False):  # fmt: skip
            assert causal
            return self.kernel(q, k, v, cu_seqlens_q, window_size[0], softmax_scale), None

        module = types.ModuleType("flash_attn_interface")
        module.flash_attn_varlen_func = flash_attn_varlen_func
        monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
        flash.kernels.cache_clear()
        tensors = inputs()
        output = call(tensors, packed("flash3"), sliding_window=window)
        torch.testing.assert_close(output, by_hand(*tensors, DIM**-0.5, window), rtol=0, atol=5e-15)
        with pytest.raises(ModelError, match=r"flash3 does not compute attention with softcap 30.0"):
            call(tensors, packed("flash3"), softcap=30.0)
        flash.kernels.cache_clear()

    def test_the_signature_of_torchs_varlen_is_the_one_used(self):
        import inspect

        from torch.nn.attention.varlen import varlen_attn

        parameters = list(inspect.signature(varlen_attn).parameters)
        assert parameters[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
        assert {"scale", "window_size"} <= set(parameters)

    @pytest.mark.gpu
    @pytest.mark.parametrize("window", [None, 5])
    @pytest.mark.parametrize("kv_heads", [1, 4])
    def test_varlen_on_the_device(self, window, kv_heads):
        exact = inputs(kv_heads)
        truth = by_hand(*exact, DIM**-0.5, window)
        half = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in exact]
        where = packed()
        errors = []
        for backend in ("varlen", "mask"):
            there = Packed(where.cu_seqlens.cuda(), where.segment_lengths, where.max_seqlen, backend)
            output = call(half, there, sliding_window=window)
            errors.append((output.double().cpu() - truth).square().mean().sqrt())
        assert errors[0] <= 1.5 * errors[1] + 1e-4


def test_the_choice_by_device_and_type():
    def chosen(device, dtype, dim=64, value_dim=None, rule=None, **options):
        tensors = [torch.empty(1, 2, 3, d, dtype=dtype, device="meta") for d in (dim, value_dim or dim)]

        class On:  # a tensor that says it lives on `device`
            def __init__(self, tensor):
                self.dtype, self.shape, self.device = tensor.dtype, tensor.shape, torch.device(device)
                self.is_cuda = device == "cuda"

        return attention.choose(*map(On, tensors), rule or Rule(1.0), **options)

    assert chosen("cpu", torch.bfloat16) == "segments"
    assert chosen("cuda", torch.bfloat16) == "varlen"
    assert chosen("cuda", torch.bfloat16, only_sdpa=True) == "segments"
    assert chosen("cuda", torch.float32) == "segments"
    assert chosen("cuda", torch.bfloat16, dim=192, value_dim=128) == "segments"
    assert chosen("cuda", torch.bfloat16, dim=320) == "segments"
    assert chosen("cuda", torch.bfloat16, rule=Rule(1.0, dropout=0.1)) == "segments"
    assert chosen("cuda", torch.bfloat16, rule=Rule(1.0, softcap=30.0)) == "segments"
    assert chosen("mps", torch.float16) == "mask"


class TestRefusals:
    def test_unknown_backend(self):
        with pytest.raises(
            ModelError, match=r"model.attention: is not known, expected one of auto, .*, got eager"
        ):
            attention_choice.check_backend("eager")

    def test_flash_that_is_not_installed(self, monkeypatch):
        monkeypatch.setattr(flash, "importable", lambda name: False)
        with pytest.raises(
            ModelError, match=r"flash2 needs the module flash_attn, .* install it or choose varlen"
        ):
            attention_choice.check_backend("flash2")

    def test_what_no_backend_adds(self):
        with pytest.raises(ModelError, match="Layer passes position_bias"):
            call(inputs(), packed(), position_bias=torch.zeros(1))

    def test_a_bidirectional_layer(self):
        with pytest.raises(ModelError, match="is not causal"):
            call(inputs(), packed(), is_causal=False)

    def test_varlen_with_dropout(self):
        with pytest.raises(
            ModelError, match=r"varlen does not compute attention with dropout 0.1; choose sdpa"
        ):
            call(inputs(), packed("varlen"), dropout=0.1)
