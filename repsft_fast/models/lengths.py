"""Lengths at which a model computes something else, as its configuration names them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

_WINDOWS = (
    "sliding_window", "sliding_window_size", "attention_window_size", "window_size", "local_attention",
    "keep_window_size", "attention_chunk_size",
)  # fmt: skip
_MADE_FOR = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "n_ctx",
    "max_target_positions",
)
_LEARNED = (
    "wpe",
    "embed_positions",
    "position_embeddings",
    "position_embedding",
    "positions_embed",
    "pos_emb",
)
# Tables that end where the configuration says, as learned ones do: angles (GPT-J, CodeGen, CTRL), and causal
# masks.
_TABLES = ("embed_positions", "pos_encoding", "causal_mask")
_ENDS = {"mpt": "max_seq_len", "reformer": "max_position_embeddings"}  # refused by code
_BESIDE_THE_TEXT = ("vision", "image", "visual", "audio")


@dataclass(frozen=True)
class Lengths:
    """In positions. Samples on different sides of one of `apart`, and any two longer than `alone_above`,
    share no row."""

    apart: tuple[int, ...] = ()  # longrope: one set of frequencies up to here, another past it
    alone_above: int | None = None  # dynamic: past it the frequencies follow the longest document of the row
    # sliding windows and attention chunks: no border for rows, but for the check at start
    windows: tuple[int, ...] = ()
    made_for: int | None = None  # positions the model was trained with

    @staticmethod
    def of(config: PreTrainedConfig) -> Lengths:
        text: Any = config.get_text_config()
        made_for = _first(text, *_MADE_FOR)
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
        return tuple(
            sorted(
                {*self.apart, *self.windows, *([self.alone_above] if self.alone_above is not None else [])}
            )
        )


def learned_positions(backbone: nn.Module) -> int | None:
    """How many positions a model has embeddings or a table for; None: it computes them as they come."""
    config = getattr(backbone, "config", None)
    found = [n] if (n := _first(config, _ENDS.get(getattr(config, "model_type", ""), ""))) is not None else []
    for path, module in backbone.named_modules():
        if any(word in path for word in _BESIDE_THE_TEXT):
            continue
        if isinstance(module, nn.Embedding) and path.rpartition(".")[2] in _LEARNED:
            # OPT keeps two rows in front
            found.append(module.num_embeddings - int(getattr(module, "offset", 0) or 0))
        for name in _TABLES:
            if isinstance(table := getattr(module, name, None), Tensor) and table.ndim >= 2:
                found.append(table.shape[-1 if name == "causal_mask" else 0])
    return min(found, default=None)


def forget_longest(model: nn.Module) -> None:
    """Dynamic RoPE as each row needs it: transformers keeps the frequencies of the longest row it has seen
    until a short one comes, so that what a sample is trained on hung on the samples before it. Every forward
    pass starts as a fresh model's."""

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
    return next(
        (
            v
            for n in names
            if isinstance(v := getattr(text, n, None), int) and not isinstance(v, bool) and v > 0
        ),
        None,
    )
