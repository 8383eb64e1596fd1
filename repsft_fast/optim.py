"""Optimizers by name, behind one step: step(lr, found_inf, clip).

Every optimizer here keeps three promises. A veto (`found_inf`, a device scalar) leaves weights, moments and step
counts untouched. The learning rate is a number of this update, so a schedule never recompiles or waits. And the state
is a closed list: `materialise` allocates all of it before the first update, `state_tensors` names it, `reset` clears
it in place, so a snapshot taken before update 1 has the same names and shapes as one taken after.

| name             | moments                  | veto on the device | seeded | needs                                  |
|------------------|--------------------------|--------------------|--------|----------------------------------------|
| adamw            | as the weights (fp32)    | yes                | —      | torch's fused AdamW                    |
| sgd              | none, or one momentum    | yes                | —      | torch's fused SGD                      |
| adamw8bit        | 8-bit, blocks of 256     | yes                | yes    | ours, `ops/adamw8bit.py`               |
| bnb_adamw8bit    | 8-bit, blocks of 256     | no: one host read  | —      | bitsandbytes                           |
| torchao_adamw8bit| 8-bit, blocks of 256     | no: one host read  | no     | torchao; it compiles its step          |
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from repsft_fast.errors import ConfigError, describe, did_you_mean

NAMES = ("adamw", "sgd", "adamw8bit", "bnb_adamw8bit", "torchao_adamw8bit")
# Wrappers that put a word of their own into parameter names; state must keep its names when they come or go.
_WRAPPER_WORDS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


class Optimizer:
    """One update rule over named parameters. Wraps a torch optimizer; holds no state of its own.

    `names` are the model's parameters, `held` what the torch optimizer sees: the parameter itself, or this rank's part of
    a DTensor, since every rule here works element by element (and torch's fused SGD knows no DTensors).
    `vetoes_on_device` says whether `found_inf` costs no host read.
    """

    def __init__(self, name: str, names: dict[str, nn.Parameter]):
        self.name = name
        self.names = names
        self.held = {key: _hold(parameter) for key, parameter in names.items()}
        self.inner: torch.optim.Optimizer
        self.vetoes_on_device: bool

    @torch.no_grad()
    def step(self, lr: float, found_inf: Tensor | None = None, clip: Tensor | None = None) -> None:
        """Apply one update.

        lr: this update's learning rate. found_inf: [] fp32 on the device, 0 or 1; where 1, nothing changes. clip: [] fp32
        on the device, multiplies every gradient (min(1, max_norm / norm)); None = 1. Neither is read by the host when
        `vetoes_on_device`. The gradients are undefined afterwards.
        """
        for group in self.inner.param_groups:
            _set_lr(group, lr)
        self._lend_shards()
        if self.vetoes_on_device:
            self._step_on_device(found_inf, clip)
        else:
            self._step_with_host_read(found_inf, clip)
        self._return_shards()

    def _step_with_host_read(self, found_inf: Tensor | None, clip: Tensor | None) -> None:
        if found_inf is not None and bool(found_inf):  # the one host read; such an optimizer counts its steps on the host
            return
        gradients = [p.grad for p in self.held.values() if p.grad is not None]
        if clip is not None and gradients:
            torch._foreach_mul_(gradients, clip)
        _put_host_steps(self)
        cast(Any, self.inner).step()
        _take_host_steps(self)

    def _lend_shards(self) -> None:
        for key, parameter in self.names.items():
            held = self.held[key]
            if held is not parameter:
                shard = local(parameter)
                if shard.data_ptr() != held.data_ptr():  # the owner moved its storage (a load, a change of device)
                    held.data = shard
                held.grad = None if parameter.grad is None else local(parameter.grad)

    def _return_shards(self) -> None:
        for key, parameter in self.names.items():
            if self.held[key] is not parameter:
                self.held[key].grad = None

    def _step_on_device(self, found_inf: Tensor | None, clip: Tensor | None) -> None:
        # The fused kernels of torch read both scalars where they are: attributes, as its GradScaler sets them. They divide
        # by grad_scale, hence the reciprocal. Our own 8-bit AdamW multiplies by clip.
        inner = cast(Any, self.inner)
        inner.found_inf, inner.clip = found_inf, clip
        inner.grad_scale = None if clip is None else clip.reciprocal()
        cast(Any, inner.step)()

    def zero_grad(self) -> None:
        """Drop the gradients; the next backward pass allocates or adopts them."""
        for parameter in self.names.values():
            parameter.grad = None


def build_optimizer(
    parameters: nn.Module | Iterable[tuple[str, nn.Parameter]],
    name: str = "adamw",
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: Literal["matrices", "all"] = "matrices",
    momentum: float = 0.0,
    seed: int = 0,
) -> Optimizer:
    """The optimizer called `name` over every parameter that requires a gradient, its state allocated.

    decay="matrices" spares vectors (norms, biases); "all" decays everything. momentum is SGD's. seed keys the stochastic
    rounding of adamw8bit. Decay is decoupled (AdamW) except for SGD, whose decay is the classic L2 term.

    Raises ConfigError on an unknown name, an impossible value, nothing to train, or a package that is not installed.
    """
    named = _trainable(parameters)
    _check(name, named, lr, betas, eps, weight_decay, decay, momentum)
    optimizer = Optimizer(name, named)
    groups = _groups(optimizer.held, weight_decay, decay)
    settings = {"lr": lr, "betas": betas, "eps": eps, "momentum": momentum, "seed": seed}
    optimizer.inner, optimizer.vetoes_on_device = _BUILDERS[name](optimizer, groups, **settings)
    materialise(optimizer)
    return optimizer


def materialise(optimizer: Optimizer) -> None:
    """Allocate every state tensor now, as zeros, where the first update would. Calling it again changes nothing."""
    if not hasattr(optimizer.inner, "repsft_step"):
        _MATERIALISE[optimizer.name](optimizer)


def state_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Every mutable tensor of the optimizer by its constant name: the live storages, DTensors as they are.

    `optim.step` holds the step counts; moments are `optim.<moment>.<parameter>`.
    """
    tensors: dict[str, Tensor] = {}
    step = getattr(optimizer.inner, "repsft_step", None)
    if step is not None:
        tensors["optim.step"] = step
    for name, parameter in optimizer.names.items():
        for key, value in optimizer.inner.state.get(optimizer.held[name], {}).items():
            if key == "step" or not isinstance(value, Tensor) or key in _CONSTANT_STATE:
                continue
            for suffix, part in _parts(value):
                tensors[f"optim.{key}.{name}{suffix}"] = _like_parameter(part, parameter)
    return tensors


def reset(optimizer: Optimizer) -> None:
    """Zero moments and step counts in place: a stage that starts with a new optimizer keeps the old storages."""
    with torch.no_grad():
        for tensor in state_tensors(optimizer).values():
            tensor.zero_()


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of optimizer state on this rank."""
    return sum(local(tensor).numel() * tensor.element_size() for tensor in state_tensors(optimizer).values())


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# Tables that the packages keep beside the moments; never written after they are built.
_CONSTANT_STATE = frozenset({"qmap1", "qmap2"})


def _trainable(parameters: nn.Module | Iterable[tuple[str, nn.Parameter]]) -> dict[str, nn.Parameter]:
    pairs = parameters.named_parameters() if isinstance(parameters, nn.Module) else parameters
    named: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, parameter in pairs:
        if not parameter.requires_grad or id(parameter) in seen:  # tied weights are one parameter
            continue
        seen.add(id(parameter))
        for word in _WRAPPER_WORDS:
            name = name.replace(word, "")
        if name in named:
            raise ConfigError(describe("optim", f"two parameters are called {name!r}", todo="give them distinct names"))
        named[name] = parameter
    return named


def _groups(named: dict[str, nn.Parameter], weight_decay: float, decay: str) -> list[dict[str, Any]]:
    spared = [p for p in named.values() if decay == "matrices" and p.ndim < 2]
    spared_ids = {id(p) for p in spared}
    decayed = [p for p in named.values() if id(p) not in spared_ids]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    if weight_decay == 0.0:  # one group, so one launch
        groups = [{"params": list(named.values()), "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _check(name, named, lr, betas, eps, weight_decay, decay, momentum) -> None:
    problems = []
    if name not in NAMES:
        near = did_you_mean(name, NAMES)
        todo = f"did you mean {near}?" if near else None
        problems.append(describe("optim.name", "is not an optimizer", expected=" | ".join(NAMES), got=name, todo=todo))
    if not named:
        problems.append(
            describe("optim", "there is nothing to train", expected="at least one parameter that requires a gradient")
        )
    numbers: dict[str, tuple[float, float, float | None]] = {
        "lr": (lr, 0.0, None),
        "eps": (eps, 0.0, None),
        "weight_decay": (weight_decay, 0.0, None),
    }
    numbers |= {"betas[0]": (betas[0], 0.0, 1.0), "betas[1]": (betas[1], 0.0, 1.0), "momentum": (momentum, 0.0, 1.0)}
    for key, (value, least, below) in numbers.items():
        if not (least <= value < (below if below is not None else float("inf"))):
            wanted = f"at least {least:g}" + (f" and below {below:g}" if below is not None else " and finite")
            problems.append(describe(f"optim.{key}", "is out of range", expected=wanted, got=value))
    if decay not in ("matrices", "all"):
        problems.append(describe("optim.decay", "is not known", expected="matrices | all", got=decay))
    if problems:
        raise ConfigError(problems)


def _set_lr(group: dict[str, Any], lr: float) -> None:
    if isinstance(group["lr"], Tensor):  # torchao keeps it as a tensor so that its compiled step is not rebuilt
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def _hold(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(local(parameter.detach())) if hasattr(parameter, "to_local") else parameter


def _like_parameter(part: Tensor, parameter: nn.Parameter) -> Tensor:
    """State of a DTensor as a DTensor over the same ranks and the same storage, so that a checkpoint can reshard it.

    Its last dimension may be shorter (one scale per block of a row); the first is split as the parameter's.
    """
    if not hasattr(parameter, "to_local") or part.ndim != parameter.ndim:
        return part
    from torch.distributed.tensor import DTensor

    like: Any = parameter
    shape = torch.Size((*parameter.shape[:-1], part.shape[-1])) if parameter.ndim > 1 else parameter.shape
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def _parts(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor subclass that is made of plain tensors (torchao's 8-bit state) as those; any other as itself."""
    flatten = getattr(value, "__tensor_flatten__", None)
    if flatten is None or hasattr(value, "to_local"):
        yield "", value
        return
    for part in flatten()[0]:
        if part != "qmap":
            yield f".{part}", getattr(value, part)


def _build_adamw(optimizer, groups, *, lr, betas, eps, **_):
    return _fused(torch.optim.AdamW, groups, lr=lr, betas=betas, eps=eps)


def _build_sgd(optimizer, groups, *, lr, momentum, **_):
    return _fused(torch.optim.SGD, groups, lr=lr, momentum=momentum)


def _fused(kind, groups, **settings) -> tuple[torch.optim.Optimizer, bool]:
    try:
        return kind(groups, fused=True, **settings), True
    except RuntimeError:  # a device without fused kernels: the veto then costs a host read, the update is the same
        return kind(groups, fused=False, foreach=True, **settings), False


def _materialise_sgd(optimizer: Optimizer) -> None:
    inner: Any = optimizer.inner
    for parameter in optimizer.held.values():
        # torch starts from a copy of the first gradient; 0 · momentum + gradient is the same number.
        inner.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter) if inner.defaults["momentum"] else None
    inner.repsft_step = None


