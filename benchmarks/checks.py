"""What must be right before a number may be printed: the measured operations against float64 on this device.

Law 3: the error of ours is at most 1.5 times that of plain torch in the same dtype, as RMS against float64. The optimizer
kernel's weights differ from plain torch's by rounding only, and vetoed updates change nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import cases, peers

FACTOR = 1.5


def red_checks(device: str) -> list[str]:
    """What is wrong, in words; empty when everything holds."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if device == "cuda" else (torch.float32,)
    red = []
    for dtype in dtypes:
        for n, h, v, masked in ((512, 64, 1000, 0.0), (300, 128, 4097, 0.5), (64, 256, 32000, 0.9)):
            red += _head(n, h, v, masked, dtype, device)
    for dtype in (torch.bfloat16, torch.float32):
        red += _optimizer(dtype, device)
    return red


def _head(n: int, h: int, v: int, masked: float, dtype: torch.dtype, device: str) -> list[str]:
    where = f"head N={n} H={h} V={v} masked={masked} {dtype}"
    hidden, head, targets = cases.head_operands(n, h, v, masked, dtype, device)
    exact = _gradients(
        peers.eager64, hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_(), targets
    )
    plain = _gradients(peers.eager, hidden, head, targets)
    ours = _gradients(peers.ours(), hidden, head, targets)
    red = []
    for what, truth, theirs, own in zip(("loss", "hidden gradient", "head gradient"), exact, plain, ours):
        floor = 1e-6 * float(truth.norm()) + 1e-12
        error, allowed = float((own.double() - truth).norm()), FACTOR * float((theirs.double() - truth).norm()) + floor
        if what == "loss":  # one number, no RMS over many: bf16's own step is the bound
            allowed = max(allowed, 4e-3 * abs(float(truth)) if dtype != torch.float32 else 1e-5 * abs(float(truth)))
        if not error <= allowed:  # NaN is red too
            red.append(f"{where}: {what} is off by {error:.3g}, expected at most {allowed:.3g}")
    return red


def _gradients(loss: peers.Loss, hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value = peers.step(loss, hidden, head, targets)()
    assert hidden.grad is not None
    assert head.grad is not None
    return value, hidden.grad, head.grad


def _optimizer(dtype: torch.dtype, device: str) -> list[str]:
    """adamw8bit on this device against its plain torch truth on the CPU, three updates, one of them vetoed."""
    from repsft_fast.optim import build_optimizer, state_tensors

    sides = []
    for place in ("cpu", device):
        generator = torch.Generator().manual_seed(0)
        shapes = [(64, 512), (33, 65), (300,)]
        named = [
            (f"p{i}", torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype).to(place))) for i, s in enumerate(shapes)
        ]
        optimizer = build_optimizer(named, "adamw8bit", lr=1e-2, weight_decay=0.1, seed=1)
        for update in range(3):
            for _, parameter in named:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype).to(place)
            veto, clip = torch.tensor(float(update == 1), device=place), torch.tensor(0.5, device=place)
            optimizer.step(1e-2, veto, clip)
        sides.append(([p.detach().float().cpu() for _, p in named], {k: t.cpu() for k, t in state_tensors(optimizer).items()}))
    (weights, state), (own_weights, own_state) = sides
    red = []
    # Contraction and rounding differ between devices: a few codes and last bits may, the rest must not.
    unit = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-20
    for index, (a, b) in enumerate(zip(weights, own_weights)):
        apart = ((a - b).abs() > unit * a.abs().clamp(min=1e-2)).float().mean()
        if not float(apart) <= 1e-3:
            red.append(f"adamw8bit {dtype}: {float(apart):.2%} of the weights of tensor {index} differ from plain torch")
    for name, a in state.items():
        apart = ((a.float() - own_state[name].float()).abs() > 1e-5 * a.float().abs() + 1e-9).float().mean()
        if not float(apart) <= 1e-2:
            red.append(f"adamw8bit {dtype}: {float(apart):.2%} of {name} differ from plain torch")
    return red
