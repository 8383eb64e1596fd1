"""The two functions behind a compiled layer: found, and refused where anything about them is not known."""

import pytest
import torch
from torch import nn

from repsft_fast.models import layer_pair
from repsft_fast.models.layer_call import NotRecorded
from repsft_fast.models.layer_pair import record, same


class Layer(nn.Module):
    """hidden · scale → weights, and what a test asks for beside it."""

    def __init__(self, odd=""):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
        self.unused = nn.Parameter(torch.randn(4))
        self.register_buffer("seen", torch.zeros(()))
        self.odd, self.said = odd, None

    def forward(self, hidden, scale=None, options=None):
        out = hidden * scale @ self.weight + self.bias if scale is not None else hidden @ self.weight
        if self.odd == "breaks":
            torch._dynamo.graph_break()
        if self.odd == "counts":
            self.seen.add_(1)
        if self.odd == "says":
            self.said = out.detach()
        if self.odd == "reads another":
            out = out + OTHER
        if self.odd == "two outputs":
            return out.tanh(), out
        if self.odd == "hands on":
            return hidden
        return out.tanh()


OTHER = torch.ones(4)


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def call(odd="", wanted=True, **kwargs):
    """A pair, recorded from a layer that was compiled and called."""
    layer = Layer(odd)
    compiled = torch.compile(layer.forward, backend="aot_eager", dynamic=False)
    hidden = torch.randn(2, 4)
    given = {"scale": torch.full((4,), 0.5), "options": (None, 3)} | kwargs
    compiled(hidden.clone().requires_grad_(wanted), **given)
    return layer, hidden, given, record(layer, compiled, hidden, (), given, wanted=wanted)


@pytest.mark.parametrize("wanted", [True, False])
def test_it_gives_the_layers_bits(wanted):
    layer, hidden, given, pair = call(wanted=wanted)
    asked = [layer.weight, layer.bias]
    expected_from = hidden.clone().requires_grad_()
    output = layer(expected_from, **given)
    up = torch.randn_like(output)
    expected = torch.autograd.grad(output, [expected_from, *asked], up)
    with torch.no_grad():
        found, kept = pair.compute(hidden, pair.given.take((), given))
        gradients = pair.gradients(kept, up)
    assert torch.equal(found, output)
    assert not kept, "what a layer kept is not given away"
    assert [w for w, _ in pair.weights] == asked, "an unused weight has a gradient"
    assert all(torch.equal(gradients[at], g) for (_, at), g in zip(pair.weights, expected[1:], strict=True))
    assert (
        torch.equal(gradients[pair.hidden_at], expected[0]) if wanted else gradients[pair.hidden_at] is None
    )


def test_an_outputs_gradient_of_another_layout_is_taken():
    _, hidden, given, pair = call()
    up = torch.randn(4, 2).t()
    own = pair.given.take((), given)
    with torch.no_grad():
        turned = pair.gradients(pair.compute(hidden, own)[1], up)
        plain = pair.gradients(pair.compute(hidden, own)[1], up.contiguous())
    assert all(same(a, b) for a, b in zip(turned, plain, strict=True))


def test_a_calls_own_tensors_are_read_and_no_recorded_ones():
    layer, hidden, given, pair = call()
    other = given | {"scale": torch.full((4,), 2.0)}
    with torch.no_grad():
        found, _ = pair.compute(hidden, pair.given.take((), other))
    assert torch.equal(found, layer(hidden, **other))


def test_nothing_is_left_of_a_recording():
    layer, hidden, given, pair = call()
    assert all(p.grad is None for p in layer.parameters())
    function = torch.compile(layer.forward, backend="aot_eager", dynamic=False)(
        hidden.requires_grad_(), **given
    ).grad_fn._forward_cls
    assert function.compiled_fw is pair.forward
    assert function._backward_impl.__name__ == "_backward_impl"


REFUSED = {
    "breaks": "a layer is more than one graph",
    "counts": "writes something|not what its graph computes|none of the layer's",
    "says": "writes something",
    "reads another": "none of the layer's or its call's",
    "two outputs": "one compiled function",
    "hands on": "one compiled function|not what its graph",
}


