"""Compiled layers: one graph for all layers of a kind, no break, plain layers' numbers, and none but the
shapes that have graphs."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from repsft_fast.evaluate.generate import generate
from repsft_fast.models import load_model
from repsft_fast.models.compiled import (
    CompiledLayers,
    _compare,
    compile_layers,
    compiled_layers,
    draws,
    opened,
)
from repsft_fast.ops.attention import Packed
from tests.helpers import tiny

DOCUMENTS = tiny.documents((7, 12, 5))
SIZES = tiny._SIZES | {"num_hidden_layers": 4}
TWO_KINDS = ["sliding_attention", "full_attention"] * 2
MODELS = {
    "llama": lambda: tiny.config("llama", num_hidden_layers=4),
    "qwen2": lambda: tiny.config("qwen2", num_hidden_layers=4),
    "qwen3": lambda: tiny.config("qwen3", num_hidden_layers=4),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, head_dim=8, sliding_window=tiny.WINDOW),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=tiny.WINDOW, layer_types=TWO_KINDS
    ),
    "mistral": lambda: transformers.MistralConfig(**SIZES, head_dim=8, sliding_window=tiny.WINDOW),
}
KINDS = {"gemma2": 2, "gemma3": 2}  # of layers: with a window and without


@pytest.fixture
def counted(monkeypatch):
    """Every `torch.compile` of a test traces and counts its graphs; what they compute is run as it is."""
    torch._dynamo.reset()
    counters.clear()
    counter, compiled = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, options=None, **o: compiled(function, backend=counter, **o)
    )
    yield counter
    torch._dynamo.reset()


def built(kind="llama", **options):
    torch.manual_seed(0)
    return load_model(MODELS[kind](), **options)


def gradients(model, row):
    model.zero_grad()
    loss = model.loss(row)[0]
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("kind", MODELS)
def test_layers_of_a_kind_share_one_graph_whatever_the_documents(kind, checkpointing, counted):
    if checkpointing == "full" and kind not in ("qwen3", "gemma3"):
        pytest.skip("what recomputes is the same for all")
    options = {"attention": "mask", "activation_checkpointing": checkpointing}
    model, plain = built(kind, compile=True, **options), built(kind, **options)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for lengths in ((7, 12, 5), (3, 20, 9), (16, 8, 8)):
        row = tiny.row(tiny.documents(lengths), length=48)
        for a, b in zip(gradients(model, row), gradients(plain, row), strict=True):
            assert torch.equal(a, b)
        assert counted.frame_count == KINDS.get(kind, 1), "a graph for every layer, or for every row"
    model.eval()
    with torch.no_grad():
        model.loss(row)
    assert counted.frame_count == 2 * KINDS.get(kind, 1), "an evaluation needs no more than one each"
    assert not counters["graph_break"]


def test_the_compiler_keeps_the_numbers():
    """Forward and backward as the compiler traces them, with joint graphs and a partition between them."""
    torch._dynamo.reset()
    compiled = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch, "compile", lambda function, options=None, **o: compiled(function, backend="aot_eager", **o)
        )
        model = built("qwen3", compile=True, attention="mask")
    row = tiny.row(DOCUMENTS, length=32)
    for a, b in zip(gradients(model, row), gradients(built("qwen3", attention="mask"), row), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch._dynamo.reset()


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_where_plain_layers_are_not_finite_compiled_ones_are_held_to_nothing(number):
    plain, same, other = torch.full((4,), number), torch.full((4,), number), torch.ones(4)
    for compiled in (same, other):
        _compare([plain], [compiled])
    with pytest.raises(ArithmeticError, match="output are off"):
        _compare([other], [plain])
    with pytest.raises(ArithmeticError, match="gradients are off"):
        _compare([other, other], [other, plain])


def borders_of(row):
    return len(row.cu_seqlens), row.max_seqlen


class TestWarmShapes:
    @pytest.fixture
    def model(self, counted):
        model = built(compile=True, attention="mask")
        compiled_layers(model).warm = set()
        return model

    def test_nothing_is_compiled_before(self, model, counted):
        model.loss(tiny.row(DOCUMENTS))
        assert counted.frame_count == 0

    def test_only_what_was_warmed_is(self, model, counted):
        row = tiny.row(DOCUMENTS, length=32)
        compiled_layers(model).warm = {(32, *borders_of(row), True, True)}
        model.loss(row)
        assert counted.frame_count == 1
        others = [
            tiny.row(DOCUMENTS, length=33),
            tiny.row(DOCUMENTS[:2], length=32),
            replace(row, max_seqlen=row.max_seqlen + 1),
        ]
        for other in others:
            model.loss(other)
        with torch.no_grad():
            model.loss(row)
        model.eval()
        model.loss(row)
        assert counted.frame_count == 1

    def test_a_generation_of_that_length_is_not(self, model, counted):
        row = tiny.row(DOCUMENTS, length=3)
        compiled_layers(model).warm = {(3, *borders_of(row), False, False)}
        generate(model, [[5, 6, 7]], end_ids=[2], max_new_tokens=4)
        model.eval()
        with torch.no_grad():
            model(input_ids=torch.tensor([[5, 6, 7]]))
        assert counted.frame_count == 0

    def test_off_is_plain(self, model, counted):
        layers = compiled_layers(model)
        layers.on, layers.warm = False, None
        model.loss(tiny.row(DOCUMENTS))
        assert counted.frame_count == 0


class TestWarming:
    """A forward pass that compiles beside computing."""

    def warmed(self, model, row, **options):
        with compiled_layers(model).warming(**options) as warming, torch.no_grad():
            loss = model.loss(row)[0]
        return warming, loss

    def test_it_computes_as_if_nothing_were_compiled_and_leaves_no_gradient(self, counted):
        model, row = built(compile=True, attention="mask"), tiny.row(DOCUMENTS, length=32)
        warming, loss = self.warmed(model, row)
        assert warming.error is None
        assert torch.equal(loss, built(attention="mask").loss(row)[0])
        assert all(p.grad is None for p in model.parameters())
        assert counted.frame_count == 1
        gradients(model, row)
        assert counted.frame_count == 1, "the graph is not the one that training needs"

    @pytest.mark.parametrize(
        "lora", [None, {"rank": 2}, {"rank": 2, "target_modules": r".*layers\.2.*q_proj"}]
    )
    @pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
    def test_training_needs_no_other_graph(self, lora, checkpointing, counted):
        options = {"attention": "mask", "lora": lora, "activation_checkpointing": checkpointing}
        model, row = built(compile=True, **options), tiny.row(DOCUMENTS, length=32)
        kept = [layer.gradient_checkpointing for layer in layers_of(model)]
        for layer in layers_of(model):
            layer.gradient_checkpointing = False  # as `warm_up` does
        warming, _ = self.warmed(model, row, reached=lora is None)
        for layer, on in zip(layers_of(model), kept, strict=True):
            layer.gradient_checkpointing = on
        assert warming.error is None
        made = counted.frame_count
        gradients(model, row)
        assert counted.frame_count == made

    def test_an_error_is_kept_and_the_pass_goes_on(self, counted, monkeypatch):
        def broken(graph, inputs):
            raise RuntimeError("no kernel for this")

        compiled = torch._dynamo.optimize
        monkeypatch.setattr(
            torch, "compile", lambda function, **_: compiled(broken, nopython=False)(function)
        )
        model, row = built(compile=True, attention="mask"), tiny.row(DOCUMENTS, length=32)
        warming, loss = self.warmed(model, row)
        assert "no kernel for this" in str(warming.error)
        assert torch.equal(loss, built(attention="mask").loss(row)[0])

    def test_no_room_is_no_error_of_the_compilers(self, monkeypatch):
        def full(function, **_):
            def call(*args, **kwargs):
                raise torch.OutOfMemoryError("CUDA out of memory")

            return call

        monkeypatch.setattr(torch, "compile", full)
        warming, _ = self.warmed(built(compile=True, attention="mask"), tiny.row(DOCUMENTS))
        assert warming.error is None
        assert warming.out_of_memory

    @pytest.mark.parametrize("what", ["output", "gradients"])
    @pytest.mark.parametrize("training", [True, False])
    def test_a_graph_that_computes_something_else_is_refused(self, what, training, monkeypatch):
        class Off(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 1.02 if what == "output" else x.clone()

            @staticmethod
            def backward(ctx, up):
                return up * 1.02 if what == "gradients" else up

        def wrong(function, **_):
            def call(layer, hidden, *args, **kwargs):
                output = function(layer, hidden, *args, **kwargs)
                return Off.apply(output)

            return call

        monkeypatch.setattr(torch, "compile", wrong)
        model = built(compile=True, attention="mask").train(training)
        warming, _ = self.warmed(model, tiny.row(DOCUMENTS))
        if what == "gradients" and not training:
            assert warming.error is None
        else:
            assert f"the compiled layer's {what} are off by 0.02" in str(warming.error)


class TestOneGraphForAllLengths:
    """The row's length and the bound on a segment are open; what a graph is made for first is no constant."""

    LENGTHS = (96, 24, 2, 40, 32, 61)

    def row(self, length, more=0):
        few = tiny.row(tiny.documents((min(length, 7),)), length=length)
        borders = torch.cat([few.cu_seqlens[:2], few.cu_seqlens.new_full((2,), length)])
        return replace(few, cu_seqlens=borders, max_seqlen=length + more)

    @pytest.mark.parametrize("lora", [None, {"rank": 2}])
    @pytest.mark.parametrize("first", [96, 2])
    def test_whatever_comes_first(self, lora, first, counted):
        options = {"attention": "mask", "lora": lora}
        model, plain = built("qwen3", compile=True, **options), built("qwen3", **options)
        plain.load_state_dict(model.state_dict())
        for training in (True, False):
            model.train(training), plain.train(training)
            with compiled_layers(model).warming(reached=lora is None) as warming, torch.no_grad():
                model.loss(self.row(first))
            assert warming.error is None
        made = counted.frame_count
        compiled_layers(model).warm = {
            (length, 4, length + more, mode, mode)
            for length in self.LENGTHS
            for more in (0, 5)
            for mode in (True, False)
        }
        for length in self.LENGTHS:
            for more in (0, 5):
                row = self.row(length, more)
                model.train(), plain.train()
                for a, b in zip(gradients(model, row), gradients(plain, row), strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=0)
                model.eval()
                with torch.no_grad():
                    model.loss(row)
                assert counted.frame_count == made, (
                    f"a graph of its own for {length} tokens, bound {length + more}"
                )

    def test_a_length_that_comes_as_it_comes(self, counted):
        model = built(compile=True, attention="mask")
        for length in self.LENGTHS:
            gradients(model, self.row(length))
        assert counted.frame_count == 1

    def test_equal_numbers_are_not_taken_for_one(self):
        packed = Packed.of(self.row(32), "mask")
        given = opened(torch.zeros(1, 32, 8), (), {"packed": packed})
        assert int(given["packed"].max_seqlen) == 33
        assert packed.max_seqlen == 32

    def test_the_longest_segment_is_open_for_kernels_that_take_it(self, counted):
        """As a kernel's number of borders and rows is: a length and a bound change, and no graph with them."""

        def multiplied(hidden, packed):
            return hidden * packed.max_seqlen + hidden.shape[1]

        attend = torch.compile(multiplied, dynamic=False)

        for length, bound in ((32, 32), (64, 7), (16, 16), (32, 500)):
            packed = replace(Packed.of(self.row(length), "mask"), max_seqlen=bound)
            hidden = torch.ones(1, length, 3)
            given = opened(hidden, (), {"packed": packed})["packed"] if length == bound == 32 else packed
            expected = (33 if given is not packed else bound) + length
            assert torch.equal(attend(hidden, given), torch.full_like(hidden, expected))
        assert counted.frame_count == 1

    def test_what_lies_along_the_row_is_marked_and_nothing_else(self):
        given = {
            n: torch.zeros(*shape)
            for n, shape in (
                ("cos", (1, 32, 8)),
                ("ids", (1, 32)),
                ("flat", (32,)),
                ("wide", (2, 32)),
                ("mask", (1, 1, 0, 0)),
            )
        }
        opened(torch.zeros(1, 32, 32), (), given)
        marked = {n: getattr(t, "_dynamo_weak_dynamic_indices", set()) for n, t in given.items()}
        assert marked == {"cos": {1}, "ids": {1}, "flat": {0}, "wide": set(), "mask": set()}


def layers_of(model):
    from repsft_fast.distributed import decoder_layers

    return decoder_layers(model)


def test_hooks_and_names_stand_outside(counted):
    model = built(compile=True, attention="mask")
    seen = Counter()
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: seen.update(["before"]))
    model.loss(tiny.row(DOCUMENTS, length=32))
    assert seen["before"] == 4
    assert not counters["graph_break"]


def test_draws():
    assert not draws(torch.nn.Linear(2, 2))
    assert draws(torch.nn.Sequential(torch.nn.Dropout(0.1)))
    assert not draws(torch.nn.Dropout(0.0))
    layer = built().model.layers[0]
    assert not draws(layer)
    layer.self_attn.attention_dropout = 0.1
    assert draws(layer)


def test_a_plain_model_has_none():
    model = built()
    assert compiled_layers(model) is None
    compile_layers(model, enabled=False)
    assert compiled_layers(model) is None
    compile_layers(model, enabled=True)
    assert isinstance(compiled_layers(model), CompiledLayers)
