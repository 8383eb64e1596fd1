"""Optimizers by name.

| name             | moments                | veto on the device | seeded | needs                         |
|------------------|------------------------|--------------------|--------|-------------------------------|
| adamw            | as the weights (fp32)  | yes                | —      | torch's fused AdamW; on a GPU |
|                  |                        |                    |        | ours, `optim/adamw.py`        |
| sgd              | none, or one momentum  | yes                | —      | torch's fused SGD             |
| adamw8bit        | 8-bit, blocks of 256   | yes                | yes    | ours, `optim/adamw8bit.py`    |
| bnb_adamw8bit    | 8-bit, blocks of 256   | no: one host read  | —      | bitsandbytes                  |
| torchao_adamw8bit| 8-bit, blocks of 256   | no: one host read  | no     | torchao; it compiles its step |
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import nn

from repsft_fast.errors import ConfigError, describe, did_you_mean
from repsft_fast.optim import adamw, adamw8bit, packages, torch_fused
from repsft_fast.optim.base import Hyperparameters, Optimizer, materialise
from repsft_fast.optim.masters import Masters

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adamw": torch_fused.FusedAdamW,
    "sgd": torch_fused.FusedSGD,
    "adamw8bit": adamw8bit.SeededAdamW8bit,
    "bnb_adamw8bit": packages.BitsandbytesAdamW8bit,
    "torchao_adamw8bit": packages.TorchaoAdamW8bit,
}
NAMES = tuple(OPTIMIZERS)
# Wrappers that put a word of their own into parameter names; state must keep its names when they come or go.
_WRAPPER_WORDS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


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
    masters: Masters | None = None,
) -> Optimizer:
    """The optimizer called `name` over every parameter that requires a gradient, its state allocated.

    decay="matrices" spares vectors (norms, biases); "all" decays everything. momentum is SGD's. seed keys the
    stochastic rounding of adamw8bit. Decay is decoupled (AdamW) except for SGD, whose decay is the classic L2
    term. masters: what is stepped on in place of parameters that have one (`masters.beside`).

    Raises ConfigError on an unknown name, an impossible value, nothing to train, or a package that is not
    installed.
    """
    named = _trainable(parameters)
    hyperparameters = Hyperparameters(lr, betas, eps, momentum, seed)
    problems = [*_name_problems(name), *_nothing_to_train(named)]
    problems += _value_problems(hyperparameters, weight_decay, decay)
    if problems:
        raise ConfigError(problems)
    rule = OPTIMIZERS[name]
    if rule is torch_fused.FusedAdamW and adamw.takes_kernel(named.values(), masters):
        rule = adamw.KernelAdamW
    optimizer = rule(name, named, hyperparameters, weight_decay=weight_decay, decay=decay, masters=masters)
    materialise(optimizer)
    return optimizer


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
            raise ConfigError(
                describe("optim", f"two parameters are called {name!r}", todo="give them distinct names")
            )
        named[name] = parameter
    return named


def _name_problems(name: str) -> list[str]:
    if name in OPTIMIZERS:
        return []
    near = did_you_mean(name, NAMES)
    todo = f"did you mean {near}?" if near else None
    return [describe("optim.name", "is not an optimizer", expected=" | ".join(NAMES), got=name, todo=todo)]


def _nothing_to_train(named: dict[str, nn.Parameter]) -> list[str]:
    if named:
        return []
    expected = "at least one parameter that requires a gradient"
    return [describe("optim", "there is nothing to train", expected=expected)]


def _value_problems(given: Hyperparameters, weight_decay: float, decay: str) -> list[str]:
    any_size = {"lr": given.lr, "eps": given.eps, "weight_decay": weight_decay}
    fractions = {"betas[0]": given.betas[0], "betas[1]": given.betas[1], "momentum": given.momentum}
    problems = [
        describe(f"optim.{key}", "is out of range", expected="at least 0 and finite", got=value)
        for key, value in any_size.items()
        if not 0.0 <= value < float("inf")
    ]
    problems += [
        describe(f"optim.{key}", "is out of range", expected="at least 0 and below 1", got=value)
        for key, value in fractions.items()
        if not 0.0 <= value < 1.0
    ]
    if decay not in ("matrices", "all"):
        problems.append(describe("optim.decay", "is not known", expected="matrices | all", got=decay))
    return problems
