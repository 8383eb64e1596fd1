"""Continuous batching on the weights that are trained: the replies of one-by-one generation, and nothing left
behind."""

from __future__ import annotations

import random
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from repsft_fast.errors import ModelError, TrainingError
from repsft_fast.evaluate import continuous
from repsft_fast.evaluate.asked import Request, Sampling
from repsft_fast.evaluate.continuous import Batching, serves
from repsft_fast.evaluate.generate import generate
from repsft_fast.evaluate.identity import check_engine
from repsft_fast.models.load import load_model
from tests.helpers import tiny

pytestmark = pytest.mark.skipif(not continuous.is_known(), reason="another transformers than it knows")
END = 2
PROMPTS = [tuple(ids) for ids in tiny.documents([5, 9, 3, 12, 30, 7, 1, 2] * 4)]


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {
        name: load_model(tiny.config(name)) for name in ("llama", "llama-tied", "qwen2", "qwen3", "olmo2")
    }


def ask(model, prompts=PROMPTS, sampling=None, on_reply=None, **changes):
    found = {}
    requests = [Request(n, 0, ids) for n, ids in enumerate(prompts)]
    sampling = sampling or Sampling(max_new_tokens=24, **changes)
    Batching(model).generate(
        requests,
        sampling,
        end_ids=[END],
        on_reply=on_reply or (lambda r, reply: found.setdefault(r.prompt, reply)),
    )
    return [found.get(n) for n in range(len(prompts))]


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen3", "olmo2"])
def test_greedy_replies_are_those_of_one_by_one_generation(models, name):
    model = models[name]
    alone = [generate(model, [ids], end_ids=[END], max_new_tokens=24)[0] for ids in PROMPTS]
    assert ask(model) == [replace(reply, entropy=None) for reply in alone]


def test_some_replies_end_by_themselves_and_some_do_not(models):
    assert {reply.finished for reply in ask(models["llama"])} == {True, False}


def test_replies_come_as_they_end(models):
    """The long first request is not waited for."""
    order = []
    ends = [reply.finished for reply in ask(models["llama"])]
    first = ends.index(False)
    prompts = [PROMPTS[first], PROMPTS[ends.index(True)]]
    ask(models["llama"], prompts, on_reply=lambda request, reply: order.append(request.prompt))
    assert order == [1, 0]


def test_a_list_of_sampled_requests_repeats_and_moves_with_the_seed(models):
    drawn = {"temperature": 0.8, "top_p": 0.9}
    first, again = (ask(models["llama"], seed=1, **drawn) for _ in range(2))
    other = ask(models["llama"], seed=2, **drawn)
    assert first == again
    assert first != other
    assert first != ask(models["llama"])


def test_one_token_is_drawn_from_the_nucleus_alone(models):
    """Of a thousand draws none outside, and each token about as often as its share of the nucleus."""
    model, count = models["llama"].eval(), 1000
    with torch.no_grad():
        p = (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.9).softmax(-1)
    model.train()
    order = p.argsort(descending=True)
    kept = order[: int((p[order].cumsum(0) < 0.5).sum()) + 1]
    share = p[kept] / p[kept].sum()
    replies = ask(model, [PROMPTS[0]] * count, Sampling(temperature=0.9, top_p=0.5, max_new_tokens=1))
    drawn = torch.tensor([reply.ids[0] for reply in replies])
    seen = (drawn[:, None] == kept[None]).sum(0).float()
    assert len(kept) > 2
    assert seen.sum() == count, "outside the nucleus"
    chi = ((seen - share * count) ** 2 / (share * count)).sum()
    assert chi < 2 * len(kept) + 20


def state(model):
    python, numpys = random.getstate(), np.random.get_state()
    return (
        [module.training for module in model.modules()],
        [c._attn_implementation for c in continuous.configs_of(model)],
        model.generation_config.to_dict(),
        sorted(vars(model)),
        python,
        numpys[1].tolist(),
        numpys[2],
        torch.get_rng_state().tolist(),
        [(name, p.requires_grad, p.detach().sum().item()) for name, p in model.named_parameters()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks), m.forward) for m in model.modules()],
        threading.active_count(),
        torch._dynamo.eval_frame._stance.stance,
        torch.is_grad_enabled(),
    )


class Stop(BaseException):
    """What a signal raises."""


def raising(error):
    def on_reply(request, reply):
        raise error

    return on_reply


@pytest.mark.parametrize("error", [None, ValueError("no"), KeyboardInterrupt(), Stop()], ids=repr)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_everything_is_left_as_it_was(models, error, temperature):
    model = models["qwen2"].train()
    model.model.layers[0].eval()  # a mode that is nobody's default
    model.generation_config = GenerationConfig(repetition_penalty=1.5, top_k=3)
    before = state(model)
    if error is None:
        ask(model, temperature=temperature)
    else:
        with pytest.raises(type(error)):
            ask(model, temperature=temperature, on_reply=raising(error))
    assert state(model) == before


