"""All compiled layers of a row as one: the bits of layers called one by one, and that path whenever in doubt."""

import contextlib
from dataclasses import replace

import pytest
import torch
from torch import nn

from repsft_fast.models import layer_pass
from repsft_fast.models.compiled import compiled_layers
from repsft_fast.models.compiled_stack import Stack, running
from repsft_fast.models.layer_pass import Counts
from repsft_fast.models.loss import hidden_states
from repsft_fast.optim import masters
from repsft_fast.selftest.syncs import SyncCounter
from tests.helpers import tiny
from tests.models.test_compiled import MODELS, built, layers_of

LENGTH, LONGEST = 32, 16
KINDS = {
    "qwen3": {},
    "llama-tied": {},
    "gemma3": {},
    "llama, adapters": {"lora": {"rank": 2}},
    "qwen3, one adapter in front": {"lora": {"rank": 2, "target_modules": r".*layers\.0.*q_proj"}},
}
MODELS["llama-tied"] = lambda: tiny.config("llama-tied", num_hidden_layers=4)


def rows(count=3):
    lengths = [(9, 11, 8), (16, 3, 12), (5, 15, 4)]
    made = [tiny.row(tiny.documents(some, seed=n), length=LENGTH) for n, some in enumerate(lengths)]
    return [replace(row, max_seqlen=LONGEST) for row in made[:count]]


def warmed(kind, backend="aot_eager", prepare=lambda model: None, **more):
    """A model whose rows of LENGTH may pass its layers together."""
    options = {"attention": "mask", **KINDS.get(kind, {}), **more}
    compiled = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **o: compiled(function, backend=backend, **o))
        model = tiny.filled(built(kind.partition(",")[0], compile=True, **options))
    prepare(model)
    layers, row = compiled_layers(model), rows(1)[0]
    shape = (LENGTH, len(row.cu_seqlens), LONGEST, True, True)
    reached = model.get_input_embeddings().weight.requires_grad
    with layers.warming(reached=reached) as warming, torch.no_grad():
        model.loss(row)
    assert warming.error is None
    layers.stack.rehearse(shape, model, lambda: model.loss(row))
    layers.warm = {shape}
    return model


@pytest.fixture(scope="module")
def model():
    yield warmed("qwen3")
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def clean(request):
    yield
    if "model" in request.fixturenames:
        request.getfixturevalue("model").zero_grad()


def stack_of(model):
    return compiled_layers(model).stack


def gradients(model, given, *, together=True):
    """Of a whole update: each weight's, with its type and layout."""
    model.zero_grad()
    for row in given:
        with running(model, row) if together else contextlib.nullcontext():
            loss = model.loss(row)[0]
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def equal(found, expected):
    return all(
        (a is None and b is None) or (a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b))
        for a, b in zip(found, expected, strict=True)
    )


def updates(model, *, together, count=3):
    """Weights after updates of three rows, and every gradient on the way."""
    seen = []
    for _ in range(count):
        seen += [g.clone() if g is not None else None for g in gradients(model, rows(), together=together)]
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.sub_(0.1 * p.grad.to(p.dtype))
    return seen + [p.detach().clone() for p in model.parameters()]


class TestBits:
    @pytest.mark.parametrize("kind", KINDS)
    def test_updates_are_those_of_layers_called_one_by_one(self, kind):
        model = warmed(kind)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        found = updates(model, together=True)
        assert stack_of(model).counts == Counts(stacked=9, at_once=0 if kind == "gemma3" else 9)
        model.load_state_dict(start)
        assert equal(found, updates(model, together=False))
        assert stack_of(model).counts.stacked == 9
        torch._dynamo.reset()

    @pytest.mark.parametrize("adds", [False, True])
    def test_gradients_beside_masters_are_added_up_in_their_type(self, adds):
        made = []

        def prepare(model):
            model.compute_dtype = torch.bfloat16
            made.append(masters.beside(model))

        model = warmed("llama-tied", prepare=prepare)
        found = []
        for together in (True, False):
            model.zero_grad()
            for number, row in enumerate(rows()):
                made[0].add_gradients(adds and number > 0)
                with running(model, row) if together else contextlib.nullcontext():
                    loss = model.loss(row)[0]
                loss.backward()
            made[0].add_gradients(False)
            found.append([p.grad for p in model.parameters()])
        assert stack_of(model).counts.stacked == 3
        assert all(g.dtype == torch.float32 for g in found[0])
        assert equal(*found)
        torch._dynamo.reset()

    def test_a_weight_of_another_layout_gets_a_gradient_of_its_layout(self, model):
        weight = layers_of(model)[1].mlp.down_proj.weight
        (pair,) = (p for p in plan_of(model).pairs if any(w is weight for w, _ in p.weights))
        at = [w is weight for w, _ in pair.weights].index(True)
        before, backward = pair.strides, pair.backward

        def turned(kept):
            found = list(backward(kept))
            place = pair.weights[at][1]
            found[place] = found[place].t().contiguous().t()
            return found

        object.__setattr__(pair, "strides", tuple(s[::-1] if n == at else s for n, s in enumerate(before)))
        object.__setattr__(pair, "backward", turned)
        found = gradients(model, rows(1))
        object.__setattr__(pair, "strides", before)
        object.__setattr__(pair, "backward", backward)
        assert weight.grad.stride() == weight.stride()
        assert equal(found, gradients(model, rows(1), together=False))

    def test_nothing_waits_and_nothing_is_compiled(self, model, monkeypatch):
        before, given = stack_of(model).counts.stacked, rows()
        with torch.compiler.set_stance("fail_on_recompile"):
            gradients(model, given)
            # the counter is a mode of torch's, beside which layers go one by one
            monkeypatch.setattr(layer_pass.Plan, "holds", lambda plan: True)
            with SyncCounter() as counter:
                gradients(model, given)
        assert counter.total == 0
        assert stack_of(model).counts.stacked == before + 6

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["qwen3", "llama-tied", "llama, adapters"])
    def test_by_inductor(self, kind):
        model = warmed(kind, backend="inductor")
        start = {name: value.clone() for name, value in model.state_dict().items()}
        found = updates(model, together=True)
        assert stack_of(model).counts.stacked == 9
        model.load_state_dict(start)
        assert equal(found, updates(model, together=False))
        torch._dynamo.reset()


