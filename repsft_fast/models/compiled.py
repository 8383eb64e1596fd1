"""Decoder layers through torch.compile: one compiled function for all layers of a class, used for the shapes
it was made for and for no other.

`compile_layers` gives every layer a `forward` that chooses, call by call, between the class's own function
and the compiled one. Hooks, FSDP2's too, and activation checkpointing stand outside of it, parameters are its
inputs: layers that compute alike share a graph, and names of parameters stay as they were. Shapes are static
(`dynamic=False`), and nothing is captured: no mode and no options, whose CUDA graphs give wrong gradients
where they accumulate over rows (pytorch #96693).

A run makes its graphs before its first update (`training.warm_up`): from then on a row of a length that was
not warmed, a generation or a probe runs the plain layers, so nothing is compiled in the loop (law 8).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from repsft_fast.distributed import decoder_layers

MOST_GRAPHS = 1024
# How far a compiled layer may lie from the plain one, in the plain one's own size: rounding in another order,
# and no more. A wrong kernel is off by about 1.
ALIKE = {torch.float64: 1e-9, torch.float32: 2e-3}
ALIKE_HALF = 0.06

# (tokens of the row, borders, bound on the longest segment, in training mode, with gradients): what a graph
# is made for, beside what a run holds constant
Shape = tuple[int, int, int, bool, bool]


class CompiledLayers:
    """The choice between compiled and plain layers of one model; lives on it as `model.compiled_layers`.

    on      False: plain ones, whatever the shape
    warm    shapes that have graphs; None: any shape is compiled for as it comes
    """

    def __init__(self) -> None:
        self.on = True
        self.warm: set[Shape] | None = None
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._warming: Warming | None = None

    def add(self, layer: nn.Module) -> None:
        """Let calls of this layer choose."""
        function, recomputes = _without_checkpointing(type(layer).forward)
        if function not in self._compiled:
            self._compiled[function] = torch.compile(function, dynamic=False)
        plain, compiled = (functools.partial(f, layer) for f in (function, self._compiled[function]))

        def choose(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._warming is not None:
                return self._warming.meet(layer, plain, compiled, (hidden_states, *args), kwargs)
            run = compiled if self._takes(layer, hidden_states, kwargs) else plain
            return run(hidden_states, *args, **kwargs)

        @functools.wraps(layer.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if recomputes and layer.gradient_checkpointing and layer.training:
                again: Any = layer._gradient_checkpointing_func
                return again(functools.partial(choose, **kwargs), *args)
            return choose(*args, **kwargs)

        layer.forward = forward

    def _takes(self, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> bool:
        if not self.on or self.warm is None:
            return self.on
        packed = kwargs.get("packed")
        if packed is None:  # a generation, whose shapes change with every token
            return False
        row = (hidden.shape[1], len(packed.cu_seqlens), packed.max_seqlen)
        return (*row, layer.training, torch.is_grad_enabled()) in self.warm

    @contextmanager
    def warming(self, *, reached: bool = True) -> Iterator[Warming]:
        """A forward pass inside makes the graphs of the shape it comes with, beside its plain result."""
        self._warming = Warming(reached=reached)
        try:
            yield self._warming
        finally:
            self._warming = None


class Warming:
    """A forward pass under way that compiles beside computing. `error`: why a layer cannot be compiled;
    `out_of_memory`: there was no room to try."""

    def __init__(self, *, reached: bool) -> None:
        """reached: the first layer's input needs a gradient, because what embeds tokens is trained. Without
        it the graph is another one."""
        self.reached = reached
        self.error: Exception | None = None
        self.out_of_memory = False

    def meet(self, layer: nn.Module, plain: Any, compiled: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """The plain layer's output; a graph for its shape was made on the way, and compared with it. Raises
        nothing of the compiler's: other ranks wait for this one's next layer."""
        with torch.no_grad():
            output = plain(*args, **kwargs)
        if self.error is None:
            try:
                self._compile(layer, plain, compiled, args, kwargs)
            except torch.OutOfMemoryError:
                self.out_of_memory = True
            except Exception as error:
                self.error = error
        return output

    def _compile(self, layer: nn.Module, plain: Any, compiled: Any, args: Any, kwargs: Any) -> None:
        if not layer.training:  # an evaluation
            with torch.no_grad():
                _compare([_first(plain(*args, **kwargs))], [_first(compiled(*args, **kwargs))])
            return
        trained = [p for p in layer.parameters() if p.requires_grad]
        wanted, self.reached = self.reached, self.reached or bool(trained)
        found = []
        for function in (plain, compiled):
            hidden = args[0].detach().requires_grad_(wanted)
            with torch.enable_grad():
                output = _first(function(hidden, *args[1:], **kwargs))
            inputs: list[Tensor] = [hidden, *trained] if wanted else [*trained]
            # not `.backward()`: nothing is left in `.grad`
            found.append([output.detach(), *(_gradients(output, inputs) if inputs else ())])
        if not draws(layer):
            _compare(*found)


def compile_layers(model: PreTrainedModel, enabled: bool) -> None:
    """Let every decoder layer be compiled, at its first call of a shape. ModelError for a model whose layers
    are not found."""
    if not enabled:
        return
    # Every length of a row is a graph of its own, with gradients and without; past its limit (8) torch would
    # quietly run the layers uncompiled.
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, MOST_GRAPHS)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, MOST_GRAPHS)
    layers = CompiledLayers()
    for layer in decoder_layers(model):
        layers.add(layer)
    model.compiled_layers = layers  # type: ignore[assignment]  # no module


def compiled_layers(model: Any) -> CompiledLayers | None:
    """None: the model's layers are plain ones for good."""
    found: CompiledLayers | None = getattr(model, "compiled_layers", None)
    return found


