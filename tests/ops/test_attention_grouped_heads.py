"""Grouped key and value heads in torch's varlen operator: handed in as they are, or repeated where a trial
says so."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from repsft_fast.errors import ModelError
from repsft_fast.ops import attention
from repsft_fast.ops.attention import Packed
from tests.ops.test_attention import DIM, HEADS, LENGTHS, TOTAL, by_hand, call, gradients, inputs, packed


def in_torch(q, k, v, borders, window_left, scale):  # [T, A, D], any number of key and value heads
    """(output [T, A, D], log-sum-exp [A, T]) as torch's varlen operator means it, differentiable."""
    scores = scores_of(q, k, borders, window_left, scale)
    wide_v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return torch.einsum("aij,jad->iad", scores.softmax(-1), wide_v), scores.logsumexp(-1).float()


def scores_of(q, k, borders, window_left, scale):  # [A, T, T]
    there = torch.arange(q.shape[0])
    document = torch.searchsorted(borders, there.to(borders.dtype), right=True)
    distance = there[:, None] - there[None, :]
    seen = (
        (document[:, None] == document[None, :])
        & (distance >= 0)
        & ((distance <= window_left) | (window_left < 0))
    )
    scores = torch.einsum("iad,jad->aij", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
    return scores.masked_fill(~seen, float("-inf"))


@pytest.fixture(scope="module")
def operator():
    """torch's own varlen operator, its autograd and its tracing, over a kernel for the CPU, which it
    lacks."""

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, scale=None, window_size=None, *rest):
        output, lse = in_torch(q, k, v, cu_q, window_size[0], scale)
        return output, lse, torch.zeros(2, dtype=torch.uint64)

    def backward(
        up, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, is_causal, rng, scale=None, window_size=None
    ):
        groups = q.shape[1] // k.shape[1]
        wide_k, wide_v = (x.repeat_interleave(groups, 1) for x in (k, v))
        scores = scores_of(q, k, cu_q, window_size[0], scale)
        p = scores.softmax(-1)
        ds = (
            p
            * (torch.einsum("iad,jad->aij", up, wide_v) - torch.einsum("iad,iad->ai", up, out)[:, :, None])
            * scale
        )
        wide = torch.einsum("aij,iad->jad", ds, q), torch.einsum("aij,iad->jad", p, up)
        dk, dv = (x.unflatten(1, (k.shape[1], groups)).sum(2) for x in wide)
        return torch.einsum("aij,jad->iad", ds, wide_k), dk, dv

    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", forward)
    torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", backward)


class TestGroupedHeads:
    """Key and value heads go into torch's operator as they are, or are repeated where a trial says so."""

    @pytest.mark.parametrize("tail", [0, 3])
    @pytest.mark.parametrize("window", [None, 5])
    @pytest.mark.parametrize("kv_heads", [1, 2])
    def test_torchs_operator_differentiates_them(self, operator, kv_heads, window, tail):
        tensors, where = inputs(kv_heads), packed("varlen", tail=tail)  # the tail repeats T: empty segments
        expected = by_hand(*tensors, DIM**-0.5, window)
        wanted = gradients(expected, tensors)
        for grouped in (True, False):
            output = call(tensors, replace(where, grouped=grouped), sliding_window=window)
            torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
            found = gradients(output, tensors)
            assert [g.shape for g in found] == [t.shape for t in tensors]
            for got, want in zip(found, wanted, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)

    @pytest.mark.parametrize("grouped", [True, False])
    def test_a_compiled_layer_is_one_graph(self, operator, grouped):
        tensors, where = inputs(), replace(packed("varlen"), grouped=grouped)
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=False)
        plain, traced = call(tensors, where, sliding_window=5), compiled(tensors, where, sliding_window=5)
        assert torch.equal(traced, plain)
        assert all(map(torch.equal, gradients(traced, tensors), gradients(plain, tensors)))

    @pytest.mark.parametrize("kv_heads", [1, 2])
    @pytest.mark.parametrize("window", [None, 5])
    def test_shapes_without_memory(self, monkeypatch, kv_heads, window):
        """torch's own fake implementation of both directions, for a GPU that is not here where torch is built
        for one."""
        monkeypatch.setattr(attention, "_grouped", {})
        device = torch.device("cuda", 0) if torch.version.cuda else torch.device("cpu")
        with FakeTensorMode(), torch.no_grad():
            shapes = ((1, a, TOTAL, DIM) for a in (HEADS, kv_heads, kv_heads))
            q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device=device) for shape in shapes)
            cu = torch.empty(9, dtype=torch.int32, device=device)
            assert attention._try_grouped_heads(device)
            assert attention._grouped == {}, "nothing was tried, so nothing may be remembered"
            output = call((q, k, v), Packed(cu, LENGTHS, 128, "varlen"), sliding_window=window)
            assert (output.shape, output.dtype, output.device) == (
                (1, TOTAL, HEADS, DIM),
                torch.bfloat16,
                device,
            )
            flat = [x[0].transpose(0, 1) for x in (q, k, v)]
            lse, rng = (
                torch.empty(HEADS, TOTAL, device=device),
                torch.empty(2, dtype=torch.uint64, device=device),
            )
            back = torch.ops.torch_attn._varlen_attn_backward(
                output[0], *flat, output[0], lse, cu, cu, 128, 128, window is None, rng, 0.1,
                list(attention.left_right(window)),
            )  # fmt: skip
            assert [g.shape for g in back] == [x.shape for x in flat]


