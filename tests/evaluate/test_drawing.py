"""The next token: uniform numbers that follow from what is asked, the nucleus as it is defined, and how often
each comes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from repsft_fast.evaluate import drawing
from repsft_fast.evaluate.drawing import choose, entropies, uniforms


def nucleus(probabilities: list[float], top_p: float) -> dict[int, float]:
    """By the definition: the most likely first, of equals the first, until their mass is at least top_p."""
    kept: dict[int, float] = {}
    for token in sorted(range(len(probabilities)), key=lambda t: (-probabilities[t], t)):
        if sum(kept.values()) >= top_p:
            break
        kept[token] = probabilities[token]
    return {token: p / sum(kept.values()) for token, p in kept.items()}


def test_numbers_follow_from_seed_draw_and_step_alone():
    some = uniforms(42, 1, 1000)
    assert (some == uniforms(42, 1, 5000)[:1000]).all()
    assert some.min() >= 0
    assert some.max() < 1
    assert abs(some.mean() - 0.5) < 0.05
    for seed, draw in ((43, 1), (42, 0), (1, 42)):
        assert (some != uniforms(seed, draw, 1000)).all()


def test_numbers_are_these():
    """A resumed evaluation goes on with them, on any machine."""
    assert uniforms(42, 0, 2).tolist() == [0.2578287633331786, 0.7845856779597866]


def test_greedy_is_the_first_of_equals():
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, -1.0, 5.0]])
    assert choose(logits, 0.0, 1.0, torch.zeros(2).double()).tolist() == [1, 0]


def edges(logits, temperature, top_p):
    """(tokens in the order of their uniform numbers, the numbers between them), from 4,000 numbers."""
    grid = (torch.arange(4000) + 0.5).double() / 4000
    return choose(logits.expand(4000, -1), temperature, top_p, grid)


@pytest.mark.parametrize("candidates", [4, 256])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 0.95), (1.0, 0.5), (2.0, 0.05)])
@pytest.mark.parametrize("kind", ["spread", "ties", "flat", "impossible"])
def test_what_is_drawn_is_the_nucleus_renormalised(kind, temperature, top_p, candidates, monkeypatch):
    monkeypatch.setattr(drawing, "CANDIDATES", candidates)
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 2
    if kind == "ties":
        logits = logits.round()
    if kind == "flat":
        logits = torch.zeros(40)
    if kind == "impossible":
        logits[::2] = float("-inf")
    expected = nucleus((logits / temperature).softmax(-1).double().tolist(), top_p)
    found = edges(logits, temperature, top_p)
    assert (found.diff() >= 0).all(), "in the order of the vocabulary"
    counts = np.bincount(found.numpy(), minlength=40)
    for token in range(40):
        assert abs(counts[token] - 4000 * expected.get(token, 0.0)) <= 1.01, token


def test_frequencies_of_replies_are_the_probabilities():
    """Chi-square of first tokens of 20,000 draws of one prompt, and of the eighth."""
    logits = torch.randn(30, generator=torch.Generator().manual_seed(1)) * 0.8
    expected = nucleus((logits / 0.6).softmax(-1).double().tolist(), 0.95)
    assert 5 < len(expected) < 25
    streams = torch.from_numpy(np.stack([uniforms(7, draw, 8) for draw in range(20_000)]))
    for step in (0, 7):
        tokens = choose(logits.expand(20_000, -1), 0.6, 0.95, streams[:, step])
        counts = np.bincount(tokens.numpy(), minlength=30)
        assert set(np.flatnonzero(counts)) <= set(expected)
        wanted = np.array([20_000 * p for p in expected.values()])
        chi = (((counts[list(expected)] - wanted) ** 2) / wanted).sum()
        degrees = len(expected) - 1
        assert chi < degrees + 4 * (2 * degrees) ** 0.5, "four standard deviations"


def test_entropy_in_nats():
    logits = torch.tensor([[0.0, 0.0, float("-inf"), float("-inf")], [0.0, 100.0, 0.0, 0.0]])
    assert entropies(logits).tolist() == pytest.approx([np.log(2), 0.0], abs=1e-6)
    assert entropies(torch.tensor([[0.0, float("nan")], [0.0, float("inf")]])).isnan().all()
