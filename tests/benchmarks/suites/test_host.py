"""The host's share of an update: the loop it times is the trainer's, and nothing of a GPU is in it."""

import io
from contextlib import redirect_stderr

import pytest
import torch

from benchmarks.suites import host
from repsft_fast.models.compiled import compiled_layers
from repsft_fast.training.step import train_step


@pytest.fixture(scope="module")
def few():
    """Two layers instead of 28, and few repeats."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "LAYERS", 2)
        patch.setattr(host, "REPEATS", 3)
        patch.setattr(host, "SAMPLES", 12)
        patch.setattr(host, "MODEL", {**host.MODEL, "num_hidden_layers": 2})
        yield
    torch._dynamo.reset()


def test_every_part_is_timed_and_the_sum_is_near_the_whole(few, capsys):
    found = host.measure()
    assert list(found) == [
        "all", "all, each layer called", "all, layers one by one", "rows", "model around the layers", "gradients dropped", "layers",
        "of layers, the empty graphs", "layers one by one", "statistics", "ledger", "norm, clip, veto", "optimizer",
    ]  # fmt: skip
    assert all(0.0 < ms < 1e3 for ms in found.values())
    assert found["layers"] < found["layers one by one"]


def test_layers_are_compiled_and_give_gradients_without_computing(few, tmp_path):
    parts = host.made(str(tmp_path))
    host.compile_emptily(parts)
    before = {name: p.clone() for name, p in parts.optimizer.names.items()}
    with host.without_a_gpu(parts), redirect_stderr(io.StringIO()):
        epoch, turn = host.loop_of(parts)
        kept = {}
        parts.optimizer.zero_grad = lambda: kept.update(
            {name: p.grad for name, p in parts.optimizer.names.items()}
        )
        turn(epoch[0])
    assert set(kept) == set(parts.optimizer.names)
    of_layers = [g for name, g in kept.items() if ".layers." in name]
    assert of_layers
    assert all(g is not None and bool((g == host._some(g.dtype)).all()) for g in of_layers)
    assert all(torch.equal(p, before[name]) for name, p in parts.optimizer.names.items()), "no optimizer ran"
    stack = compiled_layers(parts.model).stack
    assert vars(stack.counts) == dict.fromkeys(("stacked", "at_once"), len(epoch[0].ranks[0])) | {"apart": 0}
    with host.layer_by_layer(parts.model), redirect_stderr(io.StringIO()):
        parts.model.loss(next(iter(parts.rows(epoch[1]))))
        assert not stack._plans
    assert stack._plans


def test_what_was_replaced_is_put_back(few, tmp_path):
    parts = host.made(str(tmp_path))
    before = host.linear_cross_entropy.head_pass, torch._foreach_norm
    with pytest.raises(KeyError), host.without_a_gpu(parts):
        raise KeyError
    assert (host.linear_cross_entropy.head_pass, torch._foreach_norm) == before
    update = parts.plan.epoch(0, 0)[0]
    weight = next(iter(parts.optimizer.names.values())).clone()
    train_step(parts, update)
    assert not torch.equal(weight, next(iter(parts.optimizer.names.values())))
