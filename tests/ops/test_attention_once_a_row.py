"""What depends on the row alone is made once a row, however many layers read it; its borders end with it."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from repsft_fast.errors import ModelError
from repsft_fast.ops.attention import Packed
from repsft_fast.row import Row
from tests.helpers import fake_flash
from tests.helpers.fake_cuda import GPU, fake_cuda
from tests.ops.test_attention import HEADS, LENGTHS, TOTAL, call, inputs, packed

KINDS = {
    "plain": {},
    "a window": {"sliding_window": 5},
    "a soft-cap": {"softcap": 1.5},
    "both": {"softcap": 1.5, "sliding_window": 5},
    "sinks": {"s_aux": torch.arange(HEADS, dtype=torch.float64)},
    "sinks and a window": {"s_aux": torch.zeros(HEADS, dtype=torch.float64), "sliding_window": 5},
}


class Counted(TorchDispatchMode):
    """Operators, and those of them that make no number of the model's: places, borders, masks."""

    def __init__(self):
        super().__init__()
        self.all, self.of_the_row = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        tensors = [
            x for x in (found if isinstance(found, tuple | list) else [found]) if isinstance(x, torch.Tensor)
        ]
        self.all[str(func)] += 1
        self.of_the_row[str(func)] += any(not x.is_floating_point() for x in tensors)
        return found


def counted(layers, backend, options):
    where, tensors = packed(backend), inputs()
    with Counted() as found:
        outputs = [call(tensors, where, **options) for _ in range(layers)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["segments", "mask"])
def test_masks_are_made_once_a_row(backend, kind):
    one, six = (counted(layers, backend, KINDS[kind]) for layers in (1, 6))
    assert six.of_the_row == one.of_the_row
    assert (one.of_the_row.total() > 0) == (kind != "plain" or backend == "mask")
    assert six.all.total() > 2 * one.all.total() - one.of_the_row.total()


def test_layers_of_two_kinds_do_not_mix_their_masks():
    """Gemma 2 and 3: a window in every other layer."""
    tensors, where = inputs(), packed("segments")
    both = [call(tensors, where, **KINDS[kind]) for kind in KINDS for _ in (0, 1)]
    alone = [call(tensors, packed("segments"), **KINDS[kind]) for kind in KINDS for _ in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(both, alone, strict=True))
    assert not torch.equal(both[2], both[4])


def test_on_a_gpu_a_layer_is_views_and_one_operator(monkeypatch):
    """[B, T, A, D] as a projection makes them, seen as [B, A, T, D]: nothing is copied and nothing asked."""
    with fake_cuda(monkeypatch, every=1 << 30) as gpu:
        q, k, v = (
            torch.empty(1, TOTAL, heads, 64, dtype=torch.bfloat16, device=GPU).transpose(1, 2)
            for heads in (4, 2, 2)
        )
        where = replace(packed("auto"), cu_seqlens=torch.zeros(8, dtype=torch.int32, device=GPU))
        gpu.forget()
        for _ in range(3):
            call([q, k, v], where)
    views = (
        "aten::transpose",
        "aten::squeeze",
        "aten::unsqueeze",
        "aten::alias",
        "aten::detach",
        "aten::empty",
    )
    ran = {name: n for name, n in gpu.operators.items() if not name.startswith(views)}
    # the zeros are two numbers of a random state that torch's own wrapper makes, in every call
    assert ran == {"torch_attn::_varlen_attn": 3, "aten::_flash_attention_forward": 3, "aten::zeros": 3}
    assert not gpu.waits


def row(**changes):
    ids = torch.zeros(1, TOTAL, dtype=torch.int64)
    flat = torch.zeros(TOTAL, dtype=torch.int64)
    made = Row(
        ids,
        ids,
        flat,
        flat.float(),
        flat,
        flat,
        flat,
        packed().cu_seqlens,
        LENGTHS,
        max(LENGTHS),
        (0, 1, 2, 3),
        34,
    )
    return replace(made, **changes)


class TestBorders:
    """Kernels leave what lies behind the last border unwritten, and a segment longer than the bound unread."""

    def test_sound(self):
        assert Packed.of(row()).segment_lengths == LENGTHS
        Packed.of(row(max_seqlen=4096))

    @pytest.mark.parametrize("lengths", [LENGTHS[:-1], (*LENGTHS, 1), ()])
    def test_that_do_not_end_with_the_row(self, lengths):
        with pytest.raises(
            ModelError, match=f"the segments of a row of {TOTAL} tokens hold {sum(lengths)}, padding incl"
        ):
            Packed.of(row(segment_lengths=lengths))

    def test_a_bound_that_is_none(self):
        with pytest.raises(ModelError, match=r"max_seqlen 18 is smaller than a segment of 19"):
            Packed.of(row(max_seqlen=18))

    @pytest.mark.parametrize("backend", ["segments", "mask", "flash3"])
    def test_a_larger_bound_changes_no_output(self, backend, monkeypatch):
        fake_flash.install(monkeypatch, fake_flash.fa3())
        was = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)
        try:
            tensors = inputs(dtype=torch.float32)
            few, many = (call(tensors, replace(packed(backend), max_seqlen=n)) for n in (19, 4096))
        finally:
            torch.use_deterministic_algorithms(was)
        assert torch.equal(few, many)
