"""The head inside `torch.compile`, on the torch path and on the kernel's: a well-formed operator and eager's
numbers."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck

from repsft_fast.ops import products, row_pass
from repsft_fast.ops.linear_cross_entropy import linear_cross_entropy
from repsft_fast.row import IGNORE_INDEX
from tests.helpers.interpreter import interpret

N, H, V = 15, 8, 40
FIELDS = ("loss", "correct", "entropy", "top1_probability", "margin", "log10_miss")
TAU = 0.5
# What decides the way through the operator; a share of 0 sends every kept row to the kernels that read their
# count.
WAYS = {
    "plain, weights of 1": {},
    "several chunks, memorised rows": {"chunk_bytes": 2 * V * 4, "skip_below": TAU},
    "memorised rows left out": {"skip_below": TAU, "kept_share": 0.25},
    "several chunks, soft-cap": {"chunk_bytes": 2 * V * 4, "softcap": 3.0},
}
PLAIN, LEFT_OUT = "plain, weights of 1", "memorised rows left out"
DTYPES = {"fp64": torch.float64, "bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@pytest.fixture(params=["torch, fp64", "kernel, fp32", "kernel, fp16"])
def dtype(request, monkeypatch):
    """Of hidden states and head, on the path the name says."""
    path, name = request.param.split(", ")
    if path == "kernel":
        interpret(monkeypatch, "csrc_triton.cross_entropy", "csrc_triton.kept_rows")
        monkeypatch.setattr(products, "CAPACITY_STEP", 1)
    else:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert row_pass.kernel_runs(torch.device("cpu"), DTYPES[name]) == (path == "kernel")
    yield DTYPES[name]
    torch._dynamo.reset()


class Case:
    """Half of the targets are nearly certain, so that a threshold parts the rows."""

    def __init__(self, dtype, *, n=N, weighted=True, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.randint(V, (n,), generator=generator)
        head = torch.randn(V, H, generator=generator)
        hidden = torch.randn(n, H, generator=generator) * 0.3
        hidden[::2] += head[self.targets[::2]] * 1.5
        self.targets[torch.rand(n, generator=generator) < 0.2] = IGNORE_INDEX
        self.hidden, self.head = hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()
        self.weights = torch.rand(
            n, generator=generator, dtype=torch.float64 if dtype == torch.float64 else torch.float32
        )
        self.weights = self.weights if weighted else None
        self.rows = torch.nonzero(self.targets != IGNORE_INDEX)[:, 0]

    @property
    def inputs(self):
        return self.hidden, self.head, self.targets, self.weights, self.rows

    def operands(self, *, softcap=None, skip_below=0.0, chunk_bytes=None, kept_share=1.0):
        needs = self.hidden.requires_grad, self.head.requires_grad
        return *self.inputs, *needs, softcap, skip_below, chunk_bytes, kept_share


def case_of(way, dtype, **more):
    return Case(dtype, weighted=way != PLAIN, **more)


def test_the_ways_are_what_they_say(dtype):
    case = Case(dtype)
    miss = 10 ** linear_cross_entropy(*case.inputs)[1].log10_miss
    kept = int((miss >= TAU).sum())
    assert (
        products.capacity(miss.numel(), WAYS[LEFT_OUT]["kept_share"]) < kept < miss.numel()
        or dtype == torch.float64
    )
    budget = WAYS["several chunks, soft-cap"]["chunk_bytes"]
    assert len(row_pass.chunk_ranges(case.rows.numel(), V, case.hidden.element_size(), budget)) > 2


WELL_FORMED = [(PLAIN, ""), (PLAIN, "hidden head"), (LEFT_OUT, ""), (LEFT_OUT, "hidden"), (LEFT_OUT, "head")]


@pytest.mark.parametrize(("way", "frozen"), WELL_FORMED)
def test_the_operator_is_well_formed(dtype, way, frozen):
    case = case_of(way, dtype)
    for name in frozen.split():
        getattr(case, name).requires_grad_(False)
    opcheck(torch.ops.repsft.linear_cross_entropy, case.operands(**WAYS[way]))


def test_the_operator_is_well_formed_in_bf16():
    """On the torch path: Triton's interpreter has no bf16."""
    opcheck(torch.ops.repsft.linear_cross_entropy, Case(torch.bfloat16).operands())


