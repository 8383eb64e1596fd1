"""A row's way through all compiled layers in one call of the model's own loop.

The model goes through its list of layers and calls each, in most models with the same arguments. Each such
call costs the host some 20 µs, in which nothing is decided that the first had not decided. So while a row
passes, the model finds in the list's place one that it goes through once: what it meets there runs all
layers (`Pass.all_layers`).

It stands there only where a pass at warm-up has shown that every layer is given the very objects that the
first is given, and that the model's result has the same bits either way; and only while the list, its layers
and their `forward` are those of then. Who asks it for parameters, a length or one layer gets the real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from operator import is_
from typing import Any

from torch import nn

Call = Callable[..., Any]


class AtOnce:
    """Where a model keeps its layers, and what stands there while a row passes."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], forwards: Sequence[Call]):
        """forwards: what the layers have to be called by. LookupError for layers that are not a list of the
        model's, by themselves."""
        self._layers, self._forwards = list(layers), list(forwards)
        places = [
            (module._modules, name, held)
            for module in model.modules()
            for name, held in module._modules.items()
            if type(held) is nn.ModuleList and all_are(held._modules.values(), self._layers)
        ]
        if len(places) != 1:
            raise LookupError("layers are in no list of their own")
        (self._table, self._name, self._list) = places[0]
        self.call: Call | None = None
        self._instead = _Once(self._list, self)

    def holds(self) -> bool:
        """Whether list, layers and what they are called by are as they were."""
        return (
            self._table.get(self._name) is self._list
            and all_are(self._list._modules.values(), self._layers)
            and all_are([layer.__dict__.get("forward") for layer in self._layers], self._forwards)
        )

    def begin(self, call: Call) -> None:
        """From here on the model's loop calls `call` once, and no layer. Ended by `end`."""
        self.call = call
        self._table[self._name] = self._instead

    def end(self) -> None:
        self.call = None
        self._table[self._name] = self._list


class _Once(nn.ModuleList):
    """The same modules as `held`; who goes through them all meets one."""

    def __init__(self, held: nn.ModuleList, at: AtOnce):
        super().__init__()
        self._modules = held._modules
        self._one = _AllLayers(at, next(iter(held._modules.values())))

    def __iter__(self) -> Iterator[Any]:
        return iter((self._one,))

    def __getitem__(self, index: Any) -> Any:
        held = list(self._modules.values())
        if not isinstance(index, slice):
            return held[index]
        return self if all_are(held[index], held) else nn.ModuleList(held[index])


class _AllLayers:
    """Called as a layer is; its attributes are the first layer's."""

    def __init__(self, at: AtOnce, first: nn.Module | None):
        self._at, self._first = at, first

    def __getattr__(self, name: str) -> Any:
        return getattr(self._first, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._at.call
        assert call is not None
        return call(*args, **kwargs)


def all_are(found: Collection[Any], expected: Collection[Any]) -> bool:
    """The very objects, in their order."""
    return len(found) == len(expected) and all(map(is_, found, expected))
