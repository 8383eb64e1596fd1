"""What a compiled decoder layer calls: torch's two functions for it, and which of the layer's tensors are
their inputs.

Around a graph torch does much in every call: guards, wrappers at run time, an autograd function. A call whose
guards have held before needs none of it. `record` looks on while a compiled layer is called once, and keeps
the two functions and the way from the layer's arguments to theirs. Nothing is guessed: what is not found to
be the very tensor of the layer, of its call or of the forward's results is refused (`NotRecorded`), and what
was found is run beside the layer and has to give the same bits.

`_forward_cls`, `compiled_fw`, `compiled_bw` and `_backward_impl` are torch's own names (2.11 and 2.13, both
in `torch/_functorch/_aot_autograd/runtime_wrappers.py`); a torch without them is refused likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from repsft_fast.models.layer_call import Given, NotRecorded, likeness, likeness_of, tensors_in


@dataclass(frozen=True)
class Pair:
    """The functions of one layer for one shape, both with all arguments in one list, which they empty.

    inputs      of the forward: weights and numbers; None where a call's own go
    hidden_at   where the hidden state goes; its gradient comes out of the backward at the same place
    own_at      where the tensors of `given` go
    kept        those of the forward's results that the backward begins with; the first result is the layer's
    up_at       where among them the gradient of the layer's output goes
    up_like     its strides
    weights     what is trained of the layer, and where its gradient comes out
    strides     of these gradients
    """

    forward: Callable[[list[Any]], Any]
    backward: Callable[[list[Any]], Any]
    inputs: tuple[Any, ...]
    hidden_at: int
    hidden: Any
    given: Given
    own_at: tuple[int, ...]
    kept: tuple[int, ...]
    up_at: int
    up_like: tuple[int, ...]
    weights: tuple[tuple[nn.Parameter, int], ...]
    strides: tuple[tuple[int, ...], ...]
    output: Any

    def compute(self, hidden: Tensor, own: tuple[Tensor, ...]) -> tuple[Tensor, list[Any]]:
        """The layer's output and what its backward needs, in the compiled forward's own order. Called without
        gradients."""
        inputs = list(self.inputs)
        inputs[self.hidden_at] = hidden
        for at, tensor in zip(self.own_at, own, strict=True):
            inputs[at] = tensor
        results = self.forward(inputs)
        return results[0], [results[at] for at in self.kept]

    def gradients(self, kept: list[Any], up: Tensor) -> Any:
        """Of every input of the forward, None where there is none. Empties `kept`."""
        if up.stride() != self.up_like:
            up = torch.empty_strided(up.shape, self.up_like, dtype=up.dtype, device=up.device).copy_(up)
        kept.insert(self.up_at, up)
        return self.backward(kept)


@dataclass
class Seen:
    """One call of a compiled layer, forward and backward, as its two functions saw it."""

    inputs: list[Any]
    results: list[Any]
    backward_inputs: list[Any]
    gradients: list[Any]


def record(
    layer: nn.Module,
    compiled: Callable[..., Any],
    hidden: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    wanted: bool,
) -> Pair:
    """The functions behind `compiled(hidden, *args, **kwargs)`, which has been called before with these.

    wanted: the hidden state needs a gradient. NotRecorded where they cannot be called by hand, or give other
    bits than the layer does. Gradients, weights and arguments are as they were.
    """
    hidden = hidden.detach().requires_grad_(wanted)
    trained = [p for p in layer.parameters() if p.requires_grad]
    asked: list[Tensor] = [hidden, *trained] if wanted else [*trained]
    if not asked:
        raise NotRecorded("a layer's output needs no gradient")
    given, tensors = _given(args, kwargs)
    before = _state(layer, tensors)
    with torch.enable_grad():
        output = compiled(hidden, *args, **kwargs)
        function = _function_of(output)
        _check_alone(output.grad_fn)
        with _watched(function) as (forwards, backwards):
            output = compiled(hidden, *args, **kwargs)
            if _function_of(output) is not function:
                raise NotRecorded("a layer has several graphs for one shape")
            up = torch.ones_like(output)
            found = torch.autograd.grad(output, asked, up, allow_unused=True)
    if len(forwards) != 1 or len(backwards) != 1:
        raise NotRecorded("a layer is more than one graph")
    seen = Seen(*forwards[0], *backwards[0])
    if _state(layer, tensors) != before:
        raise NotRecorded("a layer writes something beside its output")
    pair = _pair(layer, function, hidden, given, tensors, seen, output, up)
    _check_gradients(pair, asked, found, seen)
    _check_bits(pair, hidden, args, kwargs, seen, up, lambda: compiled(hidden, *args, **kwargs), asked)
    return pair


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[tuple[Any, ...], Tensor]]:
    like, tensors = likeness((args, kwargs)), dict(tensors_in((args, kwargs)))
    if any(tensor.requires_grad for tensor in tensors.values()):
        raise NotRecorded("a layer is given a second tensor that needs a gradient")
    return like, tensors


def _state(layer: nn.Module, tensors: dict[Any, Tensor]) -> Any:
    """What a call might change: attributes of the layer's modules, and tensors in place."""
    held = [*layer.parameters(), *layer.buffers(), *tensors.values()]
    attributes = [
        {name: id(value) for name, value in vars(module).items() if name != "forward"}
        for module in layer.modules()
    ]
    return attributes, [tensor._version for tensor in held]


