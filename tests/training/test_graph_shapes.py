"""What is captured for a plan's rows, and what stands against capturing."""

import json
from collections import Counter
from dataclasses import replace
from itertools import combinations, permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from repsft_fast.config import Config
from repsft_fast.training import capture, graph_shapes
from repsft_fast.training.build import build
from repsft_fast.training.graph_shapes import (
    LEVELS,
    MOST_LENGTHS,
    STEP,
    capacities,
    dropout_of,
    shapes_of,
    why_not,
)
from repsft_fast.training.static_row import StaticRow
from tests.helpers import runs


def parts_of(folder, **changes):
    return build(Config.of(runs.settings(folder, samples=40, **changes)))


@pytest.mark.parametrize("seed", range(4))
def test_the_capacities_pad_least(seed):
    draw = np.random.default_rng(seed)
    counts = draw.integers(1, 1500, 60).tolist()
    found = capacities(2048, counts)
    assert list(found) == sorted(found)
    assert len(found) <= LEVELS
    assert found[-1] >= max(counts)
    steps = range(STEP, found[-1], STEP)

    def slots(ladder):
        return sum(min(c for c in ladder if c >= n) for n in counts)

    assert slots(found) == min(slots((*lower, found[-1])) for lower in combinations(steps, LEVELS - 1))


@pytest.mark.parametrize(
    ("length", "counts", "expected"),
    [
        (64, [3, 9, 30], (64,)),  # a row shorter than a step
        (512, [100] * 9, (128,)),  # an eighth more than 100 is 112
        (512, [128] * 9, (128, 192)),
        (512, [512, 512], (512,)),  # never past the row
        (512, [0], (64,)),
        (8192, [64, 5000], (128, 5120, 5632)),  # steps of a 64th of the row
    ],
)
def test_capacities(length, counts, expected):
    assert capacities(length, counts) == expected


def test_a_long_row_is_weighed_up_quickly():
    assert len(capacities(131_072, list(range(1, 131_072, 7)))) == LEVELS


def test_every_row_of_the_plan_has_a_shape(tmp_path):
    parts = parts_of(tmp_path, batch__bucket_tokens=32, batch__samples=2)
    shapes = shapes_of(parts)
    assert {s.length for s in shapes.shapes} == {32, 64}
    static = [
        StaticRow(
            shape, borders=shapes.borders, longest=shapes.longest, spare_task=1, device=torch.device("cpu")
        )
        for shape in shapes.shapes
    ]
    rows = [row for update in parts.plan.epoch(0, 0) for row in parts.rows(update)]
    assert rows
    assert all(any(one.fits(row) for one in static) for row in rows)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_borders_of_the_fullest_row_and_the_bound_of_the_longest_sample(monkeypatch, order):
    """They may be two rows, in any order."""
    index = SimpleNamespace(lengths=np.array([20, 4, 5, 6, 9, 9]), trained=np.full(6, 3))
    parts = SimpleNamespace(data=SimpleNamespace(train=SimpleNamespace(index=index)))
    rows = [
        SimpleNamespace(samples=np.array(samples), padded_tokens=32)
        for samples in ([0], [1, 2, 3], [4, 5])  # the longest, the most, neither
    ]

    def row_of(parts, row):
        return SimpleNamespace(
            cu_seqlens=torch.zeros(len(row.samples) + 1), max_seqlen=int(index.lengths[row.samples].max())
        )

    monkeypatch.setattr(graph_shapes, "_rows", lambda parts: iter([rows[n] for n in order]))
    monkeypatch.setattr(graph_shapes, "_row", row_of)
    shapes = shapes_of(parts)
    assert (shapes.borders, shapes.longest) == (4, 20)


def test_the_most_used_of_many_lengths(tmp_path, monkeypatch):
    parts = parts_of(tmp_path, batch__bucket_tokens=1, batch__samples=1)
    rows = [row for update in parts.plan.epoch(0, 0) for row in update.ranks[0]]
    times = Counter(row.padded_tokens for row in rows)
    assert len(times) > MOST_LENGTHS
    captured = {shape.length for shape in shapes_of(parts).shapes}
    assert len(captured) == MOST_LENGTHS
    # of those that are used alike the longer ones
    assert min((times[n], n) for n in captured) > max((times[n], n) for n in times.keys() - captured)
    served = sum(times[n] for n in captured) / len(rows)
    monkeypatch.setattr("repsft_fast.training.graph_shapes.SERVED", served + 0.01)
    assert "batch.bucket_tokens" in shapes_of(parts), "few rows would be replayed"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"batch__pack": False}, "batch.pack: true"),
        ({"loss__skip_below": 0.01}, "loss.skip_below"),
        ({"model__lora": {"rank": 4, "dropout": 0.1}}, "model.lora.dropout"),
        ({"model__config": {**runs.MODEL, "attention_dropout": 0.1}}, "attention_dropout"),
        ({"model__compute_dtype": "bfloat16"}, None),
    ],
    ids=lambda x: json.dumps(x)[:40],
)
def test_what_stands_against_it(tmp_path, changes, words):
    parts = parts_of(tmp_path, **changes)
    if any(hasattr(p, "to_local") for p in parts.model.parameters()):
        words = "FSDP2"
    found = why_not(parts)
    assert found is None if words is None else words in found


def test_several_ranks_and_the_allocator(tmp_path, monkeypatch):
    parts = parts_of(tmp_path)
    assert "one rank" in why_not(replace_world(parts, 2))
    monkeypatch.setenv(capture.ALLOCATOR[0], "expandable_segments:True")
    assert "expandable_segments" in why_not(replace_world(parts, 1))


def replace_world(parts, size):
    parts.world = replace(parts.world, size=size)
    return parts


def test_rows_that_may_be_too_long_for_their_architecture(tmp_path, monkeypatch):
    monkeypatch.setattr("repsft_fast.training.graph_shapes.row_limit", lambda config: 8191)
    assert "architecture" in why_not(parts_of(tmp_path))


def test_dropout_by_name():
    def model(module, **config):
        text = SimpleNamespace(get_text_config=lambda: SimpleNamespace(to_dict=lambda: config))
        module.config = text
        return module

    assert dropout_of(model(torch.nn.Sequential(torch.nn.Dropout(0.0)), resid_pdrop=0.0)) is None
    assert "resid_pdrop" in dropout_of(model(torch.nn.Identity(), resid_pdrop=0.1))
    assert "the dropout of 0" in dropout_of(model(torch.nn.Sequential(torch.nn.Dropout(0.2))))
