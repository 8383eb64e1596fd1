"""Master weights on one rank: the numbers of FSDP2 without it, weights that follow what is held, and what
that costs."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from repsft_fast import distributed
from repsft_fast.distributed import World, begin_row, full_state, grad_norm, held_parameters, shard
from repsft_fast.errors import TrainingError
from repsft_fast.models import load_model
from repsft_fast.models.loss import hidden_states
from repsft_fast.ops.reference import linear_cross_entropy_reference
from repsft_fast.optim import build_optimizer, masters, state_tensors
from repsft_fast.optim.torch_fused import FusedAdamW
from tests.helpers import ranks, tiny
from tests.helpers.peak import peak_bytes

ALONE = World(0, 1, 0, torch.device("cpu"))
LENGTHS = (9, 4, 17, 6)
CASES = {
    "untied": ("llama", {}),
    "tied": ("llama-tied", {}),
    "biases": ("qwen2", {}),
    "checkpointed": ("qwen3", {"activation_checkpointing": "full"}),
    "lora": ("llama", {"lora": {"rank": 4}}),
}


@pytest.fixture(autouse=True)
def no_group_is_left():
    yield
    ranks.leave_group()


def build(architecture="llama", changes=(), **options):
    torch.manual_seed(1)
    model = load_model(tiny.config(architecture, **dict(changes)), **{"compute_dtype": "bfloat16", **options})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros, before which no gradient reaches A
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def with_masters(*arguments, optimizer="adamw", **options):
    """(model, its optimizer over masters)"""
    model = build(*arguments, **options)
    beside = masters.beside(model)
    return model, build_optimizer(model, optimizer, lr=1e-3, seed=3, masters=beside)


def with_fsdp(*arguments, optimizer="adamw", **options):
    model = build(*arguments, **options)
    assert shard(model, ALONE)
    return model, build_optimizer(model, optimizer, lr=1e-3, seed=3)


def rows(update=0):
    documents = tiny.documents(LENGTHS, seed=update)
    return [tiny.row([document], denominator=len(LENGTHS)) for document in documents]


def backward(model, update=0, after_row=lambda: None):
    given = rows(update)
    for number, row in enumerate(given, 1):
        begin_row(model, first=number == 1, last=number == len(given))
        model.loss(row)[0].backward()
        after_row()


def step(optimizer, update=0):
    """Clipped; the third is refused. The norm."""
    norm = grad_norm(optimizer.names.values())
    clip = (1.0 / (norm + 1e-6)).clamp(max=1.0).float()
    optimizer.step(1e-3 / (update + 1), torch.tensor(float(update == 2)), clip)
    optimizer.zero_grad()
    return norm.item()


def gradients(optimizer):
    return {name: distributed.full_tensor(p.grad).clone() for name, p in optimizer.names.items()}


def state(model, optimizer):
    """Everything the closed list holds of weights and optimizer."""
    held = {name: p for name, p in held_parameters(model) if p.requires_grad}
    return {n: distributed.full_tensor(t.detach()) for n, t in (held | state_tensors(optimizer)).items()}


def follow(model):
    """Whether every weight is what its master rounds to."""
    found = model.masters
    return all(torch.equal(w, found.held[n].to(w.dtype)) for n, w in found.weights.items())


def of_the_head(model):
    """The name of the head's weight, of the embedding's where they are tied."""
    head = model.get_output_embeddings().weight
    return next(name for name, p in model.named_parameters() if p is head)


class TestBesideFSDP2:
    """One group of one rank, as it was done before: the same numbers, tensor by tensor."""

    @pytest.mark.parametrize("case", CASES)
    def test_gradients_of_several_rows_are_the_same_but_the_heads(self, case):
        architecture, options = CASES[case]
        (ours, optimizer), (theirs, sharded) = (
            kind(architecture, **options) for kind in (with_masters, with_fsdp)
        )
        backward(ours)
        backward(theirs)
        found, expected = gradients(optimizer), gradients(sharded)
        assert found.keys() == expected.keys()
        assert {g.dtype for g in found.values()} == {torch.float32}
        different = {name for name in found if not torch.equal(found[name], expected[name])}
        assert different == (set() if case == "lora" else {of_the_head(ours)})

    @pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adamw8bit"])
    @pytest.mark.parametrize("case", ["untied", "tied", "lora"])
    def test_twenty_updates_are_the_same_to_the_bit(self, case, optimizer):
        """Weights, moments and norms, once the head's gradient is rounded in every row as FSDP2 rounds it."""
        architecture, options = CASES[case]
        ours, over_masters = with_masters(architecture, optimizer=optimizer, **options)
        theirs, over_shards = with_fsdp(architecture, optimizer=optimizer, **options)
        head = ours.get_output_embeddings().weight
        sums = torch.zeros(head.shape)

        def as_fsdp_rounds():
            if head.requires_grad:
                sums.add_(head.grad)
                head.grad = None

        for update in range(20):
            if head.requires_grad:
                head.grad_dtype = torch.bfloat16
            backward(ours, update, as_fsdp_rounds)
            if head.requires_grad:
                head.grad_dtype = torch.float32
                head.grad = sums.clone()
                sums.zero_()
            backward(theirs, update)
            assert step(over_masters, update) == step(over_shards, update)
            assert follow(ours)
        found, expected = state(ours, over_masters), state(theirs, over_shards)
        assert list(found) == list(expected)
        assert [n for n in found if not torch.equal(found[n], expected[n])] == []
        assert len(found) >= 20

    @pytest.mark.parametrize("case", ["untied", "tied"])
    def test_the_heads_gradient_is_nearer_the_truth(self, case):
        """Root of the mean square error against float64 products of the same hidden states, and for the tied
        one the embedding's part as it came."""
        errors = {}
        for kind in (with_masters, with_fsdp):
            model, optimizer = kind(CASES[case][0])
            backward(model)
            errors[kind] = gradients(optimizer)[of_the_head(model)].double()
        model = build(CASES[case][0])
        model.to(torch.bfloat16)
        truth = torch.zeros(model.get_output_embeddings().weight.shape, dtype=torch.float64)
        for row in rows():
            hidden = hidden_states(model, row)
            chosen = hidden.detach()[row.trained_positions].double().requires_grad_()
            head = model.get_output_embeddings().weight.detach().double().requires_grad_()
            at = row.trained_positions
            loss, *_ = linear_cross_entropy_reference(
                chosen.detach(), head.detach(), row.targets[at], row.weights[at].double()
            )
            logits = chosen @ head.T
            losses = torch.nn.functional.cross_entropy(logits, row.targets[at], reduction="none")
            total = (losses * row.weights[at].double()).sum()
            torch.testing.assert_close(total.detach(), loss)
            total.backward()
            truth += head.grad
            if case == "tied":
                back = torch.zeros_like(hidden)
                back[at] = chosen.grad.to(torch.bfloat16)
                model.zero_grad()
                hidden.backward(back)
                truth += model.get_input_embeddings().weight.grad.double()
        ours, theirs = ((errors[kind] - truth).square().mean().sqrt() for kind in (with_masters, with_fsdp))
        assert 0.0 < ours < theirs

    def test_the_list_has_the_same_names_shapes_and_types(self):
        """So a checkpoint of either is read by the other."""
        facts = [
            {n: (tuple(t.shape), t.dtype) for n, t in state(*kind("llama-tied")).items()}
            for kind in (with_masters, with_fsdp)
        ]
        assert facts[0] == facts[1]