def _function_of(output: Any) -> Any:
    function: Any = getattr(getattr(output, "grad_fn", None), "_forward_cls", None)
    names = ("compiled_fw", "compiled_bw", "_backward_impl")
    if not isinstance(output, Tensor) or not all(hasattr(function, name) for name in names):
        raise NotRecorded("a layer's output does not come out of one compiled function")
    if not getattr(function.compiled_fw, "_boxed_call", False):
        raise NotRecorded("the compiler's functions do not take their inputs in one list")
    if getattr(function, "maybe_subclass_metadata", None) is not None:
        raise NotRecorded("a layer's tensors are of another kind")
    return function


def _check_alone(last: Any) -> None:
    """A layer that breaks is a graph and what stands before it, which would be left out."""
    met, open_ = {last}, [last]
    while open_:
        for node, _ in open_.pop().next_functions:
            if hasattr(getattr(node, "_forward_cls", None), "compiled_fw"):
                raise NotRecorded("a layer is more than one graph")
            if node is not None and node not in met:
                met.add(node)
                open_.append(node)


@contextmanager
def _watched(function: Any) -> Iterator[tuple[list[Any], list[Any]]]:
    """Inside, calls of its forward and of its backward leave their inputs and results."""
    forward, backward = function.compiled_fw, function._backward_impl
    forwards: list[Any] = []
    backwards: list[Any] = []

    def watch(inputs: list[Any]) -> Any:
        given = list(inputs)
        results = forward(inputs)
        forwards.append((given, list(results)))
        return results

    def watch_backward(context: Any, inputs: list[Any]) -> Any:
        given = list(inputs)
        results = backward(context, inputs)
        backwards.append((given, list(results)))
        return results

    watch._boxed_call = True  # type: ignore[attr-defined]
    function.compiled_fw, function._backward_impl = watch, staticmethod(watch_backward)
    try:
        yield forwards, backwards
    finally:
        function.compiled_fw, function._backward_impl = forward, staticmethod(backward)


def _pair(
    layer: nn.Module,
    function: Any,
    hidden: Tensor,
    like: Any,
    tensors: dict[tuple[Any, ...], Tensor],
    seen: Seen,
    output: Tensor,
    up: Tensor,
) -> Pair:
    results, first = seen.results, seen.results[0]
    if _memory(first) != _memory(output):
        raise NotRecorded("a layer's output is not what its graph computes")
    inputs, hidden_at, own, weights = _sources(layer, hidden, tensors, seen.inputs)
    if hidden_at is None:
        raise NotRecorded("a layer's graph does not read its hidden state")
    gradients = seen.gradients
    if len(gradients) != len(inputs):
        raise NotRecorded("a layer's backward gives gradients of other things too")
    reached = [(weight, at) for weight, at in weights if gradients[at] is not None]
    kept, up_at = _kept(seen.backward_inputs, results, up)
    _check_memory([gradients[at] for _, at in reached], [*seen.backward_inputs, *seen.inputs])
    return Pair(
        forward=function.compiled_fw,
        backward=function.compiled_bw,
        inputs=tuple(inputs),
        hidden_at=hidden_at,
        hidden=likeness_of(hidden),
        given=Given(like, tuple(place for place, _ in own)),
        own_at=tuple(at for _, at in own),
        kept=kept,
        up_at=up_at,
        up_like=up.stride(),
        weights=tuple(reached),
        strides=tuple(gradients[at].stride() for _, at in reached),
        output=likeness_of(first),
    )


