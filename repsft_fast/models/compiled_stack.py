"""All compiled layers of a row under one autograd function: of a layer the host calls its graph, and no more.

A compiled layer costs the host some 155 µs an update, whatever it computes: guards, wrappers, an autograd
function each. Where `record` has found the two functions behind every layer of a shape, a row goes through
them one after another and nothing else (`layer_pass`).

The bits are those of layers called one by one. So nothing is decided here for a run: a row that does not fit
takes that path, by itself, as do rows of shapes without pairs. What has to hold, and is looked at:

at warm-up   the pairs give their layers' bits (`layer_pair`); a pass through the whole model meets all layers
             in their order, each with the arguments that were recorded, and nothing else reads what is
             handed from one to the next (`rehearse`)
every row    the weights are the same, trained as they were, and nobody has put a hook on one, on a layer or
             on what autograd keeps; no layer is recomputed; torch's own settings are the same
every layer  hidden state and arguments are those that follow; weights have not been written between forward
             and backward

Only inside `running()`, whose caller goes backward by `loss.backward()`, once: `torch.autograd.grad` would
not find the weights.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import is_dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from repsft_fast.errors import TrainingError
from repsft_fast.models.all_layers import AtOnce, all_are
from repsft_fast.models.layer_call import NotRecorded, likeness_of
from repsft_fast.models.layer_pair import Pair, record, same
from repsft_fast.models.layer_pass import Counts, Pass, Plan
from repsft_fast.row import Row

_NO_ROOM = "there is no memory to try"
# what anybody may ask of a tensor without using its numbers
_LOOKS = {"shape", "device", "dtype", "ndim", "is_cuda", "requires_grad", "layout", "is_cpu", "is_meta"}
_LOOKS |= {"size", "dim", "stride", "numel", "is_contiguous", "is_floating_point", "__len__"}


class Stack:
    """The recorded layers of one model.

    why      shape → why its rows go layer by layer
    counts   of passes inside `running`
    """

    def __init__(self) -> None:
        self.layers: list[nn.Module] = []
        self.forwards: list[Callable[..., Any]] = []  # that the layers are called by
        self.allowed = True  # False: nothing is recorded (several ranks)
        self.why: dict[Any, str] = {}
        self.counts = Counts()
        self.passing: Pass | None = None
        self._recorded: dict[Any, dict[int, Pair]] = {}
        self._plans: dict[Any, Plan] = {}

    def forget(self) -> None:
        """What is recorded: layers are compiled anew."""
        for known in (self.why, self._recorded, self._plans):
            known.clear()

    def record(
        self, number: int, shape: Any, compiled: Callable[..., Any], call: Any, *, wanted: bool
    ) -> None:
        """Keep the functions of one layer for a shape, from a call (hidden, args, kwargs) that has its graph.
        Raises nothing but want of memory."""
        if not self.allowed or shape in self.why:
            return
        try:
            pair = record(self.layers[number], compiled, *call, wanted=wanted)
            self._recorded.setdefault(shape, {})[number] = pair
        except NotRecorded as told:
            self.why[shape] = str(told)
        except torch.OutOfMemoryError:
            self.why[shape] = _NO_ROOM
            raise
        except Exception as error:  # of torch's own insides, which another release may have otherwise
            self.why[shape] = _words(error)

    def rehearse(self, shape: Any, model: nn.Module, call: Callable[[], Any]) -> str:
        """Take a shape whose layers are recorded into use, if a pass of the model, `call`, shows that it may
        be. Returns why not, or nothing. Nothing is left of the pass."""
        pairs = self._recorded.pop(shape, {})
        if not self.allowed:
            return ""
        if shape not in self.why and len(pairs) != len(self.layers):
            self.why[shape] = "a layer was not called"
        if shape in self.why:
            return self.why[shape]
        try:
            if any(getattr(module, "layerdrop", 0.0) for module in model.modules()):
                raise NotRecorded("layers are left out at random (layerdrop)")
            plan = Plan(model, self.layers, [pairs[number] for number in range(len(self.layers))])
            self.passing = rehearsal = Rehearsal(plan)
            drawn = _random_streams()
            with torch.no_grad(), _Watch(rehearsal):
                result = call()
            rehearsal.end()
            with torch.enable_grad():
                if not plan.holds():
                    raise NotRecorded("layers or weights have hooks, or are recomputed")
            # a loop that draws may leave a layer out, another time
            if rehearsal.alike and _random_streams() == drawn:
                self._rehearse_at_once(plan, model, call, result)
            self._plans[shape] = plan
            return ""
        except (NotRecorded, TrainingError) as told:
            self.why[shape] = str(told)
        except torch.OutOfMemoryError:
            self.why[shape] = _NO_ROOM
        except Exception as error:
            self.why[shape] = _words(error)
        finally:
            self.passing = None
        return self.why[shape]

    def _rehearse_at_once(self, plan: Plan, model: nn.Module, call: Callable[[], Any], expected: Any) -> None:
        """Let one call of the model's stand for all layers, if its result is the same."""
        try:
            at_once = AtOnce(model, self.layers, self.forwards)
        except LookupError:
            return
        self.passing = rehearsal = Rehearsal(plan)
        at_once.begin(partial(rehearsal.all_layers, plan))
        try:
            with torch.no_grad():
                result = call()
            rehearsal.end()
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return  # a model that does more than call its layers: each is called
        finally:
            at_once.end()
        if rehearsal.met and at_once.holds() and _same_bits(result, expected):
            plan.at_once = at_once

    @contextmanager
    def running(self, shape: Any = None) -> Iterator[None]:
        """A forward pass inside may go through here; its loss has to go backward by `.backward()`, once.
        shape: of the row that passes, if it is known."""
        self.passing = passing = Pass(self._plans, self.counts)
        plan = self._plans.get(shape)
        at_once = plan.at_once if plan is not None else None
        if plan is None or at_once is None or not (at_once.holds() and plan.holds()):
            at_once = None
        else:
            at_once.begin(partial(passing.all_layers, plan))
        try:
            yield
            passing.end(met=at_once is not None)
        finally:
            self.passing = None
            if at_once is not None:
                at_once.end()