def plan_of(model):
    (plan,) = stack_of(model)._plans.values()
    return plan


def a_layers_hook(model):
    return layers_of(model)[2].register_forward_pre_hook(lambda *_: None).remove


def a_hook_behind_a_layer(model):
    return layers_of(model)[3].register_forward_hook(lambda *_: None).remove


def a_layers_backward_hook(model):
    return layers_of(model)[1].register_full_backward_hook(lambda *_: None).remove


def a_global_hook(model):
    return nn.modules.module.register_module_forward_pre_hook(lambda *_: None).remove


def a_weights_hook(model):
    return layers_of(model)[0].mlp.up_proj.weight.register_hook(lambda g: g * 2).remove


def a_hook_behind_a_gradient(model):
    weight = layers_of(model)[0].mlp.up_proj.weight
    return weight.register_post_accumulate_grad_hook(lambda p: [p.grad.mul_(2), None][1]).remove


def a_frozen_weight(model):
    weight = layers_of(model)[1].mlp.up_proj.weight
    weight.requires_grad_(False)
    return lambda: weight.requires_grad_(True)


def another_weight(model):
    part = layers_of(model)[1].mlp.up_proj
    before = part.weight
    part.weight = nn.Parameter(before.detach() * 2)

    def undo():
        part.weight = before

    return undo


def a_recomputed_layer(model):
    layer = layers_of(model)[3]
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = lambda f, *a: torch.utils.checkpoint.checkpoint(
        f, *a, use_reentrant=False
    )

    def undo():
        layer.gradient_checkpointing = False

    return undo


def what_autograd_keeps(model):
    context = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    context.__enter__()
    return lambda: context.__exit__(None, None, None)


def autocast(model):
    context = torch.autocast("cpu", dtype=torch.bfloat16)
    context.__enter__()
    return lambda: context.__exit__(None, None, None)


def a_mode(model):
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    context = Mode()
    context.__enter__()
    return lambda: context.__exit__(None, None, None)


def layers_off(model):
    compiled_layers(model).on = False

    def undo():
        compiled_layers(model).on = True

    return undo


CHANGES = [
    a_layers_hook, a_hook_behind_a_layer, a_layers_backward_hook, a_global_hook, a_weights_hook, a_hook_behind_a_gradient,
    a_frozen_weight, another_weight, a_recomputed_layer, what_autograd_keeps, autocast, a_mode, layers_off,
]  # fmt: skip


