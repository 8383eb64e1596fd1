"""What a configuration asks for and would not get: refused where the loss would be another's, else said.

transformers keeps keys that it does not know, takes a class by `model_type` though another is named, and
computes an encoder as a causal model where nothing forbids it: each trains something other than what was
meant, without a word.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from repsft_fast.errors import ModelError, describe, did_you_mean
from repsft_fast.models.guards import library

_OF_ROPE = ("factor", "long_factor", "short_factor", "attention_factor")
_OLD_KEYS = {  # which are still read, or were every model's once
    "rope_theta", "rope_scaling", "torch_dtype", "rotary_pct", "rotary_emb_base", "partial_rotary_factor",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id",
    "tie_encoder_decoder",
}  # fmt: skip
_ALIKE = 0.9  # of two keys, one of them unknown, to be taken for one that is misspelt


def check_meant(model: PreTrainedModel, where: str) -> None:
    """ModelError for what the loss leaves out, and for attention that looks ahead. model: on meta is
    enough."""
    config = model.config
    with library(where, type(model).__name__, "give a causal language model"):
        text = config.get_text_config()
    if config.is_encoder_decoder:
        raise ModelError(
            describe(where, f"{type(model).__name__} has an encoder", expected="a decoder-only causal LM")
        )
    if getattr(text, "output_router_logits", False):
        wrong = "output_router_logits asks for the experts' auxiliary loss, which is not added"
        raise ModelError(describe(where, wrong, todo="set output_router_logits to false"))
    if getattr(text, "output_attentions", False):
        wrong = "output_attentions asks for the weights of attention, which are never all in memory here"
        raise ModelError(describe(where, wrong, todo="set output_attentions to false"))
    if not getattr(config, "return_dict", True):
        raise ModelError(
            describe(where, "return_dict is false: transformers' older form", todo="set return_dict to true")
        )
    if (why := _looks_ahead(model)) is not None:
        wrong = (
            f"its attention looks at later tokens too ({why}): it would learn to copy what it is to predict"
        )
        todo = "give a causal language model; if it was trained as one, correct that key"
        raise ModelError(describe(where, wrong, got=type(model).__name__, todo=todo))
    _check_numbers(config.to_dict(), where)


def said_of_config(model: PreTrainedModel, written: Mapping[str, Any], where: str) -> list[str]:
    """Words on keys of config.json, as `written`, that have no effect: other architectures' names, and
    misspelt keys."""
    kind, said = model.config.model_type, []
    named = written.get("architectures")
    for name in [name for name in named if isinstance(name, str)] if isinstance(named, list) else []:
        other = _model_type_of(name)
        if name != type(model).__name__ and other is not None and not _same_family(other, kind):
            said.append(
                f"{where}: architectures names {name}, model_type is {kind}: it is loaded as"
                f" {type(model).__name__}"
            )
    known = _known_keys(model.config) | _OLD_KEYS
    for name in written:
        near = did_you_mean(name, known - written.keys(), cutoff=_ALIKE) if name not in known else None
        if near is not None and near.strip("_") != name.strip("_"):
            said.append(f"{where}: {name} is no key that transformers knows of {kind}; did you mean {near}?")
    return said


def said_of_generation(model: PreTrainedModel, where: str) -> list[str]:
    """Words on tokens that generation is to stop at and the model does not have."""
    settings, rows = getattr(model, "generation_config", None), model.get_input_embeddings()
    many = getattr(rows, "num_embeddings", None)
    ends = getattr(settings, "eos_token_id", None)
    wrong = [
        end for end in _each(ends) if isinstance(end, int) and isinstance(many, int) and not 0 <= end < many
    ]
    if not wrong:
        return []
    return [
        f"{where}: eos_token_id {', '.join(map(str, wrong))}: the model has {many:,} tokens, and never stops"
        " at these"
    ]


def _check_numbers(settings: Mapping[str, Any], where: str, *, of_rope: bool = False) -> None:
    """Numbers that make every loss NaN, raise in the middle of a run or have no effect, though their type is
    right."""
    factors = [name for name in _OF_ROPE if settings.get(name) not in (None, 1, 1.0)] if of_rope else []
    if factors and settings.get("rope_type", settings.get("type")) in (None, "default"):
        wrong = f"{factors[0]} of the rotary frequencies has no effect without a rope_type"
        raise ModelError(
            describe(where, wrong, got=dict(settings), todo="name the rope_type, or take it out")
        )
    for name, value in settings.items():
        if isinstance(value, Mapping):
            _check_numbers(value, where, of_rope=of_rope or name.startswith("rope_"))
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if name.endswith(("dropout", "_pdrop", "_dropout_prob")) and not 0 <= value < 1:
            raise ModelError(describe(where, f"{name} is no share", expected="0 or more, below 1", got=value))
        if name.endswith(("_eps", "_epsilon")) and not 0 <= value < 1:
            raise ModelError(
                describe(where, f"{name} is no small number", expected="0 or more, below 1", got=value)
            )
        if (name.endswith("theta") or (of_rope and name in _OF_ROPE)) and not 0 < value < math.inf:
            raise ModelError(
                describe(where, f"{name} gives no rotary frequencies", expected="a number above 0", got=value)
            )


def _looks_ahead(model: PreTrainedModel) -> str | None:
    """The key that makes it so."""
    text = model.config.get_text_config()
    if getattr(text, "is_causal", True) is False:
        return "is_causal: false"
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return f"use_bidirectional_attention: {getattr(text, 'use_bidirectional_attention', None)}"
    if getattr(text, "is_decoder", True) is False:
        for module in model.modules():
            if (
                type(module).__name__.endswith("SelfAttention")
                and getattr(module, "is_causal", None) is False
            ):
                return "is_decoder: false"
    return None


def _model_type_of(name: str) -> str | None:
    """Of a class of transformers; None for a name it does not have, such as one that came with its code."""
    with contextlib.suppress(Exception):  # a class whose packages are not installed
        return getattr(getattr(transformers, name).config_class, "model_type", None)
    return None


def _same_family(one: str, other: str) -> bool:
    """A model of text and images has a type of its own, and its text another."""
    return one.removesuffix("_text") == other.removesuffix("_text")


def _known_keys(config: PreTrainedConfig) -> set[str]:
    known = {*config.attribute_map, *inspect.signature(type(config).__init__).parameters}
    known |= inspect.signature(PreTrainedConfig.__init__).parameters.keys()
    with contextlib.suppress(Exception):  # one that cannot be made of nothing
        known |= type(config)().to_dict().keys()
    return known


def _each(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else [value]
