"""The closed list: everything mutable of a run, as tensors under constant names and as JSON values.

A snapshot copies this list, a checkpoint writes it, a revert copies it back. What is mutable and not on it is
a bug.

    tensors   parameters or adapters, moments with their block scales, master weights: live storages whose
              names, shapes, dtypes and addresses never change after the start, so that copies go from and to
              fixed places
    values    cursor, schedule, counters, RNG streams: read by a getter, put back by a setter

The policy's table is not on it: a roll-back must not undo it. A checkpoint holds it beside the list.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csrc_triton.state_hash import checksums
from repsft_fast.errors import SnapshotError, describe

JSON = Any  # None, bool, int, float, str, list of JSON, dict of str to JSON
Getter = Callable[[], JSON]
Setter = Callable[[JSON], None]


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: the local shard of a DTensor, sharing its storage; no
    communication."""
    shard = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return shard.detach()


def encode_values(values: Mapping[str, JSON]) -> str:
    """Canonical JSON text of the values: equal values give equal text, and decoding gives them back exactly.

    Raises SnapshotError naming the place of anything that JSON would change on the way (integer keys, numpy
    numbers, sets). Floats keep every bit (shortest repr); NaN and infinities are kept in Python's spelling.
    Tuples come back as lists.
    """
    for path, got in _not_json(values, ""):
        raise SnapshotError(
            describe(f"state value {path}", "cannot be kept", expected="plain JSON types", got=got)
        )
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def decode_values(text: str) -> dict[str, JSON]:
    return json.loads(text)


_PLAIN = {bool, int, float, str, type(None)}


def _not_json(value: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if type(key) is not str:
                yield f"{path}[{key!r}]", f"a key of type {type(key).__name__}"
            else:
                yield from _not_json(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list | tuple):
        # random streams are lists of hundreds of numbers, looked at in every snapshot
        if not set(map(type, value)) <= _PLAIN:
            for i, item in enumerate(value):
                yield from _not_json(item, f"{path}[{i}]")
    elif type(value) not in _PLAIN:
        yield path, f"{type(value).__name__} {value!r}"


def state_hash(tensors: Mapping[str, Tensor], values: Mapping[str, JSON]) -> str:
    """32 hex digits over names, order, dtypes, shapes and contents of the tensors, and over the values.

    Equal exactly when the state is (up to collisions of 64-bit checksums per tensor). One read of the memory,
    one host read per device. Of a DTensor it covers this rank's shard.
    """
    shards = [local(t) for t in tensors.values()]
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor, checksum in zip(tensors, shards, checksums(shards)):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape), checksum]).encode())
    digest.update(encode_values(values).encode())
    return digest.hexdigest()


