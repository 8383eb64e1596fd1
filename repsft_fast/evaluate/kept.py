"""Keys and values of a batch of replies whose rows leave it.

transformers' own layer concatenates: every new token copies all that is kept.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from repsft_fast.errors import ModelError, describe

# Layers whose rows `reorder_cache` picks and whose content depends on a row's own tokens alone, by name: not
# all are in every transformers.
KNOWN = {
    "Kept",
    "DummyLayer",
    "DynamicIndexedLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
}


class Kept(DynamicLayer):
    """Full attention's layer with room to grow: keys and values are the front of larger tensors."""

    _room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        had, new = self.get_seq_length(), key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < had + new:
            room = had + new + max(64, (had + new) // 4)
            wider = [x.new_empty(*x.shape[:-2], room, x.shape[-1]) for x in (key_states, value_states)]
            if self.keys is not None and self.values is not None and had:
                wider[0][..., :had, :], wider[1][..., :had, :] = self.keys, self.values
            self._room = (wider[0], wider[1])
        for kept, states in zip(self._room, (key_states, value_states), strict=True):
            kept[..., had : had + new, :] = states
        self.keys, self.values = (kept[..., : had + new, :] for kept in self._room)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self._room is not None:
            length = self.get_seq_length()
            self._room = (self._room[0].index_select(0, beam_idx), self._room[1].index_select(0, beam_idx))
            self.keys, self.values = (kept[..., :length, :] for kept in self._room)


def new_cache(model: Any) -> DynamicCache:
    """An empty cache for this model; ModelError naming a layer that is not known."""
    cache = DynamicCache(config=model.config)
    cache.layers = [Kept() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if unknown := {type(layer).__name__ for layer in cache.layers} - KNOWN or not cache.layers:
        raise ModelError(describe("model", f"its cache is not known: {unknown}"))
    return cache
