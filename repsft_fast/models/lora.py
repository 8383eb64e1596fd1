"""Low-rank adapters through peft: y = W x + (alpha / rank) · B A x, with W frozen.

Which layers get them: `models.targets`. Into the weights: `models.merge`. Going on from a folder of adapters:
its rank, alpha and targets are taken as they are, its weights whole or not at all; the dropout is the
setting's.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from repsft_fast.errors import ModelError, describe
from repsft_fast.models.adapter_folder import AdapterFolder
from repsft_fast.models.guards import first_words, library
from repsft_fast.models.layer_kinds import routers
from repsft_fast.models.merge import ADAPTER, adapted_layers, check_merge, parameter_of, plain_name
from repsft_fast.models.readable import was_gguf, weights_were_read
from repsft_fast.models.targets import (
    WHERE,
    Targets,
    check_folders,
    choose,
    renamed_by_peft,
    shortest,
)

__all__ = ["ADAPTER", "LoraSettings", "add_lora", "has_lora", "lora_said"]


@dataclass(frozen=True)
class LoraSettings:
    rank: int = 16
    alpha: float = 32.0  # the adapter's output is multiplied by alpha / rank
    dropout: float = 0.0  # before the adapter
    target_modules: str | Sequence[str] = "all-linear"  # every linear layer of the backbone, or names
    merge: bool = False  # they will be merged in the end: that it works is tried when they are made
    source: str | None = None  # a folder of adapters to go on from; `from` in a mapping

    @staticmethod
    def of(given: Any) -> LoraSettings:
        """From a mapping or any object with these attributes; others it has are not read.

        ModelError for what has not the first two: peft's LoraConfig, whose names are other ones, or true and
        false.
        """
        if isinstance(given, LoraSettings):
            return given
        names = {
            ("from" if field.name == "source" else field.name): field.name for field in fields(LoraSettings)
        }
        if not isinstance(given, Mapping) and not all(hasattr(given, name) for name in ("rank", "alpha")):
            expected = f"a mapping of {', '.join(names)}; None for no adapters"
            raise ModelError(
                describe("model.lora", "are no settings of adapters", expected=expected, got=str(given))
            )
        values = (
            given
            if isinstance(given, Mapping)
            else {name: getattr(given, name) for name in names if hasattr(given, name)}
        )
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ModelError(
                describe(
                    "model.lora", "has unknown settings", expected=", ".join(names), got=", ".join(unknown)
                )
            )
        return LoraSettings(**{inner: values[name] for name, inner in names.items() if name in values})

    def check(self) -> None:
        """ModelError for numbers that no adapter has; a run's settings were checked before, a library's call
        was not."""
        for name, good, expected in (
            ("rank", type(self.rank) is int and self.rank >= 1, "a whole number ≥ 1"),
            ("alpha", _is_number(self.alpha) and 0 < self.alpha < math.inf, "a number > 0"),
            ("dropout", _is_number(self.dropout) and 0 <= self.dropout < 1, "a number ≥ 0, < 1"),
            ("target_modules", _are_names(self.target_modules), "text or a list of text"),
        ):
            if not good:
                raise ModelError(
                    describe(
                        f"model.lora.{name}", "cannot be", expected=expected, got=repr(getattr(self, name))
                    )
                )


def add_lora(model: PreTrainedModel, settings: LoraSettings) -> None:
    """Inject fp32 adapters in place and freeze everything else; what is to be said of them: `lora_said`.

    ModelError when peft is missing, nothing or something else matches, a folder's adapters are not this
    model's, or merging (where it is asked for) is not exact for a kind of layer.
    """
    settings.check()
    peft = _peft()
    if any(hasattr(module, "backward_pass") for module in model.modules()):  # Reformer's
        wrong = (
            f"{type(model).__name__} has reversible layers, whose backward pass wants weights before them"
            " that are trained"
        )
        raise ModelError(describe("model.lora", wrong, todo="train all of it: drop model.lora"))
    said = [] if settings.merge else _said_of_base(model)

    # A folder's adapters are what its config says; new ones go where the settings say.
    folder = None if settings.source is None else AdapterFolder.read(settings.source)
    chosen: Targets | None = None
    if folder is None:
        config, chosen = _new_config(peft, model, settings)
        said += chosen.said()
    else:
        said += folder.agrees(settings, LoraSettings(), base_of(model))
        config = folder.config(settings.dropout)
    if settings.dropout > 0 and config.target_parameters:
        wrong = "adapters of parameters (experts) have no input of their own that could be dropped"
        raise ModelError(
            describe("model.lora.dropout", wrong, expected="0", got=settings.dropout, todo="set it to 0")
        )
    routed = set(routers(model))  # with adapters on them, layers are no longer what tells a router
    _add_adapters(model, config, settings)
    if chosen is not None:
        _refuse_others(model, chosen)
    _as_written(model)

    # What was asked for holds of the model as it is now, or nothing is trained.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    if folder is not None:
        said += check_folders(model, adapted_layers(model), routed, merge=settings.merge)
        folder.load_into(model)
    else:
        said += _too_high(model, settings.rank)
    if settings.merge:
        check_merge(model)
    model.__dict__["lora_said"] = said


def _new_config(peft: Any, model: PreTrainedModel, settings: LoraSettings) -> tuple[Any, Targets]:
    """(peft's LoraConfig, the layers it means) for adapters that begin here."""
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # a scale; peft divides it, whole or not
        lora_dropout=settings.dropout,
        task_type=peft.TaskType.CAUSAL_LM,
    )
    chosen = choose(model, settings.target_modules, renamed_by_peft(model, config))
    _check_rank(model, chosen, settings.rank)
    _name_targets(model, config, chosen)
    return config, chosen


