"""How fast it goes: three token counts, model FLOPs, MFU, peak memory. Formulas are printed with the figures.

slots    token places computed, padding included
tokens   real tokens
trained  tokens that carry loss

Model FLOPs of forward and backward (what the mathematics needs; recomputation is not counted):
    6 · P · tokens  +  6 · H · V · trained  +  6 · L · A·D · Σ len²
P counts the backbone's matrices only (no embedding table, no head; of experts the share a token meets);
the attention term counts the causal half of QKᵀ and PV (2 · len² · A·D forward per layer) three times, in the
L layers that attend; the head counts trained rows only, since no other row reaches it.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

# Dense bf16 peak, FLOP/s, from the makers' data sheets; the longest matching name wins.
PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


# of a token
_CHOSEN_EXPERTS = ("num_experts_per_tok", "moe_topk", "moe_k", "num_selected_experts", "top_k_experts")


@dataclass(frozen=True)
class ModelShape:
    """What the FLOPs formula needs to know of a model."""

    backbone_parameters: int  # matrices of the layers, each counted once
    layers: int  # with attention
    attention_width: int  # A · D
    hidden: int
    vocabulary: int

    @staticmethod
    def of(model: Any) -> "ModelShape":
        """Read it from an HF causal LM. Adapters and norms are left out: they are small and not always
        matmuls. Of experts a token meets some; of layers that carry a state (Mamba, linear attention,
        convolutions) only the matrices are counted."""
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        matrices, chosen = 0.0, _number(config, *_CHOSEN_EXPERTS)
        head = model.get_output_embeddings()
        for path, module in model.named_modules():
            if isinstance(module, nn.Embedding) or module is head or "lora_" in path:
                continue
            experts = "experts" in path.split(".")[-2:]  # one tensor holds all of them
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3 and experts and chosen:
                    matrices += parameter.numel() * min(chosen / parameter.shape[0], 1.0)
                elif parameter.ndim == 2 and "bias" not in name:
                    matrices += parameter.numel()
        width = _attention_width(config)
        layers = _attention_layers(config)
        return ModelShape(round(matrices), layers, width, config.hidden_size, config.vocab_size)

    def flops(self, tokens: int, trained: int, sum_squared_lengths: int) -> float:
        """Forward and backward, by the formula at the head of this file."""
        return (
            6.0 * self.backbone_parameters * tokens
            + 6.0 * self.hidden * self.vocabulary * trained
            + 6.0 * self.layers * self.attention_width * sum_squared_lengths
        )


def _attention_width(config: Any) -> int:
    """A · D; 0 for layers without attention, as Mamba's. Latent attention's keys and values differ in width:
    the mean."""
    heads = _number(config, "num_attention_heads")
    keys = _number(config, "qk_nope_head_dim") + _number(config, "qk_rope_head_dim")
    if keys and (values := _number(config, "v_head_dim")):
        return heads * (keys + values) // 2
    return heads * _number(config, "head_dim") or _number(config, "hidden_size") * bool(heads)


def _attention_layers(config: Any) -> int:
    """Layers whose work grows with the square of a sample: of a hybrid's some."""
    kinds = next(
        (v for n in ("layer_types", "layers_block_type") if isinstance(v := getattr(config, n, None), list)),
        None,
    )
    if not kinds:
        return int(config.num_hidden_layers)
    return sum(str(kind).endswith(("attention", "hybrid")) and kind != "linear_attention" for kind in kinds)


def _number(config: Any, *names: str) -> int:
    """The first whole number of a configuration under one of these names, 0 where it has none (or one for
    each layer)."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), 0)


@dataclass
class Work:
    """Host counts of the work done; they come from the plan, so they cost no sync."""

    updates: int = 0
    samples: int = 0
    slots: int = 0
    tokens: int = 0
    trained: int = 0
    sum_squared_lengths: int = 0

    def add(self, other: "Work") -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def minus(self, other: "Work") -> "Work":
        return Work(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})

    def copy(self) -> "Work":
        return Work(**self.values())

    def values(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def peak_flops(device: torch.device, override: float | None = None) -> float | None:
    """This device's dense bf16 peak in FLOP/s, or None where none is known (then no MFU is shown)."""
    if override:
        return override
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    matches = [key for key in PEAK_FLOPS if name.startswith(key)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def peak_memory_bytes(device: torch.device) -> int:
    """Peak bytes allocated on the device; on CPU the process's peak resident size."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024