class TestRowsThatDoNotFit:
    @pytest.mark.parametrize("change", CHANGES)
    def test_it_goes_layer_by_layer(self, model, change):
        before = stack_of(model).counts.stacked
        undo = change(model)
        try:
            found = [g.clone() if g is not None else None for g in gradients(model, rows(2))]
            assert stack_of(model).counts.stacked == before
            assert equal(found, gradients(model, rows(2), together=False))
        finally:
            undo()
        gradients(model, rows(1))
        assert stack_of(model).counts.stacked == before + 1, "for good, though all is as it was"

    @pytest.mark.parametrize(
        "what", ["length", "longest", "borders", "no gradients", "evaluation", "outside"]
    )
    def test_shapes_that_were_not_warmed(self, model, what):
        before, row = stack_of(model).counts.stacked, rows(1)[0]
        change = {
            "length": lambda: tiny.row(tiny.documents((16, 16, 8)), length=40),
            "longest": lambda: replace(row, max_seqlen=17),
            "borders": lambda: replace(row, cu_seqlens=torch.cat([row.cu_seqlens, row.cu_seqlens[-1:]])),
        }
        row = change.get(what, lambda: row)()
        model.train(what != "evaluation")
        way = running(model) if what != "outside" else contextlib.nullcontext()
        with way, torch.set_grad_enabled(what not in ("no gradients", "evaluation")):
            loss = model.loss(row)[0]
        model.train()
        assert stack_of(model).counts.stacked == before
        assert torch.isfinite(loss)

    @pytest.mark.parametrize("number", [0, 1, 3])
    def test_a_layer_given_something_else_leaves_the_rest_to_themselves(self, model, number, monkeypatch):
        """The layers before it are one function, and it is called with what they computed."""
        plan = plan_of(model)
        odd = replace(plan.givens[number], like="another")
        monkeypatch.setattr(
            plan, "givens", [odd if n == number else given for n, given in enumerate(plan.givens)]
        )
        monkeypatch.setattr(plan, "at_once", None)
        before = stack_of(model).counts.stacked
        found = gradients(model, rows(2))
        assert stack_of(model).counts.stacked == before + (2 if number else 0)
        assert equal(found, gradients(model, rows(2), together=False))


class TestWhatIsRefused:
    @pytest.mark.parametrize("what", ["weight", "borders"])
    def test_writing_between_forward_and_backward(self, model, what):
        row = rows(1)[0]
        with running(model):
            loss = model.loss(row)[0]
        written = layers_of(model)[2].mlp.up_proj.weight if what == "weight" else row.cu_seqlens
        with torch.no_grad():
            written.add_(0)
        with pytest.raises(Exception, match="were written between a row's forward and its backward pass"):
            loss.backward()

    def test_going_backward_twice(self, model):
        with running(model):
            loss = hidden_states(model, rows(1)[0], "mask").sum()
        loss.backward(retain_graph=True)
        with pytest.raises(Exception, match="go backward once"):
            loss.backward()

    def test_a_gradient_of_the_gradient(self, model):
        with running(model):
            loss = hidden_states(model, rows(1)[0], "mask").sum()
        with pytest.raises(Exception, match="no gradient of their gradient"):
            loss.backward(create_graph=True)

    @pytest.mark.parametrize("how", ["another tensor", "written", "left out", "in front"])
    def test_a_hidden_state_that_is_not_the_layers_before(self, model, how, monkeypatch):
        layer = layers_of(model)[2]
        plain = layer.forward

        def odd(hidden, *args, **kwargs):
            if how == "left out":
                return hidden
            if how == "another tensor":
                return plain(hidden * 1, *args, **kwargs)
            if how == "written":
                return plain(hidden.add_(0), *args, **kwargs)
            return plain(layers_of(model)[3](hidden, *args, **kwargs), *args, **kwargs)

        monkeypatch.setattr(layer, "forward", odd)
        with (
            pytest.raises(Exception, match="not called with what the one before it computed"),
            running(model),
        ):
            model.loss(rows(1)[0])
        monkeypatch.undo()
        before = stack_of(model).counts.stacked
        gradients(model, rows(1))
        assert stack_of(model).counts.stacked == before + 1

    def test_ending_amid_the_layers(self, model):
        layers = list(layers_of(model))
        model.model.config.num_hidden_layers = 2  # its own loop ends there
        try:
            with pytest.raises(Exception, match="not called with what"), running(model):
                model.loss(rows(1)[0])
        finally:
            model.model.config.num_hidden_layers = len(layers)
        assert stack_of(model).passing is None


class TestMemoryRunsOut:
    def test_amid_the_forward_pass_nothing_stays(self, model, monkeypatch):
        pair = plan_of(model).pairs[2]
        before, forward = torch.is_grad_enabled(), pair.forward

        def full(inputs):
            raise torch.OutOfMemoryError("no room")

        object.__setattr__(pair, "forward", full)
        with pytest.raises(torch.OutOfMemoryError), running(model):
            model.loss(rows(1)[0])
        object.__setattr__(pair, "forward", forward)
        assert torch.is_grad_enabled() == before
        assert stack_of(model).passing is None
        assert equal(gradients(model, rows()), gradients(model, rows(), together=False))

    def test_amid_the_backward_pass_the_update_can_be_made_anew(self, model):
        pair = plan_of(model).pairs[1]
        backward = pair.backward

        def full(inputs):
            raise torch.OutOfMemoryError("no room")

        object.__setattr__(pair, "backward", full)
        with pytest.raises(torch.OutOfMemoryError):
            gradients(model, rows())
        object.__setattr__(pair, "backward", backward)
        assert equal(gradients(model, rows()), gradients(model, rows(), together=False))

    def test_what_a_layer_kept_is_freed_when_its_backward_is_through(self, model, monkeypatch):
        left, tapes = [], []
        joined, add = layer_pass.Plan.joined, layer_pass.add_gradients
        monkeypatch.setattr(
            layer_pass.Plan,
            "joined",
            lambda plan, first, tape: tapes.append(tape) or joined(plan, first, tape),
        )

        def watch(pair, found):
            left.append((len(tapes[0].kept), [len(kept) for kept in tapes[0].kept]))
            add(pair, found)

        monkeypatch.setattr(layer_pass, "add_gradients", watch)
        gradients(model, rows(1))
        assert [count for count, _ in left] == [3, 2, 1, 0]
        assert all(sizes and min(sizes) > 5 for count, sizes in left if count)


