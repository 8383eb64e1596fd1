"""The probe: equal weights pass on every way to attend, other weights do not."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from repsft_fast.errors import ModelError
from repsft_fast.evaluate.continuous import Batching, is_known
from repsft_fast.evaluate.identity import (
    EXACT,
    PROMPT_TOKENS,
    PROMPTS,
    ROUNDED,
    Bound,
    Scored,
    bound_of,
    check_engine,
    check_identity,
    own_logprobs,
    probe_prompts,
)
from repsft_fast.models.load import load_model
from tests.helpers import tiny

AVOID = (0, 1, 2)
known = pytest.mark.skipif(not is_known(), reason="another transformers than continuous batching knows")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return load_model(tiny.config("llama"))


def test_the_prompts_are_the_same_on_every_machine():
    found = probe_prompts(97, AVOID)
    assert found == probe_prompts(97, AVOID)
    assert len(found) == PROMPTS
    assert {len(ids) for ids in found} == {PROMPT_TOKENS}
    assert all(2 < i < 97 for ids in found for i in ids)
    assert len(set(found)) == PROMPTS
    assert found[0][:4] == (8, 25, 5, 10)


def test_a_vocabulary_without_plain_ids_is_refused():
    with pytest.raises(ValueError, match="at least two ids"):
        probe_prompts(4, AVOID)


def test_our_log_probabilities_are_those_of_the_plain_forward_pass(model):
    prompts = probe_prompts(97, AVOID)
    model.train()
    got = own_logprobs(model, prompts)
    assert model.training
    for line, last in zip(got, own_logprobs(model, prompts, 3), strict=True):
        assert last == pytest.approx(line[-3:], abs=1e-5)
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            for ids, line in zip(prompts, got, strict=True):
                logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
                wanted = logits[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
                found = torch.tensor(line, dtype=torch.float64)
                assert found.shape == (len(ids) - 1,)
                assert wanted.std() > 0.5  # so that tokens that changed places would show
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    finally:
        model.set_attn_implementation("repsft")


@known
def test_continuous_batching_passes_on_the_weights_it_runs_on(model):
    assert max(check_engine(Batching(model), model, AVOID)) < 1e-5


@known
def test_its_probe_reads_the_cache_too(model):
    scored = Batching(model).probe(probe_prompts(97, AVOID))
    assert {(len(s.ids), len(s.logprobs)) for s in scored} == {(PROMPT_TOKENS + 8, 8)}


@known
def test_other_weights_are_refused_with_both_numbers(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    got = Batching(other).probe(probe_prompts(97, AVOID))
    own = own_logprobs(model, [s.ids for s in got], 8)
    means = [
        f"{math.fsum(x for line in side for x in line) / 64:.5f}" for side in ([s.logprobs for s in got], own)
    ]
    with pytest.raises(ModelError) as caught:
        check_identity("batching", got, own, EXACT)
    said = str(caught.value)
    assert said.startswith(
        "engine batching: does not compute with this model's weights: over 64 fixed tokens"
    )
    assert f"{means[0]} there and {means[1]} here" in said
    assert "expected at most 0.001 apart, and 0.001 a token" in said


@pytest.mark.parametrize(
    ("theirs", "ours", "passes"),
    [
        ((-1.0, -2.0), (-1.0005, -2.0005), True),
        ((-1.0, -2.0), (-1.002, -2.001), False),
        ((-1.0, -2.0), (-2.0, -1.0), False),  # equal sums
        ((math.nan, -2.0), (-1.0, -2.0), False),
        ((-math.inf, -2.0), (-1.0, -2.0), False),
    ],
)
def test_every_token_is_compared(theirs, ours, passes):
    got = [Scored((3, 4, 5), theirs)]
    if passes:
        assert check_identity("x", got, [ours], EXACT) == pytest.approx((5e-4, 5e-4))
    else:
        with pytest.raises(ModelError, match="engine x: does not compute"):
            check_identity("x", got, [ours], EXACT)


def test_rounding_cancels_in_the_mean_and_training_does_not():
    got = [Scored(tuple(range(101)), (-2.0,) * 100)]
    rounded = [-2.0 + 0.1 * (-1) ** n for n in range(100)]
    assert check_identity("x", got, [rounded], ROUNDED) == pytest.approx((0.0, 0.1))
    with pytest.raises(ModelError):
        check_identity("x", got, [[-1.9] * 100], ROUNDED)
    with pytest.raises(ModelError):
        check_identity("x", got, [rounded], Bound(0.05, 0.05))


def test_the_bound_follows_the_type_it_computes_in(model):
    assert bound_of(model) == EXACT
    assert bound_of(load_model(tiny.config("llama"), compute_dtype="bfloat16")) == ROUNDED


def test_an_engine_that_gives_no_numbers_is_refused():
    with pytest.raises(ModelError, match="gave no log-probabilities"):
        check_identity("x", [Scored((3, 4), ())], [()], EXACT)