@pytest.mark.parametrize("way", WAYS)
def test_no_output_shares_memory_with_another_or_with_an_input(dtype, way):
    for n, wanted in ((N, True), (N, False), (0, True)):
        case = case_of(way, dtype, n=n)
        case.hidden.requires_grad_(wanted)
        case.head.requires_grad_(wanted)
        operands = case.operands(**WAYS[way])
        with torch.no_grad():
            outputs = torch.ops.repsft.linear_cross_entropy(*operands)
        tensors = [*outputs, *(value for value in operands if isinstance(value, torch.Tensor))]
        assert len({t.untyped_storage()._cdata for t in tensors}) == len(tensors)
        places = [t.untyped_storage().data_ptr() for t in tensors if t.numel()]
        assert len(set(places)) == len(places)


@pytest.mark.parametrize("way", WAYS)
def test_one_graph_and_eagers_numbers(dtype, way):
    """Two calls before one backward, each with a factor of its own."""

    def step(hidden, head, targets, weights, rows, others):
        loss, stats = linear_cross_entropy(torch.tanh(hidden), head, targets, weights, rows, **WAYS[way])
        later, _ = linear_cross_entropy(others, head, targets, weights, rows, **WAYS[way])
        return loss * 2.0 + later * 0.5, *(getattr(stats, name) for name in FIELDS)

    found = []
    for call in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        case, others = case_of(way, dtype), case_of(way, dtype, seed=1).hidden
        loss, *stats = call(*case.inputs, others)
        assert not any(value.requires_grad for value in stats)
        loss.backward()
        found.append((loss.detach(), *stats, case.hidden.grad, others.grad, case.head.grad))
    rounding = torch.finfo(dtype).eps
    for eager, compiled in zip(*found):
        assert (compiled.dtype, compiled.shape) == (eager.dtype, eager.shape)
        if eager.dtype == torch.bool:
            assert torch.equal(compiled, eager)
        else:
            torch.testing.assert_close(
                compiled, eager, rtol=4 * rounding, atol=4 * rounding * float(eager.abs().max())
            )


def test_two_graphs_before_their_backwards(dtype):
    """What a call saved is its own, whatever came between."""
    head_of = torch.compile(lambda *a: linear_cross_entropy(*a)[0], backend="aot_eager", fullgraph=True)
    gradients = []
    for interleaved in (True, False):
        first, later = Case(dtype), Case(dtype, seed=1)
        losses = [head_of(*first.inputs)]
        if not interleaved:
            losses.pop().backward()
        losses.append(head_of(*later.inputs))
        for loss in losses:
            loss.backward()
        gradients.append([t.grad for case in (first, later) for t in (case.hidden, case.head)])
    for a, b in zip(*gradients):
        assert torch.equal(a, b)


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_what_is_frozen_gets_no_gradient(dtype, frozen):
    step = torch.compile(lambda *a: linear_cross_entropy(*a)[0], backend="aot_eager", fullgraph=True)
    case, eager = Case(dtype), Case(dtype)
    for one in (case, eager):
        getattr(one, frozen).requires_grad_(False)
    step(*case.inputs).backward()
    linear_cross_entropy(*eager.inputs)[0].backward()
    assert getattr(case, frozen).grad is None
    trained = "head" if frozen == "hidden" else "hidden"
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(
        getattr(case, trained).grad, getattr(eager, trained).grad, rtol=rounding, atol=rounding
    )


def test_other_numbers_of_rows_do_not_recompile(dtype):
    counter = CompileCounter()
    step = torch.compile(
        lambda *a: linear_cross_entropy(*a)[0], backend=counter, fullgraph=True, dynamic=True
    )
    for n in (9, 15, 12):
        step(*Case(dtype, n=n).inputs)
    assert counter.frame_count == 1
