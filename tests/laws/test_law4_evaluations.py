"""Law 4 for evaluations by generation: a run that generates between its updates equals one that does not, bit
for bit: losses, weights, moments, random streams."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from repsft_fast import train
from repsft_fast.evaluate.asked import Request, Sampling
from repsft_fast.evaluate.continuous import Batching, is_known
from repsft_fast.evaluate.generate import generate
from repsft_fast.evaluate.identity import check_engine
from repsft_fast.state import state_hash
from repsft_fast.training import trainer
from repsft_fast.training.snapshots import closed_list
from tests.helpers import runs

PROMPTS = [(5, 6, 7), (9, 3), (20, 4, 4, 8, 30)]
KINDS = {
    "full": {},
    "lora": {"model__lora": {"rank": 4, "dropout": 0.2}},
    "masters": {"model__compute_dtype": "bfloat16"},
}


def by_loop(model):
    return [reply.ids for reply in generate(model, PROMPTS, end_ids=[2], max_new_tokens=12)]


def by_batching(model):
    found = {}
    requests = [Request(prompt, draw, ids) for prompt, ids in enumerate(PROMPTS) for draw in range(2)]
    engine = Batching(model)
    check_engine(engine, model)
    for sampling in (Sampling(max_new_tokens=12), Sampling(temperature=0.9, max_new_tokens=12)):
        engine.generate(requests, sampling, end_ids=[2], on_reply=found.__setitem__)
    return [found[request].ids for request in requests]


def run(folder, watch, evaluate=None, **changes):
    """(every update's numbers, hash of the closed list at the end, where other streams stand, evaluations)"""
    finish, step = trainer.finish, trainer.train_step
    found, replies = {}, []

    def ending(run):
        state = closed_list(run.parts)
        streams = {name: value for name, value in state.values().items() if name.startswith("rng/")}
        found["hash"] = state_hash(state.tensors(), streams)
        return finish(run)

    def stepping(parts, update):
        step(parts, update)
        if evaluate is not None and parts.progress.updates in (0, 4, 5):
            replies.append(evaluate(parts.model))

    random.seed(1)
    np.random.seed(1)
    with watch.context() as patch:
        patch.setattr(trainer, "finish", ending)
        patch.setattr(trainer, "train_step", stepping)
        train(
            runs.settings(
                folder, budget__epochs=2, stop__token_accuracy=None, log__every_updates=1, **changes
            )
        )
    updates = runs.metrics(folder, "update")
    numbers = [(u["update"], u["loss"], u["grad_norm"], u["correct"], u["lr"]) for u in updates]
    return numbers, found["hash"], (random.random(), np.random.random()), replies


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_generates_between_updates_is_the_run_that_does_not(kind, tmp_path, monkeypatch):
    plain = run(tmp_path / "plain", monkeypatch, **KINDS[kind])
    assert len(plain[0]) == 12
    for evaluate in (by_loop, by_batching) if is_known() else (by_loop,):
        torch.manual_seed(5)
        other = run(tmp_path / evaluate.__name__, monkeypatch, evaluate, **KINDS[kind])
        assert other[:3] == plain[:3]
        assert len(other[3]) == 3
        assert all(any(reply) for reply in other[3])
