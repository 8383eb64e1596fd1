"""Attention sinks in packed rows: against the definition, against gpt-oss, and who refuses them."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig

from repsft_fast.errors import ModelError
from repsft_fast.models import load_model
from repsft_fast.ops import attention
from repsft_fast.ops.attention import Packed, packed_attention
from repsft_fast.ops.scores import Rule
from tests.helpers import tiny

LENGTHS = (1, 5, 9, 2)
TOTAL = sum(LENGTHS)
HEADS, GROUPS = 4, 2


class Layer(nn.Module):
    is_causal = True


def packed(backend: str) -> Packed:
    borders = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist(), TOTAL], dtype=torch.int32)
    return Packed(borders, LENGTHS, max(LENGTHS), backend)


def inputs() -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(1, HEADS, TOTAL, 8), (1, HEADS // GROUPS, TOTAL, 8), (1, HEADS // GROUPS, TOTAL, 6), (HEADS,)]
    return [(2 * torch.randn(shape, dtype=torch.float64)).requires_grad_() for shape in shapes]


def by_definition(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, scale: float, window, softcap) -> Tensor:
    """[1, T, A, D_v], one query at a time: the sink takes its part of the softmax and adds nothing."""
    rows = []
    for first, end in pairwise(packed("mask").cu_seqlens.tolist()):
        for i in range(first, end):
            start = first if window is None else max(first, i - window + 1)
            heads = []
            for a in range(HEADS):
                scores = (k[0, a // GROUPS, start : i + 1] @ q[0, a, i]) * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = torch.cat([scores, sinks[a : a + 1]]).softmax(0)[:-1]
                heads.append(weights @ v[0, a // GROUPS, start : i + 1])
            rows.append(torch.stack(heads))
    return torch.stack(rows)[None]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "segments", "mask"])
def test_outputs_and_every_gradient(backend, window, softcap):
    tensors = inputs()
    options = {"scaling": 0.4, "sliding_window": window, "softcap": softcap}
    output = packed_attention(
        Layer(), *tensors[:3], None, packed=packed(backend), s_aux=tensors[3], **options
    )[0]
    truth = by_definition(*tensors, 0.4, window, softcap)
    assert (output - truth).abs().max() < 1e-14
    up = torch.randn_like(truth)
    got, expected = torch.autograd.grad(output, tensors, up), torch.autograd.grad(truth, tensors, up)
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-13 * theirs.abs().max()


@pytest.mark.parametrize("backend", ["segments", "mask"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_dropout_leaves_the_mean(backend, softcap):
    """Of the keys alone: the sink's value is zero, dropped or not."""
    tensors = [x.detach() for x in inputs()]
    options = {"scaling": 0.4, "s_aux": tensors[3], "packed": packed(backend), "softcap": softcap}
    exact = packed_attention(Layer(), *tensors[:3], None, **options)[0]
    draws = [packed_attention(Layer(), *tensors[:3], None, dropout=0.3, **options)[0] for _ in range(3000)]
    assert not torch.equal(draws[0], draws[1])
    assert (torch.stack(draws).mean(0) - exact).abs().max() < 0.3


@pytest.mark.parametrize("backend", ["segments", "mask"])
def test_half_precision_with_fp32_sinks(backend):
    exact = by_definition(*inputs(), 0.4, None, None)
    tensors = [x.detach().bfloat16() for x in inputs()[:3]]
    sinks = inputs()[3].detach().float().requires_grad_()
    output = packed_attention(Layer(), *tensors, None, packed=packed(backend), scaling=0.4, s_aux=sinks)[0]
    assert output.dtype == torch.bfloat16
    assert (output - exact).abs().max() < 0.05
    output.sum().backward()
    assert sinks.grad.dtype == torch.float32
    assert sinks.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["varlen", "flash2", "flash3", "flash4"])
