"""Which attention the run's layers begin with under model.attention: auto. An item of `training.decided`.

What can be imported, and is seen to work, differs between machines and days; which kernel computes decides
how sums are rounded. So a run's first process decides, for what every rank can have, and a resumption takes
the same or says why it cannot. A layer that it does not serve takes another, as the call alone decides
(`ops.attention.choose`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from repsft_fast.config import Config
from repsft_fast.distributed import World, min_over_hosts, raise_together
from repsft_fast.errors import ConfigError, describe
from repsft_fast.ops import flash
from repsft_fast.ops.attention_choice import checked, why_better_not, why_not
from repsft_fast.training.parts import Parts

NAME, SETTING = "attention", "model.attention"


def decide(config: Config, world: World, model: Any) -> tuple[str, list[str]]:
    """(what the layers take, the same on every rank; what is to be said of packages that are there and are
    not taken). All ranks call it, once the model is on its device. ModelError for one that was asked for and
    cannot be had."""
    asked, device = config.model.attention, world.device
    if not config.batch.pack:  # the architecture's own
        return asked, []
    width, softcap = _heads_of(model)
    if asked != "auto":
        with raise_together(world):
            return checked(asked, device, width), []
    if device.type != "cuda" or model.compute_dtype not in flash.HALF:
        return _without_packages(config, device, model), []
    said: list[str] = []
    # Ranks may sit on other GPUs and have other packages: each asks for the same names, in the same order.
    for name in flash.PREFERENCE:
        why = why_better_not(name, device, width=width, softcap=softcap)
        (everywhere,) = min_over_hosts(world, int(why is None))
        if everywhere:
            return f"auto:{name}", said
        if flash.importable(name):
            said.append(f"attention: {name} is installed and is not taken: {why or 'not every rank has it'}")
    return "auto:varlen", said


def _heads_of(model: Any) -> tuple[int, bool]:
    """(width of the heads, whether scores are capped), as the configuration says."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(width), bool(getattr(config, "attn_logit_softcapping", None))


def _without_packages(config: Config, device: torch.device, model: Any) -> str:
    if config.model.attention != "auto" or not config.batch.pack:
        return config.model.attention
    return "auto:varlen" if device.type == "cuda" and model.compute_dtype in flash.HALF else "sdpa"


def set_attention(model: Any, backend: str) -> None:
    model.loss_settings = replace(model.loss_settings, attention=backend)


def device_facts(parts: Parts) -> str:
    """The device and, where there is more than one way, the attention, as the run's first line says them."""
    device = parts.world.device
    return f"{device} · attention {now(parts)}" if device.type == "cuda" else str(device)


# As an item of `training.decided` -------------------------------------------------------------------------


def now(parts: Parts) -> str:
    """What this run uses."""
    backend: str = parts.model.loss_settings.attention
    return backend


def use(parts: Parts, value: str) -> None:
    if (why := why_not(value, parts.world.device, _heads_of(parts.model)[0])) is not None:
        there = _without_packages(parts.config, parts.world.device, parts.model)
        wrong = f"the run began with {value}, which cannot be had here ({why})"
        todo = f"bring it back, or set {SETTING}: {there} to go on with other roundings"
        raise ConfigError(describe(SETTING, wrong, got=now(parts), todo=todo))
    set_attention(parts.model, value)


def words(value: str) -> str:
    return value


def before(parts: Parts) -> str:
    """Packages were taken only where they were asked for."""
    return _without_packages(parts.config, parts.world.device, parts.model)


def written(value: str) -> str | None:
    """Where nothing else can be had nothing was decided: the settings may be taken to another machine."""
    return None if value in ("auto", "sdpa") else value