class Rehearsal(Pass):
    """A pass without gradients that shows whether a plan's rows may take it.

    handed  what layers gave to one another
    alike   every layer was given the very objects that the first was given
    """

    def __init__(self, plan: Plan):
        super().__init__({}, Counts())
        self.handed: list[Tensor] = []
        self.alike = True
        self._plan, self.inside, self._done = plan, False, False
        self._given: Any = None

    def begin(self, shape: Any, hidden: Tensor) -> Plan | None:
        return self._plan if self.fits(self._plan, hidden) else None

    def fits(self, plan: Plan, hidden: Tensor) -> bool:
        """Without gradients here."""
        return not self._done and likeness_of(hidden)[:4] == plan.pairs[0].hidden[:4]

    def layer(self, number: int, shape: Any, hidden: Tensor, args: Any, kwargs: Any) -> tuple[bool, Tensor]:
        self.inside = True
        try:
            found = super().layer(number, shape, hidden, args, kwargs)
        finally:
            self.inside = False
        if not found[0]:
            raise NotRecorded("a layer is given other arguments than when it was recorded")
        names, values = tuple(kwargs), (*args, *kwargs.values())
        self._given = self._given or (names, values)
        self.alike &= names == self._given[0] and all_are(values, self._given[1])
        if self.plan is not None:
            self.handed.append(found[1])
        return found

    def keep(self, kept: list[Any]) -> None:
        pass

    def join(self, plan: Plan, output: Tensor) -> Tensor:
        self._done = True
        return output

    def end(self, *, met: bool = False) -> None:
        super().end(met=met)
        if not self._done:
            raise NotRecorded("no layer was called")


class _Watch(TorchFunctionMode):
    """Nobody but the next layer reads what a layer hands on: its gradient would be lost."""

    def __init__(self, rehearsal: Rehearsal):
        super().__init__()
        self.rehearsal = rehearsal

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.rehearsal.inside and self.rehearsal.handed and _uses(func):
            given = [*args, *(kwargs or {}).values()]
            lists = [each for value in given if isinstance(value, tuple | list) for each in value]
            if any(value is one for value in (*given, *lists) for one in self.rehearsal.handed):
                raise NotRecorded("something else reads what a layer hands on")
        return func(*args, **(kwargs or {}))


def _random_streams() -> Any:
    """Where everything stands that a model may draw from."""
    torchs = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]
    numpys = np.random.get_state(legacy=True)
    return [state.tolist() for state in torchs], random.getstate(), str(numpys)


def _uses(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(func.__self__, "__name__", "")
    return name not in _LOOKS


def _words(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {line}"


def running(model: Any, row: Row | None = None) -> Any:
    """`Stack.running` of a model's compiled layers; nothing for a model without. row: the one that passes;
    None: it is not known, and every layer is called."""
    layers = getattr(model, "compiled_layers", None)
    if layers is None:
        return nullcontext()
    if row is None or not layers.on:
        return layers.stack.running()
    slots, borders = row.tokens.shape[-1], len(row.cu_seqlens)
    return layers.stack.running((slots, borders, row.max_seqlen, model.training, torch.is_grad_enabled()))


def _same_bits(found: Any, expected: Any) -> bool:
    pairs = list(zip(_tensors(found), _tensors(expected), strict=True))
    return bool(pairs) and all(same(a, b) for a, b in pairs)


def _tensors(result: Any) -> list[Tensor]:
    """Of a tuple of tensors and of records of tensors, as a model's loss gives them."""
    fields = [vars(part).values() if is_dataclass(part) else (part,) for part in result]
    return [value for part in fields for value in part if isinstance(value, Tensor)]
