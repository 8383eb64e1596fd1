"""Our own loop beside transformers' `generate` of each prompt alone, and what it leaves as it was."""

from __future__ import annotations

import copy
import functools
import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from repsft_fast.errors import ModelError
from repsft_fast.evaluate.asked import Generation, Request, Sampling
from repsft_fast.evaluate.decode import Loop
from repsft_fast.models import load_model
from tests.helpers import tiny
from tests.helpers.architectures import NAMES, VOCABULARY, tiny_config
from tests.models.matrix import FP32, LARGEST

PROMPTS = [
    [5, 6, 7, 8, 9, 10, 11],
    [12, 13, 14],
    [20],
    [3, 4, 5, 6],
    [21],
    [9, 8, 7, 6, 5, 4, 3],
    [*range(30, 50)],
]
NEW = 14  # beyond the windows and chunks of `tiny_config`
DRAWN = Sampling(n=3, temperature=0.9, top_p=0.9, max_new_tokens=10)


@functools.cache
def model_of(name: str, *, seed: int = 0, packed: bool = True):
    torch.manual_seed(seed)
    config = tiny_config(name)
    model = load_model(config, param_dtype=FP32.get(config.model_type, torch.float64), packed=packed).eval()
    model.config.use_cache = True
    return model


def asked(prompts, draws: int = 1) -> list[Request]:
    return [Request(n, draw, tuple(p)) for n, p in enumerate(prompts) for draw in range(draws)]


def replies_of(loop: Loop, requests, sampling, end_ids=()) -> dict[tuple[int, int], Generation]:
    found: dict[tuple[int, int], Generation] = {}

    def note(request: Request, reply: Generation) -> None:
        assert (request.prompt, request.draw) not in found
        found[request.prompt, request.draw] = reply

    loop.generate(requests, sampling, end_ids=end_ids, on_reply=note)
    return found


def alone(model, prompt, new: int = NEW, end_ids=None) -> list[int]:
    """By transformers, in a copy: some architectures change in a forward call."""
    ids = torch.tensor([prompt])
    out = copy.deepcopy(model).generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, pad_token_id=0,
        eos_token_id=end_ids, use_cache=True,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def test_a_hundred_greedy_replies_are_those_of_prompts_alone():
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(tiny.config("llama")).eval()
    draw = random.Random(0)
    prompts = [[draw.randrange(3, tiny.VOCABULARY) for _ in range(draw.randint(1, 20))] for _ in range(100)]
    ends = [*range(0, tiny.VOCABULARY, 9)]
    expected = [alone(model, prompt, 12, ends) for prompt in prompts]
    assert len(set(map(len, expected))) > 8, "replies end at different times"
    for batch_size in (1, 16):
        found = replies_of(
            Loop(model, batch_size=batch_size), asked(prompts), Sampling(max_new_tokens=12), ends
        )
        assert [found[number, 0].ids for number in range(100)] == expected
        assert all(reply.finished == (reply.ids[-1] in ends) for reply in found.values())


@pytest.mark.parametrize(
    ("name", "packed", "way"),
    [
        ("gpt2", True, "padded"),
        ("gemma2", True, "padded"),  # its soft-cap is computed by us
        ("gpt_oss", True, "padded"),
        ("gemma3_text", True, "padded"),
        ("qwen3_next", False, "padded"),  # a state beside attention
        ("llama4_text, chunks of 8", True, "padded"),
        ("bloom", False, "alike"),
        ("mamba", False, "alike"),
        ("phi3, longrope", True, "theirs"),
        ("rwkv", False, "one by one"),
        ("xlnet", False, "one by one"),
    ],
)
def test_each_kind_is_served_as_it_can_be(name, packed, way):
    model = model_of(name, packed=packed)
    expected = [alone(model, prompt) for prompt in PROMPTS]
    ends = [expected[0][3], expected[3][1]]
    found = replies_of(
        loop := Loop(model, batch_size=6), asked(PROMPTS, 2), Sampling(max_new_tokens=NEW), ends
    )
    assert loop.way == way
    for (number, _), reply in found.items():
        cut = next((n + 1 for n, token in enumerate(expected[number]) if token in ends), NEW)
        assert reply.ids == expected[number][:cut]
        assert reply.finished == (expected[number][cut - 1] in ends)
    assert len(found) == 2 * len(PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_replies_as_alone(name):
    try:
        config = tiny_config(name)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        assert size <= LARGEST
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config, dtype=FP32.get(config.model_type, torch.float64)
        ).eval()
        model.config.use_cache, model.generation_config = True, GenerationConfig()
        expected = [alone(model, prompt) for prompt in PROMPTS]
    except Exception as error:
        pytest.skip(f"transformers makes or runs no small one: {error}")
    found = replies_of(Loop(model, batch_size=6), asked(PROMPTS, 2), Sampling(max_new_tokens=NEW))
    assert [found[number, 1].ids for number in range(len(PROMPTS))] == expected


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_entropy_is_that_of_a_forward_pass_over_the_reply(temperature):
    model = model_of("llama")
    sampling = Sampling(temperature=temperature, top_p=0.8, max_new_tokens=9)
    for (number, _), reply in replies_of(Loop(model), asked(PROMPTS, 2), sampling).items():
        ids = torch.tensor([PROMPTS[number] + reply.ids])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(PROMPTS[number]) - 1 : -1]
        assert len(logits) == 9
        expected = torch.distributions.Categorical(logits=logits).entropy().mean().item()
        assert reply.entropy == pytest.approx(expected, rel=1e-9)


