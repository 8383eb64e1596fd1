"""The operator that stands for the loop over segments in a graph: the loop's bits, for whatever row comes."""

from collections import Counter

import pytest
import torch
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import lowering
from repsft_fast.ops import attention, segments
from repsft_fast.ops.attention import Packed, packed_attention
from repsft_fast.ops.scores import Rule
from repsft_fast.ops.segments import in_a_graph, lengths_of
from tests.ops.test_attention import Layer

ROWS = ((7, 1, 12, 4), (3, 20, 9), (16, 8, 8, 8, 8))  # the last segment of each may as well be padding
SIZE = 6  # of the lengths' tensor: what a run plans for
HEADS, DIM = 4, 8
KINDS = {
    "plain": {},
    "a window": {"sliding_window": 5},
    "a soft-cap": {"softcap": 1.5},
    "both": {"softcap": 1.5, "sliding_window": 5},
    "sinks": {"sinks": True},
    "sinks and a window": {"sinks": True, "sliding_window": 5},
    "all of it": {"sinks": True, "softcap": 1.5, "sliding_window": 5, "scaling": 0.3},
}


@pytest.fixture(autouse=True)
def forgotten():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def packed(lengths):
    borders = [sum(lengths[: min(s, len(lengths))]) for s in range(SIZE + 1)]
    cu = torch.tensor(borders, dtype=torch.int32)
    return Packed(cu, lengths, max(lengths), "segments", lengths=lengths_of(lengths, SIZE))


def inputs(lengths, kv_heads=2, dtype=torch.float32, value_dim=DIM):
    """q, k, v as views of projections, and sinks."""
    draw = torch.Generator().manual_seed(sum(lengths))
    shapes = [(1, sum(lengths), HEADS, DIM), (1, sum(lengths), kv_heads, DIM)]
    shapes += [(1, sum(lengths), kv_heads, value_dim), (HEADS,)]
    made = [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]
    return [x.transpose(1, 2).requires_grad_() if x.ndim > 1 else x.requires_grad_() for x in made]


def layer(q, k, v, sinks, where, options):
    """What lies before and behind is traced with it."""
    options = {name: value for name, value in options.items() if name != "sinks"}
    return packed_attention(Layer(), q * 2, k, v, None, packed=where, s_aux=sinks, **options)[0] + 1


def passed(call, tensors, lengths, options):
    """Output and gradients of those that need one."""
    given = tensors if options.get("sinks") else [*tensors[:3], None]
    output = call(*given, packed(lengths), options)
    if not output.requires_grad:
        return [output]
    up = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    wanted = [x for x in given if x is not None and x.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, wanted, up)]


