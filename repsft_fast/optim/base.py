"""What every optimizer of a run is to the trainer: one step, and a closed list of state.

Every optimizer keeps three promises. A veto (`found_inf`, a device scalar) leaves weights, moments and step
counts untouched. The learning rate is a number of this update, so a schedule never recompiles or waits. And
the state is a closed list: `materialise` allocates all of it before the first update, `state_tensors` names
it, `reset` clears it in place, so a snapshot taken before update 1 has the same names and shapes as one taken
after.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from repsft_fast.errors import ConfigError, describe
from repsft_fast.optim.masters import Masters

Groups = list[dict[str, Any]]  # as torch takes them: "params" and what differs among them
Rule = tuple[torch.optim.Optimizer, bool]  # and whether it reads a veto where it is, on the device


@dataclass(frozen=True)
class Hyperparameters:
    """What an update rule is built with; each takes those it knows. Weight decay comes with the groups."""

    lr: float
    betas: tuple[float, float]
    eps: float
    momentum: float
    seed: int  # of stochastic rounding


class Optimizer:
    """One update rule over named parameters, around a torch optimizer, `inner`.

    A subclass says how `inner` is built (`_build`), what it would allocate in its first update (`_allocate`)
    and how many bytes that is (`moment_bytes`, `step_count_bytes`). `names` are the model's parameters,
    `held` what the torch optimizer sees: the parameter itself, its master where it has one, or this rank's
    part of a DTensor, since every rule works element by element (and torch's fused SGD knows no DTensors).
    `vetoes_on_device` says whether `found_inf` costs no host read.

    Raises ConfigError where the parameters are split over ranks and the rule is not `shardable`.
    """

    # Blocks that run over a rank's flat shard mean other numbers on another number of ranks, and no
    # checkpoint of them could be resharded.
    shardable: ClassVar[bool] = True
    # names of tables kept beside the moments, which nothing writes after they are built
    constant_state: ClassVar[frozenset[str]] = frozenset()
    # Whether the rule writes bf16 weights (`names`) together with the fp32 masters it steps on (`held`).
    writes_weights: ClassVar[bool] = False

    def __init__(
        self,
        name: str,
        names: dict[str, nn.Parameter],
        hyperparameters: Hyperparameters,
        *,
        weight_decay: float,
        decay: str,
        masters: Masters | None = None,
    ):
        """masters: of the model whose parameters these are (`masters.beside`)."""
        self.name = name
        self.names = names
        self.masters = masters
        self._refuse_shards()
        self.held = {key: _hold(parameter, masters) for key, parameter in names.items()}
        self._lent = [(p, self.held[key]) for key, p in names.items() if self.held[key] is not p]
        self._rule_publishes = self.writes_weights and {(p.dtype, held.dtype) for p, held in self._lent} == {
            (torch.bfloat16, torch.float32)
        }
        groups = parameter_groups(self.held, weight_decay, decay)
        self.inner: torch.optim.Optimizer
        self.vetoes_on_device: bool
        self.inner, self.vetoes_on_device = self._build(groups, hyperparameters)
        self.step_counts: Tensor | None = None
        self._materialised = False
        self._grad_scale: Tensor | None = None

    def _build(self, groups: Groups, hyperparameters: Hyperparameters) -> Rule:
        """The torch optimizer over `groups` of `held`, and whether it reads a veto on the device.

        Raises ConfigError when a package is missing or a parameter cannot be updated.
        """
        raise NotImplementedError

    def _allocate(self) -> Tensor | None:
        """Fills `inner.state` with zeros. Returns the step counts as one live tensor, None without any."""
        raise NotImplementedError

    @staticmethod
    def moment_bytes(
        shape: Sequence[int], local_shape: Sequence[int], element_bytes: int, *, momentum: bool
    ) -> tuple[int, ...]:
        """Bytes of each moment of a parameter of `shape` on the rank that holds `local_shape` of it.

        Nothing is allocated: it sizes runs. element_bytes: of the parameter; momentum: whether SGD keeps one.
        """
        raise NotImplementedError

    @staticmethod
    def step_count_bytes(parameters: int) -> int:
        """Bytes of the step counts of so many parameters; 0 where the rule counts none."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, lr: float, found_inf: Tensor | None = None, clip: Tensor | None = None) -> None:
        """Apply one update.

        lr: this update's learning rate. found_inf: [] fp32 on the device, 0 or 1; where 1, nothing changes.
        clip: [] fp32 on the device, multiplies every gradient (min(1, max_norm / norm)); None = 1. Neither is
        read by the host when `vetoes_on_device`. The gradients are undefined afterwards. TrainingError where
        masters were written and weights were not, so that the gradients are of other weights.
        """
        if self.masters is not None:
            self.masters.check_published()
        for group in self.inner.param_groups:
            _set_lr(group, lr)
        self._lend_gradients()
        if self.vetoes_on_device:
            self._step_on_device(found_inf, clip)
        else:
            self._step_with_host_read(found_inf, clip)
        self._take_gradients_back()
        if self.masters is not None and self._rule_publishes:
            self.masters.were_published()
        elif self.masters is not None:  # after a veto too, of which only the device knows
            self.masters.publish()

    def zero_grad(self) -> None:
        """Drop the gradients; the next backward pass allocates or adopts them."""
        for parameter in self.names.values():
            parameter.grad = None
        if self.masters is not None:
            self.masters.add_gradients(False)

    def state_was_written(self) -> None:
        """Weights and moments are another state's now: nothing of the one before is left in what follows
        them."""
        self.zero_grad()
        if self.masters is not None:
            self.masters.publish()

    def _step_on_device(self, found_inf: Tensor | None, clip: Tensor | None) -> None:
        # The fused kernels of torch read both scalars where they are: attributes, as its GradScaler sets
        # them. They divide by grad_scale, hence the reciprocal. Our own 8-bit AdamW multiplies by clip.
        inner = cast("Any", self.inner)
        inner.found_inf, inner.clip = found_inf, clip
        if clip is not None and (self._grad_scale is None or self._grad_scale.device != clip.device):
            self._grad_scale = torch.empty_like(clip)
        inner.grad_scale = None if clip is None else torch.reciprocal(clip, out=self._grad_scale)
        cast("Any", inner.step)()

    def _step_with_host_read(self, found_inf: Tensor | None, clip: Tensor | None) -> None:
        # the one host read; such an optimizer counts its steps on the host
        if found_inf is not None and bool(found_inf):
            return
        gradients = [p.grad for p in self.held.values() if p.grad is not None]
        if clip is not None and gradients:
            torch._foreach_mul_(gradients, clip)
        self._step_on_host()

    def _step_on_host(self) -> None:
        cast("Any", self.inner).step()

    def _lend_gradients(self) -> None:
        if self.masters is not None:
            self.masters.lend_gradients(self._lent)
            return
        for parameter, held in self._lent:
            shard = local(parameter)
            # the owner moved its storage (a load, a change of device)
            if shard.data_ptr() != held.data_ptr():
                held.data = shard
            held.grad = None if parameter.grad is None else local(parameter.grad)

    def _take_gradients_back(self) -> None:
        for _, held in self._lent:
            held.grad = None

    def _refuse_shards(self) -> None:
        split: list[Any] = [p for p in self.names.values() if hasattr(p, "to_local")]
        if not self.shardable and any(p.device_mesh.size() > 1 for p in split):
            raise ConfigError(
                describe(
                    "optim.name",
                    "its state cannot be split over ranks",
                    got=self.name,
                    todo="use adamw8bit or adamw",
                )
            )


def materialise(optimizer: Optimizer) -> None:
    """Allocate every state tensor now, as zeros, where the first update would. Calling it again changes
    nothing."""
    if not optimizer._materialised:
        optimizer.step_counts = optimizer._allocate()
        optimizer._materialised = True


def state_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Every mutable tensor of the optimizer by its constant name: the live storages, DTensors as they are.

    `optim.step` holds the step counts; moments are `optim.<moment>.<parameter>`.
    """
    tensors: dict[str, Tensor] = {}
    if optimizer.step_counts is not None:
        tensors["optim.step"] = optimizer.step_counts
    for name, parameter in optimizer.names.items():
        for key, value in optimizer.inner.state.get(optimizer.held[name], {}).items():
            if key == "step" or not isinstance(value, Tensor) or key in optimizer.constant_state:
                continue
            for suffix, part in _parts(value):
                tensors[f"optim.{key}.{name}{suffix}"] = _like_parameter(part, parameter)
    return tensors


def reset(optimizer: Optimizer) -> None:
    """Zero moments and step counts in place: a stage that starts with a new optimizer keeps the old
    storages."""
    with torch.no_grad():
        for tensor in state_tensors(optimizer).values():
            tensor.zero_()


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of optimizer state on this rank."""
    return sum(local(tensor).numel() * tensor.element_size() for tensor in state_tensors(optimizer).values())


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def parameter_groups(parameters: dict[str, nn.Parameter], weight_decay: float, decay: str) -> Groups:
    """torch's groups of what decays and what does not: with decay="matrices" vectors are spared."""
    if weight_decay == 0.0:  # one group, so one launch
        return [{"params": list(parameters.values()), "weight_decay": 0.0}]
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for parameter in parameters.values():
        (spared if decay == "matrices" and parameter.ndim < 2 else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _set_lr(group: dict[str, Any], lr: float) -> None:
    # torchao keeps it as a tensor so that its compiled step is not rebuilt
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def _hold(parameter: nn.Parameter, masters: Masters | None) -> nn.Parameter:
    if hasattr(parameter, "to_local"):
        return nn.Parameter(local(parameter.detach()))
    held: nn.Parameter = parameter if masters is None else masters.of(parameter)
    return held


def _like_parameter(part: Tensor, parameter: nn.Parameter) -> Tensor:
    """State of a DTensor as a DTensor over the same ranks and the same storage, so that a checkpoint can
    reshard it.

    Its last dimension may be shorter (one scale per block of a row); the first is split as the parameter's.
    """
    if not hasattr(parameter, "to_local") or part.ndim != parameter.ndim:
        return part
    from torch.distributed.tensor import DTensor

    like: Any = parameter
    shape = torch.Size((*parameter.shape[:-1], part.shape[-1])) if parameter.ndim > 1 else parameter.shape
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
    )


def _parts(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor subclass that is made of plain tensors (torchao's 8-bit state) as those; any other as
    itself."""
    flatten = getattr(value, "__tensor_flatten__", None)
    if flatten is None or hasattr(value, "to_local"):
        yield "", value
        return
    for part in flatten()[0]:
        if part != "qmap":
            yield f".{part}", getattr(value, part)