class TestDrawn:
    def test_neither_batch_nor_order_nor_n_changes_a_reply(self):
        model = model_of("llama")
        expected = replies_of(Loop(model, batch_size=64), asked(PROMPTS, 3), DRAWN, [7])
        assert len({tuple(reply.ids) for reply in expected.values()}) == 3 * len(PROMPTS)
        for batch_size in (1, 4):
            requests = asked(PROMPTS, 3)
            random.Random(batch_size).shuffle(requests)
            assert replies_of(Loop(model, batch_size=batch_size), requests, DRAWN, [7]) == {
                key: Generation(r.ids, r.finished, pytest.approx(r.entropy)) for key, r in expected.items()
            }
        assert (
            replies_of(Loop(model), [Request(3, 2, tuple(PROMPTS[3]))], DRAWN, [7])[3, 2].ids
            == expected[3, 2].ids
        )

    @pytest.mark.parametrize("way", ["alike", "theirs", "one by one"])
    def test_the_way_changes_no_reply(self, way):
        model = model_of("llama")
        expected = replies_of(Loop(model), asked(PROMPTS, 2), DRAWN, [7])
        other = Loop(model, batch_size=5)
        other.way = way
        assert {key: r.ids for key, r in replies_of(other, asked(PROMPTS, 2), DRAWN, [7]).items()} == {
            key: r.ids for key, r in expected.items()
        }

    def test_seed_and_prompt_are_added(self):
        """The prompt's seed is sampling.seed + its number."""
        model, prompt = model_of("llama"), tuple(PROMPTS[0])
        first = replies_of(
            Loop(model), [Request(1, 0, prompt)], Sampling(temperature=1.0, seed=4, max_new_tokens=8)
        )
        same = replies_of(
            Loop(model), [Request(0, 0, prompt)], Sampling(temperature=1.0, seed=5, max_new_tokens=8)
        )
        other = replies_of(
            Loop(model), [Request(0, 0, prompt)], Sampling(temperature=1.0, seed=4, max_new_tokens=8)
        )
        assert first[1, 0].ids == same[0, 0].ids != other[0, 0].ids

    def test_first_tokens_are_as_likely_as_the_model_says(self):
        model, prompt = model_of("llama"), PROMPTS[0]
        with torch.no_grad():
            p = model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1).numpy()
        found = replies_of(Loop(model, batch_size=2000), [Request(0, d, tuple(prompt)) for d in range(2000)],
                           Sampling(temperature=1.0, max_new_tokens=1))  # fmt: skip
        counts = np.bincount([reply.ids[0] for reply in found.values()], minlength=VOCABULARY)
        often = 2000 * p > 5
        chi = ((counts - 2000 * p) ** 2 / (2000 * p))[often].sum()
        assert chi < often.sum() + 4 * (2 * often.sum()) ** 0.5


def states():
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