def traced(backend="aot_eager"):
    """`layer` in one graph, its row's length open as in a compiled decoder layer; the count of graphs."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, backend=counter, dynamic=False, fullgraph=True)

    def call(q, k, v, sinks, where, options):
        for x in (q, k, v):
            torch._dynamo.maybe_mark_dynamic(x, 2)
        return compiled(q, k, v, sinks, where, options)

    return call, counter


def equal(found, expected):
    return len(found) == len(expected) and all(
        a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
        for a, b in zip(found, expected, strict=True)
    )


class TestBits:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    def test_one_graph_for_all_rows_gives_the_loops(self, kind, dtype):
        call, counter = traced()
        for lengths in ROWS:
            tensors = inputs(lengths, dtype=dtype)
            expected = passed(layer, tensors, lengths, KINDS[kind])
            assert len(expected) == 4 + ("sinks" in kind or kind == "all of it")
            assert all(x.isfinite().all() and x.any() for x in expected)
            assert equal(passed(call, tensors, lengths, KINDS[kind]), expected)
        assert counter.frame_count == 1

    @pytest.mark.parametrize("kind", ["plain", "all of it"])
    @pytest.mark.parametrize(("kv_heads", "value_dim"), [(4, DIM), (1, DIM), (2, 6)])
    def test_heads_of_other_numbers_and_widths(self, kind, kv_heads, value_dim):
        tensors = inputs(ROWS[0], kv_heads, value_dim=value_dim)
        found, expected = (passed(way, tensors, ROWS[0], KINDS[kind]) for way in (traced()[0], layer))
        assert equal(found, expected)

    @pytest.mark.parametrize("needed", [(0,), (2, 3), (0, 1, 2), (3,), ()], ids=str)
    def test_where_only_some_need_a_gradient(self, needed):
        """SDPA takes its kernel by that: sinks that are frozen are added up in another order."""
        tensors = [x.detach().requires_grad_(at in needed) for at, x in enumerate(inputs(ROWS[0]))]
        ways = traced()[0], layer
        found, expected = (passed(way, tensors, ROWS[0], KINDS["sinks and a window"]) for way in ways)
        assert len(expected) == 1 + len(needed)
        assert equal(found, expected)

    def test_an_evaluation(self):
        tensors, ways = inputs(ROWS[0]), (traced()[0], layer)
        with torch.no_grad():
            found, expected = (passed(way, tensors, ROWS[0], KINDS["sinks"]) for way in ways)
        assert equal(found, expected)
        assert not equal(found, passed(layer, tensors, ROWS[0], KINDS["sinks"])[:1]), "no other kernel"

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["plain", "all of it"])
    def test_by_inductor(self, kind):
        """It may round what lies around the operator otherwise; here it is exact."""
        call, counter = traced("inductor")
        for lengths in ROWS:
            tensors = inputs(lengths)
            expected = passed(layer, tensors, lengths, KINDS[kind])
            assert equal(passed(call, tensors, lengths, KINDS[kind]), expected)
        assert counter.frame_count == 1


def operands(lengths=ROWS[0], dtype=torch.float64, *, sinks=True, window=5, softcap=None, graded=True):
    """What the operators are given."""
    q, k, v, s = inputs(lengths, dtype=dtype, value_dim=6)
    rule = 0.4, window, softcap, [graded] * 3 + [graded and sinks]
    return [q, k, v, lengths_of(lengths, SIZE), s if sinks else None, *rule]


class TestOperators:
    @pytest.mark.parametrize("softcap", [None, 1.5])
    @pytest.mark.parametrize("sinks", [True, False])
    def test_as_torch_checks_them(self, sinks, softcap):
        given = operands(sinks=sinks, softcap=softcap)
        torch.library.opcheck(torch.ops.repsft.segments.default, given)
        bare = [x.detach() if isinstance(x, torch.Tensor) else x for x in given]
        torch.library.opcheck(torch.ops.repsft.segments.default, [*bare[:-1], [False] * 4])
        up = torch.randn(1, sum(ROWS[0]), HEADS, 6, dtype=torch.float64)
        torch.library.opcheck(torch.ops.repsft.segments_backward.default, [up, *bare])

    @pytest.mark.parametrize("softcap", [None, 1.5])
    def test_gradients_are_those_of_finite_differences(self, softcap):
        lengths = (1, 4, 2)
        tensors = inputs(lengths, dtype=torch.float64)
        rule = {"scale": 0.4, "window": 3, "softcap": softcap}

        def call(q, k, v, sinks):
            return in_a_graph(q, k, v, lengths_of(lengths, SIZE), Rule(**rule, sinks=sinks))

        assert torch.autograd.gradcheck(call, tensors)

    def test_they_look_the_same_under_a_mode(self):
        """Which shuts autograd off inside an operator; torch looks on like this at the first call."""

        class Looks(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                return func(*args, **(kwargs or {}))

        given = operands(dtype=torch.float32)
        up = torch.randn(1, sum(ROWS[0]), HEADS, 6)

        def both():
            with torch.no_grad():
                output = torch.ops.repsft.segments(*given)
                return [output, *torch.ops.repsft.segments_backward(up, *given)]

        alone = both()
        with Looks():
            assert equal(both(), alone)
        with Looks(), Looks():
            assert equal(both(), alone)

    def test_lengths_that_are_not_the_rows_are_an_error(self):
        """So are those of a static row, of which the host knows none."""
        q, k, v, _, sinks, *rule = operands()
        for lengths in (lengths_of((), SIZE), lengths_of((7, 1, 12), SIZE)):
            with pytest.raises(RuntimeError, match="split"):
                torch.ops.repsft.segments(q, k, v, lengths, sinks, *rule)

    def test_only_what_is_given_is_kept_for_the_backward(self):
        """Nothing that grows with the square of a segment, as scores do."""
        q, k, v, lengths, sinks, *_ = operands(softcap=1.5)
        output = in_a_graph(q, k, v, lengths, Rule(0.4, None, 1.5, sinks=sinks))
        kept, given = output.grad_fn.saved_tensors, (q, k, v, lengths, sinks)
        assert [x.data_ptr() for x in kept] == [x.data_ptr() for x in given]

    @pytest.mark.parametrize("kind", ["sinks", "sinks and a window", "both"])
    def test_masks_are_made_once_a_row(self, kind, monkeypatch):
        """Whatever the number of layers, forward and backward, and not for the next row again."""
        made, band = Counter(), segments.band

        def count(length, window, device):
            made[length, window] += 1
            return band(length, window, device)

        monkeypatch.setattr(segments, "band", count)
        call, _ = traced()
        for lengths in (ROWS[0], (12, 9, 3)):
            tensors, where = inputs(lengths), packed(lengths)
            given = tensors if KINDS[kind].get("sinks") else [*tensors[:3], None]
            made.clear()
            for _ in range(3):
                call(*given, where, KINDS[kind]).sum().backward()
            assert set(made.values()) == {1}
            assert {length for length, _ in made} <= set(lengths)
            assert len(made) == len(lengths) or KINDS[kind].get("sliding_window")


class TestTheTensorOfLengths:
    def test_what_it_holds(self):
        found = lengths_of((7, 1, 12), 5)
        assert found.tolist() == [7, 1, 12, 0, 0]
        assert (found.dtype, found.device.type) == (torch.int32, "cpu")
        assert lengths_of((7, 1, 12), 2).tolist() == [7, 1, 12]

    def test_it_stays_on_the_host_whatever_torchs_default(self):
        with torch.device("meta"):
            assert lengths_of((7,), 2).tolist() == [7, 0]


class TestWhatBreaksAGraph:
    def test_dropout(self):
        """Numbers drawn again for the backward would be others."""
        tensors, options = inputs(ROWS[0]), {"dropout": 0.5}
        with pytest.raises(Unsupported, match="_loop"):
            passed(traced()[0], tensors, ROWS[0], options)
        broken = torch.compile(layer, backend="aot_eager", dynamic=False)
        torch.manual_seed(3)
        found = passed(broken, tensors, ROWS[0], options)
        torch.manual_seed(3)
        assert equal(found, passed(layer, tensors, ROWS[0], options))

    def test_a_row_without_the_tensor_of_lengths(self, monkeypatch):
        monkeypatch.setattr(segments, "lengths_of", lambda *_: None)
        where = Packed(torch.tensor([0, 4, 9], dtype=torch.int32), (4, 5), 5, "segments")
        assert where.lengths is None
        with pytest.raises(Unsupported, match="_loop"):
            traced()[0](*inputs((4, 5))[:3], None, where, {})


SMALL = {
    "model_type": "gemma2", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 96, "sliding_window": 64,
}  # fmt: skip


def test_a_layer_on_a_gpu_is_one_program_each_way(monkeypatch):
    """As the compiler lowers it for CUDA: Gemma 2, whose scores are capped, in rows of two lengths."""

    def by_segments(borders, lengths, longest, _):
        return Packed(borders, lengths, longest, "segments", lengths=lengths_of(lengths, len(borders) - 1))

    monkeypatch.setattr(attention, "Packed", by_segments)
    found = lowering.lowered(SMALL, [1024, 256])
    assert [is_backward for is_backward, _ in found] == [False, True]
    operators = [name for _, program in found for name in program.by_name if "repsft" in name]
    assert operators == ["repsft.segments.default", "repsft.segments_backward.default"]