def _materialise_adamw(optimizer: Optimizer) -> None:
    inner: Any = optimizer.inner
    # One tensor of counts and a view of it per parameter: 300 parameters are one entry of the closed list, not 300.
    # A parameter without a gradient keeps its own count, as in torch.
    device = next(iter(optimizer.held.values())).device if optimizer.vetoes_on_device else torch.device("cpu")
    inner.repsft_step = torch.zeros(len(optimizer.names), dtype=torch.float32, device=device)
    for count, parameter in zip(inner.repsft_step, optimizer.held.values()):
        inner.state[parameter] = {
            "step": count,
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            describe(
                "optim.name", f"needs the package {package}", got=str(error), todo=f"pip install {package}, or use adamw8bit"
            )
        ) from error


def _build_adamw8bit(optimizer, groups, *, lr, betas, eps, seed, **_):
    from repsft_fast.ops.adamw8bit import AdamW8bit, Shard

    shards = {optimizer.held[name]: Shard.of(name, parameter) for name, parameter in optimizer.names.items()}
    return AdamW8bit(groups, shards, lr=lr, betas=betas, eps=eps, seed=seed), True


def _build_bnb(optimizer, groups, *, lr, betas, eps, **_):
    _refuse_shards(optimizer)
    kind = _import("bitsandbytes.optim", "bitsandbytes").AdamW8bit
    return kind(groups, lr=lr, betas=betas, eps=eps), False