def test_the_models_own_generation_settings_do_not_matter(models):
    model = models["llama"]
    plain = ask(model)
    model.generation_config = GenerationConfig(repetition_penalty=5.0, top_k=1, eos_token_id=5)
    try:
        assert ask(model) == plain
    finally:
        model.generation_config = GenerationConfig()


def test_an_error_of_the_scheduler_is_told(models, monkeypatch):
    def failing(*_, **__):
        raise RuntimeError("something deep inside\nand more")

    monkeypatch.setattr(continuous.paged, "_each", failing)
    model = models["llama"]
    before = state(model)
    with pytest.raises(
        TrainingError, match=r"engine batching: its scheduler failed \(something deep inside\)"
    ):
        ask(model)
    assert state(model) == before


def test_too_little_memory_is_told_before_anything_is_asked(models, monkeypatch):
    """transformers' own words are a ValueError without a way out."""
    monkeypatch.setattr(continuous, "HOST_SHARE", 1e-6)
    with pytest.raises(
        TrainingError, match=r"engine batching: memory does not hold its cache \(.*our own loop"
    ):
        ask(models["llama"])
    monkeypatch.setattr(continuous, "HOST_SHARE", 0.0)
    with pytest.raises(TrainingError, match=r"there is no memory for its cache, got \d.*bytes free"):
        ask(models["llama"])


def test_a_smaller_cache_takes_longer_and_answers_the_same(models, monkeypatch):
    """Two pages: requests wait, and are put off and begun again."""
    plain = ask(models["llama"])
    monkeypatch.setattr(continuous, "MOST_AT_ONCE", 2)
    assert ask(models["llama"]) == plain


def test_a_request_that_the_cache_can_never_hold_is_told(models, monkeypatch):
    whole = continuous._with_cache
    monkeypatch.setattr(continuous, "_with_cache", lambda *given: whole(*given[:3], 1))
    with pytest.raises(
        TrainingError, match=r"its cache holds 256 tokens, and a request may need more, expected 512"
    ):
        ask(models["llama"], sampling=Sampling(max_new_tokens=300))


def test_no_request_no_work(models):
    assert ask(models["llama"], []) == []


def test_no_room_no_tokens(models):
    found = ask(models["llama"], PROMPTS[:3], Sampling(max_new_tokens=0))
    assert [(reply.ids, reply.finished) for reply in found] == [([], False)] * 3


def test_an_empty_prompt_is_refused(models):
    with pytest.raises(ValueError, match="at least one token in each"):
        ask(models["llama"], [()])


def test_a_model_with_sliding_windows_is_refused():
    model = load_model(tiny.config("olmo3"))
    assert "sliding_attention" in serves(model)
    with pytest.raises(ModelError, match=r"engine batching: cannot serve .*our own loop"):
        Batching(model)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda m: setattr(m.config, "sliding_window", 8), "sliding window"),
        (lambda m: setattr(m, "position_limit", 64), "positions"),
        (lambda m: setattr(m.config, "rope_parameters", {"rope_type": "dynamic"}), "rotary"),
        (lambda m: setattr(m.config, "kv_lora_rank", 4), "another state"),
        (lambda m: setattr(m, "_cached_continuous_batching_manager", object()), "somebody else's"),
        (lambda m: setattr(m, "_supports_attention_backend", False), "attention interface"),
    ],
)
def test_what_it_cannot_serve_is_said(change, word):
    model = load_model(tiny.config("llama"))
    assert serves(model) is None
    change(model)
    assert word in serves(model)


def test_another_transformers_is_refused(models, monkeypatch):
    monkeypatch.setattr(continuous, "is_known", lambda: False)
    assert "another than the one known here" in serves(models["llama"])


def test_several_ranks_are_refused(models, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert "one rank" in serves(models["llama"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_it_passes_the_probe_and_is_left_as_it_was(dtype):
    model = load_model(
        tiny.config("qwen3", head_dim=64), device="cuda", param_dtype=dtype, compute_dtype=dtype
    )
    before, stream = state(model), torch.cuda.get_rng_state().tolist()
    check_engine(Batching(model), model, (0, 1, 2))
    drawn = {"temperature": 0.8, "top_p": 0.9}
    assert ask(model, **drawn) == ask(model, **drawn)
    assert state(model) == before
    assert torch.cuda.get_rng_state().tolist() == stream


def test_further_draws_of_the_same_prompts_are_not_those_that_are_there(models):
    """As an evaluation asks that goes on with more replies: with one stream they would be copies."""
    model, sampling = models["llama"], Sampling(temperature=1.0, max_new_tokens=24, seed=3)

    def draws(*numbers):
        found = {}
        asked = [Request(n, draw, ids) for n, ids in enumerate(PROMPTS[:3]) for draw in numbers]
        Batching(model).generate(
            asked, sampling, end_ids=[END], on_reply=lambda r, reply: found.setdefault(r, reply.ids)
        )
        return [found[request] for request in asked]

    first = draws(0, 1)
    assert draws(0, 1) == first
    assert not {tuple(ids) for ids in first} & {tuple(ids) for ids in draws(2, 3)}
