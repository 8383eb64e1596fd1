"""Load any Hugging Face causal LM by path or configuration and give it `loss(row)`.

Precision: parameters are held in `param_dtype` (fp32) and computed with in `compute_dtype`. Where the two
differ, one rank holds masters beside them (`optim.masters`), several cast through FSDP2's mixed precision
(`distributed.shard`). Frozen weights (LoRA) are held in `compute_dtype`: they never take a step too small for
it. On CPU both are fp32 unless asked otherwise.

Not done here, and refused or said: a mixture-of-experts' auxiliary loss is not added (asking for it by
`output_router_logits` is refused); length-dependent RoPE sees the longest position of its row, so it is one
of the named exceptions of law 2.
"""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from repsft_fast.errors import ModelError, describe
from repsft_fast.hub import offline
from repsft_fast.models.checks import check_head, check_loads_again, no_packed_rows
from repsft_fast.models.compiled import compile_layers
from repsft_fast.models.completeness import check_finite, check_header, check_whole
from repsft_fast.models.config_checks import check_meant, said_of_config, said_of_generation
from repsft_fast.models.configuration import config_of
from repsft_fast.models.folder import CONFIG, folder_of, settings_of, stored_weights
from repsft_fast.models.foreign_files import no_weights
from repsft_fast.models.guards import bounded_building, check_memory, first_words, library
from repsft_fast.models.layers import (
    apply_layer_kernels,
    check_layer_kernels,
    checkpoint_activations,
)
from repsft_fast.models.lengths import forget_longest, learned_positions
from repsft_fast.models.lora import LoraSettings, add_lora
from repsft_fast.models.loss import Head, LossSettings, attach_loss, backbone_of, supported_dtype
from repsft_fast.models.paths import CORRECT, located, unreadable
from repsft_fast.models.readable import model_form
from repsft_fast.models.tokenizer import load_tokenizer
from repsft_fast.models.vocabulary import grow_vocabulary
from repsft_fast.ops.attention import NAME, register
from repsft_fast.ops.attention_choice import check_backend, own_attention

__all__ = ["config_of", "load_model", "load_tokenizer"]

_NO_INTERFACE = "its layers do not call transformers' attention interface"


def load_model(
    path_or_config: str | Path | PreTrainedConfig | Mapping[str, Any],
    *,
    device: torch.device | str = "cpu",
    param_dtype: str | torch.dtype = torch.float32,
    compute_dtype: str | torch.dtype | None = None,
    attention: str = "auto",
    lora: LoraSettings | Mapping[str, Any] | Any | None = None,
    activation_checkpointing: str = "none",
    compile: bool = False,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    packed: bool = True,
    skip_below: float = 0.0,
    layer_kernels: str = "auto",
    random_weights: bool = False,
    chunk_bytes: int | None = None,
    weights_on: torch.device | str | None = None,
    vocabulary: int | None = None,
) -> PreTrainedModel:
    """A causal LM in training mode on `device`, with `model.loss(row)`.

    path_or_config: folder or hub id; a `.gguf` file; `package:NAME/FILE` for a file inside an installed
    package; a configuration (object or mapping with `model_type`) for random weights, drawn by torch's
    default generator of the device they are made on (`weights_on`; with lora the CPU).
    compute_dtype: None = bfloat16 on CUDA, param_dtype elsewhere; `distributed.shard` casts where it differs.
    attention, activation_checkpointing, layer_kernels, compile: see `ops.attention`, `models.layers`,
    `models.compiled`.
    packed: rows hold several documents, kept apart by our attention; False: one each, with the
    architecture's own. random_weights: use the path's architecture only. chunk_bytes: of logits the head
    holds at once; None = by device. weights_on: cpu, or meta where none are read: `distributed.shard(…,
    arriving=True)` brings the weights to `device`, and `check_head` comes after that. None = `device`.
    vocabulary: ids below it get rows of their own where the model has none (`models.vocabulary`).
    device meta: the architecture without memory, to be sized and never trained; no weights are read.
    Raises ModelError when the model cannot be loaded or would not train on what was asked.
    """
    with library("device", device, "give cpu, cuda or meta"):
        device = torch.device(device)
    place = device if weights_on is None else torch.device(weights_on)
    held, computed = _dtypes(param_dtype, compute_dtype, device)
    options = _options(computed if lora is not None else held, attention, packed)
    _check_can_run(layer_kernels, compile, device, place)
    source = _Source.of(path_or_config, gguf_file, trust_remote_code, options)
    model, said = source.weights(place, random=random_weights, frozen=lora is not None)
    if vocabulary is not None and (grown := grow_vocabulary(model, vocabulary, frozen=lora is not None)):
        said.append(grown)
    head = Head.of(model)
    model.to(place)
    apply_layer_kernels(model, layer_kernels, device, compile=compile)
    # Weights that have yet to arrive can be asked nothing.
    if weights_on is None and device.type != "meta":
        check_head(model, head)
    attach_loss(model, LossSettings(head, attention, packed, skip_below, chunk_bytes))
    if lora is not None:
        add_lora(model, LoraSettings.of(lora))
    checkpoint_activations(model, activation_checkpointing)
    compile_layers(model, compile)
    return _ready(model, computed, said, source.path)


