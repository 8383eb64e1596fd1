"""The 8-bit AdamW kernel in Triton's CPU interpreter against its plain torch truth: the same bits,
everywhere."""

import pytest
import torch
import triton

# Triton imports it at the first launch, and it insists on the compiled functions
import triton.experimental.gluon.nvidia
from triton.runtime.interpreter import InterpretedFunction

from csrc_triton import adamw8bit, adamw8bit_count, tensor_table
from repsft_fast.optim import adamw8bit_reference as reference
from repsft_fast.optim import build_optimizer, state_tensors
from repsft_fast.selftest.syncs import SyncCounter
from tests.helpers.adamw_sides import moments

BLOCK = reference.BLOCK


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """What TRITON_INTERPRET=1 does at import, for these tests only: every jitted function of ours and of the
    language."""
    for module in (adamw8bit, adamw8bit_count, tensor_table, triton.language, triton.language.standard):
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.runtime.JITFunction):
                monkeypatch.setattr(module, name, InterpretedFunction(value.fn))


def scalars(
    step: int, *, veto=0.0, clip=1.0, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.999)
) -> reference.Scalars:
    first, second = reference.corrections(*betas, torch.tensor(step))
    return reference.Scalars(
        lr, *betas, 1e-8, weight_decay, first, second, torch.tensor(clip), torch.tensor(veto)
    )


class Both:
    """The same tensors twice, one side updated by the kernel, one by the reference."""

    def __init__(self, shapes, dtype, firsts=None, *, copies=False):
        torch.manual_seed(0)
        self.weights = [torch.randn(shape).to(dtype) for shape in shapes]
        self.moments = [moments(shape) for shape in shapes]
        self.plain_weights = [w.clone() for w in self.weights]
        self.plain_moments = [moments(shape) for shape in shapes]
        self.keys = [reference.parameter_key(7, f"p{i}") for i in range(len(shapes))]
        self.firsts = firsts or [0] * len(shapes)
        self.launcher = adamw8bit.Launcher()
        self.copies = [torch.ones(shape).bfloat16() if copies else None for shape in shapes]
        self.plain_copies = [None if copy is None else copy.clone() for copy in self.copies]
        self.parts: list[adamw8bit.Part] | None = None

    def update(self, step: int, grads: list[torch.Tensor], **settings) -> int:
        s, count = scalars(step, **settings), torch.tensor(step)
        made = [self.weights, self.moments, self.keys, self.firsts, self.copies]
        if self.parts is None or any(a is not b for a, b in zip(self.made, made)):
            self.parts, self.made = [adamw8bit.Part(*each) for each in zip(*made)], made
        launches = self.launcher(self.parts, grads, s, count, group=id(self))
        for number, (w, g, m) in enumerate(zip(self.plain_weights, grads, self.plain_moments)):
            flat, copy = {name: t.view(-1) for name, t in m.items()}, self.plain_copies[number]
            key, first = reference.update_key(self.keys[number], count), self.firsts[number]
            flat_copy = None if copy is None else copy.view(-1)
            reference.update_(w.view(-1), g.reshape(-1), flat, s, key, first, flat_copy)
        return launches

    def check(self) -> None:
        for index, (ours, plain) in enumerate(zip(self.weights, self.plain_weights)):
            assert torch.equal(ours.view(torch.uint8), plain.view(torch.uint8)), f"weight {index}"
            for name, value in self.plain_moments[index].items():
                assert torch.equal(self.moments[index][name], value), f"{name} {index}"
            copy, plain_copy = self.copies[index], self.plain_copies[index]
            if copy is not None:
                assert torch.equal(copy.view(torch.int16), plain_copy.view(torch.int16)), f"copy {index}"


def gradients(shapes, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * 10.0 ** -(seed % 3)).to(dtype) for shape in shapes]


SHAPES = [(16, 256), (9, 512), (3, 7, 256), (100,), (33, 65), (1,), (4096,), (48, 320)]


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_as_the_reference(weight_dtype, grad_dtype):
    both = Both(SHAPES, weight_dtype)
    for step in range(1, 5):
        launches = both.update(step, gradients(SHAPES, grad_dtype, step), clip=0.7, lr=1e-2 / step)
        # all 8-bit tensors in one; 32-bit ones of a multiple of 16 elements, and the others
        assert launches == 3
        both.check()


def test_shards_far_into_a_huge_tensor():
    """Global elements beyond 2^32: keys, not addresses, so no memory is needed to test them."""
    both = Both([(16, 256), (7, 33)], torch.bfloat16, firsts=[256 * (2**25 + 3), 2**33 + 77])
    both.update(2**20, gradients([(16, 256), (7, 33)], torch.float32, 0))
    both.check()


