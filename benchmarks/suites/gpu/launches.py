"""Compiled layers whose independent kernels share a launch (`models.compiler_options`), beside the same
layers with every kernel in a launch of its own: the numbers of one row, and whole updates in turn.

Last in the process that has measured compiled layers: its model, its data and one of the two compilations are
there. Plain layers need nothing more, so the row's numbers are compared with theirs before anything is
compiled anew. Weights are the same in every comparison, as the updates before have left them.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.suites.gpu.goals import Card, Found, Goal
from benchmarks.suites.gpu.session import Session

PLAIN, SHARED, SEPARATE = "plain", "shared", "separate"
NUMBERS, UPDATES = "numbers of a row", "update, launches"
WHAT = "compiled layers, launches apart"
# Seconds on an H100, guessed: the layers compiled once more, in a process that has just done it, half of
# what the compiler is said to take cold (15), and seven rounds of six updates of two rows (10). Below it
# nothing is begun.
NEEDS_S, BUDGET_S = 25, 5
_LAYER = re.compile(r"\blayers\.(\d+)\.")


class NotApart(RuntimeError):
    """Layers whose kernels are launched one by one cannot be had; says why."""


class Ways:
    """The layers of a model in several ways, one in use. In a rehearsal nothing is compiled: all are
    plain."""

    def __init__(self, parts: Any):
        from repsft_fast.models.compiled import compiled_layers

        self.parts, self.layers = parts, compiled_layers(parts.model)
        self._made: dict[str, Any] = {}
        self._keep(SHARED)

    def take(self, way: str) -> None:
        if self.layers is None:
            return
        self.layers.on = way != PLAIN
        if way == PLAIN:
            return
        (self.layers._compiled, self.layers.shared, self.layers.warm), stack = self._made[way]
        self.layers.stack.why, self.layers.stack._recorded, self.layers.stack._plans = stack

    def compile_apart(self) -> float:
        """Have SEPARATE made; returns seconds. NotApart where that fails; SHARED is in use then."""
        from repsft_fast.training.warm_up import warm_up

        layers, began = self.layers, time.perf_counter()
        if layers is None:
            return 0.0
        self.take(SHARED)
        # Of its own: what is made anew is put in the place of what was there, or cleared.
        stack, layers._compiled, layers.warm = layers.stack, dict(layers._compiled), set()
        stack.why, stack._recorded, stack._plans = {}, {}, {}
        said: list[str] = []
        try:
            if not layers.separate():
                raise NotApart("this run's launches are not shared: there is nothing to compare")
            warm_up(self.parts, said.append)
            if layers.failed:
                raise NotApart(said[-1])
        except BaseException:
            layers.failed = False
            self.take(SHARED)
            raise
        self._keep(SEPARATE)
        return time.perf_counter() - began

    def _keep(self, way: str) -> None:
        if self.layers is not None:
            layers, stack = self.layers, self.layers.stack
            made = (layers._compiled, layers.shared, layers.warm)
            self._made[way] = made, (stack.why, stack._recorded, stack._plans)


@dataclass(frozen=True)
class Numbers:
    """What a row computes: its loss, and the gradients by parameter, where they were made."""

    loss: float
    gradients: Mapping[str, Tensor]
    ms: float

    @classmethod
    def of(cls, parts: Any, row: Any) -> Numbers:
        """Of an update of one row; nothing of the run is changed."""
        from repsft_fast.distributed import local
        from repsft_fast.training.step import forward_backward

        began = time.perf_counter()
        forward_backward(parts, row)
        loss = float(parts.ledger.open_loss())  # waits for the device
        ms = 1e3 * (time.perf_counter() - began)
        held = {name: p.grad for name, p in parts.optimizer.names.items() if p.grad is not None}
        found = {name: local(gradient).detach().clone() for name, gradient in held.items()}
        parts.optimizer.zero_grad()
        parts.ledger.drop_open()
        return cls(loss, found, ms)

    def beside(self, other: Numbers) -> dict[str, Any]:
        """Differences in the other's own size: of the loss; of every layer's gradients, a layer's together;
        of those outside the layers, together. [] of what has no gradients."""
        if self.gradients.keys() != other.gradients.keys():
            raise ValueError("gradients: other parameters have one")
        squares: dict[int, list[float]] = {}  # by layer, −1 outside: of the difference, of the other's
        for name, theirs in other.gradients.items():
            found = _LAYER.search(name)
            sums = squares.setdefault(int(found[1]) if found else -1, [0.0, 0.0])
            difference = self.gradients[name].double() - theirs.double()
            sums[0] += float(difference.square().sum())
            sums[1] += float(theirs.double().square().sum())
        off = {at: (a / b) ** 0.5 if b else float(a > 0) for at, (a, b) in squares.items()}
        layers = [off[at] for at in sorted(off) if at >= 0]
        a, b = (sum(sums[n] for sums in squares.values()) for n in (0, 1))
        return {
            "loss_off": abs(self.loss - other.loss) / abs(other.loss),
            "gradients_off": (a / b) ** 0.5,
            "layer_off": max(layers),
            "layer": layers.index(max(layers)),
            "layers_off": layers,
            "outside_off": off.get(-1),
        }


def measure(session: Session, shape: Mapping[str, int | float | str], parts: Any) -> bool:
    """Records of NUMBERS and UPDATES; whether layers of SEPARATE are in use when it returns."""
    dtype = str(parts.model.compute_dtype).rsplit(".", 1)[-1]
    update, ways = parts.plan.epoch(0, 0)[0], Ways(parts)
    row = dataclasses.replace(update, ranks=tuple(rows[:1] for rows in update.ranks))

    def numbers(way: str) -> Numbers:
        ways.take(way)
        return Numbers.of(parts, row)

    def keep(name: str, ours: Numbers, theirs: Numbers) -> None:
        session.record(NUMBERS, name, [ours.ms], {**shape, "rows": 1}, dtype=dtype, **ours.beside(theirs))

    shared, again, plain = numbers(SHARED), numbers(SHARED), numbers(PLAIN)
    keep("shared beside itself", again, shared)
    keep("shared beside plain", shared, plain)
    ways.take(SHARED)
    if session.late(WHAT, 0 if session.rehearsal else NEEDS_S):
        return False
    try:
        seconds = ways.compile_apart()
    except NotApart as told:
        session.leave_out(WHAT, str(told))
        return False
    separate = numbers(SEPARATE)
    keep("separate beside plain", separate, plain)
    keep("shared beside separate", shared, separate)
    del shared, again, plain, separate  # gradients of the whole model each
    _time(session, shape, dtype, parts, ways, update, seconds)
    ways.take(SEPARATE)
    return True


def _time(
    session: Session,
    shape: Mapping[str, int | float | str],
    dtype: str,
    parts: Any,
    ways: Ways,
    update: Any,
    seconds: float,
) -> None:
    from repsft_fast.training.step import train_step

    def call(way: str) -> None:
        ways.take(way)
        train_step(parts, update)

    calls = {SHARED: lambda: call(SHARED), SEPARATE: lambda: call(SEPARATE)}
    more = {SEPARATE: {"compiling_s": seconds}}
    session.measure(UPDATES, calls, shape, dtype=dtype, budget_s=BUDGET_S, more=more)
    if session.device == "cuda":
        torch.cuda.synchronize()


# What is known and expected -------------------------------------------------------------------------------

# Counted on the programs that torch 2.11 makes of a layer of Qwen3-0.6B for rows of 8,192 tokens
# (csrc_triton/README.md), forward and backward: kernels, and GB read and written. Before anything was
# measured: a short kernel takes 2 us of a device that is busy, bytes come at 3.0 TB/s of an H100 and 4.3 of
# an H200. Launches are a hundredth of such a row, and the bytes take back half of that.
KERNELS, GB = {SHARED: 34, SEPARATE: 44}, {SHARED: 3.03, SEPARATE: 2.99}
LAYERS, SHORT_MS = 28, 2e-3
# Times as far from plain layers as separate launches are: law 3's bound, with these as the norm.
MOST_OFF = 1.5


def saved_ms(bytes_per_s: float) -> float:
    """Of a row, by sharing launches; negative: what it costs."""
    kernels, moved = KERNELS[SEPARATE] - KERNELS[SHARED], (GB[SEPARATE] - GB[SHARED]) * 1e9
    return LAYERS * (kernels * SHORT_MS + 1e3 * moved / bytes_per_s)


def goals_of(model: str, row_ms: Callable[[Card], float | None], rows: int) -> Sequence[Goal]:
    """row_ms: what is predicted of a row with shared launches."""

    def ratio(card: Card) -> float | None:
        ms, saved = row_ms(card), card.of_kind(H100=saved_ms(3.0e12), H200=saved_ms(4.3e12))
        return None if ms is None or saved is None else (ms + saved) / ms

    def off(name: str, field: str) -> Callable[[Found], float | None]:
        return lambda found: found.value(NUMBERS, name, field, model=model)

    def slower(found: Found) -> float | None:  # round by round
        record = found.one(UPDATES, SEPARATE, model=model)
        return None if record is None else float(record["ratio"][0])

    def further(found: Found) -> float | None:
        a, b = (off(f"{way} beside plain", "gradients_off")(found) for way in (SHARED, SEPARATE))
        if a is None or b is None:
            return None
        return 1.0 if a == b else a / b if b else math.inf

    def fewer(found: Found) -> float | None:
        ours, theirs = (
            found.value("kernels of an update", way, "kernels", model=model) for way in ("compiled", SEPARATE)
        )
        return None if ours is None or theirs is None else (theirs - ours) / rows

    what, fewer_kernels = "0.6B, compiled", float(LAYERS * (KERNELS[SEPARATE] - KERNELS[SHARED]))
    return (
        Goal(f"{what}: launches apart / shared", slower, predicted=ratio),
        Goal(
            f"{what}: kernels a row fewer, launches shared", fewer,
            predicted=lambda card: card.of_kind(H100=fewer_kernels, H200=fewer_kernels),
        ),
        Goal(
            f"{what}: gradients off plain, shared / apart", further, most=MOST_OFF, predicted=lambda card: 1.0
        ),
        Goal(f"{what}: worst layer's gradients off plain", off("shared beside plain", "layer_off")),
        Goal(f"{what}: worst layer's, shared off apart", off("shared beside separate", "layer_off")),
        Goal(f"{what}: loss off plain", off("shared beside plain", "loss_off")),
    )  # fmt: skip
