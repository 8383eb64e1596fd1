"""Decoder layers through torch.compile: one compiled function for all layers of a class, used for the shapes
it was made for and for no other.

`compile_layers` gives every layer a `forward` that chooses, call by call, between the class's own function
and the compiled one. Hooks, FSDP2's too, and activation checkpointing stand outside of it, parameters are its
inputs: layers that compute alike share a graph, and names of parameters stay as they were. Nothing is
captured: no mode, and no option that captures; CUDA graphs of the compiler give wrong gradients where they
accumulate over rows (pytorch #96693).

Two things of a row are left open in a graph, its length and the bound on its longest segment (`opened`), so
that one graph serves all lengths; every other size is a constant (`dynamic=False`). In deterministic runs the
compiler takes another kernel for short rows (a reduction over two axes at once pays from 5 million elements
on), and makes a graph for each side of that border. No kernel and no byte is more than in a graph of one
length.

A run makes its graphs before its first update (`training.warm_up`): from then on a row of a length that was
not warmed, a generation or a probe runs the plain layers, so nothing is compiled in the loop (law 8).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.sym_node import DynamicInt
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from repsft_fast.distributed import decoder_layers
from repsft_fast.models.compiled_stack import Stack
from repsft_fast.models.compiler_options import compiler_options

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
    failed  they are plain because they could not be compiled
    shared  the compiler may put kernels side by side (`compiler_options`)
    stack   warm shapes whose layers a training row passes together
    """

    def __init__(self) -> None:
        self.on = True
        self.failed = False
        self.shared = True
        self.warm: set[Shape] | None = None
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._warming: Warming | None = None
        self.stack = Stack()

    def add(self, layer: nn.Module) -> None:
        """Let calls of this layer choose."""
        function, recomputes = _without_checkpointing(type(layer).forward)
        if function not in self._compiled:
            self._compiled[function] = _through_compiler(function, compiler_options())
        plain = functools.partial(function, layer)

        def compiled(*args: Any, **kwargs: Any) -> Any:
            return self._compiled[function](layer, *args, **kwargs)

        number, stack = len(self.stack.layers), self.stack
        stack.layers.append(layer)

        def choose(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._warming is not None:
                return self._warming.meet(number, plain, compiled, (hidden_states, *args), kwargs)
            if stack.passing is not None and self.on:
                shape = None if number else shape_of(layer, hidden_states, kwargs)
                ran, hidden_states = stack.passing.layer(number, shape, hidden_states, args, kwargs)
                if ran:
                    return hidden_states
            run = compiled if self._takes(layer, hidden_states, kwargs) else plain
            if run is compiled and self.warm is None:
                kwargs = opened(hidden_states, args, kwargs)
            return run(hidden_states, *args, **kwargs)

        @functools.wraps(layer.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if recomputes and layer.gradient_checkpointing and layer.training:
                again: Any = layer._gradient_checkpointing_func
                return again(functools.partial(choose, **kwargs), *args)
            return choose(*args, **kwargs)

        layer.forward = forward
        stack.forwards.append(forward)

    def separate(self) -> bool:
        """From here on the compiler gives every kernel a launch of its own; False where it did so already."""
        if not self.shared or compiler_options() is None:
            return False
        self.shared = False
        for function in self._compiled:
            self._compiled[function] = _through_compiler(function, None)
        self.stack.forget()
        return True

    def _takes(self, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> bool:
        if not self.on or self.warm is None:
            return self.on
        return shape_of(layer, hidden, kwargs) in self.warm

    @contextmanager
    def warming(self, *, reached: bool = True) -> Iterator[Warming]:
        """A forward pass inside makes the graphs of the shape it comes with, beside its plain result."""
        self._warming = Warming(self.stack, reached=reached)
        try:
            yield self._warming
        finally:
            self._warming = None


def _through_compiler(function: Any, options: dict[str, Any] | None) -> Callable[..., Any]:
    """The one place where anything is compiled."""
    return torch.compile(function, dynamic=False, options=options)


def shape_of(layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Shape | None:
    """None: a generation, whose shapes change with every token."""
    packed = kwargs.get("packed")
    if packed is None:
        return None
    row = (hidden.shape[1], len(packed.cu_seqlens), packed.max_seqlen)
    return (*row, layer.training, torch.is_grad_enabled())


class Warming:
    """A forward pass under way that compiles beside computing. `error`: why a layer cannot be compiled;
    `out_of_memory`: there was no room to try."""

    def __init__(self, stack: Stack, *, reached: bool) -> None:
        """stack: told how each layer is called without what torch does around its graph. reached: the first
        layer's input needs a gradient, because what embeds tokens is trained. Without it the graph is another
        one."""
        self.stack, self.reached = stack, reached
        self.error: Exception | None = None
        self.out_of_memory = False

    def meet(self, number: int, plain: Any, compiled: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """The plain layer's output; a graph for its shape was made on the way, and compared with it. Raises
        nothing of the compiler's: other ranks wait for this one's next layer."""
        with torch.no_grad():
            output = plain(*args, **kwargs)
        if self.error is None:
            try:
                self._compile(number, plain, compiled, args, kwargs)
            except torch.OutOfMemoryError:
                self.out_of_memory = True
            except Exception as error:
                self.error = error
        return output

    def _compile(self, number: int, plain: Any, compiled: Any, args: Any, kwargs: Any) -> None:
        layer = self.stack.layers[number]
        if not layer.training:  # an evaluation
            with torch.no_grad():
                expected = _first(plain(*args, **kwargs))
                _compare([expected], [_first(compiled(*args, **opened(args[0], args[1:], kwargs)))])
            return
        trained = [p for p in layer.parameters() if p.requires_grad]
        wanted, self.reached = self.reached, self.reached or bool(trained)
        found = []
        for function in (plain, compiled):
            hidden = args[0].detach().requires_grad_(wanted)
            given = opened(hidden, args[1:], kwargs) if function is compiled else kwargs
            with torch.enable_grad():
                output = _first(function(hidden, *args[1:], **given))
            inputs: list[Tensor] = [hidden, *trained] if wanted else [*trained]
            # not `.backward()`: nothing is left in `.grad`
            found.append([output.detach(), *(_gradients(output, inputs) if inputs else ())])
        if not draws(layer):
            _compare(*found)
            with torch.enable_grad():
                shape = shape_of(layer, args[0], kwargs)
            self.stack.record(number, shape, compiled, (args[0], args[1:], kwargs), wanted=wanted)


def opened(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a layer's call whose graph is to serve rows of every length: hidden states and what
    lies beside them along the row, rotary tables and positions, are marked, and the bound on a segment
    becomes a number that is no constant. A graph once made serves calls without marks.

    hidden: [1, T, H]. Only what the first call of a shape traces is other for it; no number is.
    """
    length = hidden.shape[1]
    if length > 1:  # torch makes a constant of one, whatever is marked
        for tensor in pytree.tree_leaves((hidden, args, kwargs)):
            if isinstance(tensor, Tensor):
                along = 0 if tensor.ndim == 1 else 1
                # The first axis of others is the batch: one.
                if tensor.ndim and tensor.shape[along] == length and (tensor.ndim == 1 or len(tensor) == 1):
                    torch._dynamo.maybe_mark_dynamic(tensor, along)
    packed = kwargs.get("packed")
    if packed is None or packed.max_seqlen <= 1:
        return kwargs
    # Equal sizes are taken for one: by another number the bound is not taken for the length.
    bound = packed.max_seqlen + (packed.max_seqlen == length)
    return kwargs | {"packed": dataclasses.replace(packed, max_seqlen=DynamicInt(bound))}


def compile_layers(model: PreTrainedModel, enabled: bool) -> None:
    """Let every decoder layer be compiled, at its first call of a shape. ModelError for a model whose layers
    are not found."""
    if not enabled:
        return
    # Where a layer breaks every length of a row is a graph of its own, with gradients and without; past its
    # limit (8) torch would quietly run the layers uncompiled.
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
