"""AdamW of `optim.name: adamw` on a GPU: one launch over all tensors that also writes the bf16 weights.

The formula and its bits: `adamw_reference.py`; the kernel: `csrc_triton/adamw.py`. State has the names,
shapes and dtypes of torch's fused AdamW (`torch_fused.py`, which is `adamw` on a CPU), so a checkpoint of
either is the other's.
"""

from __future__ import annotations

import importlib.util
import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from repsft_fast.errors import describe
from repsft_fast.optim import adamw_reference as reference
from repsft_fast.optim.base import Groups, Hyperparameters, Optimizer, Rule, local
from repsft_fast.optim.masters import Masters
from repsft_fast.optim.torch_fused import FusedAdamW

FLOATS = (torch.float32, torch.bfloat16)  # weights and gradients of the kernel


class KernelAdamW(FusedAdamW):
    """`AdamW` behind the trainer's interface."""

    writes_weights: ClassVar[bool] = True

    def _build(self, groups: Groups, hyperparameters: Hyperparameters) -> Rule:
        h = hyperparameters
        return AdamW(groups, copies_of(self), lr=h.lr, betas=h.betas, eps=h.eps), True

    def _step_on_device(self, found_inf: Tensor | None, clip: Tensor | None) -> None:
        # nothing divides by a clip factor here, so no reciprocal of it is made
        inner = cast("AdamW", self.inner)
        inner.found_inf, inner.clip = found_inf, clip
        inner.step()


class AdamW(torch.optim.Optimizer):
    """AdamW whose state (`step` [] fp32, `exp_avg`, `exp_avg_sq`) is there before the first update.

    `copies`: of an fp32 master the bf16 weight that is written with it. `found_inf` and `clip` are [] fp32 on
    the device, or None. On a CPU, and wherever there is no kernel, plain torch computes the same bits.
    """

    def __init__(
        self,
        groups: Groups,
        copies: dict[nn.Parameter, Tensor],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.copies = copies
        self.found_inf: Tensor | None = None
        self.clip: Tensor | None = None
        self._launcher: Any = None
        self._parts: tuple[list[nn.Parameter], list[Any]] = ([], [])

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        """One update of every parameter that has a gradient; no host sync."""
        if closure is not None:
            raise ValueError(describe("AdamW.step", "takes no closure"))
        parameters, gradients = [], []
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is not None:
                    parameters.append(parameter)
                    gradients.append(gradient)
        if not parameters:
            return
        if gradients[0].device.type == "cuda":
            self._launch(parameters, gradients)
        else:
            self._update_plain(parameters, gradients)

    def __setstate__(self, state):  # of `load_state_dict`: moments are other tensors now
        super().__setstate__(state)
        self._parts = ([], [])

    def _launch(self, parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
        from csrc_triton.adamw import Launcher

        if self._launcher is None:
            self._launcher = Launcher()
        # the same list as at the update before, unless other parameters have gradients: the launcher asks
        if not same_objects(parameters, self._parts[0]):
            self._parts = parameters, self._parts_of(parameters)
        first = self.param_groups[0]
        self._launcher(
            self._parts[1], gradients,
            lr=first["lr"], eps=first["eps"], betas=first["betas"], clip=self.clip, veto=self.found_inf,
        )  # fmt: skip

    def _parts_of(self, parameters: list[nn.Parameter]) -> list[Any]:
        from csrc_triton.adamw import Part

        group_of = {parameter: group for group in self.param_groups for parameter in group["params"]}
        parts = []
        for parameter in parameters:
            group, state = group_of[parameter], self.state[parameter]
            moments = state["exp_avg"], state["exp_avg_sq"], state["step"]
            copy = self.copies.get(parameter)
            parts.append(Part(parameter, copy, *moments, group["betas"], group["weight_decay"]))
        return parts

    def _update_plain(self, parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
        group_of = {parameter: group for group in self.param_groups for parameter in group["params"]}
        for parameter, gradient in zip(parameters, gradients):
            group, state, device = group_of[parameter], self.state[parameter], gradient.device
            clip = torch.ones((), device=device) if self.clip is None else self.clip
            veto = torch.zeros((), device=device) if self.found_inf is None else self.found_inf
            beta1, beta2 = group["betas"]
            scalars = reference.Scalars(
                group["lr"], beta1, beta2, group["eps"], group["weight_decay"], clip, veto
            )
            moments = state["exp_avg"], state["exp_avg_sq"], state["step"]
            reference.update_(parameter, gradient, *moments, scalars, self.copies.get(parameter))


def copies_of(optimizer: Optimizer) -> dict[nn.Parameter, Tensor]:
    """Master → the bf16 weight that the model computes with; a DTensor's local part is no master."""
    pairs = [(held, optimizer.names[name]) for name, held in optimizer.held.items()]
    return {
        held: weight
        for held, weight in pairs
        if (held.dtype, weight.dtype) == (torch.float32, torch.bfloat16) and not hasattr(weight, "to_local")
    }


_torchs_own = False


@contextmanager
def torchs_own() -> Iterator[None]:
    """What is built inside takes torch's fused AdamW on a GPU too: for measuring one beside the other."""
    global _torchs_own
    before, _torchs_own = _torchs_own, True
    try:
        yield
    finally:
        _torchs_own = before


def takes_kernel(parameters: Iterable[Tensor], masters: Masters | None = None) -> bool:
    """Whether `adamw` of these parameters is the kernel's: they and their masters on a GPU, in fp32 or bf16,
    and Triton there."""
    shards = [local(parameter) for parameter in parameters]
    held = shards if masters is None else [masters.of(parameter) for parameter in shards]
    fits = all(p.device.type == "cuda" and p.dtype in FLOATS and p.is_contiguous() for p in [*shards, *held])
    return fits and not _torchs_own and importlib.util.find_spec("triton") is not None


def same_objects(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))