@dataclass(frozen=True)
class _Source:
    """The model that was named: its architecture, and how transformers is asked for it."""

    config: PreTrainedConfig
    path: str | None  # None: only a configuration was given
    gguf_file: str | None
    trust_remote_code: bool
    options: dict[str, Any]  # of from_config and from_pretrained
    where: str  # what errors call it
    got: str

    @staticmethod
    def of(
        path_or_config: str | Path | PreTrainedConfig | Mapping[str, Any],
        gguf_file: str | None,
        trust_remote_code: bool,
        options: dict[str, Any],
    ) -> "_Source":
        path = str(path_or_config) if isinstance(path_or_config, str | Path) else None
        config = config_of(path_or_config, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
        if path is None:
            where, got = "model.config", config.model_type
        else:
            where, got = "model.path config.json", path
        return _Source(config, path, gguf_file, trust_remote_code, options, where, got)

    def weights(self, place: torch.device, *, random: bool, frozen: bool) -> tuple[Any, list[str]]:
        """(the model with its weights at `place`, what is to be said of them)."""
        # Built without memory first: sizes and names are checked before memory is taken and a weight is read,
        # on every rank alike. Building writes into the configuration, so it gets a copy.
        shape = _on_meta(
            copy.deepcopy(self.config), self.trust_remote_code, self.options, self.where, self.got
        )
        check_meant(shape, self.where)
        check_loads_again(shape)
        check_memory(shape, self.options["dtype"], place, self.where, self.got)
        if self.path is not None and not random:
            return self._stored(shape, self.path, place)
        # Frozen weights are in no checkpoint: a resumption draws them again, and on another device would draw
        # others.
        at = place if not frozen or place.type == "meta" else torch.device("cpu")
        if at.type == "meta":
            return shape, []
        return _drawn(self.config, at, self.trust_remote_code, self.options), []

    def _stored(
        self, shape: PreTrainedModel, path: str, place: torch.device
    ) -> tuple[PreTrainedModel, list[str]]:
        """`weights` out of the path's files, which are compared with `shape` before they are read."""
        said = _check_stored(shape, path, self.gguf_file, self.options)
        _generate_as_saved(shape, *located(path, self.gguf_file)[::2])
        if place.type == "meta":
            return shape, said or []
        model, zero = _from_path(path, self.config, self.gguf_file, self.trust_remote_code, self.options)
        if said is None:  # the hub sent it only now
            said = _check_stored(shape, path, self.gguf_file, self.options)
        if said is not None:
            model.tie_weights()  # transformers 5.0 holds a head twice that the file has twice
        return model, [*(said or []), *zero]


def _dtypes(
    param_dtype: str | torch.dtype, compute_dtype: str | torch.dtype | None, device: torch.device
) -> tuple[torch.dtype, torch.dtype]:
    """(what parameters are held in, what is computed in)."""
    held = supported_dtype(param_dtype, "model.param_dtype")
    if compute_dtype is not None:
        return held, supported_dtype(compute_dtype, "model.compute_dtype")
    return held, torch.bfloat16 if device.type == "cuda" else held


def _options(dtype: torch.dtype, attention: str, packed: bool) -> dict[str, Any]:
    """What transformers is asked for: the weights' type, and our attention where rows are packed."""
    options: dict[str, Any] = {"dtype": dtype}
    if (implementation := register() if packed else own_attention(attention)) is not None:
        options["attn_implementation"] = implementation
    check_backend(attention)
    return options


def _check_can_run(layer_kernels: str, compile: bool, device: torch.device, place: torch.device) -> None:
    """ModelError for what this machine, or a mixture of settings, cannot do: before anything is read."""
    check_layer_kernels(layer_kernels, compile)
    if "cuda" in (device.type, place.type) and not torch.cuda.is_available():
        raise ModelError(describe("device", "torch finds no CUDA device", got=str(device), todo="give cpu"))


def _ready(model: Any, computed: torch.dtype, said: list[str], path: str | None) -> PreTrainedModel:
    """The model as training finds it, with what is known of it only now that it is complete."""
    forget_longest(model)
    model.position_limit = learned_positions(backbone_of(model))
    ends = "model.config" if path is None else "model.path generation_config.json"
    model.load_said = [*said, *said_of_generation(model, ends)]  # words for the user
    model.compute_dtype = computed
    model_form(model)  # the folder may be gone when the model is saved
    return model.train()


def _on_meta(
    config: PreTrainedConfig, trust_remote_code: bool, options: dict[str, Any], where: str, got: str
) -> PreTrainedModel:
    with bounded_building(where, got), torch.device("meta"):
        model = _from_config(config, trust_remote_code, options, where, got)
    model.tie_weights()  # transformers 5.0 does not, on meta
    return model


def _check_stored(
    model: PreTrainedModel, path: str, gguf_file: str | None, options: dict[str, Any]
) -> list[str] | None:
    """What is to be said of the folder's files, None where none can be compared; ModelError unless they hold
    this model.

    Not known before: GGUF files, whose names transformers turns into its own as it reads them, and what the
    hub has yet to send. `_from_path` checks both when they are read.
    """
    folder, gguf, _ = located(path, gguf_file)
    if not gguf and os.path.isfile(folder):  # enough for a configuration
        raise unreadable(FileNotFoundError(), path, folder=folder)
    here = None if gguf else folder_of(folder)
    if here is None:
        return None
    stored = stored_weights(here, "model.path")
    if stored is None:
        if os.path.isdir(folder):
            raise no_weights(here, "model.path")
        return None
    said = said_of_config(model, settings_of(here, "model.path"), f"model.path {CONFIG}")
    return [*check_header(model, stored, "model.path", path, options), *said]


def _from_path(
    path: str,
    config: PreTrainedConfig,
    gguf_file: str | None,
    trust_remote_code: bool,
    options: dict[str, Any],
) -> tuple[PreTrainedModel, list[str]]:
    folder, gguf, unreached = located(path, gguf_file)
    # Safetensors or GGUF only: the other format transformers would fall back to is a pickle.
    read: dict[str, Any] = {**(gguf or {"use_safetensors": True}), "config": config}
    options = {**options, **read, "output_loading_info": True, "ignore_mismatched_sizes": True}

    def instead(error: BaseException) -> ModelError:
        if _names_our_attention(error):
            return no_packed_rows(path, _NO_INTERFACE)
        return unreadable(error, path, folder=folder)

    with library("model.path", path, instead=instead), offline(unreached):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=trust_remote_code, **options
        )
    model, info = loaded
    check_whole(model, info, "model.path", path)
    said = check_finite(model, "model.path", path)
    if gguf:
        _forget_quantisation(model)
    return model, said


