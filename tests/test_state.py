"""The closed list: streams come back exactly, what JSON would bend is refused, the hash sees every part."""

import random

import numpy as np
import pytest
import torch

from repsft_fast.errors import SnapshotError
from repsft_fast.state import RunState, decode_values, encode_values, state_hash


def draws():
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
        torch.rand(3).tolist(),
        torch.randn(5).tolist(),
    ]


def test_every_stream_comes_back_through_json_exactly():
    state = RunState()
    state.add_rng()
    draws()  # leaves a half-used gauss pair behind
    random.gauss(0, 1)
    kept = encode_values(state.values())
    first = draws()
    assert draws() != first
    state.load_values(decode_values(kept))
    assert encode_values(state.values()) == kept
    assert draws() == first


def test_values_are_exact_or_refused():
    exact = {"a": 0.1 + 0.2, "b": [1, None, True, "ü\ud800"], "c": {"x": -0.0, "y": 2**70, "z": float("inf")}}
    assert decode_values(encode_values(exact)) == exact
    assert np.isnan(decode_values(encode_values({"best": float("nan")}))["best"])
    assert encode_values({"b": 1, "a": 2}) == encode_values({"a": 2, "b": 1})
    for bad, place in [
        ({"t": {3: 1}}, r"t\[3\]"),
        ({"a": [0, np.float32(1)]}, r"a\[1\]"),
        ({"s": {1, 2}}, "s"),
        ({"t": torch.zeros(1)}, "t"),
    ]:
        with pytest.raises(SnapshotError, match=place):
            encode_values(bad)


def test_the_hash_sees_name_order_shape_dtype_content_and_values():
    a, b = torch.arange(6.0), torch.arange(6.0) + 1
    base = ({"a": a, "b": b}, {"update": 3})
    others = [
        ({"b": b, "a": a}, {"update": 3}),
        ({"a": b, "b": a}, {"update": 3}),
        ({"a": a.reshape(2, 3), "b": b}, {"update": 3}),
        ({"a": a.view(torch.int32), "b": b}, {"update": 3}),
        ({"a": a.flip(0), "b": b}, {"update": 3}),
        ({"a": a, "b": b}, {"update": 4}),
        ({"a": a, "b": b}, {"update": "3"}),
        ({"a": a}, {"update": 3}),
        ({"a": a, "c": b}, {"update": 3}),
    ]
    hashes = {state_hash(*case) for case in [base, *others]}
    assert len(hashes) == 1 + len(others)
    assert state_hash({"a": a.clone(), "b": b.clone()}, {"update": 3}) == state_hash(*base)


def test_names_and_memory_are_registered_once():
    state, weight = RunState(), torch.zeros(3)
    state.add_tensor("w", weight)
    with pytest.raises(SnapshotError, match="twice"):
        state.add_tensor("w", torch.zeros(3))
    with pytest.raises(SnapshotError, match="twice"):
        state.add_value("w", int, lambda v: None)
    with pytest.raises(SnapshotError, match="same memory as w"):
        state.add_tensor("tied", weight.view(3))


def test_values_are_set_all_or_none():
    state, seen = RunState(), {}
    state.add_value("a", lambda: 1, lambda v: seen.update(a=v))
    state.add_value("b", lambda: 2, lambda v: seen.update(b=v))
    for wrong in ({"a": 5}, {"a": 5, "b": 6, "c": 7}):
        with pytest.raises(SnapshotError, match=r"missing \['b'\]|unknown \['c'\]"):
            state.load_values(wrong)
    assert seen == {}
    state.load_values({"b": 6, "a": 5})
    assert seen == {"a": 5, "b": 6}


def test_check_notices_replaced_added_and_moved_tensors():
    moments = {"m": torch.zeros(2), "v": torch.zeros(2)}
    state = RunState()
    state.add_tensors("moments", lambda: moments)
    state.check()
    moments["m"].add_(1)
    state.check()
    moments["step"] = torch.zeros(1)
    with pytest.raises(SnapshotError, match="moments/step"):
        state.check()
    del moments["step"]
    moments["m"] = moments["m"] * 2
    with pytest.raises(SnapshotError, match="moments/m"):
        state.check()
    weight = torch.nn.Parameter(torch.zeros(2))
    other = RunState()
    other.add_tensor("w", weight)
    weight.data = torch.ones(2)
    with pytest.raises(SnapshotError, match="state w: is not the tensor"):
        other.check()