def _build_torchao(optimizer, groups, *, lr, betas, eps, **_):
    _refuse_shards(optimizer)
    kind = _import("torchao.optim", "torchao").AdamW8bit
    return kind(groups, lr=lr, betas=betas, eps=eps, bf16_stochastic_round=True), False


def _refuse_shards(optimizer: Optimizer) -> None:
    # Their blocks run over the rank's flat shard: another number of ranks would mean other numbers, and no checkpoint of
    # theirs could be resharded.
    split: list[Any] = [p for p in optimizer.names.values() if hasattr(p, "to_local")]
    if any(p.device_mesh.size() > 1 for p in split):
        raise ConfigError(
            describe("optim.name", "its state cannot be split over ranks", got=optimizer.name, todo="use adamw8bit or adamw")
        )


def _materialise_bnb(optimizer: Optimizer) -> None:
    inner: Any = optimizer.inner
    inner.check_overrides()
    for group_index, group in enumerate(inner.param_groups):
        for index, parameter in enumerate(group["params"]):
            inner.init_state(group, parameter, group_index, index)
    inner.initialized = True
    inner.repsft_step = torch.zeros(len(optimizer.names), dtype=torch.int64)


def _materialise_torchao(optimizer: Optimizer) -> None:
    inner: Any = optimizer.inner
    for parameter in optimizer.held.values():
        moments = {key: inner._new_buffer(parameter, signed) for key, signed in (("exp_avg", True), ("exp_avg_sq", False))}
        inner.state[parameter] = {"step": torch.tensor(0.0), **moments}
    inner.repsft_step = torch.zeros(len(optimizer.names), dtype=torch.int64)