def _drawn(
    config: PreTrainedConfig, place: torch.device, trust_remote_code: bool, options: dict[str, Any]
) -> PreTrainedModel:
    """Random weights, drawn where they will be: a GPU draws a billion in a blink and a CPU in seven seconds.
    The same seed gives the same on the same kind of device."""
    if place.type == "cpu":
        return _from_config(config, trust_remote_code, options)
    with place:
        model = _from_config(config, trust_remote_code, options)
    _compute_tables_on_the_host(model, model)
    return model


def _compute_tables_on_the_host(module: nn.Module, owner: PreTrainedModel) -> None:
    """Rotary tables, last bit and all, as they are where the saved model is loaded again: pow is another
    function on a GPU.

    What `_init_weights` fills in modules without parameters; nothing is drawn.
    """
    owner = module if isinstance(module, PreTrainedModel) else owner
    for child in module.children():
        _compute_tables_on_the_host(child, owner)
    if next(module.buffers(recurse=False), None) is not None and next(module.parameters(), None) is None:
        owner._init_weights(module)


def _from_config(
    config: PreTrainedConfig,
    trust_remote_code: bool,
    options: dict[str, Any],
    where: str = "model.config",
    got: str | None = None,
) -> PreTrainedModel:
    def instead(error: BaseException) -> ModelError:
        if _names_our_attention(error):
            return no_packed_rows(config.model_type, _NO_INTERFACE)
        wrong, todo = first_words(error), "correct it"
        if wrong.startswith("Unrecognized configuration class"):  # and a list of all that are
            wrong = (
                f"model_type {config.model_type} is no causal language model to transformers"
                f" {transformers.__version__}"
            )
            todo = "give a causal language model, of text alone"
        return ModelError(describe(where, wrong, got=got or config.model_type, todo=todo))

    with library(where, got, instead=instead):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **options)


def _generate_as_saved(model: Any, folder: str, unreached: bool) -> None:
    """Beside reading weights `from_pretrained` does this: ranks that are sent theirs must generate as the one
    that read."""
    with library("model.path generation_config.json", folder, CORRECT), offline(unreached):
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except OSError:
            return  # a model saved without


def _forget_quantisation(model: Any) -> None:
    """A GGUF model is held de-quantised but still called quantised, and `save_pretrained` refuses those."""
    model.hf_quantizer = None
    model.__dict__.pop("is_quantized", None)
    model.__dict__.pop("quantization_method", None)
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config


def _names_our_attention(error: BaseException) -> bool:
    """Architectures with a table of attentions of their own (GPT-J, Falcon) do not know ours."""
    return NAME in str(error) and isinstance(error, KeyError | ValueError)
