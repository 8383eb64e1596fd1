"""One call of a model's loop for all layers: only where nothing else can be meant by it."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from repsft_fast.models.all_layers import AtOnce
from repsft_fast.models.compiled import compiled_layers
from repsft_fast.models.compiled_stack import running
from repsft_fast.models.loss import hidden_states
from tests.models.test_compiled import layers_of
from tests.models.test_compiled_stack import equal, gradients, plan_of, rows, stack_of, warmed


@pytest.fixture(scope="module")
def warm():
    yield warmed("qwen3")
    torch._dynamo.reset()


@pytest.fixture
def model(warm):
    counts = stack_of(warm).counts
    counts.stacked = counts.at_once = counts.apart = 0
    yield warm
    warm.zero_grad()
    assert type(warm.model.layers) is nn.ModuleList


def counted(model):
    counts = stack_of(model).counts
    return counts.stacked, counts.at_once, counts.apart


def test_the_models_loop_goes_round_once(model, monkeypatch):
    called = []
    for layer in layers_of(model):
        monkeypatch.setattr(type(layer), "__call__", lambda *_, **__: called.append(1))
    gradients(model, rows(2))
    assert not called
    assert counted(model) == (2, 2, 0)


def test_who_asks_for_layers_and_weights_gets_them(model):
    seen = []

    def look(module, args, kwargs):
        held = module.layers
        assert type(held) is not nn.ModuleList
        names = [name for name, _ in model.named_parameters()]
        (one,) = held
        seen.append((len(held), held[1], held[-1], list(held[1:]), held[:] is held, names, one.self_attn))

    real, names = list(layers_of(model)), [name for name, _ in model.named_parameters()]
    handle = model.model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        gradients(model, rows(1))
    finally:
        handle.remove()
    assert seen == [(4, real[1], real[3], real[1:], True, names, real[0].self_attn)]


def test_rows_of_unknown_shape_meet_every_layer(model):
    with running(model):
        hidden_states(model, rows(1)[0], "mask").sum().backward()
    assert counted(model) == (1, 0, 0)


def another_forward(model):
    layer = layers_of(model)[2]
    before = layer.forward
    layer.forward = lambda hidden, *args, **kwargs: before(hidden, *args, **kwargs)
    return lambda: setattr(layer, "forward", before)


def another_list(model):
    before = model.model.layers
    model.model.layers = nn.ModuleList(before)
    return lambda: setattr(model.model, "layers", before)


@pytest.mark.parametrize("change", [another_forward, another_list])
def test_what_has_changed_is_called(model, change):
    undo = change(model)
    found = [g.clone() for g in gradients(model, rows(2))]
    undo()
    assert counted(model) == (2, 0, 0)
    assert equal(found, gradients(model, rows(2)))
    assert counted(model) == (4, 2, 0)


def test_a_list_in_another_order_is_no_longer_the_one_that_was_seen(model):
    held = model.model.layers
    held[1], held[2] = held[2], held[1]
    try:
        with pytest.raises(Exception, match="not called with what"), running(model, rows(1)[0]):
            model.loss(rows(1)[0])
    finally:
        held[1], held[2] = held[2], held[1]


def test_a_loop_over_some_of_the_layers(model):
    model.model.config.num_hidden_layers = 2
    try:
        with pytest.raises(Exception, match="not called with what"), running(model, rows(1)[0]):
            model.loss(rows(1)[0])
    finally:
        model.model.config.num_hidden_layers = 4
    gradients(model, rows(1))
    assert counted(model)[:2] == (1, 1)


def test_an_embedding_that_is_frozen_meanwhile(model):
    weight = model.get_input_embeddings().weight
    model.tie_weights()
    weight.requires_grad_(False)
    try:
        found = [g.clone() if g is not None else None for g in gradients(model, rows(2))]
        assert counted(model) == (0, 0, 2)
        assert equal(found, gradients(model, rows(2), together=False))
    finally:
        weight.requires_grad_(True)


def test_a_loop_that_goes_another_way_than_at_warm_up_is_refused(model, monkeypatch):
    """By itself the pass would look as if there were no layers."""
    monkeypatch.setattr(model.model, "forward", lambda *_, **__: None)
    with pytest.raises(Exception, match="not called with what"), running(model, rows(1)[0]):
        model.model()
    assert stack_of(model).passing is None


def test_other_arguments_are_refused(model, monkeypatch):
    plan = plan_of(model)
    monkeypatch.setattr(plan, "kinds", [replace(plan.kinds[0], like="another")])
    with pytest.raises(Exception, match=r"given other arguments than at warm-up; set model\.compile: false"):
        gradients(model, rows(1))
    assert stack_of(model).passing is None


def test_what_fails_amid_the_layers_leaves_the_list_as_it_was(model):
    pair = plan_of(model).pairs[2]
    forward = pair.forward

    def full(inputs):
        raise torch.OutOfMemoryError("no room")

    object.__setattr__(pair, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        gradients(model, rows(1))
    object.__setattr__(pair, "forward", forward)
    assert torch.is_grad_enabled()
    gradients(model, rows(1))
    assert counted(model)[:2] == (1, 1)


class TestWarmUp:
    """A pass beside the layers' own decides."""

    def between_layers(self, model):
        plain = model.model.forward

        def forward(*args, **kwargs):
            turns = [None for _ in model.model.layers]  # as many as are met
            output = plain(*args, **kwargs)
            output.last_hidden_state = output.last_hidden_state * len(turns)
            return output

        model.model.forward = forward

    def by_numbers(self, model):
        """Its loop asks for one layer after the other."""
        plain = model.model.forward

        def forward(*args, **kwargs):
            layers, one = model.model.layers, nn.ModuleList()
            one._modules = {str(n): layers[n] for n in range(4)}
            model.model._modules["layers"] = one
            try:
                return plain(*args, **kwargs)
            finally:
                model.model._modules["layers"] = layers

        model.model.forward = forward

    def drawing(self, model, draw=lambda: torch.rand([])):
        plain = model.model.forward
        model.model.forward = lambda *args, **kwargs: (draw(), plain(*args, **kwargs))[1]

    def drawing_in_python(self, model):
        self.drawing(model, random.random)

    def drawing_in_numpy(self, model):
        self.drawing(model, np.random.rand)

    def own_arguments(self, model):
        """Every layer gets positions of its own, as far as objects go."""
        layer_type, patch = type(layers_of(model)[0]), pytest.MonkeyPatch()
        before = layer_type.__call__

        def called(layer, *args, **kwargs):
            kwargs["position_ids"] = kwargs["position_ids"].detach()
            return before(layer, *args, **kwargs)

        patch.setattr(layer_type, "__call__", called)
        self.undo = patch.undo

    def a_forward_of_somebody(self, model):
        another_forward(model)

    undo = staticmethod(lambda: None)

    @pytest.mark.parametrize(
        "what", [
            "between_layers", "by_numbers", "own_arguments", "a_forward_of_somebody", "drawing",
            "drawing_in_python", "drawing_in_numpy", "nothing",
        ],
    )  # fmt: skip
    def test_a_loop_that_does_more_calls_every_layer(self, what):
        model = warmed("llama", prepare=getattr(self, what, lambda model: None))
        assert not stack_of(model).why
        assert (plan_of(model).at_once is None) == (what != "nothing")
        gradients(model, rows(1))
        self.undo()
        assert counted(model) == (1, int(what == "nothing"), 0)
        torch._dynamo.reset()

    def test_layers_in_no_list_of_their_own(self, model):
        layers = list(layers_of(model))
        with pytest.raises(LookupError):
            AtOnce(model, layers[:2], [layer.forward for layer in layers[:2]])
        assert compiled_layers(model).stack.layers == layers