REFUSED = {
    "read_by_another": "something else reads what a layer hands on",
    "left_out": "a layer was not called",
    "a_shared_weight": "a weight has two places",
    "a_hook": "layers or weights have hooks",
    "a_weights_hook": "a weight has a hook",
    "a_layer_that_draws": "a layer was not called",
    "layers_dropped": "layers are left out at random",
}


class TestWarmUp:
    def read_by_another(self, model):
        layer = layers_of(model)[2]
        plain = layer.forward
        layer.forward = lambda hidden, *a, **k: (hidden.sum(), plain(hidden, *a, **k))[1]

    def looked_at(self, model):
        layer = layers_of(model)[2]
        plain = layer.forward
        layer.forward = lambda hidden, *a, **k: (hidden.shape, hidden.dtype, plain(hidden, *a, **k))[2]

    def left_out(self, model):
        layers_of(model)[3].forward = lambda hidden, *a, **k: hidden

    def a_shared_weight(self, model):
        layers_of(model)[1].mlp.up_proj.weight = layers_of(model)[0].mlp.up_proj.weight

    def a_hook(self, model):
        layers_of(model)[0].register_forward_pre_hook(lambda *_: None)

    def a_weights_hook(self, model):
        layers_of(model)[0].mlp.up_proj.weight.register_hook(lambda g: g)

    def a_hook_taken_away(self, model):
        weight = layers_of(model)[0].mlp.up_proj.weight
        weight.register_hook(lambda g: g).remove()
        weight.register_post_accumulate_grad_hook(lambda p: None).remove()

    def layers_dropped(self, model):
        model.model.layerdrop = 0.1

    def a_layer_that_draws(self, model):
        layers_of(model)[1].self_attn.attention_dropout = 0.1

    @pytest.mark.parametrize("what", [*REFUSED, "looked_at", "a_hook_taken_away"])
    def test_a_model_that_is_no_chain_of_layers(self, what):
        model = warmed("llama", prepare=getattr(self, what))
        (why,) = stack_of(model).why.values() or [""]
        assert REFUSED.get(what, "") in why
        assert bool(why) == (what in REFUSED)
        gradients(model, rows(1))
        assert stack_of(model).counts.stacked == (0 if why else 1)
        torch._dynamo.reset()

    @pytest.mark.parametrize("adapters", ["none in front", "in the middle"])
    def test_layers_that_need_no_gradient(self, adapters):
        where = {"none in front": 3, "in the middle": 1}[adapters]
        lora = {"rank": 2, "target_modules": rf".*layers\.{where}.*q_proj"}
        model = warmed("llama", lora=lora)
        assert "needs no gradient" in next(iter(stack_of(model).why.values()))
        found = gradients(model, rows(2))
        assert equal(found, gradients(model, rows(2), together=False))
        torch._dynamo.reset()

    def test_another_compiler(self):
        model = warmed("llama", backend="eager")
        assert "one compiled function" in next(iter(stack_of(model).why.values()))
        torch._dynamo.reset()

    def test_no_memory_to_try(self, model):
        stack = Stack()
        stack.layers = list(layers_of(model))

        def full(*args, **kwargs):
            raise torch.OutOfMemoryError("no room")

        with pytest.raises(torch.OutOfMemoryError):
            stack.record(0, "shape", full, (torch.ones(1, 4, 4), (), {}), wanted=True)
        assert stack.why == {"shape": "there is no memory to try"}
        assert stack.rehearse("shape", model, full)

    def test_several_ranks_try_nothing(self, model):
        stack = Stack()
        stack.allowed = False
        stack.record(0, "shape", None, None, wanted=True)
        assert stack.rehearse("shape", model, lambda: None) == ""
        assert not stack.why


def test_a_plain_model_runs_as_it_is():
    model = built("llama")
    with running(model):
        assert torch.isfinite(model.loss(rows(1)[0])[0])