class TestBeside:
    def test_what_is_held_becomes_the_master_and_the_parameter_a_copy(self):
        model = build("llama-tied")
        before = {name: (id(p), p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
        beside = masters.beside(model)
        assert beside is model.masters
        assert list(beside.held) == list(before)
        for name, weight in model.named_parameters():
            identity, address, value = before[name]
            assert (id(weight), weight.dtype) == (identity, torch.bfloat16)
            assert (beside.held[name].data_ptr(), beside.held[name].dtype) == (address, torch.float32)
            assert torch.equal(beside.held[name], value)
            assert beside.of(weight) is beside.held[name]
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert follow(model)

    def test_one_type_needs_none(self):
        model = build(compute_dtype="float32")
        assert masters.beside(model) is None
        assert model.masters is None
        assert {name: id(p) for name, p in held_parameters(model)} == {
            name: id(p) for name, p in model.named_parameters()
        }
        assert masters.beside(build(param_dtype="bfloat16")) is None

    def test_no_group_is_made(self):
        model, optimizer = with_masters()
        backward(model)
        step(optimizer)
        assert not dist.is_initialized()

    def test_frozen_weights_in_the_compute_type_have_none(self):
        model, optimizer = with_masters(lora={"rank": 4})
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert set(model.masters.held) == trained
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert {held.dtype for held in optimizer.held.values()} == {torch.float32}

    def test_frozen_weights_in_another_are_saved_as_they_were_read(self):
        model = build(lora={"rank": 4})
        frozen = model.get_input_embeddings().weight
        frozen.data = torch.randn(frozen.shape)
        value = frozen.detach().clone()
        beside = masters.beside(model)
        assert frozen.dtype == torch.bfloat16
        assert not beside.of(frozen).requires_grad
        kept = full_state(model, ALONE)
        assert any(torch.equal(value, tensor) for tensor in kept.values())

    def test_what_is_saved_is_what_is_held(self):
        model, optimizer = with_masters("llama-tied")
        backward(model)
        step(optimizer)
        kept = full_state(model, ALONE)
        assert {t.dtype for t in kept.values()} == {torch.float32}
        assert kept["lm_head.weight"] is kept["model.embed_tokens.weight"]
        held = dict(held_parameters(model))
        assert all(torch.equal(kept[name], held[name]) for name in held)
        assert any(not torch.equal(t, t.bfloat16().float()) for t in kept.values())

    @pytest.mark.parametrize(
        ("computed", "sums"), [("float16", torch.float32), ("float64", torch.float64)], ids=["fp16", "fp64"]
    )
    def test_other_types_are_added_up_in_theirs(self, computed, sums):
        model, optimizer = with_masters(compute_dtype=computed)
        before = state(model, optimizer)
        before = {name: t.clone() for name, t in before.items()}
        backward(model)
        assert {p.grad.dtype for p in optimizer.names.values()} == {sums}
        assert step(optimizer) > 0.0
        after = state(model, optimizer)
        assert {after[name].dtype for name in optimizer.names} == {torch.float32}
        assert all(not torch.equal(after[name], before[name]) for name in optimizer.names)
        assert follow(model)

    def test_a_narrow_master_of_a_wide_weight(self):
        """Held in bf16, computed in fp32: gradients reach the optimizer in the held type, as from FSDP2."""
        ours, over_masters = with_masters(param_dtype="bfloat16", compute_dtype="float32", optimizer="sgd")
        theirs, over_shards = with_fsdp(param_dtype="bfloat16", compute_dtype="float32", optimizer="sgd")
        for update in range(2):
            backward(ours, update)
            backward(theirs, update)
            for optimizer in (over_masters, over_shards):
                optimizer.step(1e-2)
                optimizer.zero_grad()
        found, expected = state(ours, over_masters), state(theirs, over_shards)
        assert {t.dtype for t in found.values()} == {torch.bfloat16}
        assert all(torch.equal(found[name], expected[name]) for name in found)


class TestFollowing:
    def test_a_veto_leaves_masters_and_weights(self):
        model, optimizer = with_masters()
        before = {name: t.clone() for name, t in state(model, optimizer).items()}
        backward(model)
        optimizer.step(1e-2, torch.ones(()))
        assert all(torch.equal(before[name], t) for name, t in state(model, optimizer).items())
        assert follow(model)

    def test_a_write_behind_its_back_is_seen_before_the_next_step(self):
        model, optimizer = with_masters()
        held = next(iter(optimizer.held.values()))
        with torch.no_grad():
            held.mul_(2.0)
        backward(model)
        before = held.detach().clone()
        with pytest.raises(TrainingError, match=r"^training: weights were written where they are held, not"):
            optimizer.step(1e-2)
        assert torch.equal(held, before)
        optimizer.state_was_written()
        assert follow(model)
        assert all(p.grad is None for p in optimizer.names.values())
        optimizer.step(1e-2)

    def test_a_rule_that_writes_weights_is_believed(self, monkeypatch):
        """One pass over all of it: nothing is published after it; it is where the types are others."""
        monkeypatch.setattr(FusedAdamW, "writes_weights", True)
        for dtype, followed in (("bfloat16", False), ("float16", True)):
            model, optimizer = with_masters(compute_dtype=dtype)
            backward(model)
            optimizer.step(1e-2)
            assert follow(model) == followed
            optimizer.zero_grad()
            backward(model)
            optimizer.step(1e-2)  # and is not taken for a write behind its back

    def test_gradients_are_handed_over_and_not_kept(self):
        model, optimizer = with_masters()
        backward(model)
        optimizer.step(1e-2)
        assert all(held.grad is None for held in optimizer.held.values())


class TestGradients:
    @pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
    def test_a_later_row_is_added_in_place_in_fp32(self, architecture):
        model, optimizer = with_masters(architecture)
        given = rows()
        addresses, expected = {}, {}
        for number, row in enumerate(given, 1):
            begin_row(model, first=number == 1, last=number == len(given))
            assert model.get_output_embeddings().weight.grad_dtype == torch.float32, (
                "uses may be summed in bf16"
            )
            model.loss(row)[0].backward()
            alone, other = with_masters(architecture)
            alone.loss(row)[0].backward()
            for name, p in optimizer.names.items():
                assert addresses.setdefault(name, p.grad.data_ptr()) == p.grad.data_ptr()
                grad = other.names[name].grad
                expected[name] = grad.clone() if number == 1 else expected[name] + grad
                assert torch.equal(p.grad, expected[name]), name
                assert p.grad.dtype == torch.float32

    @pytest.mark.parametrize("end", ["step", "abort", "said"])
    def test_the_next_update_begins_in_fp32_again(self, end):
        model, optimizer = with_masters()
        backward(model)
        if end == "step":
            step(optimizer)
        elif end == "abort":
            optimizer.zero_grad()
            assert distributed.abort_pass(model)
        else:  # by the first row alone
            for p in optimizer.names.values():
                p.grad = None
            begin_row(model, first=True, last=True)
        model.loss(rows()[0])[0].backward()
        assert {p.grad.dtype for p in optimizer.names.values()} == {torch.float32}

    def test_one_that_was_not_added_up_in_fp32_is_refused(self):
        model, optimizer = with_masters()
        begin_row(model, first=False, last=True)
        model.loss(rows()[0])[0].backward()
        with pytest.raises(
            TrainingError, match=r"not added up in its type, expected torch\.float32, got torch"
        ):
            optimizer.step(1e-2)


class Bytes(TorchDispatchMode):
    """Bytes that casts and additions of floating-point gradients read and write, and foreach copies."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name == "aten::_foreach_copy_":
            self.found[name] += sum(map(size, [*args[0], *args[1]]))
        elif name in ("aten::_to_copy", "aten::add_"):
            self.found[name] += size(out) + sum(size(a) for a in args if isinstance(a, torch.Tensor))
        return out


def size(tensor):
    return tensor.numel() * tensor.element_size()


def test_bytes_a_parameter_and_update():
    """The formula of the module, counted in the parameters of the layers; activations that are cast are few
    here."""
    model, optimizer = with_masters(
        changes={"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 61}.items()
    )
    parameters = sum(p.numel() for p in model.parameters())

    def counted(lengths):
        given = [tiny.row([document], denominator=4) for document in tiny.documents(lengths, vocabulary=61)]
        with Bytes() as found:
            for number, row in enumerate(given, 1):
                begin_row(model, first=number == 1, last=number == len(given))
                model.loss(row)[0].backward()
        optimizer.zero_grad()
        return sum(found.found.values()) / parameters

    one, two, four = (counted((4,) * count) for count in (1, 2, 4))
    assert one == pytest.approx(6, abs=0.35)
    assert two - one == pytest.approx(10, abs=0.35)
    assert (four - two) / 2 == pytest.approx(two - one, abs=0.01)
    with Bytes() as found:
        model.masters.publish()
    assert found.found == {"aten::_foreach_copy_": 6 * parameters}


def test_one_tensor_at_a_time_is_held_twice_on_the_way():
    model = build(changes={"num_hidden_layers": 9, "hidden_size": 128, "intermediate_size": 256}.items())
    sizes = [p.numel() for p in model.parameters()]
    peak = peak_bytes(lambda: masters.beside(model))
    assert peak <= 2 * sum(sizes) + 1024, "the copies in bf16, and no second one in fp32 of anything"
