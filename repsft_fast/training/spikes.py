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

import importlib.util
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from repsft_fast.distributed import World, all_sum, copies, grad_norm, present_gradients
from repsft_fast.metrics import JUDGED

WINDOW, KNOWN, SIGMAS, MOST = 128, 64, 6.0, 18.0
LEAST_LOSS, LOUD_LOSS = 1e-3, 0.5  # below the first losses are alike, below the second none is a spike
LEAST_DEVIATION = (0.02, 0.6)  # of the logarithms of loss and norm
UNCLIPPED = 1.0  # the least norm where none is clipped
EPSILON = 1e-6  # beside the norm that a clip factor divides by
_SQUARED = (torch.float32, torch.bfloat16)  # gradients whose squares the kernel adds up
_FIXED = 2.0**32  # losses of the ranks add up as fixed point: the sum is the same whatever the order


@dataclass(frozen=True)
class Verdict:
    """What an update was judged by, as host numbers: of loss and norm each the middle of the window and the
    limit."""

    middle: tuple[float, float]  # exp of the mean of the logarithms
    limit: tuple[float, float]  # above it an update is a spike


class Judgement(NamedTuple):
    """What an update is done with: device scalars that are the same on every rank, and nobody's copies: the
    next judgement overwrites them."""

    norm: Tensor  # [] fp64, before clipping
    clip: Tensor | None  # [] fp32 factor for every gradient
    veto: Tensor  # [] fp32, 1.0 where the step must not be taken
    applied: Tensor  # [] int64, 1 - veto
    numbers: Tensor  # [2 + JUDGED] fp64: norm, veto, and what `verdict` reads


