"""Compiled or plain layers: decided once for a run (an item of `training.decided`), because compiled ones
round otherwise.

A run's first process decides: what model.compile says; auto compiles on a GPU (`models.layers.compiles`).
Where compiling fails before the first update, the run keeps plain layers (`training.warm_up`), whatever the
setting says, and so does its resumption: compiled anew it would not equal the run that was not interrupted.
"""

from __future__ import annotations

from typing import Any

from repsft_fast.errors import ConfigError, ModelError, describe
from repsft_fast.models.compiled import compile_layers, compiled_layers
from repsft_fast.models.layers import has_liger
from repsft_fast.training.parts import Parts

NAME = "compiled"
SETTING = "model.compile"
FAILED = "failed"  # asked for or decided, tried, and not to be had
SEPARATE = "separate"  # had only with every kernel in a launch of its own (`models.compiler_options`)


def now(parts: Parts) -> bool | str:
    """Whether this run compiles its layers, as asked, as decided or as it turned out."""
    layers = compiled_layers(parts.model)
    if layers is not None and layers.failed:
        return FAILED
    if layers is not None and layers.on and not layers.shared:
        return SEPARATE
    return layers is not None and layers.on


def use(parts: Parts, value: bool | str) -> None:
    """Take what the run before did. ConfigError where its layers were compiled and cannot be here."""
    wanted, layers = value in (True, SEPARATE), compiled_layers(parts.model)
    if layers is not None:
        layers.on, layers.failed = wanted, value == FAILED
        if value == SEPARATE:
            layers.separate()
        return
    if not wanted:
        return
    wrong, todo = "", "set model.compile to false, which rounds otherwise from here on"
    if has_liger(parts.model):
        wrong = "were compiled when the run began, and liger's kernels stand in their place now"
        todo = "set model.layer_kernels to none, or model.compile to false"
    else:
        try:
            compile_layers(parts.model, enabled=True)
            hold(parts.model)
            if value == SEPARATE:
                compiled_layers(parts.model).separate()  # type: ignore[union-attr]
        except ModelError as error:
            wrong = f"were compiled when the run began and cannot be here ({error})"
    if wrong:
        raise ConfigError(describe(SETTING, f"the layers {wrong}", todo=todo))


def hold(model: Any) -> None:
    """No graph is made before `warm_up`: the checks at start come with shapes of their own."""
    layers = compiled_layers(model)
    if layers is not None:
        layers.warm = set()


def words(value: bool | str) -> str:
    if value == FAILED:
        return "plain layers (compiling them failed; a run in another folder tries again)"
    if value == SEPARATE:
        return "compiled layers, every kernel in a launch of its own (side by side they failed)"
    return "compiled layers" if value else "plain layers"


def before(parts: Parts) -> bool:
    """Versions without `auto` compiled where they were told to."""
    return parts.config.model.compile is True


def written(value: bool | str) -> bool:
    return value in (True, SEPARATE)
