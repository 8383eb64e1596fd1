"""The AdamW kernel on a device beside its plain torch truth on the CPU: the same bits after every update."""

from __future__ import annotations

import torch
from torch import Tensor

from csrc_triton.adamw import Launcher, Part
from repsft_fast.optim import adamw_reference as reference

FLOATS = [torch.float32, torch.bfloat16]
BETAS = (0.9, 0.999)
# of the weight, and whether it is a master whose bf16 weight is written
KINDS = [(torch.float32, True), (torch.float32, False), (torch.bfloat16, False)]
CPU = torch.device("cpu")


class Side:
    """Tensors as an optimizer holds them, drawn alike on every device."""

    def __init__(self, shapes, dtype: torch.dtype, copies: bool, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        self.weights = [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes]
        ones = [torch.ones(shape, dtype=torch.bfloat16, device=device) for shape in shapes]
        self.copies = ones if copies else [None] * len(shapes)
        self.moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in self.weights]
        self.counts = torch.zeros(len(shapes), device=device)

    def tensors(self):
        for number, weight in enumerate(self.weights):
            yield f"weight {number}", weight
            yield f"exp_avg {number}", self.moments[number][0]
            yield f"exp_avg_sq {number}", self.moments[number][1]
            copy = self.copies[number]
            if copy is not None:
                yield f"copy {number}", copy
        yield "counts", self.counts


class Both:
    """The same tensors twice, one side updated by the kernel, one by the reference. Decay differs by
    tensor."""

    def __init__(self, shapes, dtype=torch.float32, *, copies=False, betas=BETAS, device=CPU):
        self.kernel, self.plain = Side(shapes, dtype, copies, device), Side(shapes, dtype, copies, CPU)
        self.decays = [0.1 * (number % 3) for number in range(len(shapes))]
        self.betas, self.device, self.launcher = betas, device, Launcher()
        self.parts: dict[tuple[int, ...], list[Part]] = {}

    def part(self, number: int) -> Part:
        side = self.kernel
        moments = (*side.moments[number], side.counts[number])
        weight, copy = side.weights[number], side.copies[number]
        return Part(weight, copy, *moments, self.betas, self.decays[number])

    def update(self, grads, *, lr=1e-2, eps=1e-8, clip=None, veto=None, check=True) -> int:
        """grads: on the kernel's device or the CPU; None = this tensor has no gradient. Returns the number of
        launches."""
        present = tuple(n for n, g in enumerate(grads) if g is not None)
        parts = self.parts.setdefault(present, [self.part(n) for n in present])
        there = [None if v is None else torch.tensor(v, device=self.device) for v in (clip, veto)]
        launches = self.launcher(
            parts, [grads[n].to(self.device) for n in present],
            lr=lr, eps=eps, betas=self.betas, clip=there[0], veto=there[1],
        )  # fmt: skip
        here = torch.tensor(1.0 if clip is None else clip), torch.tensor(0.0 if veto is None else veto)
        for n in present:
            s = reference.Scalars(lr, *self.betas, eps, self.decays[n], *here)
            side, moments = self.plain, self.plain.moments[n]
            copy = side.copies[n]
            reference.update_(side.weights[n], grads[n].cpu(), *moments, side.counts[n], s, copy)
        if check:
            self.check()
        return launches

    def check(self) -> None:
        for (name, ours), (_, plain) in zip(self.kernel.tensors(), self.plain.tensors(), strict=True):
            same = torch.equal(ours.cpu().view(torch.uint8), plain.view(torch.uint8))
            assert same, f"bits of {name} differ"


def gradients(shapes, dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * 10.0 ** -(seed % 3)).to(dtype) for shape in shapes]
