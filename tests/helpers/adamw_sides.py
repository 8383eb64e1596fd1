"""The 8-bit AdamW twice: by its kernel on a device, and in plain torch on the CPU, which is its truth.

On a GPU the compiler contracts a · b + c into one rounding where plain torch has two. `contraction(False)`
compiles the same kernel without: then every bit must be the truth's, and what the kernel is run with may
differ from it by such roundings only.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from csrc_triton import adamw8bit
from repsft_fast.optim import adamw8bit_reference as reference

# Whole tiles, parts of one, 32-bit moments of a multiple of 16 elements: one launch of either kernel a step.
SHAPES = [(256, 512), (9, 512), (3, 7, 256), (4096,), (48, 320)]
ODD = [(100,), (33, 65), (1,)]  # 32-bit moments that no wide access can reach: a variant of its own


class Uncontracted:
    """A kernel whose launches ask for two roundings."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.kernel[grid](*arguments, **options, enable_fp_fusion=False)


@contextmanager
def contraction(wanted: bool) -> Iterator[None]:
    names = ("adamw_8bit_kernel", "adamw_32bit_kernel")
    plain = {name: getattr(adamw8bit, name) for name in names}
    try:
        for name, kernel in plain.items():
            setattr(adamw8bit, name, kernel if wanted else Uncontracted(kernel))
        yield
    finally:
        for name, kernel in plain.items():
            setattr(adamw8bit, name, kernel)


def scalars(
    step: int, *, veto=0.0, clip=1.0, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8
) -> reference.Scalars:
    """On the CPU: the same numbers go to both sides, so that no device's logarithm enters."""
    first, second = reference.corrections(*betas, torch.tensor(step))
    return reference.Scalars(
        lr, *betas, eps, weight_decay, first, second, torch.tensor(clip), torch.tensor(veto)
    )


def gradients(shapes, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * 10.0 ** -(seed % 3)).to(dtype) for shape in shapes]


def moments(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    if not reference.has_8bit_moments(shape):
        return {"exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape)}
    scales = reference.scale_shape(shape)
    sizes = {"exp_avg": shape, "exp_avg_scale": scales, "exp_avg_sq": shape, "exp_avg_sq_scale": scales}
    return {name: torch.zeros(size, dtype=torch.uint8) for name, size in sizes.items()}


class Sides:
    """weights, moments: the truth's, on the CPU. device_weights, device_moments: the kernel's."""

    def __init__(self, shapes, dtype: torch.dtype, device: torch.device, weights=None, *, copies=False):
        generator = torch.Generator().manual_seed(0)
        self.device = device
        self.weights = weights or [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        self.moments = [moments(tuple(shape)) for shape in shapes]
        self.keys = [reference.parameter_key(7, f"p{i}") for i in range(len(shapes))]
        self.launcher = adamw8bit.Launcher()
        self.device_weights = [w.to(device, copy=True) for w in self.weights]
        self.device_moments = [{name: t.to(device, copy=True) for name, t in m.items()} for m in self.moments]
        # of masters the weights they are of, which begin as anything
        self.copies = [torch.zeros_like(w, dtype=torch.bfloat16) if copies else None for w in self.weights]
        self.device_copies = [None if c is None else c.to(device, copy=True) for c in self.copies]
        self.parts = [
            adamw8bit.Part(*each)
            for each in zip(
                self.device_weights, self.device_moments, self.keys, [0] * len(shapes), self.device_copies
            )
        ]

    def kernel(self, step: int, grads: list[torch.Tensor], **settings) -> int:
        """One update of the kernel's side. Returns the number of launches."""
        given = scalars(step, **settings)
        there = reference.Scalars(
            given.lr, given.beta1, given.beta2, given.eps, given.weight_decay,
            *(t.to(self.device) for t in (given.inverse_correction1, given.inverse_correction2, given.clip, given.veto)),
        )  # fmt: skip
        on_device = [g.to(self.device) for g in grads]
        return self.launcher(self.parts, on_device, there, torch.tensor(step, device=self.device))

    def truth(self, step: int, grads: list[torch.Tensor], **settings) -> None:
        for weight, gradient, m, key, copy in zip(self.weights, grads, self.moments, self.keys, self.copies):
            copied = None if copy is None else copy.view(-1)
            flat = {name: t.view(-1) for name, t in m.items()}
            now = reference.update_key(key, torch.tensor(step))
            reference.update_(
                weight.view(-1), gradient.reshape(-1), flat, scalars(step, **settings), now, 0, copied
            )

    def start_from_truth(self) -> None:
        """The kernel's side becomes a copy of the truth's, so that differences of one update are seen
        alone."""
        for ours, weight in zip(self.device_weights, self.weights):
            ours.copy_(weight)
        for ours, m in zip(self.device_moments, self.moments):
            for name, value in m.items():
                ours[name].copy_(value)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """(name, a copy of the kernel's on the CPU, the truth's)."""
        for number, (ours, weight) in enumerate(zip(self.device_weights, self.weights)):
            yield f"weight {number}", ours.to("cpu", copy=True), weight
            for name, value in self.moments[number].items():
                yield f"{name} {number}", self.device_moments[number][name].to("cpu", copy=True), value
            copy, truth = self.device_copies[number], self.copies[number]
            if copy is not None:
                assert truth is not None
                yield f"copy {number}", copy.to("cpu", copy=True), truth
