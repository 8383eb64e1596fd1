"""The AdamW kernel in Triton's CPU interpreter against its plain torch truth: the same bits, everywhere."""

import math

import pytest
import torch

from csrc_triton import adamw
from csrc_triton.adamw import Launcher, Part
from repsft_fast.optim import adamw_reference as reference
from tests.helpers.adamw_pair import BETAS, FLOATS, KINDS, Both, gradients
from tests.helpers.interpreter import interpret

# whole tiles, parts of one, of no multiple of 16 elements, and none at all
SHAPES = [(16, 256), (9, 512), (100,), (33, 65), (1,), (0,), (1024,), (48, 80)]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Launches ask for no contraction, of which the interpreter knows nothing."""
    interpret(monkeypatch, "csrc_triton.adamw")


@pytest.mark.parametrize("grad_dtype", FLOATS)
@pytest.mark.parametrize(("dtype", "copies"), KINDS)
def test_the_same_bits_as_the_reference(dtype, copies, grad_dtype):
    both = Both(SHAPES, dtype, copies=copies)
    for step in range(1, 4):
        launches = both.update(gradients(SHAPES, grad_dtype, step), clip=0.7, lr=1e-2 / step)
        assert launches == 4  # whole 16s, and the others; the counts of each before it
    assert both.kernel.counts.tolist() == [3] * len(SHAPES)  # of no elements too, as in torch
    both.update(gradients(SHAPES, grad_dtype, 5))  # neither clip nor veto


def test_tensors_of_no_elements_alone():
    both = Both([(0,), (0, 16)], copies=True)
    both.update([torch.zeros(0), torch.zeros(0, 16)])
    assert both.kernel.counts.tolist() == [1, 1]


def test_weights_follow_their_masters_as_torch_rounds():
    both = Both(SHAPES, copies=True)
    both.update(gradients(SHAPES, torch.float32, 0))
    assert all(torch.equal(c, w.bfloat16()) for c, w in zip(both.kernel.copies, both.kernel.weights))


@pytest.mark.parametrize(("dtype", "copies"), KINDS)
def test_a_veto_writes_nothing(dtype, copies):
    shapes = [(16, 256), (10,)]
    both = Both(shapes, dtype, copies=copies)
    both.update([torch.full(shape, math.nan) for shape in shapes], veto=1.0)  # of the very first update too
    both.update(gradients(shapes, dtype, 1), veto=0.0)
    kept = [tensor.clone() for _, tensor in both.kernel.tensors()]
    for veto in (1.0, -1.0, math.nan):  # whatever is not 0
        both.update([torch.full(shape, math.nan) for shape in shapes], veto=veto)
    assert all(torch.equal(a, b) for a, (_, b) in zip(kept, both.kernel.tensors()))
    assert both.kernel.counts.tolist() == [1, 1]
    both.update(gradients(shapes, dtype, 2), veto=0.0)


def test_a_parameter_without_a_gradient_keeps_its_own_count():
    shapes = [(16, 256), (10,), (32,)]
    both = Both(shapes, copies=True)
    for step in range(5):
        grads = gradients(shapes, torch.float32, step)
        both.update([g if number != 2 or step % 2 else None for number, g in enumerate(grads)])
    assert both.kernel.counts.tolist() == [5, 5, 2]


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.9, 0.95), (0.5, 0.999999), (0.99999999, 0.9)])
def test_corrections_of_any_betas_and_counts(betas):
    """Against Python's own powers to fp32; between kernel and reference the bits."""
    shapes = [(16,)] * 8
    both = Both(shapes, betas=betas)
    counts = [0.0, 1.0, 2.0, 10.0, 999.0, 65535.0, 2.0**24 - 2, 2.0**24]
    for side in (both.kernel, both.plain):
        side.counts.copy_(torch.tensor(counts))
    both.update(gradients(shapes, torch.float32, 0))
    assert both.kernel.counts.tolist() == [
        *(count + 1 for count in counts[:-1]),
        2.0**24,
    ]  # as far as it goes
    first, second = reference.corrections(*betas, both.kernel.counts)
    for count, one, two in zip(both.kernel.counts.tolist(), first.tolist(), second.tolist()):
        assert one == pytest.approx(1 / -math.expm1(count * math.log(betas[0] or 1e-300)), rel=2e-7)
        assert two == pytest.approx((-math.expm1(count * math.log(betas[1] or 1e-300))) ** -0.5, rel=2e-7)


