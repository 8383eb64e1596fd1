"""Loss spikes: whether an update is out of line with the updates before it, judged on the device, alike on
every rank.

An update is a spike when its loss, or its gradient norm before clipping, lies more than SIGMAS standard
deviations above the mean of the last WINDOW updates, once at least KNOWN are known. Mean and deviation are of
the *logarithms*, floored:

    loss: ln max(loss, 0.001)       deviation at least 0.02 (the limit at least 13 % up)     and the loss
                                    above 0.5
    norm: ln max(norm, the clip)    deviation at least 0.6 (37 times)

Norms are products: their tails are heavy, and those of one-sample batches heaviest. Of 46 plain runs of tiny
models (1 to 16 samples an update, adamw, sgd, LoRA, repeated until memorised) the raw values gave 56 alarms
in 16 runs; in 73, these rules give three in two: one where one sample in fifty is noise among memorised ones,
batch 1 (the loss rose from 0.002 to 11.8), and one of LoRA that learned nothing at thirty times its learning
rate (norms from 0.2 to 121). The highest of all others lay 5.8 deviations up; with a floor of 0.5 two runs of
one-sample batches at a high learning rate would have alarmed. A norm that the clip would leave as it is hurts
nobody; where `optim.max_norm` is null, 1 stands for it.

What enters the window: every finite update that has a gradient, spikes too, but none higher than MOST
deviations up: entering whole, a spike of 10,000 times would hide the next of 100 times for 128 updates. So
after one the limit rises from 1.33 to 1.72 times the mean, and a new level is accepted after 4 to 9 updates
in a row (1.5 to 10,000 times; 16 at 1e300), where `refusals.REFUSED_IN_A_ROW` would end the run. Never a
non-finite one.

`numbers.on_spike` says what becomes of the update. Prior art: OLMo-core's SkipStepOptimizer (6 deviations of
the last 128 losses and norms), ZClip (arXiv 2504.02507, a z-score of the norm's running mean).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repsft_fast.distributed import World, all_sum

WINDOW, KNOWN, SIGMAS, MOST = 128, 64, 6.0, 18.0
LEAST_LOSS, LOUD_LOSS = 1e-3, 0.5  # below the first losses are alike, below the second none is a spike
LEAST_DEVIATION = (0.02, 0.6)  # of the logarithms of loss and norm
UNCLIPPED = 1.0  # the least norm where none is clipped
_FIXED = 2.0**32  # losses of the ranks add up as fixed point: the sum is the same whatever the order


@dataclass(frozen=True)
class Verdict:
    """What an update was judged by, as host numbers: of loss and norm each the middle of the window and the
    limit."""

    middle: tuple[float, float]  # exp of the mean of the logarithms
    limit: tuple[float, float]  # above it an update is a spike


class Spikes:
    """The window of the last updates, on the device and on the closed list of state; the same on every
    rank."""

    def __init__(self, device: torch.device, world: World, max_norm: float | None):
        self.world = world
        # the newest last; zeros where none is known
        self._ring = torch.zeros(WINDOW, 2, dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.float64, device=device)
        # the open update's logarithms, and whether they enter
        self._judged: tuple[Tensor, Tensor] | None = None
        least, floor, loud = _bounds(max_norm)
        self._least = torch.tensor(least, dtype=torch.float64).to(device)
        self._floor = torch.tensor(floor, dtype=torch.float64).square().to(device)
        self._loud = torch.tensor(loud, dtype=torch.float64).log().to(device)

    def tensors(self) -> dict[str, Tensor]:
        """For the closed list of state: every rank has the same."""
        return {"window": self._ring, "count": self._count}

    def begin_anew(self) -> None:
        """Forget what is known: other samples are trained from here on, whose loss is another."""
        self._ring.zero_()
        self._count.zero_()

    @contextmanager
    def lasting(self) -> Iterator[None]:
        """What is known now stays known, whatever state is put back inside."""
        known = {name: tensor.clone() for name, tensor in self.tensors().items()}
        yield
        for name, tensor in self.tensors().items():
            tensor.copy_(known[name])

    @torch.no_grad()
    def judge(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """([] bool finite, [JUDGED] fp64 as `verdict` reads them, [] fp64 the norm), the same on every rank.
        No host sync.

        loss: [] fp64 of this rank's rows; norm: [] fp64, the joint one. One message between ranks. The window
        is as before.
        """
        values, finite = self._of_all_ranks(loss, norm)
        # few small operations: each costs a launch in every update
        here = torch.maximum(values, self._least).log_()
        # NaN while nothing is known, and no comparison with NaN is true
        mean = self._ring.sum(0) / self._count
        variance = torch.addcmul(self._ring.square().sum(0) / self._count, mean, mean, value=-1.0)
        deviation = torch.maximum(variance, self._floor).sqrt_()
        limit = torch.maximum(mean.add(deviation, alpha=SIGMAS), self._loud)
        spike = (here > limit).any() & finite & (self._count >= KNOWN)
        here = torch.where(spike, torch.minimum(here, mean.add(deviation, alpha=MOST)), here)
        self._judged = here, finite & (values[1] > 0.0)
        return finite, torch.cat((spike[None], mean, limit)), values[1]

    @torch.no_grad()
    def enter(self) -> None:
        """The update that was judged last is done: into the window with it, where it belongs there."""
        if self._judged is not None:
            here, enters = self._judged
            self._ring.copy_(torch.where(enters, torch.cat((self._ring[1:], here[None])), self._ring))
            self._count.add_(enters).clamp_(max=WINDOW)
        self._judged = None

    def _of_all_ranks(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """([2] fp64 loss and norm of the whole update, [] bool whether all of it is finite)."""
        values = torch.stack((loss, norm))
        finite = (values.abs() < math.inf).all()
        if self.world.size == 1:
            return values, finite
        most = 2.0**62 / _FIXED / self.world.size
        fixed = (torch.nan_to_num(loss).clamp(-most, most) * _FIXED).round().to(torch.int64)
        # one rank's, to the bit
        bits = norm.double().view(torch.int64) if self.world.is_main else torch.zeros_like(fixed)
        told = all_sum(torch.stack((fixed, (~finite).to(torch.int64), bits)))
        return torch.stack((told[0].double() / _FIXED, told[2].view(torch.float64))), told[1] == 0


def verdict(judged: Sequence[float]) -> Verdict | None:
    """What `judge` found, read from the device; None: no spike."""
    spike, *logs = judged
    if spike <= 0.0:
        return None
    values = [math.exp(min(value, 709.0)) for value in logs]
    return Verdict((values[0], values[1]), (values[2], values[3]))


class Reference:
    """The same in numpy, written for reading: what the device must decide, decision for decision."""

    def __init__(self, max_norm: float | None):
        self.least, self.floor, self.loud = (np.array(bound, dtype=np.float64) for bound in _bounds(max_norm))
        self.window: list[NDArray[np.float64]] = []

    def judge(self, loss: float, norm: float) -> bool:
        """Whether this update is a spike; it enters the window."""
        values = np.array([loss, norm], dtype=np.float64)
        if not np.isfinite(values).all():
            return False
        here = np.log(np.maximum(values, self.least))
        spike = False
        if len(self.window) >= KNOWN:
            known = np.array(self.window)
            deviation = np.maximum(known.std(axis=0), self.floor)
            limit = np.maximum(known.mean(axis=0) + SIGMAS * deviation, np.log(self.loud))
            spike = bool((here > limit).any())
            if spike:
                here = np.minimum(here, known.mean(axis=0) + MOST * deviation)
        if norm > 0.0:
            self.window = [*self.window, here][-WINDOW:]
        return spike


def _bounds(max_norm: float | None) -> tuple[tuple[float, float], tuple[float, float], tuple[float, float]]:
    """(least values, least deviations of their logarithms, values at which a spike begins), each of loss and
    norm."""
    norm = UNCLIPPED if max_norm is None else max_norm
    return (LEAST_LOSS, norm), LEAST_DEVIATION, (LOUD_LOSS, norm)
