"""Which engine answers, and that one with other weights is refused."""

import pytest
import torch

from repsft_fast.config import Config
from repsft_fast.distributed import World
from repsft_fast.errors import ConfigError, ModelError
from repsft_fast.evaluate import decode
from repsft_fast.models import load_model
from repsft_fast.suite.engines import engine_of
from tests.helpers import tiny
from tests.helpers.chat_tokenizers import byte_level

ALONE = World(0, 1, 0, torch.device("cpu"))
BASE = {"run.folder": "x", "data.train": "a", "budget.epochs": 1, "model.config": {"model_type": "llama"}}


def chosen(engine, kind="llama", world=ALONE, model=None):
    config = Config.of({**BASE, "evaluate.tasks": "a", "evaluate.engine": engine})
    model = model if model is not None else load_model(tiny.config(kind, vocab_size=400))
    found, notes = engine_of(config, model, world, byte_level())
    return found.name, notes


def test_auto_is_our_loop_on_a_cpu_and_what_is_asked_for_is_had():
    assert chosen("auto") == chosen("loop") == ("loop", [])
    assert chosen("batching") == ("batching", [])


def test_batching_refuses_what_it_cannot_serve_and_auto_says_why_on_a_gpu():
    with pytest.raises(
        ModelError, match=r"evaluate.engine: batching cannot serve.*set evaluate.engine: loop"
    ):
        chosen("batching", "olmo3")
    gpu = World(0, 1, 0, torch.device("cuda"))
    name, (note,) = chosen("auto", "olmo3", gpu)
    assert name == "loop"
    assert note.startswith("evaluate.engine: auto is our own loop: its layers are not all of full attention")
    assert chosen("auto", "llama", gpu) == ("batching", [])


def test_vllm_is_not_of_this_process():
    with pytest.raises(
        ConfigError, match=r"vllm runs on a saved folder alone.*repsft eval FOLDER --engine vllm"
    ):
        chosen("vllm")


def test_an_engine_that_computes_with_other_weights_is_refused(monkeypatch):
    """As if it held the weights of before an update."""
    model = load_model(tiny.config("llama", vocab_size=400))
    other = load_model(tiny.config("llama", vocab_size=400))
    other.load_state_dict({name: value * 1.01 for name, value in model.state_dict().items()})
    probe = decode.Loop.probe
    monkeypatch.setattr(decode.Loop, "probe", lambda self, prompts: probe(decode.Loop(other), prompts))
    with pytest.raises(ModelError, match="engine loop: does not compute with this model's weights"):
        chosen("loop", model=model)