def test_flash_kernels_refuse(backend):
    q, k, v, sinks = inputs()
    with pytest.raises(ModelError, match=rf"{backend} does not compute attention sinks .*; choose auto"):
        packed_attention(Layer(), q, k, v, None, packed=packed(backend), s_aux=sinks)


@pytest.mark.parametrize("size", [1, HEADS // GROUPS])
def test_sinks_that_are_not_one_a_head(size):
    q, k, v, _ = inputs()
    with pytest.raises(
        ModelError, match=rf"Layer passes attention sinks .*expected \({HEADS},\).*got \({size},\)"
    ):
        packed_attention(
            Layer(), q, k, v, None, packed=packed("auto"), s_aux=torch.zeros(size, dtype=torch.float64)
        )


def test_auto_never_takes_varlen_on_a_gpu():
    class OnGpu:
        device, dtype, shape, is_cuda = torch.device("cuda"), torch.bfloat16, (1, 4, 8, 64), True

    assert attention.choose(OnGpu(), OnGpu(), Rule(1.0)) == "varlen"
    assert attention.choose(OnGpu(), OnGpu(), Rule(1.0, sinks=torch.zeros(4))) == "segments"


@pytest.mark.parametrize("backend", ["auto", "mask"])
def test_gpt_oss_in_one_row_as_each_document_alone(backend):
    """A sliding and a full layer, grouped heads, experts, padding: loss and every gradient, the sinks' among
    them."""
    kinds = ["sliding_attention", "full_attention"]
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "head_dim": 8,
    }
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    config = GptOssConfig(
        **sizes,
        **heads,
        sliding_window=6,
        layer_types=kinds,
        pad_token_id=0,
        eos_token_id=2,
        initializer_range=0.2,
    )
    config._experts_implementation = "eager"  # the grouped product has no fp64
    torch.manual_seed(0)
    model = load_model(config, attention=backend, param_dtype=torch.float64)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager").train()
    plain.load_state_dict(model.state_dict())
    documents = tiny.documents((5, 13, 4))
    loss, _ = model.loss(tiny.row(documents, denominator=4.0, length=24))
    loss.backward()
    for document in documents:
        ids = torch.tensor([document])
        logits = plain(input_ids=ids[:, :-1], use_cache=False).logits[0]
        (nn.functional.cross_entropy(logits, ids[0, 1:]) / 4).backward()
    expected = dict(plain.named_parameters())
    largest = max(p.grad.abs().max() for p in expected.values())
    sinks = [name for name in expected if name.endswith("sinks")]
    assert len(sinks) == 2
    assert all(expected[name].grad.abs().min() > 0 for name in sinks)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name].grad).abs().max() < 1e-7 * largest, name


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("as_numbers", [False, True])
def test_without_packed_under_transformers_own_mask(softcap, as_numbers):
    """Plain forward calls: sdpa alone would leave the sinks out in silence."""
    tensors = [x.detach() for x in inputs()]
    documents = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    mask = (documents[:, None] == documents[None, :]).tril()[None, None]
    if as_numbers:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    output = packed_attention(Layer(), *tensors[:3], mask, scaling=0.4, softcap=softcap, s_aux=tensors[3])[0]
    assert (output - by_definition(*tensors, 0.4, None, softcap)).abs().max() < 1e-14


def test_generation_with_a_cache_as_gpt_oss_by_eager():
    config = GptOssConfig(
        vocab_size=97, hidden_size=32, intermediate_size=16, num_hidden_layers=2, head_dim=8, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, sliding_window=6, initializer_range=0.2,
        layer_types=["sliding_attention", "full_attention"], pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = load_model(config, param_dtype=torch.float32).eval()
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    plain.load_state_dict(model.state_dict())
    prompts = torch.tensor([tiny.documents((11,))[0], [0, 0, 0, *tiny.documents((8,), seed=1)[0]]])
    options = {"attention_mask": (prompts != 0).long(), "max_new_tokens": 12, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    ours, theirs = model.generate(prompts, **options), plain.generate(prompts, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=0, atol=1e-5)
