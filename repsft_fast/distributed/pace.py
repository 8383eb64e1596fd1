"""A forward pass in which one of several ranks runs out of memory, without the others waiting for it in vain.

Ranks gather the parameters of every layer together (FSDP2), so one that leaves a row in its middle cannot be
reached until it has made the gathers that are left of it. It makes them, computes nothing, and all meet at
the pass's end. What a layer's gather itself takes must be there: a rank that has no room for one layer's
parameters ends the run, as in an update.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from repsft_fast.distributed.reset import reset
from repsft_fast.distributed.sharding import decoder_layers


class Pace:
    """Used as a context around the rows of a pass under no_grad. A model that is not sharded has no gathers:
    nothing is done to it."""

    def __init__(self, model: nn.Module):
        self.model: Any = model
        self._layers: list[Any] = decoder_layers(model) if isinstance(model, FSDPModule) else []
        self._begun = 0

    def __enter__(self) -> Pace:
        # After FSDP2's own, which gathers: a layer is counted when its gather is made.
        self._hooks = [layer.register_forward_pre_hook(self._begin_layer) for layer in self._layers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def begin_row(self) -> None:
        """The next row begins here, on every rank."""
        self._begun = 0

    def finish_row(self) -> None:
        """Make what is left of the row's gathers, of one that raised on the way or was not begun."""
        if not self._layers:
            return
        # The root's comes before the first layer's. One that was made, or is on its way, is not made again.
        for module in self._layers[self._begun :] if self._begun else (self.model, *self._layers):
            module.unshard()
            module.reshard()
        reset(self.model)

    def _begin_layer(self, *_: Any) -> None:
        self._begun += 1
