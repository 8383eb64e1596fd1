"""The checks at start blame a model for what its layers raise, and for nothing else."""

from dataclasses import replace

import pytest

from repsft_fast.errors import ModelError
from repsft_fast.models import check_head, check_no_leak, load_model
from tests.helpers.architectures import tiny_config

LOST = "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:8917: Connection reset by peer"


@pytest.mark.parametrize("check", [lambda model: check_head(model, model.loss_settings.head), check_no_leak])
@pytest.mark.parametrize(
    ("words", "error", "said"),
    [(LOST, RuntimeError, "Connection reset"), ("sizes", ModelError, "does not take packed rows")],
)
def test_a_lost_rank_is_no_fault_of_the_architecture(check, words, error, said, monkeypatch):
    model = load_model(tiny_config("llama"))

    def fails(*_, **__):
        raise RuntimeError(words)

    monkeypatch.setattr(model.model.layers[0], "forward", fails)
    with pytest.raises(error, match=said):
        check(model)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("check", [lambda model: check_head(model, model.loss_settings.head), check_no_leak])
def test_products_that_overflow_are_no_fault_of_the_architecture(check, packed):
    model = load_model(tiny_config("llama"))
    model.loss_settings = replace(model.loss_settings, packed=packed)
    model.model.norm.weight.data.fill_(3e38)
    with pytest.raises(ModelError, match=r"are not finite, before any training.*model\.lora\.alpha"):
        check(model)