@pytest.mark.parametrize("odd", REFUSED)
def test_what_is_not_known_is_refused(odd):
    with pytest.raises(NotRecorded, match=REFUSED[odd]):
        call(odd)


def test_a_second_tensor_with_a_gradient_is_refused():
    with pytest.raises(NotRecorded, match="a second tensor"):
        call(scale=torch.ones(4, requires_grad=True))


def test_an_argument_of_an_unknown_kind_is_refused():
    with pytest.raises(NotRecorded, match="given a set"):
        call(options={1, 2})


def test_a_layer_without_gradients_is_refused():
    layer = Layer().requires_grad_(False)
    with pytest.raises(NotRecorded, match="needs no gradient"):
        record(layer, layer, torch.ones(2, 4), (), {}, wanted=False)


def test_an_uncompiled_layer_is_refused():
    layer = Layer()
    with pytest.raises(NotRecorded, match="one compiled function"):
        record(layer, layer, torch.ones(2, 4), (), {}, wanted=True)


@pytest.mark.parametrize("wrong", ["output", "gradient", "order of weights", "kept"])
def test_a_pair_that_gives_other_bits_is_refused(wrong, monkeypatch):
    make = layer_pair._pair

    def broken(*args):
        pair = make(*args)
        forward, backward = pair.forward, pair.backward
        if wrong == "output":
            change = {"forward": lambda inputs: (lambda r: (r[0] * 1.5, *r[1:]))(forward(inputs))}
        elif wrong == "gradient":
            change = {
                "backward": lambda kept: tuple(g if g is None else g * 1.5 for g in backward(kept)),
            }
        elif wrong == "kept":
            change = {"kept": pair.kept[::-1]}
        else:
            (a, at), (b, there) = pair.weights
            change = {"weights": ((a, there), (b, at))}
        return layer_pair.Pair(**{**vars(pair), **change})

    monkeypatch.setattr(layer_pair, "_pair", broken)
    with pytest.raises((NotRecorded, RuntimeError)):
        call()


def test_a_layer_that_never_gives_the_same_bits_is_taken(monkeypatch):
    """Of kernels that add in any order the functions and their inputs have been looked at."""
    monkeypatch.setattr(layer_pair, "same", lambda a, b, real=same: a is b or next(answers, real(a, b)))
    answers = iter([True] * 3 + [False] * 2)  # gradients are in place; then neither repeats
    assert call()[-1] is not None


def test_gradients_that_share_memory_are_refused():
    a = torch.ones(4)
    with pytest.raises(NotRecorded, match="share memory"):
        layer_pair._check_memory([a, a.view(2, 2)], [])
    with pytest.raises(NotRecorded, match="share memory"):
        layer_pair._check_memory([a], [a])
    layer_pair._check_memory([a, a.clone()], [torch.ones(4), 3])


class TestWhatTheBackwardReads:
    def test_the_outputs_gradient_once(self):
        up, a = torch.ones(2), torch.ones(3)
        assert layer_pair._kept([a, 7, up], [torch.ones(2), 7, a], up) == ((2, 1), 2)
        for backward in ([a], [up, up]):
            with pytest.raises(NotRecorded, match="output's gradient"):
                layer_pair._kept(backward, [torch.ones(2), a], up)

    @pytest.mark.parametrize("what", ["the output", "another", "a view", "a number"])
    def test_nothing_but_what_the_forward_gave_to_keep(self, what):
        up, output, a = torch.ones(2), torch.ones(2), torch.ones(3)
        odd = {"the output": output, "another": a.clone(), "a view": a[1:], "a number": 8}[what]
        with pytest.raises(NotRecorded, match="does not give out"):
            layer_pair._kept([odd, up], [output, a, 7], up)


def test_same_is_bit_for_bit():
    nan = torch.tensor([float("nan"), -0.0])
    assert same(nan, nan.clone())
    assert not same(nan, torch.tensor([float("nan"), 0.0]))
    assert not same(nan, nan.double())
    assert not same(nan, nan[:1])
    assert same(None, None)
    assert not same(nan, None)