class Spikes:
    """The window of the last updates, on the device and on the closed list of state; the same on every rank.

    What an update is judged in is made here, once. On a GPU with Triton one kernel judges
    (`csrc_triton/judge.py`); plain torch, here, is its truth, and serves everywhere else.
    """

    def __init__(
        self, device: torch.device, world: World, max_norm: float | None, *, veto_spikes: bool = True
    ):
        """veto_spikes: whether a spike is refused as what is not finite is."""
        self.world, self.max_norm, self.veto_spikes = world, max_norm, veto_spikes

        def made(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # the newest last; zeros where none is known
        self._ring, self._count = made(WINDOW, 2), made()
        self._next_ring, self._next_count = made(WINDOW, 2), made()  # what they are after the open update
        self._judged = False  # whether those two are of an update that is not yet in the window
        least, floor, loud = _bounds(max_norm)
        bounds = torch.tensor(
            (*least, *floor, *loud, math.inf if max_norm is None else max_norm, EPSILON), dtype=torch.float64
        )
        bounds[2:4].square_()
        bounds[4:6].log_()
        self._bounds = bounds.to(device)
        self._least, self._floor, self._loud = self._bounds[:2], self._bounds[2:4], self._bounds[4:6]
        self._numbers = made(2 + JUDGED)
        clip = made(dtype=torch.float32) if max_norm is not None else None
        veto, applied = made(dtype=torch.float32), made(dtype=torch.int64)
        self._outcome = Judgement(self._numbers[0], clip, veto, applied, self._numbers)
        self._room = _Room.made(device, self._numbers)
        self._kernel = _Kernel(device) if kernel_judges(device) else None

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
    def judge_gradients(self, loss: Tensor, parameters: Iterable[nn.Parameter]) -> Judgement:
        """`judge` by the joint norm of the parameters' gradients (`distributed.grad_norm`)."""
        if self._kernel is None:
            return self.judge(loss, grad_norm(parameters))
        parameters = list(parameters)
        gradients = present_gradients(parameters)
        if not gradients or any(g.dtype not in _SQUARED for g in gradients):
            return self.judge(loss, grad_norm(parameters))
        partial = self._kernel.squares([g if g.is_contiguous() else g.contiguous() for g in gradients])
        if self.world.size == 1:
            return self._by_kernel(loss, partial, None)
        norm = (all_sum(partial.sum()) / copies(parameters)).sqrt()
        return self._by_kernel(loss, partial, self._message(loss, norm))

    @torch.no_grad()
    def judge(self, loss: Tensor, norm: Tensor) -> Judgement:
        """The same on every rank. No host sync.

        loss: [] fp64 of this rank's rows; norm: [] fp64, the joint one. One message between ranks. The window
        is as before: `enter`.
        """
        room, outcome = self._room, self._outcome
        self._judged = False  # what the window would be is room to compute in
        self._of_all_ranks(loss, norm)
        # few small operations: each costs a launch in every update
        here = torch.maximum(room.values, self._least, out=room.here).log_()
        # NaN while nothing is known, and no comparison with NaN is true
        mean = torch.sum(self._ring, 0, out=room.mean).div_(self._count)
        squares = torch.square(self._ring, out=self._next_ring)
        variance = torch.sum(squares, 0, out=room.deviation).div_(self._count)
        variance.addcmul_(mean, mean, value=-1.0)
        deviation = torch.maximum(variance, self._floor, out=variance).sqrt_()
        limit = torch.add(mean, deviation, alpha=SIGMAS, out=room.limit)
        torch.maximum(limit, self._loud, out=limit)
        spike = torch.any(torch.gt(here, limit, out=room.both), 0, out=room.spike)
        spike.logical_and_(room.finite).logical_and_(torch.ge(self._count, KNOWN, out=room.flag))
        most = torch.add(mean, deviation, alpha=MOST, out=room.most)
        torch.where(spike, torch.minimum(here, most, out=most), here, out=here)
        room.spiked.copy_(spike)
        self._after(room)
        refused = torch.logical_not(room.finite, out=room.flag)
        if self.veto_spikes:
            refused.logical_or_(spike)
        outcome.veto.copy_(refused)
        room.vetoed.copy_(refused)
        outcome.applied.copy_(refused.logical_not_())
        if outcome.clip is not None and self.max_norm is not None:
            factor = torch.add(outcome.norm, EPSILON, out=room.scalar).reciprocal_().mul_(self.max_norm)
            outcome.clip.copy_(factor.clamp_(max=1.0))
        return outcome

    @torch.no_grad()
    def enter(self) -> None:
        """The update that was judged last is done: into the window with it, where it belongs there."""
        if self._judged:
            torch._foreach_copy_([self._ring, self._count], [self._next_ring, self._next_count])
        self._judged = False

    def _after(self, room: _Room) -> None:
        """What the window is once this update has entered."""
        enters = torch.gt(room.norm, 0.0, out=room.flag).logical_and_(room.finite)
        self._next_ring[:-1] = self._ring[1:]
        self._next_ring[-1] = room.here
        torch.where(enters, self._next_ring, self._ring, out=self._next_ring)
        torch.add(self._count, enters, out=self._next_count).clamp_(max=WINDOW)
        self._judged = True

    def _of_all_ranks(self, loss: Tensor, norm: Tensor) -> None:
        """`room.values`: loss and norm of the whole update; `room.finite`: whether all of it is finite."""
        room = self._room
        if self.world.size == 1:
            room.loss.copy_(loss)
            room.norm.copy_(norm)
            sizes = torch.abs(room.values, out=room.here)
            torch.all(torch.lt(sizes, math.inf, out=room.both), 0, out=room.finite)
        else:
            told = self._message(loss, norm)
            room.loss.copy_(told[0]).div_(_FIXED)
            room.norm.copy_(told[2].view(torch.float64))
            torch.eq(told[1], 0, out=room.finite)
        self._outcome.norm.copy_(room.norm)

    def _message(self, loss: Tensor, norm: Tensor) -> Tensor:
        """[3] int64, the same on every rank: loss in fixed point, ranks that are not finite, bits of the
        norm."""
        finite = (loss.abs() < math.inf) & (norm.abs() < math.inf)
        most = 2.0**62 / _FIXED / self.world.size
        fixed = (torch.nan_to_num(loss).clamp(-most, most) * _FIXED).round().to(torch.int64)
        # one rank's, to the bit
        bits = norm.double().view(torch.int64) if self.world.is_main else torch.zeros_like(fixed)
        return all_sum(torch.stack((fixed, (~finite).to(torch.int64), bits)))

    def _by_kernel(self, loss: Tensor, partial: Tensor, told: Tensor | None) -> Judgement:
        assert self._kernel is not None
        outcome = self._outcome
        clip = self._kernel.unused if outcome.clip is None else outcome.clip
        self._kernel.judge(
            loss, partial, told, self._bounds, (self._ring, self._count),
            (self._next_ring, self._next_count), self._numbers, (clip, outcome.veto, outcome.applied),
            veto_spikes=self.veto_spikes, known=KNOWN, sigmas=SIGMAS, most=MOST,
        )  # fmt: skip
        self._judged = True
        return outcome


class _Room(NamedTuple):
    """Where the plain path computes. Fields are [2] fp64 unless said."""

    values: Tensor
    loss: Tensor  # [] fp64, of `values`, as the next
    norm: Tensor
    here: Tensor
    mean: Tensor  # of `numbers`, as the next three
    limit: Tensor
    vetoed: Tensor  # [] fp64
    spiked: Tensor  # [] fp64
    deviation: Tensor
    most: Tensor
    scalar: Tensor  # [] fp64
    both: Tensor  # [2] bool
    finite: Tensor  # [] bool, as the next two
    spike: Tensor
    flag: Tensor

    @staticmethod
    def made(device: torch.device, numbers: Tensor) -> _Room:
        values, here, deviation, most = torch.zeros(4, 2, dtype=torch.float64, device=device).unbind()
        both = torch.zeros(2, dtype=torch.bool, device=device)
        finite, spike, flag = torch.zeros(3, dtype=torch.bool, device=device).unbind()
        scalar = torch.zeros((), dtype=torch.float64, device=device)
        mean, limit, vetoed, spiked = numbers[3:5], numbers[5:7], numbers[1], numbers[2]
        loss, norm = values.unbind()
        return _Room(
            values, loss, norm, here, mean, limit, vetoed, spiked, deviation, most, scalar, both, finite,
            spike, flag,
        )  # fmt: skip


class _Kernel:
    """The two launches that take the place of `judge` and `grad_norm`."""

    def __init__(self, device: torch.device):
        from csrc_triton import judge

        self.squares: Any = judge.Squares()
        self.judge: Any = judge.judge
        self.unused = torch.zeros((), dtype=torch.float32, device=device)  # the clip factor where none clips


def kernel_judges(device: torch.device) -> bool:
    """Whether updates on this device are judged by the kernel."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


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