def test_a_veto_writes_nothing():
    both = Both([(16, 256), (10,)], torch.bfloat16)
    both.update(1, gradients([(16, 256), (10,)], torch.float32, 1))
    kept = [w.clone() for w in both.weights], [{k: t.clone() for k, t in m.items()} for m in both.moments]
    poison = [torch.full((16, 256), float("nan")), torch.full((10,), float("inf"))]
    both.update(1, poison, veto=1.0)
    both.check()
    assert all(torch.equal(a, b) for a, b in zip(kept[0], both.weights))
    assert all(torch.equal(m[k], t) for m, n in zip(both.moments, kept[1]) for k, t in n.items())


IGNORE_OVERFLOW = pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning"
)


@IGNORE_OVERFLOW
def test_poison_is_never_hidden():
    shapes = [(16, 256), (10,)]
    both = Both(shapes, torch.bfloat16)
    grads = gradients(shapes, torch.float32, 1)
    grads[0][3, 5], grads[0][4, 6], grads[1][2] = float("nan"), float("inf"), float("nan")
    both.update(1, grads)
    assert both.weights[0][3, 5].isnan()
    assert both.weights[1][2].isnan()
    assert not both.weights[0][4, 6].isfinite()
    assert int((~both.weights[0].isfinite()).sum()) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_around_the_tensors_is_left_alone(dtype):
    """9 × 512 is two whole tiles and two blocks of a third: weights, moments and scales end inside a tile."""
    both = Both([(9, 512), (13,)], dtype, copies=dtype == torch.float32)
    arenas = []

    def fenced(tensor: torch.Tensor, fill: float) -> torch.Tensor:
        arena = torch.full((tensor.numel() + 128,), fill, dtype=tensor.dtype)
        inner = arena[64 : 64 + tensor.numel()].view(tensor.shape)
        inner.copy_(tensor)
        arenas.append((arena, inner, arena.clone()))
        return inner

    both.weights = [fenced(weight, float("nan")) for weight in both.weights]
    both.copies = [None if copy is None else fenced(copy, float("nan")) for copy in both.copies]
    both.moments = [
        {name: fenced(t, 255 if t.dtype == torch.uint8 else float("nan")) for name, t in m.items()}
        for m in both.moments
    ]
    grads = [fenced(g, float("nan")) for g in gradients([(9, 512), (13,)], torch.float32, 1)]
    both.update(1, grads)
    both.check()
    for arena, inner, before in arenas:
        for outside in (slice(0, 64), slice(64 + inner.numel(), None)):
            assert torch.equal(arena[outside].view(torch.uint8), before[outside].view(torch.uint8))


class Far(adamw8bit.Launcher):
    """The same launch as if the tensors were the end of larger ones of `beyond` tiles more, none of which is
    touched."""

    beyond = 2**21 + 5  # 2^32 elements and a few

    def _plans(self, parts, grads, group):
        plans = super()._plans(parts, grads, group)
        for plan in plans:
            for line, number in zip(plan.table, plan.gradients):
                self.move(line, parts[number], grads[number], eight_bit=plan.kind[0])
        return plans

    def move(self, line, part, gradient, eight_bit):
        elements, a, m, first = self.beyond * adamw8bit.TILE, adamw8bit, part.moments, part.first
        moved = {a.WEIGHT: part.weight, a.GRAD: gradient, a.M: m["exp_avg"], a.V: m["exp_avg_sq"]}
        moved |= {} if part.copy is None else {a.COPY: part.copy}
        for column, tensor in moved.items():
            line[column] = tensor.data_ptr() - elements * tensor.element_size()
        if eight_bit:
            line[a.M_SCALE] = m["exp_avg_scale"].data_ptr() - elements // BLOCK
            line[a.V_SCALE] = m["exp_avg_sq_scale"].data_ptr() - elements // BLOCK
        line[a.SIZE] += elements // BLOCK if eight_bit else elements
        line[a.FIRST] = first - elements
        line[a.FIRST_TILE] -= self.beyond


def test_tensors_of_more_than_2_to_the_32_elements():
    """Only the last tiles of such tensors are launched: offsets within a tensor are 64-bit, and no memory is
    needed."""
    shapes = [(9, 512), (33, 65)]
    for dtype in (torch.bfloat16, torch.float32):
        both = Both(shapes, dtype, firsts=[256 * (2**25 + 3), 2**33 + 77], copies=dtype == torch.float32)
        both.launcher = Far()
        both.update(3, gradients(shapes, dtype, 0))
        both.check()


