"""A row's way through compiled layers of which the pairs of functions are known (`compiled_stack`).

Each layer's call runs the forward's function, without gradients, and hands its bare output to the model,
which gives it to the next layer. The last layer's output is the one result of an autograd function, whose
backward runs all backward functions, last layer first, and adds the weights' gradients into `.grad` as
autograd does: taken as it is where there is none, in `grad_dtype` and in the weight's layout; else added in
place. What a layer kept is freed when its backward is through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.guards import GlobalStateGuard
from torch.nn.modules import module as modules

from repsft_fast.errors import TrainingError, describe
from repsft_fast.models.all_layers import AtOnce
from repsft_fast.models.layer_call import Given, NotRecorded, likeness_of
from repsft_fast.models.layer_pair import Pair

_TOLD = attrgetter("requires_grad", "dtype", "_backward_hooks", "_post_accumulate_grad_hooks")
_HOOKS = attrgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Counts:
    """Passes that went through here (those of them in one call of the model's loop), and passes that could
    have and did not."""

    stacked: int = 0
    at_once: int = 0
    apart: int = 0


class Plan:
    """The pairs of all layers for a shape, and what of the model they rely on."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], pairs: Sequence[Pair]):
        self.layers, self.pairs = layers, pairs
        inside = [m for layer in layers for m in layer.modules()]
        tables: list[Any] = [table for m in inside for table in (m._parameters, m._buffers)]
        self._places = [(table, name) for table in tables for name, held in table.items() if held is not None]
        self.tensors: list[Tensor] = [table[name] for table, name in self._places]
        everywhere = [id(p) for m in model.modules() for p in m._parameters.values() if p is not None]
        of_layers = {id(tensor) for tensor in self.tensors if isinstance(tensor, nn.Parameter)}
        if sum(number in of_layers for number in everywhere) != len(of_layers):
            raise NotRecorded("a weight has two places")
        with torch.enable_grad():
            self._settings = GlobalStateGuard()
        self._told = self._bare()
        if any(hooks is not None for told in self._told for hooks in told[2:]):
            raise NotRecorded("a weight has a hook")
        if not {id(weight) for pair in pairs for weight, _ in pair.weights} <= of_layers:
            raise NotRecorded("weights are others inside a layer's call than outside")
        # one object for alike arguments, so that they are looked at once a row
        known: dict[int, Given] = {}
        self.givens = []
        for pair in pairs:
            same = next((given for given in known.values() if given == pair.given), pair.given)
            known[id(same)] = same
            self.givens.append(same)
        self.kinds = list(known.values())
        for one, following in pairwise(pairs):
            if one.output[:4] != following.hidden[:4] or not following.hidden[4]:
                raise NotRecorded("a layer's output is not what the next one was recorded with")
        self._anchor = torch.empty(0, requires_grad=True)
        self.at_once: AtOnce | None = None  # where one call of the model's may stand for all layers

    def holds(self) -> bool:
        """Whether everything is as it was recorded. Objects and flags alone are looked at."""
        live = [table.get(name) for table, name in self._places]
        return (
            all(map(is_, live, self.tensors))
            and (list(map(_TOLD, self.tensors)) == self._told or self._bare() == self._told)
            and not any(
                any(_HOOKS(layer)) or getattr(layer, "gradient_checkpointing", False) for layer in self.layers
            )
            and not modules._has_any_global_hook()
            and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
            and not torch._C._len_torch_function_stack()
            and self._settings.check()
        )

    def _bare(self) -> list[tuple[Any, ...]]:
        """A hook that was taken away has left an empty table behind, which is none."""
        return [(*told[:2], *(hooks or None for hooks in told[2:])) for told in map(_TOLD, self.tensors)]

    def versions(self) -> list[int]:
        return [tensor._version for tensor in self.tensors]

    def joined(self, first: Tensor, tape: Tape) -> Tensor:
        output: Tensor = _Layers.apply(self._anchor, first, tape)
        return output


class Tape:
    """What a row's forward pass left for its backward: of each layer what its pair keeps."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.kept: list[list[Any]] = []
        self.read: list[Tensor] = []  # tensors of the calls
        self.versions: list[int] = []
        self.output: Tensor | None = None

    def close(self, output: Tensor) -> None:
        self.output = output
        self.versions = self.plan.versions() + [tensor._version for tensor in self.read]

    def check(self) -> None:
        if self.versions != self.plan.versions() + [tensor._version for tensor in self.read]:
            wrong = "weights or inputs of layers were written between a row's forward and its backward pass"
            raise TrainingError(describe("training", wrong, todo="write them after the update's last row"))


class _Layers(torch.autograd.Function):
    """All layers of a row. anchor: it alone makes the output need a gradient where the first hidden state
    does not."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, first: Tensor, tape: Tape) -> Tensor:
        ctx.tape = tape
        output, tape.output = tape.output, None
        assert output is not None
        return output

    @staticmethod
    def backward(ctx: Any, *ups: Any) -> Any:
        tape, ctx.tape = ctx.tape, None
        if tape is None or torch.is_grad_enabled():
            wrong = "compiled layers of a row go backward once, and have no gradient of their gradient"
            raise TrainingError(describe("training", wrong))
        tape.check()
        (up,) = ups
        for pair in reversed(tape.plan.pairs[: len(tape.kept)]):
            gradients = pair.gradients(tape.kept.pop(), up)
            up = gradients[pair.hidden_at]
            add_gradients(pair, gradients)
        return None, up, None


def add_gradients(pair: Pair, found: Any) -> None:
    """A layer's gradients into `.grad`, as autograd does it: the first is taken as it is, in the weight's
    `grad_dtype` and layout; later ones are added in place."""
    sums: list[Tensor] = []
    added: list[Tensor] = []
    casts: list[tuple[Any, Tensor]] = []
    for (weight, at), strides in zip(pair.weights, pair.strides, strict=True):
        gradient, held, kind = found[at], weight.grad, weight.grad_dtype
        if held is not None:
            sums.append(held)
            added.append(gradient if kind is None or held.dtype == kind else gradient.to(kind))
        elif (kind is None or gradient.dtype == kind) and strides == weight.stride():
            weight.grad = gradient
        else:
            casts.append((weight, gradient))
    if sums:
        torch._foreach_add_(sums, added)
    if casts:
        empty = [
            torch.empty_strided(w.shape, w.stride(), dtype=w.grad_dtype or g.dtype, device=g.device)
            for w, g in casts
        ]
        torch._foreach_copy_(empty, [gradient for _, gradient in casts])
        for (weight, _), gradient in zip(casts, empty, strict=True):
            weight.grad = gradient


class Pass:
    """A row's way through the layers."""

    def __init__(self, plans: Mapping[Any, Plan], counts: Counts):
        """plans: by shape."""
        self.plans, self.counts = plans, counts
        self.plan: Plan | None = None
        self.number = 0  # of the layer that is next
        self.met = False  # one call for all layers was made
        self.hidden: Tensor | None = None  # what the last one handed on
        self._version = 0
        self._first: Any = None
        self._tape: Any = None
        self._apart = False
        self._known: dict[int, Any] = {}

    def begin(self, shape: Any, hidden: Tensor) -> Plan | None:
        plan = self.plans.get(shape)
        return plan if plan is not None and self.fits(plan, hidden) and plan.holds() else None

    def fits(self, plan: Plan, hidden: Tensor) -> bool:
        return type(hidden) is Tensor and likeness_of(hidden) == plan.pairs[0].hidden

    def all_layers(self, plan: Plan, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The last layer's output, all being given what the first is: `plan.at_once` has looked at that."""
        self.met = True
        if not self.fits(plan, hidden):
            for layer in plan.layers:
                hidden = layer(hidden, *args, **kwargs)
            return hidden
        self.plan, self._first, self._tape = plan, hidden, Tape(plan)
        self._tape.read.append(hidden)
        owns = {id(given): self._own(given, args, kwargs) for given in plan.kinds}
        if None in owns.values():
            wrong = "compiled layers were given other arguments than at warm-up"
            raise TrainingError(describe("training", wrong, todo="set model.compile: false"))
        enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            for pair, given in zip(plan.pairs, plan.givens, strict=True):
                hidden, kept = pair.compute(hidden, owns[id(given)])
                self.keep(kept)
        finally:
            torch._C._set_grad_enabled(enabled)
        self.counts.at_once += 1
        return self._close(hidden)

    def layer(self, number: int, shape: Any, hidden: Tensor, args: Any, kwargs: Any) -> tuple[bool, Tensor]:
        """(whether it ran here, its output); else (False, what the layer is to be called with)."""
        plan = self.plan
        if plan is None:
            if number or self._apart:
                return False, hidden
            plan = self.begin(shape, hidden)
            if plan is None:
                self._apart = True
                self.counts.apart += 1
                return False, hidden
            self.plan, self.number, self._first, self._tape = plan, 0, hidden, Tape(plan)
            self._tape.read.append(hidden)
        elif number != self.number or hidden is not self.hidden or hidden._version != self._version:
            raise self._torn()
        own = self._own(plan.givens[number], args, kwargs)
        if own is None:
            return self._misfit(hidden)
        enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # a context manager takes 3 µs, in every layer
        try:
            output, kept = plan.pairs[number].compute(hidden, own)
        finally:
            torch._C._set_grad_enabled(enabled)
        self.keep(kept)
        if number + 1 == len(plan.pairs):
            return True, self._close(output)
        self.number, self.hidden, self._version = number + 1, output, output._version
        return True, output

    def keep(self, kept: list[Any]) -> None:
        self._tape.kept.append(kept)

    def join(self, plan: Plan, output: Tensor) -> Tensor:
        self._tape.close(output)
        self.counts.stacked += 1
        return plan.joined(self._first, self._tape)

    def end(self, *, met: bool = False) -> None:
        """The pass is over. TrainingError where it ended amid the layers: what came out has no gradient; and
        where one call for all of them should have been met and was not."""
        if self.plan is not None or (met and not self.met):
            raise self._torn()

    def _own(self, given: Given, args: Any, kwargs: dict[str, Any]) -> Any:
        """The call's tensors that the graph reads. Equal objects are looked at once."""
        values, names = (*args, *kwargs.values()), tuple(kwargs)
        known: Any = self._known.get(id(given), (None, (), None))
        if known[0] == names and len(known[1]) == len(values) and all(map(is_, known[1], values)):
            return known[2]
        own = given.take(args, kwargs)
        if own is not None:
            self._known[id(given)] = names, values, own
            self._tape.read.extend(own)
        return own

    def _close(self, output: Tensor) -> Tensor:
        plan, self.plan, self.hidden = self.plan, None, None
        assert plan is not None
        joined = self.join(plan, output)
        self._first = self._tape = None
        self._known.clear()
        return joined

    def _misfit(self, hidden: Tensor) -> tuple[bool, Tensor]:
        """The layers so far are one function; from here on each is called by itself."""
        self._apart = True
        if self._tape.kept:
            hidden = self._close(hidden)
        self.plan = None
        return False, hidden

    def _torn(self) -> TrainingError:
        wrong = "a compiled layer was not called with what the one before it computed, as it was at warm-up"
        return TrainingError(describe("training", wrong, todo="set model.compile: false"))