@pytest.mark.parametrize(("dtype", "copies"), KINDS)
def test_memory_around_the_tensors_is_left_alone(dtype, copies):
    """Tails are NaN: what is read beside a tensor would show, what is written there is seen."""
    shapes = [(9, 512), (13,)]
    both, arenas = Both(shapes, dtype, copies=copies), []

    def fenced(tensor):
        arena = torch.full((tensor.numel() + 128,), math.nan, dtype=tensor.dtype)
        inner = arena[64 : 64 + tensor.numel()].view(tensor.shape)
        inner.copy_(tensor)
        arenas.append((arena, tensor.numel(), arena.clone()))
        return inner

    side = both.kernel
    side.weights = [fenced(weight) for weight in side.weights]
    side.copies = [None if copy is None else fenced(copy) for copy in side.copies]
    side.moments = [(fenced(m), fenced(v)) for m, v in side.moments]
    both.update([fenced(g) for g in gradients(shapes, torch.float32, 1)])
    assert all(tensor.isfinite().all() for _, tensor in side.tensors())
    for arena, size, before in arenas:
        for outside in (slice(0, 64), slice(64 + size, None)):
            assert torch.equal(arena[outside].view(torch.uint8), before[outside].view(torch.uint8))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, -0x800000])
@pytest.mark.parametrize(("dtype", "copies"), KINDS)
def test_every_nan_and_infinity_reaches_weight_and_copy(dtype, copies, bits):
    """GPUs make the NaN whose bits are all ones: rounding must not carry it into another number."""
    shapes = [(16, 256), (10,)]
    both = Both(shapes, dtype, copies=copies)
    grads = gradients(shapes, torch.float32, 1)
    for grad in grads:
        grad.view(-1)[5:].view(torch.int32)[:2] = bits
    part = [both.part(n) for n in range(2)]
    Launcher()(part, grads, lr=1e-2, eps=1e-8, betas=BETAS, clip=None, veto=None)
    for _, tensor in list(both.kernel.tensors())[:-1]:
        assert not tensor.view(-1)[5:7].isfinite().any()
        assert int((~tensor.isfinite()).sum()) == 2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("size", [1e-39, 1e-20, 1e-12, 1e18])
def test_subnormal_and_huge_numbers(size):
    """A gradient of 1e-39 is subnormal itself, of 1e-20 its square."""
    shapes = [(16, 256), (48, 80)]
    both = Both(shapes, copies=True, betas=(0.5, 0.75))
    for side in (both.kernel, both.plain):
        for weight in side.weights:
            weight.mul_(1e-30)
    for _ in range(2):
        grads = [gradient * size for gradient in gradients(shapes, torch.float32, 0)]
        both.update(grads, eps=1e-30, lr=1e-22)
    assert both.kernel.moments[1][0].count_nonzero() > 3000


def test_ties_are_rounded_to_even():
    """Halfway between two bf16s, both ways; and the largest fp32s, which round to infinity."""
    both = Both([(16,)], copies=True)
    upper = torch.arange(0x3F80, 0x3F8E, dtype=torch.int32)
    bits = torch.cat([(upper << 16) + 0x8000, torch.tensor([0x7F7FFFFF, 0x7F7F7FFF], dtype=torch.int32)])
    for side in (both.kernel, both.plain):
        side.weights[0].copy_(bits.view(torch.float32))
    both.decays = [0.0]
    both.update([torch.zeros(16)])
    assert torch.equal(both.kernel.copies[0], bits.view(torch.float32).bfloat16())
    assert both.kernel.copies[0][14:].isinf().tolist() == [True, False]


