"""Master weights: on one rank, what is held beside weights that are computed with in another type.

    weight  the module's own parameter in the compute type (bf16): forward, backward, evaluation and
            generation read it. Its gradient adds up over the rows of an update in fp32 (`grad_dtype`), where
            autograd makes it
    master  the same weight as it is held (fp32): what the optimizer steps on, what the closed list,
            checkpoints and the saved model are made of

No FSDP2 and no process group: on one rank nothing travels, and all that FSDP2 does there is to cast. Bytes
read and written for a parameter in an update of R rows, beside the pass that makes a gradient and the
optimizer's: 6 for the first row's (a cast), 10 for each later one (an addition in place), 6 to publish.
Under FSDP2 it is 24 for R = 1, else 32 + 10 (R - 1) (`distributed.sharding`).

A weight follows its master, so whoever writes masters publishes: an optimizer after its step,
`RunState.writing` after everything else. A tensor counts what is written into it, which tells on whoever
forgot (`check_published`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from repsft_fast.errors import TrainingError, describe


class Masters:
    """Weights and masters of a model, by the parameters' names; `beside` makes them and leaves them on it as
    `model.masters`.

    weights  the model's own parameters, in the compute type
    held     their masters, in the type they were held in. Live storages that never move
    """

    def __init__(self, weights: dict[str, nn.Parameter], held: dict[str, nn.Parameter], head: Tensor | None):
        """head: the output head's weight. Its gradient comes in fp32, another use's (tied) in the compute
        type."""
        self.weights, self.held = weights, held
        self._of = {id(weight): held[name] for name, weight in weights.items()}
        # one kernel each: a foreach copy leaves its fast path where types mix
        groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        for name, weight in weights.items():
            pair = groups.setdefault((weight.dtype, held[name].dtype), ([], []))
            pair[0].append(weight)
            pair[1].append(held[name])
        self._groups = list(groups.values())
        trained = [weight for weight in weights.values() if weight.requires_grad]
        self._sums = {weight.dtype: sums_in(weight.dtype) for weight in trained}
        for weight in trained:
            weight.grad_dtype = self._sums[weight.dtype]
        # whether every gradient is added up in its master's type
        self._fit = all(sums_in(weight.dtype) is held[name].dtype for name, weight in weights.items())
        self._added_to = [weight for weight in trained if weight is not head]
        self._adds = False
        self._published = self._written()

    def of(self, parameter: Any) -> Any:
        """The master of one of the model's tensors; the tensor itself where it has none."""
        return self._of.get(id(parameter), parameter)

    @torch.no_grad()
    def publish(self) -> None:
        """Every master into its weight, rounded to nearest. No host sync; again changes nothing."""
        for weights, masters in self._groups:
            torch._foreach_copy_(weights, masters)
        self.were_published()

    def were_published(self) -> None:
        """Said by an update rule that wrote weights and masters in one pass."""
        self._published = self._written()

    def check_published(self) -> None:
        """TrainingError where a master was written and its weight was not. Looks at the host alone: 0.1 µs a
        parameter."""
        if self._written() != self._published:
            wrong = "weights were written where they are held, not where they are computed with"
            todo = "write them inside RunState.writing()"
            raise TrainingError(describe("training", wrong, todo=todo))

    def add_gradients(self, adds: bool) -> None:
        """Whether the next backward pass finds gradients of rows before it, to which its own are added as
        they come: without a copy in fp32 of each. False is how it must stand when there are none.

        The head's are cast all the same: autograd sums the uses of one weight first, in place and in the type
        of whichever came first, which for a tied head may be the narrower.
        """
        if adds != self._adds:
            self._adds = adds
            for weight in self._added_to:
                weight.grad_dtype = None if adds else self._sums[weight.dtype]

    def gradient(self, weight: nn.Parameter) -> Tensor | None:
        """A weight's gradient as the optimizer takes it: in the master's type (of bf16 beside fp32 the very
        tensor)."""
        gradient = weight.grad
        if gradient is None:
            return None
        expected = self._sums[weight.dtype]
        if gradient.dtype != expected:
            wrong, got = "a gradient was not added up in its type", str(gradient.dtype)
            raise TrainingError(describe("training", wrong, expected=str(expected), got=got))
        return gradient.to(self._of[id(weight)].dtype)

    def lend_gradients(self, pairs: Iterable[tuple[nn.Parameter, nn.Parameter]]) -> None:
        """Each of these masters has its weight's `gradient`, as its own. There are hundreds, in every update:
        what is right as it is is only handed on."""
        for weight, master in pairs:
            gradient = weight.grad
            if gradient is not None and not (self._fit and gradient.dtype is master.dtype):
                gradient = self.gradient(weight)
            master.grad = gradient

    def _written(self) -> int:
        return sum(master._version for master in self.held.values())


def beside(model: Any) -> Masters | None:
    """Masters for every parameter that is held in another type than `model.compute_dtype`, in place, tensor
    by tensor: the held storage becomes the master, the parameter a copy of it in the compute type. Frozen
    ones too, so that they are saved as they were read. None where there is none.

    One rank, before the first pass. Tied weights are one parameter and have one master.
    """
    computed: torch.dtype = model.compute_dtype
    weights, held = {}, {}
    for name, parameter in model.named_parameters():
        if parameter.dtype != computed and parameter.is_floating_point():
            weights[name] = parameter
            held[name] = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
            parameter.data = parameter.data.to(computed)
    head = model.get_output_embeddings()
    model.masters = Masters(weights, held, None if head is None else head.weight) if weights else None
    return model.masters


def sums_in(computed: torch.dtype) -> torch.dtype:
    """The type that gradients of weights of this type are added up in: fp32, or a wider one."""
    return torch.promote_types(torch.float32, computed)