# bitsandbytes counts in a Python int, torchao in host tensors. The closed list needs one tensor, so that is the truth
# between updates and lent to the package for the update. Host memory on both sides: nothing waits.
def _put_host_steps(optimizer: Optimizer) -> None:
    counts: Tensor | None = cast(Any, optimizer.inner).repsft_step
    if counts is None or optimizer.name not in ("bnb_adamw8bit", "torchao_adamw8bit"):
        return
    for count, parameter in zip(counts.tolist(), optimizer.held.values()):
        state = optimizer.inner.state[parameter]
        if isinstance(state["step"], Tensor):
            state["step"].fill_(count)
        else:
            state["step"] = count


def _take_host_steps(optimizer: Optimizer) -> None:
    counts: Tensor | None = cast(Any, optimizer.inner).repsft_step
    if counts is None or optimizer.name not in ("bnb_adamw8bit", "torchao_adamw8bit"):
        return
    counts.copy_(torch.tensor([int(optimizer.inner.state[p]["step"]) for p in optimizer.held.values()]))


_BUILDERS: dict[str, Callable[..., tuple[torch.optim.Optimizer, bool]]] = {
    "adamw": _build_adamw,
    "sgd": _build_sgd,
    "adamw8bit": _build_adamw8bit,
    "bnb_adamw8bit": _build_bnb,
    "torchao_adamw8bit": _build_torchao,
}
_MATERIALISE: dict[str, Callable[[Optimizer], None]] = {
    "adamw": _materialise_adamw,
    "sgd": _materialise_sgd,
    "adamw8bit": lambda optimizer: None,  # allocates in its constructor
    "bnb_adamw8bit": _materialise_bnb,
    "torchao_adamw8bit": _materialise_torchao,
}