@IGNORE_OVERFLOW
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, -0x800000])
def test_every_nan_and_infinity_reaches_weight_and_moments(bits):
    """GPUs make the NaN whose bits are all ones: adding to them must not carry it into another number."""
    shapes = [(16, 256), (10,)]
    for dtype in (torch.bfloat16, torch.float32):
        both = Both(shapes, dtype)
        grads = gradients(shapes, torch.float32, 1)
        for grad in grads:
            grad.view(-1)[5:].view(torch.int32)[:2] = bits
        both.update(1, grads)
        for weight, plain in zip(both.weights, both.plain_weights):
            assert (~weight.view(-1)[5:7].isfinite()).all()
            assert torch.equal(weight.isfinite(), plain.isfinite())
        for name in ("exp_avg_scale", "exp_avg_sq_scale"):
            assert both.moments[0][name].view(-1)[0] == both.plain_moments[0][name].view(-1)[0] == 255 - 16
        both.update(2, gradients(shapes, torch.float32, 2))  # and they stay
        assert all((~weight.view(-1)[5:7].isfinite()).all() for weight in both.weights)


@IGNORE_OVERFLOW
def test_infinite_weights_stay_infinite():
    shapes = [(16, 256), (10,)]
    for dtype in (torch.bfloat16, torch.float32):
        both = Both(shapes, dtype)
        both.update(1, gradients(shapes, torch.float32, 1), lr=3e38, weight_decay=0.0)
        both.check()
        assert all(weight.isinf().all() for weight in both.weights)


@pytest.mark.parametrize("value", [3.75, 3.875, 3.9, 4.0, 0.0])
def test_blocks_of_equal_values_at_the_end_of_an_octave(value):
    """With these betas m and √v are half the gradient: 1.875 and 1.9375 are the last codes below 2."""
    both = Both([(16, 256)], torch.float32)
    for step in (1, 2):
        both.update(step, [torch.full((16, 256), value)], betas=(0.5, 0.75))
        both.check()


def test_the_moments_of_tiny_and_huge_gradients():
    """Blocks at either end of the codes' range: all zero, below the least scale, and spread over more than 15
    octaves."""
    both = Both([(16, 256)], torch.float32)
    both.weights[0] *= 1e-3
    both.plain_weights[0] *= 1e-3
    size = torch.logspace(-42, 18, 16, dtype=torch.float64)[:, None] * torch.logspace(
        -8, 0, 256, dtype=torch.float64
    )
    size[3] = 0
    for step in (1, 2, 3):
        both.update(step, [(size * gradients([(16, 256)], torch.float32, 0)[0]).float()], betas=(0.5, 0.75))
        both.check()


def test_the_optimizer_launches_what_it_computes_on_a_cpu(monkeypatch):
    """`AdamW8bit` through the kernel: one launch per group and kind, with clip, veto and step left on the
    device."""
    torch.manual_seed(0)
    named = [
        (f"p{i}", torch.nn.Parameter(torch.randn(s).bfloat16()))
        for i, s in enumerate([(16, 256), (9, 512), (64,), (48,)])
    ]
    named.append(("without a gradient", torch.nn.Parameter(torch.randn(16, 256))))
    other = [(name, torch.nn.Parameter(p.detach().clone())) for name, p in named]
    ours, plain = (build_optimizer(n, "adamw8bit", lr=1e-2, weight_decay=0.1, seed=3) for n in (named, other))
    launches = []

    class Counting(adamw8bit.Launcher):
        def __call__(self, parts, gradients, scalars, step, **more):
            launches.append((len(parts), super().__call__(parts, gradients, scalars, step, **more)))

    monkeypatch.setattr(adamw8bit, "Launcher", Counting)
    ours.inner._by_kernel = True  # in the interpreter
    for update in range(4):
        for (_, p), (_, q) in zip(named[:-1], other):
            gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(update)).to(p.dtype)
            p.grad, q.grad = gradient if p.grad is None else p.grad.copy_(gradient), gradient.clone()
        with SyncCounter() as syncs:
            ours.step(1e-2 / (1 + update), torch.tensor(float(update == 2)), torch.tensor(0.3))
        assert update == 0 or syncs.found == {}  # the first builds its table, on the host
        plain.step(1e-2 / (1 + update), torch.tensor(float(update == 2)), torch.tensor(0.3))
    # one launcher for the optimizer's life, and one table a group
    assert [tables.built for _, _, tables in ours.inner._launcher._tables.values()] == [1, 1]
    assert launches == [(2, 1), (2, 1)] * 4  # matrices, which decay, in one group, vectors in the other
    theirs = state_tensors(plain)
    for name, value in state_tensors(ours).items():
        assert torch.equal(value, theirs[name]), name
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(named, other))


def test_tables_follow_gradients_that_move():
    both = Both([(16, 256)], torch.float32)
    for step in (1, 2, 3):
        fresh = gradients([(16, 256)], torch.float32, step)
        both.update(step, fresh)
        both.check()
    ((_, _, tables),) = both.launcher._tables.values()
    assert (tables.built, tables.moved) == (1, 2)


