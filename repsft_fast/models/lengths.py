"""Lengths at which a model computes something else, as its configuration names them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

_WINDOWS = ("sliding_window", "attention_window_size", "window_size", "attention_chunk_size")
_LEARNED = ("wpe", "embed_positions", "position_embeddings", "position_embedding", "positions_embed", "pos_emb")


@dataclass(frozen=True)
class Lengths:
    """In positions. Samples on different sides of one of `apart`, and any two longer than `alone_above`, share no row."""

    apart: tuple[int, ...] = ()  # longrope: one set of frequencies up to here, another past it
    alone_above: int | None = None  # dynamic: past it the frequencies follow the longest document of the row
    windows: tuple[int, ...] = ()  # sliding windows and attention chunks: no border for rows, but for the check at start
    made_for: int | None = None  # positions the model was trained with

    @staticmethod
    def of(config: PreTrainedConfig) -> Lengths:
        text: Any = config.get_text_config()
        made_for = _first(text, "max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx")
        apart, alone = set(), None
        for rope in _ropes(text):
            kind = str(rope.get("rope_type", rope.get("type", "default")))
            if kind == "longrope" and (first := rope.get("original_max_position_embeddings") or made_for):
                apart.add(int(first))
            elif "dynamic" in kind and made_for:
                alone = made_for
        windows = {w for name in _WINDOWS if (w := _first(text, name)) is not None}
        return Lengths(tuple(sorted(apart)), alone, tuple(sorted(windows)), made_for)

    @property
    def borders(self) -> tuple[int, ...]:
        """Every length past which a sample is computed in another way than up to it, shortest first."""
        return tuple(sorted({*self.apart, *self.windows, *([self.alone_above] if self.alone_above is not None else [])}))


def learned_positions(backbone: nn.Module) -> int | None:
    """How many positions there are embeddings for, where a model learned them one by one; None: it computes them."""
    found = [
        module.num_embeddings - int(getattr(module, "offset", 0) or 0)  # OPT and its like keep two rows in front
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _LEARNED
    ]
    return min(found, default=None)


def forget_longest(model: nn.Module) -> None:
    """Dynamic RoPE as each row needs it: transformers keeps the frequencies of the longest row it has seen until a short one
    comes, so that what a sample is trained on hung on the samples before it. Every forward pass starts as a fresh model's."""

    def reset(module: Any, arguments: Any) -> None:
        for name in [*vars(module), *module._buffers]:
            if name.endswith("max_seq_len_cached"):
                setattr(module, name, module.original_max_seq_len)
            elif name.endswith("original_inv_freq"):
                live = name.replace("original_", "")
                setattr(module, live, getattr(module, name).to(getattr(module, live).device))

    for module in model.modules():
        if hasattr(module, "max_seq_len_cached") and "dynamic" in str(getattr(module, "rope_type", "")):
            module.register_forward_pre_hook(reset)


def _ropes(text: Any) -> list[dict[str, Any]]:
    """One set of rotary parameters, or one for each type of layer."""
    given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if not isinstance(given, dict):
        return []
    return [given, *(inner for inner in given.values() if isinstance(inner, dict))]


def _first(text: Any, *names: str) -> int | None:
    return next((v for n in names if isinstance(v := getattr(text, n, None), int) and not isinstance(v, bool) and v > 0), None)
