"""A row's forward pass, backward pass and sums, captured once for every shape and replayed for every row of
it.

Small models are launch-bound: the host queues thousands of kernels a row, and the device waits for it. A
replay is one launch. What it needs is that nothing moves: a row is copied into static buffers
(`static_row`), gradients are added into buffers that were there before the capture, weights are written in
place by whoever writes them, and every result is copied out before anything is replayed again.

Shapes are captured before the first update and never afterwards (law 8). A row of any other shape takes the
plain pass and adds into the same gradients. Whatever could make a replay read a stale address or a stale
number (weights that moved, other loss settings, another mode of the model) drops the captures and is said;
the run goes on plain.

Between updates no gradient is there, as without captures: `begin_update` lends the buffers, zeroed, and
`Optimizer.zero_grad` gives them back. So a snapshot never holds one, and a parameter that the loss does not
reach has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from repsft_fast.models.compiled_stack import running
from repsft_fast.row import Row
from repsft_fast.stats import PositionStats, TokenStats
from repsft_fast.training.capture import Capture, Captured
from repsft_fast.training.static_row import Shape, StaticRow

RowResult = tuple[Tensor, PositionStats, TokenStats]  # [] loss, [N'] statistics, [tasks, K] sums


class CaptureFailed(Exception):
    """No captures, in words for people. The model, its gradients and the random streams are as they were."""


@dataclass(frozen=True)
class Shapes:
    """What is captured: a function of the plan. borders: capacity of cu_seqlens; longest: bound on a
    segment."""

    shapes: tuple[Shape, ...]
    borders: int
    longest: int


@dataclass
class Counts:
    """What became of rows. fell_back: rows of no captured shape, or after the captures were dropped."""

    captured: int = 0
    replayed: int = 0
    fell_back: int = 0


class RowGraphs:
    """The captured passes of one model. `off`: why there are none any more; "" while there are."""

    def __init__(
        self,
        model: Any,
        shapes: Shapes,
        capture: Capture,
        *,
        num_tasks: int,
        device: torch.device,
        tell: Callable[[str], None] = lambda text: None,
    ):
        """Captures every shape. CaptureFailed where one cannot be; then nothing has changed."""
        self.model, self.shapes, self.num_tasks, self.device = model, shapes, num_tasks, device
        self.tell, self.off, self.counts = tell, "", Counts()
        self.timed = (0.0, 0.0)  # seconds of an update in the trial, captured and not
        self._rows: dict[Shape, tuple[StaticRow, Captured]] = {}
        self._by_length: dict[int, list[Shape]] = {}
        for shape in sorted(shapes.shapes):
            self._by_length.setdefault(shape.length, []).append(shape)
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._settings, self._mode = model.loss_settings, model.training
        # where the model holds each tensor, under which name, and at which address
        self._tensors = [
            (held, name, tensor, tensor.data_ptr())
            for module in model.modules()
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
            if tensor is not None
        ]
        self._record(capture)
        if not self._as_captured():
            self._forget()
            raise CaptureFailed("the model's own passes replace its weights or buffers")

    # Capturing --------------------------------------------------------------------------------------------

    def _record(self, capture: Capture) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if any(p.grad is not None for p in trained):
            raise CaptureFailed("gradients of an update are there")
        streams, buffers = _random_states(self.device), [(b, b.clone()) for b in self.model.buffers()]
        try:
            # The largest first: the others then take their memory out of what it took.
            for shape in sorted(self.shapes.shapes, reverse=True):
                self._capture(shape, capture, trained)
            if not _same(streams, _random_states(self.device)):
                raise CaptureFailed("the model draws random numbers in its forward pass (dropout)")
        except CaptureFailed:
            self._forget()
            raise
        except Exception as error:  # of torch, transformers or a kernel: whatever it is, the plain pass works
            self._forget()
            text = str(error).strip().partition("\n")[0]
            raise CaptureFailed(f"{type(error).__name__}: {text}") from error
        finally:
            for parameter in trained:
                parameter.grad = None
            _put_back(streams, self.device)
            with torch.no_grad():
                for live, before in buffers:
                    live.copy_(before)

    def _capture(self, shape: Shape, capture: Capture, trained: Sequence[nn.Parameter]) -> None:
        static = StaticRow(
            shape,
            borders=self.shapes.borders,
            longest=self.shapes.longest,
            spare_task=self.num_tasks,
            device=self.device,
        )
        # A plain pass says which parameters the loss reaches, and how their gradients lie.
        for parameter in trained:
            parameter.grad = None
        self._pass(static)
        reached = [p for p in trained if p.grad is not None]
        if not reached:
            raise CaptureFailed("the loss reaches no parameter")
        if not self._gradients:
            self._gradients = {p: _like_gradient(p) for p in reached}
        if set(reached) != set(self._gradients):
            raise CaptureFailed("rows of different shapes reach different parameters")
        self._lend()
        self._rows[shape] = static, capture(lambda: self._pass(static))
        if not self._lent():
            raise CaptureFailed("autograd replaces gradients, where a capture needs them added in place")
        self.counts.captured += 1

    def _pass(self, static: StaticRow) -> tuple[PositionStats, Tensor]:
        """[capacity] statistics, and [tasks + 1, K] sums whose last line is of what was padded."""
        with running(self.model, static.row):
            loss, stats = self.model.loss(static.row)
        loss.backward()
        return stats, stats.sum_by(static.row.position_tasks, self.num_tasks + 1).table

    # Replaying --------------------------------------------------------------------------------------------

    def begin_update(self) -> None:
        """Lend the gradients' buffers, zeroed; the update's rows are added into them, captured or plain."""
        if self.off:
            return
        if not self._as_captured():
            self.drop("weights, loss settings or the model's mode are not those of the captures")
            return
        self._lend()
        torch._foreach_zero_(list(self._gradients.values()))

    def __call__(self, row: Row, *, keep: bool) -> RowResult | None:
        """The row's gradients added, its results; None: the caller takes the plain pass.

        keep: the statistics outlive the next row's pass; without it they hold until then. Loss and sums
        always do.
        """
        if not self.holds(row) or not self._lent():
            self.counts.fell_back += 1
            return None
        loss, stats, sums = self.replay(row)
        if keep:
            stats = PositionStats(**{f.name: getattr(stats, f.name).clone() for f in fields(stats)})
        return loss, stats, sums

    def holds(self, row: Row) -> bool:
        return self._fitting(row) is not None

    def replay(self, row: Row) -> RowResult:
        """A row that is held, by its capture."""
        _, captured = self._take(row)
        captured.replay()
        self.counts.replayed += 1
        return self._result(row, *captured.outputs)

    def eager(self, row: Row) -> RowResult:
        """The same pass over the same buffers without a graph: what `replay` has to equal bit for bit."""
        static, _ = self._take(row)
        return self._result(row, *self._pass(static))

    def _take(self, row: Row) -> tuple[StaticRow, Captured]:
        found = self._fitting(row)
        assert found is not None
        found[0].take(row)
        return found

    def _result(self, row: Row, stats: PositionStats, table: Tensor) -> RowResult:
        n = row.trained_positions.numel()
        stats = PositionStats(**{f.name: getattr(stats, f.name)[:n] for f in fields(stats)})
        # Summed here, over N' numbers as the head does it: a sum over the capacity rounds otherwise.
        weights = row.weights.index_select(0, row.trained_positions).to(stats.loss.dtype)
        return (stats.loss * weights).sum(), stats, TokenStats(table[: self.num_tasks].clone())

    def drop(self, why: str) -> None:
        """No replays from here on. Their memory is free once nothing reads it any more."""
        if not self.off:
            self.off = why
            self._forget()
            self.tell(f"model.cuda_graphs: off from here on, because {why}")

    def _fitting(self, row: Row) -> tuple[StaticRow, Captured] | None:
        """The smallest captured shape that holds the row."""
        for shape in self._by_length.get(row.targets.numel(), ()):
            found = self._rows[shape]
            if found[0].fits(row):
                return found
        return None

    def _lend(self) -> None:
        for parameter, buffer in self._gradients.items():
            parameter.grad = buffer

    def _lent(self) -> bool:
        return all(parameter.grad is buffer for parameter, buffer in self._gradients.items())

    def _as_captured(self) -> bool:
        """Whether all that a capture has baked in is as it was. Addresses and objects alone are looked at."""
        model = self.model
        return (
            model.loss_settings is self._settings
            and model.training == self._mode
            and all(held.get(name) is t and t.data_ptr() == at for held, name, t, at in self._tensors)
        )

    def _forget(self) -> None:
        self._rows.clear()
        self._by_length.clear()
        self._gradients = {}


def _like_gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return torch.zeros_like(parameter.grad)


def _random_states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _same(a: tuple[Tensor, Tensor | None], b: tuple[Tensor, Tensor | None]) -> bool:
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in zip(a, b))


def _put_back(streams: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(streams[0])
    if streams[1] is not None:
        torch.cuda.set_rng_state(streams[1], device)
