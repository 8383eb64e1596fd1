"""Which attention a run takes under model.attention: auto, and whether one that is named can be had here.

A package is taken where it can be imported, is made for this GPU, and is seen to compute the right thing
there: one call of 64 tokens, forward and backward, with and without a window, beside SDPA in fp32. Releases
of these packages differ in what they have a backward pass for.
"""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from repsft_fast.errors import ModelError, describe
from repsft_fast.ops import flash
from repsft_fast.ops.attention import AUTO, BACKENDS, Packed, alike, packed_attention, waves

# Plain torch in bf16 comes within 0.011 at every width of heads from 8 to 256, with this scale; with 1/√D the
# gradients of grouped keys cancel, to 0.017 at 256. What is wrong differs by a tenth and more.
_BOUND = 2**-5


def why_better_not(name: str, device: torch.device, *, width: int, softcap: bool) -> str | None:
    """Why auto does not take this package for a model with heads of this width; None: it does."""
    package = flash.PACKAGES[name]
    if not flash.importable(name):  # before a GPU is asked anything
        return "it cannot be imported"
    if width > package.width or width % 8:
        return f"heads of {width} are not what it is relied on for"
    if softcap and not package.softcap:
        return "it is not relied on for a soft-cap"
    if name == "flash2" and not softcap:
        return "torch's varlen kernels are the same"
    return why_not(name, device, width)


def why_not(backend: str, device: torch.device, width: int = 64) -> str | None:
    """Why this backend cannot be had on the device; None: it can. width: of the model's heads, for the trial.

    On a device that is not there (meta, fake tensors) nothing is tried.
    """
    if backend not in BACKENDS:
        return f"it is not known, only {', '.join(BACKENDS)}"
    name = backend.removeprefix("auto:")
    if name == "varlen":
        return "torch's varlen kernels need a CUDA device" if device.type == "cpu" else None
    if name not in flash.PACKAGES:
        return None
    package = flash.PACKAGES[name]
    if not flash.importable(name):
        return f"{name} needs the module {package.module}, which cannot be imported"
    if device.type == "meta":
        return None
    major = flash.major_of(device)
    if major is None:
        return f"{name} needs a CUDA device"
    if major not in package.majors:
        return f"{name} is not made for GPUs of compute capability {major}.x"
    try:
        return _wrong(flash.kernels(name, major), device, min(width, package.width))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a package that was built for another torch can raise anything
        return f"{name} fails: {str(error).partition(chr(10))[0] or type(error).__name__}"


def _wrong(has: flash.Kernels, device: torch.device, width: int) -> str | None:
    """Two documents and a tail of empty ones, heads in groups: borders, window and tail all matter."""
    borders = torch.tensor([0, 40, 64, 64, 64], dtype=torch.int32, device=device)
    with torch.inference_mode(False), torch.enable_grad():
        heads = ((4, 0.7), (2, 1.1), (2, 1.9), (4, 2.3))
        q, k, v, up = (waves(n, step, device, width) for n, step in heads)
        if isinstance(q, FakeTensor):
            return None
        for window in (None, 5):
            found = []
            for backend, dtype in ((has.name, q.dtype), ("sdpa", torch.float32)):
                inputs = a, b, c = [x.to(dtype).requires_grad_() for x in (q, k, v)]
                where = Packed(borders, (40, 24), 64, backend, flash=has)
                output, _ = packed_attention(
                    nn.Module(), a, b, c, None, scaling=1.0, sliding_window=window, packed=where
                )
                found.append([output, *torch.autograd.grad(output, inputs, up.transpose(1, 2).to(dtype))])
            if not all(alike(one, other, _BOUND) for one, other in zip(*found, strict=True)):
                return f"{has.name} gives other results than SDPA (heads of {width}, window {window})"
    return None


def checked(backend: str, device: torch.device, width: int = 64) -> str:
    """`backend` where it can be had, else ModelError with the way out."""
    if (why := why_not(backend, device, width)) is not None:
        raise ModelError(describe("model.attention", why, got=backend, todo="choose auto"))
    return backend


def own_attention(backend: str) -> str | None:
    """transformers' name of an attention for rows of one document; None = what it takes by itself. ModelError
    without one."""
    names = {"sdpa": "sdpa", "flash2": "flash_attention_2", "flash3": "flash_attention_3"}
    if backend in AUTO:
        return None
    if backend not in names:
        expected = f"auto, {', '.join(names)} with batch.pack: false"
        raise ModelError(describe("model.attention", "needs packed rows", expected=expected, got=backend))
    return names[backend]


def check_backend(backend: str) -> str:
    """`backend` if it can be used here, else ModelError saying what is missing."""
    if backend not in BACKENDS:
        raise ModelError(
            describe("model.attention", "is not known", expected=f"one of {', '.join(BACKENDS)}", got=backend)
        )
    name = backend.removeprefix("auto:")
    if name in flash.PACKAGES and not flash.importable(name):
        wrong = f"{name} needs the module {flash.PACKAGES[name].module}, which cannot be imported"
        raise ModelError(describe("model.attention", wrong, todo="install it or choose varlen"))
    return backend