def _without_checkpointing(forward: Callable[..., Any]) -> tuple[Callable[..., Any], bool]:
    """(a layer class's own function, whether transformers has put its recomputation around it).

    In newer versions (5.23) it stands in the class's `forward`, and asks whether it is the outermost: FSDP2's
    class has one more around it. Compiled with the layer it would make graphs of its own; it is called here,
    around whichever function is chosen. In older ones (5.17) it stands in `__call__`.
    """
    if forward.__code__.co_name != "forward_with_checkpointing":
        return forward, False
    inner: Callable[..., Any] = forward.__wrapped__  # type: ignore[attr-defined]
    return inner, True


def draws(module: nn.Module) -> bool:
    """Whether a forward pass in training mode draws random numbers."""
    config = getattr(module, "config", None)
    dropouts = [getattr(config, "attention_dropout", 0.0)]
    for part in module.modules():
        dropouts += [part.p] if isinstance(part, nn.Dropout) else [getattr(part, "attention_dropout", 0.0)]
    return any(isinstance(p, float) and p > 0.0 for p in dropouts)


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Of the inputs, one number for each where it is not used; the weights' as one vector's parts."""
    found = torch.autograd.grad(output, inputs, torch.ones_like(output), allow_unused=True)
    return tuple(output.new_zeros(1) if g is None else g for g in found)


def _compare(plain: list[Tensor], compiled: list[Tensor]) -> None:
    """ArithmeticError where the compiled layer computes something else: its output, or its gradients taken
    together (one that is zero by symmetry has no size of its own to be held to)."""
    limit = ALIKE.get(plain[0].dtype, ALIKE_HALF)
    for what, a, b in (("output", plain[:1], compiled[:1]), ("gradients", plain[1:], compiled[1:])):
        if not a:
            continue
        size = torch.stack([x.double().norm() for x in a]).norm()
        off = torch.stack([(x.double() - y.double()).norm() for x, y in zip(a, b, strict=True)]).norm()
        # where the plain one is not finite itself there is nothing to hold the other to
        if bool(torch.isfinite(size)) and not bool(off <= limit * size):
            share = float(off / size)
            raise ArithmeticError(f"the compiled layer's {what} are off by {share:.2g} of their size")