def _sources(
    layer: nn.Module, hidden: Tensor, tensors: dict[tuple[Any, ...], Tensor], given: list[Any]
) -> tuple[list[Any], int | None, list[tuple[Any, int]], list[tuple[Any, int]]]:
    """The forward's inputs with None for a call's own; where the hidden state is; where each of the call's
    tensors is; where each trained weight is."""
    held = {id(tensor) for tensor in (*layer.parameters(), *layer.buffers())}
    places = {id(tensor): place for place, tensor in tensors.items()}
    hidden_at, own, weights, inputs = None, [], [], []
    for at, value in enumerate(given):
        inputs.append(value)
        if value is hidden and hidden_at is None:
            hidden_at, inputs[at] = at, None
        elif isinstance(value, Tensor) and id(value) in held:
            if value.requires_grad:
                weights.append((value, at))
        elif isinstance(value, Tensor) and id(value) in places:
            own.append((places[id(value)], at))
            inputs[at] = None
        elif type(value) is not int:  # a number stands for a shape's, and the shape is the pair's own
            raise NotRecorded("a layer's graph reads a tensor that is none of the layer's or its call's")
    if len({id(weight) for weight, _ in weights}) != len(weights):
        raise NotRecorded("a layer's graph reads a weight twice")
    return inputs, hidden_at, own, weights


def _memory(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return type(value), value
    return value.data_ptr(), value.dtype, value.shape, value.stride()


def _kept(backward: list[Any], results: list[Any], up: Tensor) -> tuple[tuple[int, ...], int]:
    """Which results the backward's inputs are, and where the output's gradient stands among them."""
    # the last of equals, never the output: it is handed on, and kept by nobody
    known = {_memory(result): at for at, result in enumerate(results) if at}
    kept, up_at = [], []
    for at, value in enumerate(backward):
        if isinstance(value, Tensor) and value.data_ptr() == up.data_ptr() and value.numel():
            up_at.append(at)
        elif _memory(value) in known:
            kept.append(known[_memory(value)])
        else:
            raise NotRecorded("a layer's backward reads what its forward does not give out")
    if len(up_at) != 1:
        raise NotRecorded("a layer's backward does not read its output's gradient")
    return tuple(kept), up_at[0]


def _check_memory(gradients: list[Tensor], others: list[Any]) -> None:
    """Gradients become `.grad`, so each must be memory of its own."""
    mine = [gradient.data_ptr() for gradient in gradients]
    if len(set(mine)) != len(mine) or set(mine) & {x.data_ptr() for x in others if isinstance(x, Tensor)}:
        raise NotRecorded("gradients of a layer share memory")


def _check_gradients(pair: Pair, asked: list[Tensor], found: tuple[Any, ...], seen: Seen) -> None:
    """Autograd found, for each that was asked, what lies at its place."""
    places = {id(weight): at for weight, at in pair.weights}
    if pair.hidden[-1]:  # it needs a gradient, and is the first that was asked
        places[id(asked[0])] = pair.hidden_at
    for tensor, gradient in zip(asked, found, strict=True):
        at = places.get(id(tensor))
        mine = None if at is None else seen.gradients[at]
        if gradient is not None and mine is not None:
            mine = mine.to(gradient.dtype)  # a weight's may be added up in another type
        if not same(mine, gradient):
            raise NotRecorded("a layer's gradients are not where its inputs are")


def _check_bits(
    pair: Pair,
    hidden: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seen: Seen,
    up: Tensor,
    again: Callable[[], Any],
    asked: list[Tensor],
) -> None:
    """The pair gives the layer's bits. Where the layer does not give its own bits twice (kernels that add in
    any order), that its functions and their inputs are the layer's has to do."""
    own = pair.given.take(args, kwargs)
    if own is None:
        raise NotRecorded("a layer's arguments change while it is called")
    with torch.no_grad():
        output, kept = pair.compute(hidden, own)
        gradients = pair.gradients(kept, up)
    picked = itemgetter(pair.hidden_at, *(at for _, at in pair.weights), pair.hidden_at)
    pairs = list(zip(picked(gradients), picked(seen.gradients), strict=True))
    if same(output, seen.results[0]) and all(same(a, b) for a, b in pairs):
        return
    found = []
    for _ in range(2):
        with torch.enable_grad():
            once = again()
            found.append([once.detach(), *torch.autograd.grad(once, asked, up, allow_unused=True)])
    if all(same(a, b) for a, b in zip(*found, strict=True)):
        raise NotRecorded("a layer's functions by themselves give other numbers")


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Bit for bit, whatever the numbers."""
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    one, other = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(one, other)