class TestTheTrial:
    """`_try_grouped_heads` against kernels that fail in every way it must notice."""

    @staticmethod
    def tried(monkeypatch, kernel):
        def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, **more):
            return kernel(q, k, v, lambda a, b, c: in_torch(a, b, c, cu_q, window_size[0], scale)[0])

        monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
        monkeypatch.setattr(attention, "_grouped", {})
        return attention._try_grouped_heads(torch.device("cpu"))

    def test_right_ones_are_taken_without_drawing_a_number(self, monkeypatch):
        before = torch.get_rng_state()
        assert self.tried(monkeypatch, lambda q, k, v, run: run(q, k, v))
        assert attention._grouped == {None: True}
        assert torch.equal(torch.get_rng_state(), before)

    def refused(q, k, v, run):
        if k.shape[1] < q.shape[1]:
            raise RuntimeError("Expected as many heads\nC++ stack")
        return run(q, k, v)

    def wrong_head(q, k, v, run):
        groups = q.shape[1] // k.shape[1]
        return run(q, k.repeat(1, groups, 1), v.repeat(1, groups, 1))  # 0 1 0 1 in place of 0 0 1 1

    def forgets_a_head_of_the_group(q, k, v, run):
        if k.shape[1] == q.shape[1]:
            return run(q, k, v)
        whole, part = (x.repeat_interleave(2, 1) for x in (k, k.detach()))
        keep = torch.tensor([1.0, 0.0, 1.0, 0.0]).view(1, 4, 1).to(k.dtype)
        return run(q, whole * keep + part * (1 - keep), v.repeat_interleave(2, 1))

    def nan(q, k, v, run):
        return run(q, k, v) * (float("nan") if k.shape[1] < q.shape[1] else 1.0)

    @pytest.mark.parametrize(
        ("kernel", "why"),
        [
            (refused, "grouped ones fail: Expected as many heads$"),
            (wrong_head, "grouped ones give other results"),
            (forgets_a_head_of_the_group, "grouped ones give other results"),
            (nan, "grouped ones give other results"),
        ],
        ids=["refused", "wrong head", "gradient of half a group", "nan"],
    )
    def test_others_are_not_and_it_is_said(self, monkeypatch, kernel, why):
        with pytest.warns(
            UserWarning, match=rf"attention: torch .* repeated key and value heads on cpu, because {why}"
        ):
            assert not self.tried(monkeypatch, kernel)
        assert attention._grouped == {None: False}

    @pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
    def test_gradients_are_tried_where_none_are_made(self, monkeypatch, off):
        with off(), pytest.warns(UserWarning, match="grouped ones give other results"):
            assert not self.tried(monkeypatch, TestTheTrial.forgets_a_head_of_the_group)

    def test_want_of_memory_is_no_answer(self, monkeypatch):
        def full(q, k, v, run):
            raise torch.OutOfMemoryError("CUDA out of memory")

        with pytest.raises(torch.OutOfMemoryError):
            self.tried(monkeypatch, full)
        assert attention._grouped == {}

    def test_a_kernel_that_never_runs_is_no_matter_of_groups(self, monkeypatch):
        def old_card(q, k, v, run):
            raise RuntimeError("FlashAttention only supports Ampere GPUs or newer")

        assert self.tried(monkeypatch, old_card)

    def test_nothing_is_tried_while_a_graph_is_captured(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(
            ModelError, match="grouped heads: cannot be tried while a CUDA graph is captured; run one forward"
        ):
            self.tried(monkeypatch, lambda q, k, v, run: run(q, k, v))

    @pytest.mark.parametrize("answer", [True, False])
    def test_it_is_made_once_and_reaches_every_layer(self, monkeypatch, answer):
        tries = []

        def trial(device):
            tries.append(device)
            attention._grouped[device.index] = answer
            return answer

        monkeypatch.setattr(attention, "_try_grouped_heads", trial)
        monkeypatch.setattr(attention, "_grouped", {})
        there = [row_on(torch.device("cuda", index)) for index in (0, 0, 1, 0)]
        assert [Packed.of(row, backend).grouped for row in there for backend in ("auto", "varlen")] == [
            answer
        ] * 8
        assert tries == [torch.device("cuda", 0), torch.device("cuda", 1)]
        assert all(Packed.of(there[0], backend).grouped for backend in ("sdpa", "flash3")), (
            "no matter of theirs"
        )
        assert Packed.of(row_on(torch.device("cpu"))).grouped
        assert len(tries) == 2


def row_on(device):
    return SimpleNamespace(
        cu_seqlens=SimpleNamespace(device=device, shape=(8,)),
        segment_lengths=LENGTHS,
        max_seqlen=128,
        tokens=torch.empty(1, TOTAL, device="meta"),
        spare=False,
    )
