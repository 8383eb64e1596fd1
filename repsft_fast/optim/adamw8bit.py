"""The 8-bit AdamW as an optimizer: geometry of shards, state, and the choice of implementation.

Bytes per parameter of a matrix whose rows are multiples of 256: weight 2 (bf16), gradient 2, moments 2 +
2/256; with an fp32 master 4 more, and then the gradient has 4. The formula, the codes and why they are what
they are: `adamw8bit_reference.py`. The kernel: `csrc_triton/adamw8bit.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from repsft_fast.errors import ConfigError, describe
from repsft_fast.optim import adamw8bit_reference as reference
from repsft_fast.optim.adamw import copies_of, same_objects
from repsft_fast.optim.base import Groups, Hyperparameters, Optimizer, Rule


class SeededAdamW8bit(Optimizer):
    """`AdamW8bit` behind the trainer's interface: the same bits on any number of ranks."""

    writes_weights: ClassVar[bool] = True

    def _build(self, groups: Groups, hyperparameters: Hyperparameters) -> Rule:
        shards = {self.held[name]: Shard.of(name, parameter) for name, parameter in self.names.items()}
        h = hyperparameters
        return AdamW8bit(
            groups, shards, copies_of(self), lr=h.lr, betas=h.betas, eps=h.eps, seed=h.seed
        ), True

    def _allocate(self) -> Tensor:
        return cast("AdamW8bit", self.inner).step_count  # it allocated in its constructor

    @staticmethod
    def moment_bytes(shape, local_shape, element_bytes, *, momentum):
        n = math.prod(local_shape)
        if not reference.has_8bit_moments(shape):
            return (4 * n,) * 2
        return (n, math.prod(reference.scale_shape(local_shape))) * 2

    @staticmethod
    def step_count_bytes(parameters):
        return 8  # one count of all parameters


