"""One rank under FSDP2 (fp32 weights, bf16 compute): what is copied for it, what is held, and that neither
changes a number."""

import sys
from collections import Counter

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from repsft_fast import distributed
from repsft_fast.distributed import World, begin_row, shard
from repsft_fast.models import load_model
from tests.helpers import ranks, tiny

ALONE = World(0, 1, 0, torch.device("cpu"))
LENGTHS = (9, 4, 17, 6)
LORA = {"lora": {"rank": 4}, "param_dtype": "float32"}


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


def rows(lengths=LENGTHS):
    return [tiny.row([document], denominator=len(lengths)) for document in tiny.documents(lengths)]


def backward(model, told=True):
    """All rows of one update; its gradients."""
    given = rows()
    for number, row in enumerate(given, 1):
        if told:
            begin_row(model, last=number == len(given))
        model.loss(row)[0].backward()
    return {name: p.grad.full_tensor().clone() for name, p in model.named_parameters() if p.grad is not None}


def as_several_ranks_do(model):
    """Layers gathered for every pass, gradients reduced in every row and divided by a factor."""
    shard(model, ALONE)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(True)
            module.set_gradient_divide_factor(1.0)
    return backward(model, told=False)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("llama", {}), ("llama-tied", {}), ("qwen3", {"activation_checkpointing": "full"}), ("llama", LORA)],
)
def test_gradients_are_those_of_rows_one_by_one(architecture, options):
    """Bit for bit, those of the way that gathers and reduces everything in every row."""
    expected = as_several_ranks_do(build(architecture, **options))
    model = build(architecture, **options)
    assert shard(model, ALONE)
    found = backward(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(gradient.dtype == torch.float32 and gradient.abs().sum() > 0 for gradient in found.values())


def sharded(model):
    return [isinstance(p, DTensor) for p in model.parameters()]


def test_parameters_stay_gathered_until_the_last_row():
    model = build()
    shard(model, ALONE)
    given = rows()
    for number, row in enumerate(given, 1):
        begin_row(model, last=number == len(given))
        loss, _ = model.loss(row)
        assert not any(sharded(model))
        loss.backward()
        last = number == len(given)
        assert sharded(model) == [last] * len(sharded(model))
        assert [p.grad is not None for p in model.parameters()] == [last] * len(sharded(model))
    model.zero_grad()
    model.loss(given[0])[0].backward()  # nothing said: a row of its own
    assert all(sharded(model))
    assert all(p.grad is not None for p in model.parameters())


def test_what_is_written_after_an_update_is_seen_by_the_next_pass():
    """By an evaluation, by a forward pass with gradients, by generation; weights are written where they are
    held."""
    model, row, ids = build(), rows()[0], torch.tensor([[5, 6, 7]])
    shard(model, ALONE)

    def seen():
        with torch.no_grad():
            loss = model.loss(row)[0].item()
            assert all(sharded(model)), "an evaluation leaves no copies behind"
            return loss, model(input_ids=ids).logits.double().sum().item()

    for _ in range(2):
        backward(model)
        model.zero_grad()
        with torch.no_grad():
            for parameter in model.parameters():
                distributed.local(parameter).mul_(0.5)
        again = build()
        again.load_state_dict(
            {name: distributed.full_tensor(p).detach() for name, p in model.state_dict().items()}
        )
        distributed.shard(again, ALONE)
        with torch.no_grad():
            expected = again.loss(row)[0].item(), again(input_ids=ids).logits.double().sum().item()
        assert seen() == expected
        assert all(sharded(model)), "nor does a plain forward pass"
        assert model.loss(row)[0].item() == expected[0]
        assert distributed.abort_pass(model)


class Copies(TorchDispatchMode):
    """Bytes that operators called from FSDP2's own code read and write, by operator; views and allocations
    are none."""

    OPERATORS = ("aten::_to_copy", "aten::copy_", "aten::add_", "aten::div", "aten::mul", "fsdp::chunk_cat")

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        if name in self.OPERATORS and self.from_fsdp(sys._getframe(1)):
            read = args[1:] if name == "aten::copy_" else args[:2] if name == "aten::add_" else args[:1]
            self.found[name] += count(read) + count(kwargs["out"] if name == "fsdp::chunk_cat" else out)
        return out

    def from_fsdp(self, frame, depth=4):
        while frame is not None and depth:
            if "_fully_shard" in frame.f_code.co_filename:
                # what a module's forward does is not its doing
                return frame.f_code.co_name != "wrapped_method"
            frame, depth = frame.f_back, depth - 1
        return False


def count(tensors):
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(count, tensors)) if isinstance(tensors, list | tuple) else 0


def copied(model, lengths):
    """Bytes FSDP2 reads and writes in one update."""
    given = rows(lengths)
    with Copies() as copies:
        for number, row in enumerate(given, 1):
            begin_row(model, last=number == len(given))
            model.loss(row)[0].backward()
    model.zero_grad()
    return sum(copies.found.values())


def test_bytes_a_parameter_and_update():
    """The formula of `sharding`, counted; a little is added for inputs that are cast."""
    model = build(changes={"hidden_size": 128, "intermediate_size": 256}.items())
    parameters = sum(p.numel() for p in model.parameters())
    shard(model, ALONE)
    backward(model)
    model.zero_grad()
    assert copied(model, LENGTHS[:1]) / parameters == pytest.approx(10 + 14, abs=0.1)
    assert copied(model, LENGTHS) / parameters == pytest.approx(10 + 22 + 10 * 3, abs=0.1)


def test_frozen_weights_in_the_compute_type_are_neither_copied_nor_held_twice():
    options = {"lora": {"rank": 4}}
    model = build(**options)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shard(model, ALONE)
    gradients = backward(model)
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    assert [isinstance(p, DTensor) for p in model.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    assert copied(model, LENGTHS) / adapters == pytest.approx(62, abs=0.6)  # and inputs that are cast


def stay_sharded(world):
    """What is sharded after each of two rows, the first of which is not the last."""
    model = build()
    shard(model, world)
    found = []
    for number, row in enumerate(rows()[:2]):
        begin_row(model, last=number == 1)
        model.loss(row)[0].backward()
        found.append((all(sharded(model)), all(p.grad is not None for p in model.parameters())))
    return found


def test_several_ranks_drop_what_they_gathered_after_every_row():
    assert ranks.run_ranks(stay_sharded) == [[(True, True)] * 2] * 2
