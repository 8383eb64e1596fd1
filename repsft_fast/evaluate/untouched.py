"""Leave a model and the process's random streams as they were found, whatever happens between."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    """Every configuration that a module of the model reads, each once."""
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in found if isinstance(config, PreTrainedConfig)}.values())


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back at the end, also behind an error or a signal: the mode of every module, the name of the
    attention in every configuration, the generation settings, what was hung on the model, and the random
    streams of Python, numpy, torch and its GPUs. Weights, gradients and hooks are nobody's to change inside.
    """
    modes = [(module, module.training) for module in model.modules()]
    # transformers' own name of the setting writes to other configurations too
    names = [(config, config._attn_implementation_internal) for config in configs_of(model)]
    held = set(vars(model))
    asked = getattr(model, "generation_config", None)
    settings = dict(vars(asked)) if asked is not None else {}
    streams = _streams()
    try:
        yield
    finally:
        _set_streams(streams)
        for module, training in modes:
            module.training = training
        for config, name in names:
            config._attn_implementation_internal = name
        for name in set(vars(model)) - held:
            delattr(model, name)
        if asked is not None:
            vars(asked).clear()
            vars(asked).update(settings)


def _streams() -> tuple[Any, Any, torch.Tensor, list[torch.Tensor]]:
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), devices


def _set_streams(streams: tuple[Any, Any, torch.Tensor, list[torch.Tensor]]) -> None:
    python, numpys, host, devices = streams
    random.setstate(python)
    np.random.set_state(numpys)
    torch.set_rng_state(host)
    if devices:
        torch.cuda.set_rng_state_all(devices)