@dataclass(frozen=True)
class Shard:
    """Which part of a parameter this rank holds: whole rows of its first dimension."""

    name: str
    shape: tuple[int, ...]  # global
    first_element: int  # global index of the local part's first element

    @staticmethod
    def of(name: str, parameter: Tensor) -> Shard:
        """The local part of a DTensor split over its first dimension (FSDP2, HSDP), or of a plain tensor: all
        of it.

        Raises ConfigError for any other split, whose blocks would not stay whole.
        """
        shape = tuple(parameter.shape)
        if not hasattr(parameter, "device_mesh"):
            return Shard(name, shape, 0)
        split: Any = parameter
        first_row, rows = 0, shape[0] if shape else 1
        for dimension, placement in enumerate(split.placements):
            if placement.is_replicate():
                continue
            if type(placement).__name__ != "Shard" or placement.dim != 0 or first_row or rows != shape[0]:
                wrong = f"cannot follow the split of {name}"
                expected = "Shard(0) over one dimension of the mesh"
                raise _refusal(wrong, split.placements, expected=expected, todo="use adamw")
            # as torch.chunk: the last ranks may be short
            chunk = -(-shape[0] // split.device_mesh.size(dimension))
            first_row = min(chunk * split.device_mesh.get_local_rank(dimension), shape[0])
            rows = min(chunk, shape[0] - first_row)
        return Shard(name, shape, first_row * math.prod(shape[1:]))


class AdamW8bit(torch.optim.Optimizer):
    """Block-wise 8-bit AdamW with seeded stochastic rounding. All state is allocated here.

    `shards` says where each parameter lies in its global tensor; `copies`, of an fp32 master, the bf16 weight
    that is written with it, rounded to the nearest. Weights are fp32 or bf16 and contiguous. One step count
    serves all parameters: one without a gradient keeps weight and moments, and later sees the others' bias
    correction.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        shards: dict[nn.Parameter, Shard],
        copies: dict[nn.Parameter, Tensor] | None = None,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        seed: int = 0,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.seed = seed
        self.shards, self.copies = shards, copies or {}
        self.keys = {
            parameter: reference.parameter_key(seed, shard.name) for parameter, shard in shards.items()
        }
        self.found_inf: Tensor | None = None
        self.clip: Tensor | None = None
        self._launcher: Any = None
        self._counter: tuple[list[tuple[float, float]], Any] | None = None
        self._parts: dict[int, tuple[list[nn.Parameter], list[Any]]] = {}  # of each group
        for parameter, shard in shards.items():
            _check(parameter, shard)
            self.state[parameter] = _zeros(parameter, shard)
        device = next(iter(shards)).device
        self.step_count = torch.zeros((), dtype=torch.int64, device=device)
        self._by_kernel = device.type == "cuda"

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        """One update. Reads `found_inf` and `clip` ([] fp32 on the device, or None) where they are; no host
        sync."""
        if closure is not None:
            raise ValueError(describe("AdamW8bit.step", "takes no closure"))
        device = self.step_count.device
        if self._by_kernel:
            self._step_by_kernel()
            return
        veto = torch.zeros((), device=device) if self.found_inf is None else (self.found_inf != 0).float()
        clip = torch.ones((), device=device) if self.clip is None else self.clip.float()
        self.step_count += (1 - veto).to(torch.int64)
        corrections: dict[tuple[float, float], tuple[Tensor, Tensor]] = {}  # groups share them
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None and p.numel()]
            beta1, beta2 = group["betas"]
            if (beta1, beta2) not in corrections:
                corrections[beta1, beta2] = reference.corrections(beta1, beta2, self.step_count)
            first, second = corrections[beta1, beta2]
            scalars = reference.Scalars(
                group["lr"], beta1, beta2, group["eps"], group["weight_decay"], first, second, clip, veto
            )
            self._update_plain(parameters, scalars)

    def _step_by_kernel(self) -> None:
        """One launch that counts, and one for every kind of tensor; nothing is allocated but where gradients
        have moved."""
        from csrc_triton.adamw8bit_count import Counter

        pairs = list(dict.fromkeys(tuple(group["betas"]) for group in self.param_groups))
        if self._counter is None or self._counter[0] != pairs:
            self._counter = pairs, Counter(pairs, self.step_count.device)
        lines = self._counter[1](self.step_count, self.found_inf, self.clip)
        for number, group in enumerate(self.param_groups):
            parameters = [p for p in group["params"] if p.grad is not None and p.numel()]
            self._launch(number, parameters, group, lines[pairs.index(tuple(group["betas"]))])

    def __setstate__(self, state):  # of `load_state_dict`: moments are other tensors now
        super().__setstate__(state)
        self._parts = {}

    def _update_plain(self, parameters: list[nn.Parameter], scalars: reference.Scalars) -> None:
        for p in parameters:
            assert p.grad is not None
            moments = {name: state.view(-1) for name, state in self.state[p].items()}
            key = reference.update_key(self.keys[p], self.step_count)
            gradient = p.grad.contiguous().view(-1)
            first, copy = self.shards[p].first_element, self.copies.get(p)
            flat = None if copy is None else copy.view(-1)
            reference.update_(p.view(-1), gradient, moments, scalars, key, first, flat)

    def _launch(
        self, number: int, parameters: list[nn.Parameter], group: dict[str, Any], shared: Sequence[Tensor]
    ) -> None:
        from csrc_triton.adamw8bit import Launcher, Part

        if self._launcher is None:
            self._launcher = Launcher()
        # the same list as at the update before, unless other parameters have gradients: the launcher asks
        known = self._parts.get(number)
        if known is None or not same_objects(known[0], parameters):
            first = {p: self.shards[p].first_element for p in parameters}
            parts = [Part(p, self.state[p], self.keys[p], first[p], self.copies.get(p)) for p in parameters]
            known = self._parts[number] = (parameters, parts)
        gradients = [p.grad for p in parameters]
        (beta1, beta2), (line, one, two, clip, veto) = group["betas"], shared
        scalars = reference.Scalars(
            group["lr"], beta1, beta2, group["eps"], group["weight_decay"], one, two, clip, veto
        )
        self._launcher(known[1], gradients, scalars, self.step_count, group=number, shared=line)


def _zeros(parameter: Tensor, shard: Shard) -> dict[str, Tensor]:
    shape, device = parameter.shape, parameter.device
    if not reference.has_8bit_moments(shard.shape):
        moments = ("exp_avg", "exp_avg_sq")
        return {name: torch.zeros(shape, dtype=torch.float32, device=device) for name in moments}
    scales = reference.scale_shape(shape)
    return {
        name: torch.zeros(scales if name.endswith("_scale") else shape, dtype=torch.uint8, device=device)
        for name in ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
    }


def _check(parameter: Tensor, shard: Shard) -> None:
    if parameter.dtype not in (torch.float32, torch.bfloat16):
        wrong, todo = f"cannot update {shard.name}", "choose another model.param_dtype"
        raise _refusal(wrong, parameter.dtype, expected="float32 or bfloat16 weights", todo=todo)
    if not parameter.is_contiguous():
        raise _refusal(f"needs {shard.name} contiguous", parameter.stride())


def _refusal(wrong: str, got: object, *, expected: str | None = None, todo: str | None = None) -> ConfigError:
    return ConfigError(
        describe("optim.name", f"adamw8bit {wrong}", expected=expected, got=str(got), todo=todo)
    )
