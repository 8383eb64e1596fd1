"""What is done to the decoder layers of a loaded model: fused kernels, activation checkpointing; whether they
are compiled (`models.compiled` does it).

activation_checkpointing: `full` recomputes every decoder layer in the backward pass (memory: one hidden state
per layer), `selective` every second one, starting with the first.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from repsft_fast.distributed import decoder_layers
from repsft_fast.errors import ModelError, describe

CHECKPOINT_EVERY = {"full": 1, "selective": 2}


def checkpoint_activations(model: PreTrainedModel, mode: str) -> None:
    """Recompute layers in backward. ModelError for an unknown mode or a model whose layers do not offer
    it."""
    if mode == "none":
        return
    if mode not in CHECKPOINT_EVERY:
        expected = "none, selective or full"
        raise ModelError(
            describe("model.activation_checkpointing", "is not known", expected=expected, got=mode)
        )
    # The random state is kept for the second forward only where one draws from it.
    recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=_draws(model))
    try:
        layers: list[Any] = decoder_layers(model)
    except ModelError as error:
        wrong = f"{type(model).__name__} cannot be checkpointed ({error})"
        raise ModelError(describe("model.activation_checkpointing", wrong, todo="set it to none")) from error
    for layer in layers[:: CHECKPOINT_EVERY[mode]]:
        if not hasattr(layer, "gradient_checkpointing"):
            wrong = f"{type(layer).__name__} cannot be checkpointed"
            raise ModelError(describe("model.activation_checkpointing", wrong, todo="set it to none"))
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = recompute


def compiles(asked: bool | str, layer_kernels: str, device: torch.device, *, packed: bool) -> bool:
    """Whether layers are compiled: as asked; `auto` on CUDA, unless liger's kernels are asked for or rows are
    single samples, whose lengths would each be compiled for. On a CPU compiling loses (an update of a small
    model took 578 ms in place of 495)."""
    if isinstance(asked, bool):
        return asked
    return device.type == "cuda" and layer_kernels != "liger" and packed


def check_layer_kernels(which: str, compile: bool) -> None:
    """ModelError for an unknown name, and for liger's kernels inside compiled layers.

    Each is fast alone; together they have been seen to compute something else without a word (LayerNorm,
    RMSNorm), to raise, and to be three times slower than compiling alone (SwiGLU). Source:
    github.com/linkedin/Liger-Kernel, issues 174, 871, 1330; github.com/huggingface/kernels-community, pull
    request 948.
    """
    if which not in ("auto", "liger", "none"):
        raise ModelError(
            describe("model.layer_kernels", "is not known", expected="auto, liger or none", got=which)
        )
    if which == "liger" and compile:
        wrong = "liger's kernels inside compiled layers have given wrong numbers without a word"
        todo = "set model.layer_kernels to auto or none to compile, or model.compile to false for liger"
        raise ModelError(
            describe("model.layer_kernels", wrong, got="liger with model.compile: true", todo=todo)
        )


def apply_layer_kernels(
    model: PreTrainedModel, which: str, device: torch.device, *, compile: bool = False
) -> None:
    """Liger's norms, rotary embedding and gated MLP for the architectures it knows; never its loss. device:
    of the training.

    `auto`: on CUDA, when liger-kernel is installed and knows the model, and the layers will not be compiled:
    the compiler fuses the same operations (see `check_layer_kernels`). Liger replaces functions of
    transformers' modules for the whole process, so a CPU copy of the same architecture in this process would
    use them too.
    """
    check_layer_kernels(which, compile)
    on_cuda = device.type == "cuda"
    if which == "none" or (which == "auto" and (compile or not on_cuda)):
        return
    if not on_cuda:
        raise ModelError(describe("model.layer_kernels", "liger needs a CUDA device", todo="set it to auto"))
    # auto asks for nothing that is not installed; who names liger wants to know.
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        if which == "auto":
            return
        raise ModelError(
            describe("model.layer_kernels", "liger-kernel cannot be imported", got=str(error))
        ) from error
    kind = model.config.model_type
    if kind in MODEL_TYPE_TO_APPLY_LIGER_FN:
        _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
        model.liger = True  # type: ignore[assignment]  # no module
    elif which == "liger":
        raise ModelError(
            describe("model.layer_kernels", "liger has no kernels for this architecture", got=kind)
        )


def has_liger(model: nn.Module) -> bool:
    """Whether liger's kernels stand in the place of this model's own."""
    return bool(getattr(model, "liger", False))


def _draws(model: nn.Module) -> bool:
    return any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()) or bool(
        getattr(getattr(model, "config", None), "attention_dropout", 0.0)
    )