class TestTables:
    def test_stay_while_nothing_moves(self):
        both, grads = Both(SHAPES, copies=True), gradients(SHAPES, torch.float32, 1)
        tables = []
        for _ in range(3):
            for grad in grads:
                grad.mul_(0.5)
            both.update(grads)
            tables.append([plan.table.data_ptr() for plan in both.launcher._tables.plans])
        assert tables[0] == tables[1] == tables[2]
        assert (both.launcher._tables.built, both.launcher._tables.moved) == (1, 0)

    def test_follow_gradients_that_move(self):
        both, kept = Both(SHAPES, copies=True), []
        for step in range(3):
            kept.append(gradients(SHAPES, torch.float32, step))  # alive: no address comes back
            both.update(kept[-1])
        assert (both.launcher._tables.built, both.launcher._tables.moved) == (1, 2)

    def test_follow_gradients_of_another_type(self):
        both = Both([(16, 256)])
        buffer = torch.zeros(16 * 256)
        for dtype in (torch.float32, torch.bfloat16):  # at one address
            gradient = buffer.view(dtype)[: 16 * 256].view(16, 256)
            gradient.copy_(torch.randn(16, 256, generator=torch.Generator().manual_seed(0)))
            both.update([gradient])
        assert both.launcher._tables.built == 2

    def test_are_made_anew_when_a_gradient_loses_its_alignment(self):
        both, arena = Both([(16, 256)]), torch.randn(16 * 256 + 1)
        for start in (0, 1):
            both.update([arena[start : start + 16 * 256].view(16, 256)])
        assert both.launcher._tables.built == 2
        assert both.launcher._tables.plans[0].kind[-1] is False

    @pytest.mark.parametrize("what", ["weights", "copies", "moments", "counts"])
    def test_are_made_anew_when_anything_else_moves(self, what):
        both = Both([(16, 256), (32,)], copies=True)
        grads = gradients([(16, 256), (32,)], torch.float32, 1)
        both.update(grads)
        (parts,) = both.parts.values()
        tensors = {"weights": [part.weight for part in parts], "copies": [part.copy for part in parts]}
        tensors |= {"moments": [part.exp_avg_sq for part in parts], "counts": [p.updates for p in parts]}
        old = [tensor.data for tensor in tensors[what]]
        for tensor in tensors[what]:
            tensor.data = tensor.data.clone()  # its owner gave it another storage
        side = both.kernel
        side.counts = torch.stack([part.updates for part in parts]) if what == "counts" else side.counts
        for tensor in old:
            tensor.fill_(math.nan)
        if what == "counts":
            parts[0].updates.data, parts[1].updates.data = side.counts[0], side.counts[1]
        both.update(grads)
        assert both.launcher._tables.built == 2

    def test_strided_gradients(self):
        both = Both([(16, 256)])
        both.update([torch.randn(256, 16).t()])


@pytest.mark.parametrize("shifted", ["weight", "copy", "gradient", "exp_avg", "exp_avg_sq", None])
def test_16_byte_accesses_are_only_for_addresses_that_take_them(shifted):
    """The interpreter cannot see what the promise is for: a GPU would fault."""
    tensors = {name: torch.zeros(16, 256) for name in ("weight", "gradient", "exp_avg", "exp_avg_sq")}
    tensors["copy"] = torch.zeros(16, 256).bfloat16()
    if shifted:
        tensors[shifted] = torch.zeros(16 * 256 + 1, dtype=tensors[shifted].dtype)[1:].view(16, 256)
    gradient = tensors.pop("gradient")
    line = adamw._line(0, Part(**tensors, updates=torch.zeros(()), betas=BETAS, weight_decay=0.0), gradient)
    assert line.kind == (False, False, True, shifted is None)
    assert line.aligned == (16 if shifted is None else 1)


def test_contracts_are_checked():
    full, half = torch.zeros(16, 256), torch.zeros(16, 256).bfloat16()

    def refused(words, weight=full, gradient=full, copy=None, m=full, v=full, updates=full[0, 0]):
        with pytest.raises(ValueError, match=words):
            Launcher()(
                [Part(weight, copy, m, v, updates, BETAS, 0.0)], [gradient],
                lr=1e-2, eps=1e-8, betas=BETAS, clip=None, veto=None,
            )  # fmt: skip

    refused("weight float32 or bfloat16", weight=full.half())
    refused("gradient float32 or bfloat16", gradient=full.double())
    refused("a gradient of shape", gradient=full[:8])
    refused("exp_avg in the weight's dtype", m=half)
    refused("exp_avg_sq of shape", v=full[:8])
    refused("one fp32 count", updates=full[0])
    refused("one fp32 count", updates=full[0, 0].double())
    refused("a copy of an fp32 weight", weight=half, m=half, v=half, copy=half)
    refused("copy bfloat16", copy=full.clone())
    refused("a copy of shape", copy=half[:8])
    strided = torch.zeros(256, 16).t()
    refused("contiguous", weight=strided)
    refused("contiguous", copy=strided.bfloat16())
    refused("contiguous", v=strided)
    assert Launcher()([], [], lr=1e-2, eps=1e-8, betas=BETAS, clip=None, veto=None) == 0


def test_its_bits_are_asked_for_on_a_gpu_too(monkeypatch):
    """A product and a sum contracted into one rounding would be other bits than the reference's."""
    asked = []

    class Watched:
        def __getitem__(self, grid):
            return lambda *arguments, **options: asked.append(options)

    monkeypatch.setattr(adamw, "adamw_kernel", Watched())
    part = Part(torch.zeros(16), None, torch.zeros(16), torch.zeros(16), torch.zeros(()), BETAS, 0.0)
    Launcher()([part], [torch.zeros(16)], lr=1e-2, eps=1e-8, betas=BETAS, clip=None, veto=None)
    assert asked[0]["enable_fp_fusion"] is False
    assert all(not case.contraction for case in adamw.AOT_CASES if case.kernel.fn.__name__ == "adamw_kernel")