def _add_adapters(model: PreTrainedModel, config: Any, settings: LoraSettings) -> None:
    """Peft's own injection. ModelError where it refuses."""
    new = settings.source is None
    given = settings.target_modules if new else settings.source
    where = WHERE if new else f"{WHERE} of model.lora.from"

    def refused(error: BaseException) -> ModelError:  # of several types
        return ModelError(describe(where, f"peft refuses: {first_words(error)}", got=given))

    with library(where, given, instead=refused):
        model.add_adapter(config, adapter_name=ADAPTER)


def _as_written(model: PreTrainedModel) -> None:
    """The adapters' config as their folder is to say it: where the base is, and names in one order."""
    written = model.peft_config[ADAPTER]
    written.base_model_name_or_path = base_of(model)
    for name in ("target_modules", "target_parameters"):
        # written in an order of their own, the folder is the same in every process
        if isinstance(getattr(written, name), set):
            setattr(written, name, sorted(getattr(written, name)))


def _peft() -> Any:
    """The library. ModelError where it is missing, or there and cannot be imported."""
    if importlib.util.find_spec("peft") is None:
        raise ModelError(
            describe("model.lora", "needs peft, which is not installed", todo="pip install peft")
        )
    with library(
        "model.lora: import peft",
        "an installation that cannot be imported",
        "pip install --force-reinstall peft",
    ):
        return importlib.import_module("peft")


def has_lora(model: nn.Module) -> bool:
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def lora_said(model: nn.Module) -> list[str]:
    """What a run is told of its adapters at the start: what they leave out, where they come from."""
    return list(model.__dict__.get("lora_said", ()))


def base_of(model: PreTrainedModel) -> str | None:
    """Where the frozen weights are: a folder by its whole path, so that adapters find it from anywhere, or a
    hub id.

    None for random ones: a path gave their configuration, and holds others.
    """
    name = (getattr(model, "name_or_path", None) or None) if weights_were_read(model) else None
    return str(Path(name).absolute()) if name is not None and os.path.exists(name) else name


def _said_of_base(model: PreTrainedModel) -> list[str]:
    """Adapters are nothing without their base: where a reader of their folder will not find it."""
    merge = "set model.lora.merge: true to save the whole model"
    if not weights_were_read(model):
        return [
            f"model.lora: the adapters are saved without the random weights beside which they learn; {merge}"
        ]
    if was_gguf(model):
        return [
            "model.lora: the base is a GGUF file: who loads it for the adapters must name it as gguf_file;"
            f" or {merge}"
        ]
    return []


def _name_targets(model: PreTrainedModel, config: Any, chosen: Targets) -> None:
    """The targets as readers of adapter folders know them: ends of names that mean these layers and no
    others."""
    modules = set(chosen.modules)
    others = [name for name, _ in model.named_modules() if name and name not in modules]
    config.target_modules = set(shortest(chosen.modules, others))
    # Otherwise peft sets it layer by layer, with a warning.
    config.fan_in_fan_out = any(isinstance(model.get_submodule(name), Conv1D) for name in modules)
    if chosen.parameters:
        parameters = set(chosen.parameters)
        others = [name for name, _ in model.named_parameters() if name not in parameters]
        config.target_parameters = sorted(shortest(chosen.parameters, others, parts=2))


def _refuse_others(model: PreTrainedModel, chosen: Targets) -> None:
    """Peft reads names in its own way: what it adapted is what was meant, or nothing is trained."""
    layers = adapted_layers(model)
    found = {
        plain_name(f"{name}.{parameter_of(layer)}", layers) if hasattr(layer, "parameter_name") else name
        for name, layer in layers.items()
    }
    meant = {*chosen.modules, *chosen.parameters}
    if found != meant:
        example = sorted(found ^ meant)[0]
        wrong = (
            f"peft adapts {len(found)} layers where {len(meant)} are meant: {example} is one they differ in"
        )
        raise ModelError(describe(WHERE, wrong, todo="name the layers otherwise"))


def _check_rank(model: PreTrainedModel, chosen: Targets, rank: int) -> None:
    """ModelError for a rank that no layer has: all of it would be memory and time for nothing, and a million
    takes minutes."""
    shapes = {name: model.get_parameter(f"{name}.weight").shape for name in chosen.modules}
    # a convolution's as the matrix it is
    sizes = {name: [shape[0], shape[1:].numel()] for name, shape in shapes.items()}
    # of each expert in a stack
    sizes |= {name: list(model.get_parameter(name).shape[-2:]) for name in chosen.parameters}
    name = max(sizes, key=lambda name: min(sizes[name]))
    if rank > min(sizes[name]):
        expected = f"at most {min(sizes[name])}, the smaller side of {name} {sizes[name]}"
        wrong = "is more than any of the layers has"
        raise ModelError(describe("model.lora.rank", wrong, expected=expected, got=rank, todo="lower it"))


def _too_high(model: PreTrainedModel, rank: int) -> list[str]:
    """A rank above a layer's own costs memory and adds nothing."""
    over = [
        name
        for name, layer in adapted_layers(model).items()
        if not hasattr(layer, "parameter_name") and rank > min(layer.get_base_layer().weight.shape)
    ]
    if not over:
        return []
    return [f"model.lora.rank: {rank} is more than {len(over)} of the layers have, first {over[0]}"]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_names(value: object) -> bool:
    return isinstance(value, str) or (
        isinstance(value, Sequence) and all(isinstance(name, str) for name in value)
    )
