"""What an evaluation may change is put back; of a whole engine `test_continuous` says it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from repsft_fast.evaluate.untouched import configs_of, left_as_it_was
from repsft_fast.models.load import load_model
from tests.helpers import tiny


@pytest.fixture
def model():
    return load_model(tiny.config("llama"))


def test_what_was_hung_on_the_model_is_taken_off_and_its_settings_come_back(model):
    settings = model.generation_config
    settings.top_k = 9

    def changing():
        with left_as_it_was(model):
            model.hung = 1
            settings.top_k, settings.more = 3, 4
            model.set_attn_implementation("eager")
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        changing()
    assert not hasattr(model, "hung")
    assert settings is model.generation_config
    assert settings.top_k == 9
    assert not hasattr(settings, "more")
    assert {config._attn_implementation for config in configs_of(model)} == {"repsft"}


def test_every_module_keeps_its_own_mode(model):
    model.train()
    model.lm_head.eval()
    with left_as_it_was(model):
        model.eval()
    assert [name for name, module in model.named_modules() if not module.training] == ["lm_head"]


def test_every_stream_goes_on_where_it_was(model):
    def drawn():
        return random.random(), np.random.random(), torch.rand(1).item()

    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    wanted = drawn()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    with left_as_it_was(model):
        drawn()
        torch.manual_seed(8)
    assert drawn() == wanted


def test_a_model_without_generation_settings_is_one_too():
    with left_as_it_was(torch.nn.Linear(2, 2)) as nothing:
        assert nothing is None
