"""Keys and values with room to grow hold what transformers' own layer holds."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicLayer

from repsft_fast.errors import ModelError
from repsft_fast.evaluate.kept import Kept, new_cache
from tests.helpers import tiny
from tests.helpers.architectures import tiny_config


def test_as_a_layer_that_concatenates():
    draw = torch.Generator().manual_seed(0)
    ours, theirs = Kept(), DynamicLayer()
    rows = 3
    for step in range(200):
        states = [torch.randn(rows, 2, 7 if step == 0 else 1, 4, generator=draw) for _ in range(2)]
        for mine, other in zip(ours.update(*states), theirs.update(*states), strict=True):
            assert torch.equal(mine, other)
        if step in (5, 150):
            order = torch.tensor([2, 0, 2, 1] if step == 5 else [1, 0])
            rows = len(order)
            for layer in (ours, theirs):
                layer.reorder_cache(order)
        assert ours.get_seq_length() == theirs.get_seq_length() == 7 + step
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)


def test_a_token_copies_nothing_but_itself():
    layer = Kept()
    states = torch.zeros(2, 2, 10, 4)
    layer.update(states, states)
    at = layer.keys.data_ptr()
    for _ in range(60):
        layer.update(states[:, :, :1], states[:, :, :1])
        assert layer.keys.data_ptr() == at


def test_layers_of_full_attention_are_ours():
    cache = new_cache(AutoModelForCausalLM.from_config(tiny.config("olmo3")))
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer", "Kept"]


def test_a_layer_nobody_knows_is_refused():
    with pytest.raises(ModelError, match=r"its cache is not known: \{'Deepseek"):
        new_cache(AutoModelForCausalLM.from_config(tiny_config("deepseek_v4")))