@pytest.mark.parametrize(("name", "packed"), [("llama", True), ("rwkv", False)])
def test_nothing_is_left_changed(name, packed):
    model = model_of(name, packed=packed)
    for training in (True, False):
        model.train(training)
        before, own = states(), model.generation_config
        replies_of(Loop(model), asked(PROMPTS[:3], 2), DRAWN, [7])

        def fails(*_):
            raise KeyError("the caller's")

        with pytest.raises(KeyError, match="the caller's"):
            Loop(model).generate(asked(PROMPTS), DRAWN, end_ids=[], on_reply=fails)
        assert states() == before
        assert model.training == training
        assert model.generation_config is own
        assert torch.is_grad_enabled()
    model.eval()


def test_ended_replies_cost_nothing_more_and_draws_share_their_prompt():
    """Positions that go through the model: each prompt once, and each token of a reply but its last."""
    model, rows = copy.deepcopy(model_of("llama")), []
    model.model.embed_tokens.register_forward_hook(lambda _, given, __: rows.append(given[0].numel()))
    loop = Loop(model, batch_size=64)
    replies_of(loop, asked(PROMPTS[:1]), DRAWN)  # it is tried
    rows.clear()
    prompts = [prompt for prompt in PROMPTS if len(prompt) == 7]
    found = replies_of(loop, asked(prompts, 3), DRAWN, [*range(0, VOCABULARY, 5)])
    lengths = [len(reply.ids) for reply in found.values()]
    assert len(set(lengths)) > 2
    assert sum(rows) == sum(map(len, prompts)) + sum(length - 1 for length in lengths)
    assert len(rows) == max(lengths)


def test_replies_are_told_as_they_end():
    model, told = model_of("llama"), []
    ends = [alone(model, PROMPTS[0])[2]]
    Loop(model).generate(
        asked(PROMPTS),
        Sampling(max_new_tokens=NEW),
        end_ids=ends,
        on_reply=lambda r, g: told.append(len(g.ids)),
    )
    assert told == sorted(told)
    assert told[0] < told[-1]


def test_what_the_models_settings_ask_besides_is_not_applied():
    model = copy.deepcopy(model_of("llama"))
    expected = replies_of(Loop(model), asked(PROMPTS), Sampling(max_new_tokens=NEW))
    model.generation_config = GenerationConfig(repetition_penalty=5.0, max_new_tokens=2)
    assert alone(model, PROMPTS[0]) != expected[0, 0].ids
    for way in ("padded", "one by one"):
        loop = Loop(model)
        loop.way = way
        found = replies_of(loop, asked(PROMPTS), Sampling(max_new_tokens=NEW))
        assert {key: r.ids for key, r in found.items()} == {key: r.ids for key, r in expected.items()}


def test_each_prompt_goes_as_far_as_learned_positions_do():
    model = load_model(tiny_config("gpt2", n_positions=24))
    prompts = [[5] * 3, [6] * 12, [7] * 24, [8] * 30]
    found = replies_of(Loop(model), asked(prompts), Sampling(max_new_tokens=15))
    assert [len(found[n, 0].ids) for n in range(4)] == [15, 12, 0, 0]
    assert found[2, 0] == Generation([], False)
    assert replies_of(Loop(model), asked(prompts), Sampling(max_new_tokens=0))[0, 0] == Generation([], False)


def test_an_empty_prompt_is_refused_and_no_prompt_is_not():
    with pytest.raises(ValueError, match="expected at least one token in each, got an empty prompt"):
        replies_of(Loop(model_of("llama")), asked([[5], []]), DRAWN)
    assert replies_of(Loop(model_of("llama")), [], DRAWN) == {}


@pytest.mark.parametrize("way", [None, "one by one"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(way, temperature):
    model = copy.deepcopy(model_of("llama"))
    model.model.norm.weight.data[3] = float("nan")
    loop = Loop(model)
    loop.way = way
    with pytest.raises(ModelError, match="its logits are not finite: no token can be chosen"):
        replies_of(loop, asked(PROMPTS), Sampling(temperature=temperature, top_p=0.9, max_new_tokens=3))


def test_a_model_is_tried_once_whatever_asks_it(monkeypatch):
    model, tried = load_model(tiny.config("llama")), []
    monkeypatch.setattr(Loop, "_try", lambda self, *_: tried.append(self) or "padded")
    for _ in range(3):
        Loop(model).generate(
            [Request(0, 0, (5, 6))], Sampling(max_new_tokens=2), end_ids=[], on_reply=lambda *_: None
        )
    assert len(tried) == 1
