"""Entropies of replies from one packed pass are those of each reply's own logits."""

import pytest
import torch

from repsft_fast.distributed import World
from repsft_fast.evaluate.reply_entropy import reply_entropies
from repsft_fast.models import load_model
from tests.helpers import tiny

ALONE = World(0, 1, 0, torch.device("cpu"))
TEXTS = [([1, 2, 3], [4, 5, 6, 7]), ([9], [8]), ([3, 3, 3, 3], []), ([5, 6], [7] * 30)]


def by_hand(model, prompt, reply):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *reply]])).logits[0].double()
    p = logits[len(prompt) - 1 : -1].softmax(-1)
    return float(-(p * p.log()).sum(-1).mean())


@pytest.mark.parametrize("row_tokens", [8, 64])
@pytest.mark.parametrize("packed", [True, False])
def test_means_are_those_of_the_logits(row_tokens, packed):
    model = load_model(tiny.config("llama"), packed=packed)
    found = reply_entropies(model, TEXTS, row_tokens=row_tokens, world=ALONE, packed=packed)
    model.eval()
    for (prompt, reply), entropy in zip(TEXTS, found, strict=True):
        assert entropy == (pytest.approx(by_hand(model, prompt, reply), abs=2e-6) if reply else None)


def test_numbers_that_are_none_are_not_known():
    model = load_model(tiny.config("llama"))
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = float("nan")
    assert reply_entropies(model, TEXTS[:2], row_tokens=64, world=ALONE) == [None, None]


def test_nothing_is_asked_for_nothing():
    assert reply_entropies(None, [([1], [])], row_tokens=8, world=ALONE) == [None]
    assert reply_entropies(None, [], row_tokens=8, world=ALONE) == []
