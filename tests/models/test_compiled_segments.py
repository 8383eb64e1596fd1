"""Compiled layers whose attention goes by segments: one graph, no break, plain layers' bits, together as one."""

import contextlib
from dataclasses import replace

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from repsft_fast.models.compiled import compiled_layers
from repsft_fast.models.layer_call import likeness, tensors_in
from repsft_fast.ops.attention import Packed
from repsft_fast.training.static_row import Shape, StaticRow
from tests.helpers import tiny
from tests.models import test_compiled_stack
from tests.models.test_compiled import MODELS, SIZES, TWO_KINDS, built
from tests.models.test_compiled_stack import LENGTH, LONGEST, equal, rows, stack_of, updates, warmed


def gpt_oss():
    sizes = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": tiny.WINDOW}
    config = transformers.GptOssConfig(**sizes, head_dim=8, layer_types=TWO_KINDS)
    config._experts_implementation = "batched_mm"  # the grouped product is no graph's in older versions
    return config


MODELS["gpt-oss"] = gpt_oss
# sinks; soft-caps; neither
KINDS = {"gpt-oss": 2, "gemma2": 2, "qwen3": 1}
BY_SEGMENTS = {"attention": "segments"}


@pytest.fixture(autouse=True)
def forgotten():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(kind, backend="aot_eager", **options):
    counter, through = CompileCounterWithBackend(backend), torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch, "compile", lambda function, options=None, **o: through(function, backend=counter, **o)
        )
        return built(kind, compile=True, **BY_SEGMENTS, **options), counter


def gradients(model, row):
    return test_compiled_stack.gradients(model, [row], together=False)


@pytest.mark.parametrize(("kind", "checkpointing"), [*((kind, "none") for kind in KINDS), ("gemma2", "full")])
def test_layers_of_a_kind_are_one_graph_whatever_the_row(kind, checkpointing):
    options = {"activation_checkpointing": checkpointing}
    model, counter = compiled(kind, **options)
    plain = built(kind, **BY_SEGMENTS, **options)
    for lengths, length in (((7, 12, 5), 48), ((3, 20, 9), 48), ((16, 8, 8), 40), ((30, 1, 33), 64)):
        row = tiny.row(tiny.documents(lengths), length=length)
        row = replace(row, cu_seqlens=row.cu_seqlens[:6], max_seqlen=64)
        found = [x.clone() for x in gradients(model, row)]
        assert equal(found, gradients(plain, row))
        assert counter.frame_count == KINDS[kind], "a graph for every row, or a break"
    model.eval(), plain.eval()
    with torch.no_grad():
        assert torch.equal(model.loss(row)[0], plain.loss(row)[0])
    assert counter.frame_count == 2 * KINDS[kind]
    assert not counters["graph_break"]


@pytest.mark.parametrize("kind", [*KINDS, "qwen3, one adapter in front"])
def test_a_row_passes_all_layers_together(kind):
    model = warmed(kind, **BY_SEGMENTS)
    assert not stack_of(model).why
    start = {name: value.clone() for name, value in model.state_dict().items()}
    found = updates(model, together=True)
    assert (stack_of(model).counts.stacked, stack_of(model).counts.apart) == (9, 0)
    model.load_state_dict(start)
    assert equal(found, updates(model, together=False))
    assert stack_of(model).counts.stacked == 9
    compiled_layers(model).on = False
    model.load_state_dict(start)
    assert equal(found, updates(model, together=False)), "plain layers have other bits"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_passes_all_layers_together_by_inductor(kind):
    model = warmed(kind, backend="inductor", **BY_SEGMENTS)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    found = updates(model, together=True)
    assert (stack_of(model).counts.stacked, stack_of(model).counts.apart) == (9, 0)
    model.load_state_dict(start)
    assert equal(found, updates(model, together=False))


def test_the_pair_is_given_the_rows_own_lengths():
    one, other = (Packed.of(row, "segments") for row in rows(2))
    assert one.segment_lengths != other.segment_lengths
    assert likeness({"packed": one}) == likeness({"packed": other})
    assert dict(tensors_in({"packed": other}))["packed", "lengths"] is other.lengths
    assert other.lengths.tolist() == [*other.segment_lengths, 0, 0]
    fewer = replace(other, lengths=other.lengths[:-1])
    assert likeness({"packed": fewer}) != likeness({"packed": one})
    assert likeness({"packed": replace(other, lengths=None)}) != likeness({"packed": one})


@pytest.mark.parametrize("together", [True, False])
def test_a_static_row_is_refused(together):
    """The host knows no lengths of it: a captured graph would keep those of one row."""
    model = warmed("qwen3", **BY_SEGMENTS)
    borders = len(rows(1)[0].cu_seqlens)
    static = StaticRow(
        Shape(LENGTH, LENGTH), borders=borders, longest=LONGEST, spare_task=1, device=torch.device("cpu")
    )
    static.take(rows(1)[0])
    ran = []
    through = compiled_layers(model)._takes
    compiled_layers(model)._takes = lambda *given: ran.append(through(*given)) or ran[-1]
    way = compiled_layers(model).stack.running() if together else contextlib.nullcontext()
    with pytest.raises(RuntimeError, match="split"), way:
        model.loss(static.row)
    assert together or all(ran)


def test_dropout_is_a_break_as_before():
    """Its numbers are drawn once, in the forward pass."""
    model, counter = compiled("qwen3", backend="eager")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    row = rows(1)[0]
    torch.manual_seed(5)
    found = [x.clone() for x in gradients(model, row)]
    assert counter.frame_count > 1
    assert counters["graph_break"]
    compiled_layers(model).on = False
    torch.manual_seed(5)
    assert equal(found, gradients(model, row))