def test_tables_are_reused_while_addresses_stay():
    """Two groups of one kind keep a table each; a gradient written in place costs no new one."""
    groups = [Both([(16, 256)], torch.float32) for _ in range(2)]
    groups[1].launcher = groups[0].launcher
    grads = [gradients([(16, 256)], torch.float32, seed) for seed in (1, 2)]
    tables = []
    for step in (1, 2):
        for both, grad in zip(groups, grads):
            grad[0].mul_(0.5)
            both.update(step, grad)
            both.check()
        known = [tables for _, _, tables in groups[0].launcher._tables.values()]
        tables.append([id(plan.table) for kept in known for plan in kept.plans])
    assert len(tables[0]) == 2
    assert tables[0] == tables[1]
    assert [(kept.built, kept.moved) for kept in known] == [(1, 0)] * 2
    for plan in (plan for kept in known for plan in kept.plans):  # as the kernels compiled ahead take them
        assert (plan.table.dtype, plan.tiles.dtype) == (torch.int64, torch.int32)


def test_misaligned_and_strided_tensors():
    both = Both([(16, 256)], torch.float32)
    arena = torch.zeros(16 * 256 + 1)
    arena[1:] = both.weights[0].view(-1)
    both.weights[0] = arena[1:].view(16, 256)
    gradient = torch.randn(256, 16).t()  # not contiguous
    both.update(1, [gradient])
    both.check()


@pytest.mark.parametrize("shifted", ["weight", "gradient", "exp_avg", "exp_avg_sq", "copy", None])
def test_16_byte_accesses_are_only_for_addresses_that_take_them(shifted):
    """The interpreter cannot see what the promise is for: a GPU would fault."""
    tensors = {"weight": torch.zeros(16, 256), "gradient": torch.zeros(16, 256)} | moments((16, 256))
    tensors["copy"] = torch.zeros(16, 256, dtype=torch.bfloat16)
    if shifted:
        there = tensors[shifted]
        tensors[shifted] = torch.zeros(there.numel() + 1, dtype=there.dtype)[1:].view(16, 256)
    state = {name: tensors[name] for name in moments((16, 256))}
    part = adamw8bit.Part(tensors["weight"], state, (0, 0), 0, tensors["copy"])
    assert adamw8bit._kind(part, tensors["gradient"]) == (True, False, False, True, shifted is None)
    odd = torch.zeros(33, 65)
    alone = adamw8bit.Part(odd, moments((33, 65)), (0, 0), 0)
    assert adamw8bit._kind(alone, odd) == (False, False, False, False, False)


def test_contracts_are_checked():
    weight, launcher, half = torch.zeros(16, 256), adamw8bit.Launcher(), torch.zeros(16, 256).bfloat16()
    narrow = {name: torch.zeros(1, 128, dtype=torch.uint8) for name in moments((16, 256))}
    small = weight[:1, :128].clone()

    def refused(words, weight, gradient, state=None, first=0, copy=None):
        part = adamw8bit.Part(weight, state or moments((16, 256)), (0, 0), first, copy)
        with pytest.raises(ValueError, match=words):
            launcher([part], [gradient], scalars(1), torch.tensor(1))

    refused("float32 or bfloat16", weight.half(), weight)
    refused("gradient float32 or bfloat16", weight, weight.double())
    refused("weight contiguous", weight.t(), weight.t())
    refused("gradient of shape", weight, weight[:8])
    refused("whole blocks", weight, weight, first=128)
    refused("whole blocks", small, small.clone(), narrow)
    refused("a copy of an fp32 weight", half, half.clone(), copy=half.clone())
    refused("contiguous bf16 copy", weight, weight.clone(), copy=weight.clone())
    refused("contiguous bf16 copy", weight, weight.clone(), copy=half[:8])
    assert launcher([], [], scalars(1), torch.tensor(1)) == 0


def test_masters_move_as_they_do_alone_and_their_weights_follow():
    """The bits of master and moments are those without a copy; the copy is torch's own rounding of it."""
    alone, both = Both(SHAPES, torch.float32), Both(SHAPES, torch.float32, copies=True)
    for step in (1, 2, 3):
        grads = gradients(SHAPES, torch.float32, step)
        alone.update(step, grads, clip=0.7)
        assert both.update(step, grads, clip=0.7) == 3
        both.check()
    assert all(torch.equal(a, b) for a, b in zip(alone.weights, both.weights))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(alone.moments, both.moments) for k in a)
    assert all(torch.equal(copy, master.bfloat16()) for copy, master in zip(both.copies, both.weights))
    both.update(4, [torch.full(shape, float("nan")) for shape in SHAPES], veto=1.0)
    both.check()