class RunState:
    """The register of the closed list. Built once by the trainer, before the first update.

    >>> state = RunState()
    >>> counters = {"update": 0}
    >>> state.add_tensor("weight", torch.zeros(2))
    >>> state.add_value("cursor", lambda: counters["update"], lambda v: counters.update(update=v))
    >>> state.values()
    {'cursor': 0}
    """

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._sources: dict[str, tuple[str, Callable[[], Mapping[str, Tensor]]]] = {}
        self._facts: dict[str, tuple] = {}
        self._memory: dict[tuple, str] = {}
        self._values: dict[str, tuple[Getter, Setter]] = {}
        self._followers: list[Callable[[], object]] = []

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Registers a live tensor. Raises SnapshotError for a name used twice and for memory registered under
        another name."""
        if name in self._tensors or name in self._values:
            raise SnapshotError(
                describe(f"state {name}", "is registered twice", todo="give every part of the state one name")
            )
        facts = _facts(tensor)
        # this rank's part of [1, H] on two ranks may be nothing, which has no memory
        if local(tensor).numel():
            twin = self._memory.setdefault(facts, name)
            if twin != name:
                raise SnapshotError(
                    describe(
                        f"state {name}", f"is the same memory as {twin}", todo="register tied tensors once"
                    )
                )
        self._tensors[name] = tensor
        self._facts[name] = facts

    def add_tensors(
        self, prefix: str, source: Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]]
    ) -> None:
        """Registers `prefix/name` for every tensor of a mapping.

        A callable is asked again by `check`, which thereby notices an optimizer that replaced, added or
        dropped a tensor.
        """
        mapping = source() if callable(source) else source
        for name, tensor in mapping.items():
            self.add_tensor(f"{prefix}/{name}", tensor)
        if callable(source):
            self._sources[prefix] = (prefix, source)

    def add_value(self, name: str, get: Getter, put: Setter) -> None:
        """Registers a value by its getter and setter. The setter receives what the getter gave, after a trip
        through JSON."""
        if name in self._tensors or name in self._values:
            raise SnapshotError(
                describe(f"state {name}", "is registered twice", todo="give every part of the state one name")
            )
        self._values[name] = (get, put)

    def add_rng(self, device: torch.device | str = "cpu") -> None:
        """Registers the streams anything here may draw from: torch on CPU and on `device`, Python's and
        numpy's global ones."""
        self.add_value(
            "rng/python",
            lambda: list(random.getstate()),
            lambda s: random.setstate((s[0], tuple(s[1]), s[2])),
        )
        self.add_value("rng/numpy", _numpy_global, _set_numpy_global)
        self.add_value(
            "rng/torch", lambda: _hex(torch.get_rng_state()), lambda s: torch.set_rng_state(_unhex(s))
        )
        where = torch.device(device)
        if where.type == "cuda":
            self.add_value(
                "rng/cuda",
                lambda: _hex(torch.cuda.get_rng_state(where)),
                lambda s: torch.cuda.set_rng_state(_unhex(s), where),
            )

    def add_follower(self, follow: Callable[[], object]) -> None:
        """Registers what brings up to date whatever is derived from the tensors, after they were written."""
        self._followers.append(follow)

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors by name, always in the same order. To be written inside `writing` alone."""
        return dict(self._tensors)

    @contextmanager
    def writing(self) -> Iterator[dict[str, Tensor]]:
        """The live tensors, to be overwritten with another state's: the one door for it, behind which nothing
        derived is left of the state before. Also where the writing breaks off."""
        try:
            yield self.tensors()
        finally:
            for follow in self._followers:
                follow()

    def values(self) -> dict[str, JSON]:
        return {name: get() for name, (get, _) in self._values.items()}

    def load_values(self, values: Mapping[str, JSON]) -> None:
        """Puts every value back. Raises SnapshotError, before touching any, when a name is missing or
        unknown."""
        missing = sorted(self._values.keys() - values.keys())
        unknown = sorted(values.keys() - self._values.keys())
        if missing or unknown:
            raise SnapshotError(
                describe(
                    "state values", "do not match this run", expected=sorted(self._values), got=sorted(values)
                )
                + f" (missing {missing}, unknown {unknown})"
            )
        for name, (_, put) in self._values.items():
            put(values[name])

    def hash(self) -> str:
        return state_hash(self.tensors(), self.values())

    def check(self) -> None:
        """Raises SnapshotError when a registered tensor moved, changed shape or dtype, or a source has other
        tensors now."""
        for name, tensor in self._tensors.items():
            then, now = self._facts[name], _facts(tensor)
            if now != then:
                wrong, todo = "is not the tensor that was registered", "change state in place"
                raise SnapshotError(describe(f"state {name}", wrong, expected=then, got=now, todo=todo))
        for prefix, source in self._sources.values():
            given = {f"{prefix}/{name}": _facts(t) for name, t in source().items()}
            known = {name: facts for name, facts in self._facts.items() if name.startswith(f"{prefix}/")}
            names = given.keys() | known.keys()
            changed = sorted(name for name in names if given.get(name) != known.get(name))
            if changed:
                wrong = "was replaced, added or dropped since the start"
                todo = "allocate every tensor before the first update and change it in place"
                raise SnapshotError(describe(f"state {prefix}", wrong, got=changed, todo=todo))


def _facts(tensor: Tensor) -> tuple:
    shard = local(tensor)
    return (shard.data_ptr(), tuple(shard.shape), tuple(shard.stride()), str(shard.dtype), str(shard.device))


def _hex(state: Tensor) -> str:
    return bytes(state.cpu().numpy()).hex()


def _unhex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _numpy_global() -> JSON:
    return _plain(np.random.get_state(legacy=False))


def _set_numpy_global(state: JSON) -> None:
    np.random.set_state(_arrays(state))


def _plain(state: Any) -> JSON:
    """numpy's nested state as JSON: arrays become {"dtype", "items"}."""
    if isinstance(state, Mapping):
        return {key: _plain(item) for key, item in state.items()}
    if isinstance(state, np.ndarray):
        return {"dtype": str(state.dtype), "items": state.tolist()}
    return state.item() if isinstance(state, np.generic) else state


def _arrays(state: JSON) -> Any:
    if isinstance(state, Mapping):
        if state.keys() == {"dtype", "items"}:
            return np.array(state["items"], dtype=state["dtype"])
        return {key: _arrays(item) for key, item in state.items()}
    return state
