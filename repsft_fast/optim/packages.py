"""The 8-bit AdamW of other packages, imported only when one is asked for: bitsandbytes and torchao."""

from __future__ import annotations

import importlib
import math
from typing import Any, cast

import torch
from torch import Tensor

from repsft_fast.errors import ConfigError, describe
from repsft_fast.optim.base import Groups, Hyperparameters, Optimizer, Rule

BLOCK = 256  # elements that share a scale, in both
MIN_ELEMENTS = 4096  # of both: smaller tensors keep 32-bit moments


class _CountsOnHost(Optimizer):
    """A rule that counts its steps in Python ints (bitsandbytes) or host tensors (torchao).

    The closed list needs one tensor, so that is the truth between updates and lent to the package for the
    update. Host memory on both sides: nothing waits.
    """

    shardable = False

    def _step_on_host(self) -> None:
        self._lend_counts()
        super()._step_on_host()
        self._take_counts()

    def _lend_counts(self) -> None:
        if self.step_counts is None:
            return
        for count, parameter in zip(self.step_counts.tolist(), self.held.values()):
            state = self.inner.state[parameter]
            if isinstance(state["step"], Tensor):
                state["step"].fill_(count)
            else:
                state["step"] = count

    def _take_counts(self) -> None:
        if self.step_counts is not None:
            counts = [int(self.inner.state[p]["step"]) for p in self.held.values()]
            self.step_counts.copy_(torch.tensor(counts))

    @staticmethod
    def step_count_bytes(parameters):
        return 8 * parameters


class BitsandbytesAdamW8bit(_CountsOnHost):
    """bitsandbytes.optim.AdamW8bit."""

    constant_state = frozenset({"qmap1", "qmap2"})

    def _build(self, groups: Groups, hyperparameters: Hyperparameters) -> Rule:
        kind = _import("bitsandbytes.optim", "bitsandbytes").AdamW8bit
        h = hyperparameters
        return kind(groups, lr=h.lr, betas=h.betas, eps=h.eps), False

    def _allocate(self) -> Tensor:
        inner: Any = self.inner
        inner.check_overrides()
        for group_index, group in enumerate(inner.param_groups):
            for index, parameter in enumerate(group["params"]):
                inner.init_state(group, parameter, group_index, index)
        inner.initialized = True
        return torch.zeros(len(self.names), dtype=torch.int64)

    @staticmethod
    def moment_bytes(shape, local_shape, element_bytes, *, momentum):
        n = math.prod(local_shape)
        return _coded_bytes(n) if n >= MIN_ELEMENTS else (4 * n,) * 2


class TorchaoAdamW8bit(_CountsOnHost):
    """torchao.optim.AdamW8bit, which rounds bf16 weights stochastically from torch's global generator."""

    def _build(self, groups: Groups, hyperparameters: Hyperparameters) -> Rule:
        kind = _import("torchao.optim", "torchao").AdamW8bit
        h = hyperparameters
        return kind(groups, lr=h.lr, betas=h.betas, eps=h.eps, bf16_stochastic_round=True), False

    def _allocate(self) -> Tensor:
        inner = cast("Any", self.inner)
        for parameter in self.held.values():
            moments = {
                key: inner._new_buffer(parameter, signed)
                for key, signed in (("exp_avg", True), ("exp_avg_sq", False))
            }
            inner.state[parameter] = {"step": torch.tensor(0.0), **moments}
        return torch.zeros(len(self.names), dtype=torch.int64)

    @staticmethod
    def moment_bytes(shape, local_shape, element_bytes, *, momentum):
        n = math.prod(local_shape)
        return _coded_bytes(n) if n >= MIN_ELEMENTS and n % BLOCK == 0 else (n * element_bytes,) * 2


def _coded_bytes(elements: int) -> tuple[int, ...]:
    """A code per element and an fp32 scale per block, of two moments."""
    return (elements, 4 * -(-elements // BLOCK)) * 2


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            describe(
                "optim.name",
                f"needs the package {package}",
                got=str(error),
                todo=f"pip install {package}, or use adamw8bit",
            )
        ) from error
