"""AdamW and SGD as torch's fused kernels compute them: SGD everywhere, AdamW on a CPU (on a GPU:
`adamw.py`)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from repsft_fast.optim.base import Groups, Hyperparameters, Optimizer, Rule


class FusedAdamW(Optimizer):
    """torch.optim.AdamW; moments in the weights' dtype."""

    def _build(self, groups: Groups, hyperparameters: Hyperparameters) -> Rule:
        settings = {"lr": hyperparameters.lr, "betas": hyperparameters.betas, "eps": hyperparameters.eps}
        return _fused(torch.optim.AdamW, groups, settings)

    def _allocate(self) -> Tensor:
        # One tensor of counts and a view of it per parameter: 300 parameters are one entry of the closed
        # list, not 300. A parameter without a gradient keeps its own count, as in torch.
        device = next(iter(self.held.values())).device if self.vetoes_on_device else torch.device("cpu")
        counts = torch.zeros(len(self.names), dtype=torch.float32, device=device)
        for count, parameter in zip(counts, self.held.values()):
            self.inner.state[parameter] = {
                "step": count,
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
        return counts

    @staticmethod
    def moment_bytes(shape, local_shape, element_bytes, *, momentum):
        return (math.prod(local_shape) * element_bytes,) * 2

    @staticmethod
    def step_count_bytes(parameters):
        return 4 * parameters


class FusedSGD(Optimizer):
    """torch.optim.SGD; one moment in the weights' dtype where there is a momentum, no step counts."""

    def _build(self, groups: Groups, hyperparameters: Hyperparameters) -> Rule:
        settings = {"lr": hyperparameters.lr, "momentum": hyperparameters.momentum}
        return _fused(torch.optim.SGD, groups, settings)

    def _allocate(self) -> None:
        for parameter in self.held.values():
            # torch starts from a copy of the first gradient; 0 · momentum + gradient is the same number.
            self.inner.state[parameter]["momentum_buffer"] = (
                torch.zeros_like(parameter) if self.inner.defaults["momentum"] else None
            )

    @staticmethod
    def moment_bytes(shape, local_shape, element_bytes, *, momentum):
        return (math.prod(local_shape) * element_bytes,) if momentum else ()

    @staticmethod
    def step_count_bytes(parameters):
        return 0


def _fused(kind: Any, groups: Groups, settings: dict[str, Any]) -> Rule:
    # torch's fused SGD on a CPU (2.11, 2.13) leaves whole vectors of bf16 and fp16 weights as they were
    on_cpu = {parameter.dtype for group in groups for parameter in group["params"] if parameter.is_cpu}
    if kind is torch.optim.SGD and on_cpu & {torch.bfloat16, torch.float16}:
        return kind(groups, fused=False, foreach=True, **settings), False
    try:
        return kind(groups, fused=True, **settings), True
    # a device without fused kernels: the veto then costs a host read, the update is the same
    except RuntimeError:
        return kind(groups, fused=False, foreach=True, **settings), False
