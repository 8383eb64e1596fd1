"""The 8-bit AdamW kernel in Triton's CPU interpreter against its plain torch truth: the same bits, everywhere."""

import pytest
import torch
import triton
import triton.experimental.gluon.nvidia  # Triton imports it at the first launch, and it insists on the compiled functions
from triton.runtime.interpreter import InterpretedFunction

from csrc_triton import adamw8bit
from repsft_fast.ops import adamw8bit_reference as reference

BLOCK = reference.BLOCK


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """What TRITON_INTERPRET=1 does at import, for these tests only: every jitted function of ours and of the language."""
    for module in (adamw8bit, triton.language, triton.language.standard):
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.runtime.JITFunction):
                monkeypatch.setattr(module, name, InterpretedFunction(value.fn))


def scalars(step: int, *, veto=0.0, clip=1.0, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.999)) -> reference.Scalars:
    first, second = reference.corrections(*betas, torch.tensor(step))
    return reference.Scalars(lr, *betas, 1e-8, weight_decay, first, second, torch.tensor(clip), torch.tensor(veto))


def moments(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    if not reference.has_8bit_moments(shape):
        return {"exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape)}
    scales = reference.scale_shape(shape)
    sizes = {"exp_avg": shape, "exp_avg_scale": scales, "exp_avg_sq": shape, "exp_avg_sq_scale": scales}
    return {name: torch.zeros(size, dtype=torch.uint8) for name, size in sizes.items()}


class Both:
    """The same tensors twice, one side updated by the kernel, one by the reference."""

    def __init__(self, shapes, dtype, firsts=None):
        torch.manual_seed(0)
        self.weights = [torch.randn(shape).to(dtype) for shape in shapes]
        self.moments = [moments(shape) for shape in shapes]
        self.plain_weights = [w.clone() for w in self.weights]
        self.plain_moments = [moments(shape) for shape in shapes]
        self.keys = [reference.parameter_key(7, f"p{i}") for i in range(len(shapes))]
        self.firsts = firsts or [0] * len(shapes)
        self.launcher = adamw8bit.Launcher()

    def update(self, step: int, grads: list[torch.Tensor], **settings) -> int:
        s, count = scalars(step, **settings), torch.tensor(step)
        launches = self.launcher(list(zip(self.weights, grads, self.moments, self.keys, self.firsts)), s, count)
        for w, g, m, key, first in zip(self.plain_weights, grads, self.plain_moments, self.keys, self.firsts):
            flat = {name: t.view(-1) for name, t in m.items()}
            reference.update_(w.view(-1), g.reshape(-1), flat, s, reference.update_key(key, count), first)
        return launches

    def check(self) -> None:
        for index, (ours, plain) in enumerate(zip(self.weights, self.plain_weights)):
            assert torch.equal(ours.view(torch.uint8), plain.view(torch.uint8)), f"weight {index}"
            for name, value in self.plain_moments[index].items():
                assert torch.equal(self.moments[index][name], value), f"{name} {index}"


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
        assert launches == 3  # all 8-bit tensors in one; 32-bit ones of a multiple of 16 elements, and the others
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


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
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


def test_memory_around_the_tensors_is_left_alone():
    shape = (16, 256)
    both = Both([shape, (13,)], torch.float32)
    arenas = []
    for index, weight in enumerate(both.weights):
        arena = torch.full((weight.numel() + 128,), float("nan"))
        arena[64 : 64 + weight.numel()] = weight.view(-1)
        both.weights[index] = arena[64 : 64 + weight.numel()].view(weight.shape)
        arenas.append(arena)
    both.update(1, gradients([shape, (13,)], torch.float32, 1))
    both.check()
    for arena, weight in zip(arenas, both.weights):
        assert arena[:64].isnan().all()
        assert arena[64 + weight.numel() :].isnan().all()


def test_tables_follow_gradients_that_move():
    both = Both([(16, 256)], torch.float32)
    for step in (1, 2, 3):
        fresh = gradients([(16, 256)], torch.float32, step)
        both.update(step, fresh)
        both.check()
    assert len(both.launcher._plans) == 1


def test_misaligned_and_strided_tensors():
    both = Both([(16, 256)], torch.float32)
    arena = torch.zeros(16 * 256 + 1)
    arena[1:] = both.weights[0].view(-1)
    both.weights[0] = arena[1:].view(16, 256)
    gradient = torch.randn(256, 16).t()  # not contiguous
    both.update(1, [gradient])
    both.check()


def test_contracts_are_checked():
    weight, launcher = torch.zeros(16, 256), adamw8bit.Launcher()
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        launcher([(weight.half(), weight, moments((16, 256)), (0, 0), 0)], scalars(1), torch.tensor(1))
    with pytest.raises(ValueError, match="gradient of shape"):
        launcher([(weight, weight[:8], moments((16, 256)), (0, 0), 0)], scalars(1), torch.tensor(1))
    with pytest.raises(ValueError, match="whole blocks"):
        launcher([(weight, weight, moments((16, 256)), (0, 0), 128)], scalars(1), torch.tensor(1))
    assert launcher([], scalars(1), torch.tensor(1)) == 0
