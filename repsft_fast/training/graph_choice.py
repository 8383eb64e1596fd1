"""Whether rows are captured as CUDA graphs: asked by `model.cuda_graphs`, tried before the first update,
decided once (law 12).

The trial makes the passes of the first updates twice, captured and as they are, from the same weights.
Captured is taken only where

- every loss, sum and gradient of a captured pass has the bits of the same pass made without a graph, in
  torch's deterministic mode (else two plain passes differ already, by attention's atomics),
- they are, to rounding, those of the row before its shapes were filled up, and every trained position is
  counted,
- the median update is faster.

Nothing is stepped, so nothing has to be put back. What was decided stands in checkpoints as the shapes
captured, because a row that is filled up may round its products otherwise: a resumption captures the same
or is refused.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from csrc_triton.state_hash import checksums
from repsft_fast.errors import ConfigError, describe
from repsft_fast.report.format import count
from repsft_fast.row import Row
from repsft_fast.training.capture import Capture, CudaCapture, refuse_inductor_graphs
from repsft_fast.training.graph_shapes import shapes_of, why_not
from repsft_fast.training.graphs import CaptureFailed, RowGraphs, Shapes
from repsft_fast.training.parts import Parts
from repsft_fast.training.static_row import Shape

NAME, SETTING, OFF = "cuda_graphs", "model.cuda_graphs", "off"
TRIAL_UPDATES, TRIAL_TIMES = 3, 5
# of a gradient's own size: what filling up a row's shapes may move it by
_NEAR = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: 1e-5, torch.float64: 1e-10}
Clock = Callable[[], float]


# As an item of what is decided once ---------------------------------------------------------------


def now(parts: Parts) -> Any:
    """What is captured, as JSON, or "off", also once captures were dropped; None: not tried yet."""
    if parts.config.model.cuda_graphs == OFF or (parts.graphs is not None and parts.graphs.off):
        return OFF
    return parts.cuda_graphs


def use(parts: Parts, value: Any) -> None:
    """Take what the run before used; it is captured when the run begins."""
    parts.cuda_graphs = None if value == "auto" else value


def words(value: Any) -> str:
    if value is None:
        return ""  # what is not tried yet is not compared with
    return OFF if value == OFF else f"captured in {len(value['shapes'])} shapes"


def before(parts: Parts) -> Any:
    """Versions without it had none."""
    return OFF


def written(value: Any) -> Any:
    """What is captured is no value of the setting: checkpoints hold it."""
    return OFF if value == OFF else None


# Before the first update --------------------------------------------------------------------------


def begin(
    parts: Parts,
    tell: Callable[[str], None],
    *,
    capture: Callable[[], Capture] | None = None,
    clock: Clock | None = None,
) -> list[str]:
    """Capture what was decided, or decide; what to say of it. Called once, before the first update of a run
    that begins or goes on. ConfigError where a resumed run's captures cannot be had here, and where
    inductor would capture by itself.

    tell: of captures that are dropped later. capture, clock: None on a GPU; without one nothing is captured
    unless they are given.
    """
    if parts.world.device.type == "cuda":
        refuse_inductor_graphs(compiled=parts.config.model.compile is not False)
    if parts.config.model.cuda_graphs == OFF or parts.cuda_graphs == OFF:
        return []
    began = time.perf_counter()
    saved = parts.cuda_graphs
    why, graphs = _without_a_gpu(parts, capture) or why_not(parts), None
    shapes = _shapes(saved) if saved is not None else None
    if why is None and shapes is None:
        found = shapes_of(parts)
        why, shapes = (found, None) if isinstance(found, str) else (None, found)
    if why is None and shapes is not None:
        try:
            graphs = _made(parts, shapes, tell, capture)
            if saved is None:
                why = _trial(parts, graphs, capture, shapes, clock or _clock(parts.world.device))
        except (CaptureFailed, torch.OutOfMemoryError) as error:
            why = str(error).strip().partition("\n")[0]
    parts.optimizer.zero_grad()
    if why is None and graphs is not None:
        parts.graphs, parts.cuda_graphs = graphs, _value(graphs.shapes)
        took = time.perf_counter() - began
        tried = f"; {_timed(graphs)}" if saved is None else ""
        return [f"{SETTING}: on, {len(graphs.shapes.shapes)} shapes of rows captured in {took:.1f} s{tried}"]
    if saved is not None:
        wrong = f"the run began with captured rows, which cannot be had here: {why}"
        todo = f"resume on the machine it began on, or set {SETTING}: {OFF}"
        raise ConfigError(describe(SETTING, wrong, todo=todo))
    parts.cuda_graphs = OFF
    return [f"{SETTING}: off, because {why}"]


def result(parts: Parts) -> dict[str, Any]:
    """For result.json: what became of rows; nothing where it was never asked for."""
    if parts.config.model.cuda_graphs == OFF:
        return {}
    graphs = parts.graphs
    counted = {"captured": 0, "replayed": 0, "fell_back": 0} if graphs is None else vars(graphs.counts)
    return {
        NAME: {"decided": now(parts), **counted, **({"dropped": graphs.off} if graphs and graphs.off else {})}
    }


def said(parts: Parts) -> list[str]:
    """The line of a run's end, where rows were captured."""
    if parts.graphs is None:
        return []
    counts = parts.graphs.counts
    line = f"CUDA graphs: {counts.captured} shapes captured, {count(counts.replayed)} rows replayed"
    return [line + (f", {count(counts.fell_back)} of other shapes passed plain" if counts.fell_back else "")]


def _without_a_gpu(parts: Parts, capture: Callable[[], Capture] | None) -> str | None:
    return "they need a GPU" if capture is None and parts.world.device.type != "cuda" else None


def _made(
    parts: Parts, shapes: Shapes, tell: Callable[[str], None], capture: Callable[[], Capture] | None
) -> RowGraphs:
    device = parts.world.device
    how = capture() if capture is not None else CudaCapture(device)
    return RowGraphs(parts.model, shapes, how, num_tasks=parts.num_tasks, device=device, tell=tell)


def _value(shapes: Shapes) -> dict[str, Any]:
    listed = [[shape.length, shape.trained] for shape in shapes.shapes]
    return {"shapes": listed, "borders": shapes.borders, "longest": shapes.longest}


def _shapes(value: Any) -> Shapes:
    listed = tuple(Shape(length, trained) for length, trained in value["shapes"])
    return Shapes(listed, value["borders"], value["longest"])


# The trial ----------------------------------------------------------------------------------------


def _trial(
    parts: Parts, graphs: RowGraphs, capture: Callable[[], Capture] | None, shapes: Shapes, clock: Clock
) -> str | None:
    """Why the captures are not used; None: they are right and faster."""
    updates = [[row for row in rows if graphs.holds(row)] for rows in _first_updates(parts)]
    updates = [rows for rows in updates if rows]
    if not updates:
        return "no row of the first updates has a captured shape"
    # In the mode of the run itself a graph holds whatever kernels it was captured with.
    with _deterministic():
        judged = graphs
        if parts.world.device.type == "cuda" and not parts.config.run.deterministic:
            judged = _made(parts, shapes, lambda text: None, capture)
        for rows in updates:
            if (wrong := _compare(parts, judged, rows)) is not None:
                return wrong
        del judged
    plain, replayed = [], []
    for _ in range(TRIAL_TIMES):
        for rows in updates:
            plain.append(_seconds(clock, partial(_plain, parts, rows)))
            replayed.append(_seconds(clock, partial(_replayed, graphs, rows)))
    graphs.counts.replayed = 0
    graphs.timed = statistics.median(replayed), statistics.median(plain)
    return None if graphs.timed[0] < graphs.timed[1] else _timed(graphs)


def _timed(graphs: RowGraphs) -> str:
    ours, theirs = (1e3 * seconds for seconds in graphs.timed)
    return f"an update takes {ours:.2f} ms captured and {theirs:.2f} ms without"


def _first_updates(parts: Parts) -> Iterator[list[Row]]:
    epoch = parts.plan.epoch(0, 0)
    for number in islice(range(len(epoch)), TRIAL_UPDATES):
        yield list(parts.rows(epoch.update(number)))


def _compare(parts: Parts, graphs: RowGraphs, rows: list[Row]) -> str | None:
    """What of an update's passes differs, captured and not."""
    made: list[list[int]] = []
    for one_pass in (graphs.eager, graphs.replay):
        parts.optimizer.zero_grad()
        graphs.begin_update()
        found = [one_pass(row) for row in rows]
        gradients = [p.grad for p in parts.optimizer.names.values() if p.grad is not None]
        made.append(checksums([*gradients, *(t for loss, _, sums in found for t in (loss, sums.table))]))
    if made[0] != made[1]:
        return "a captured pass has other bits than the same pass without a graph"
    return _near(parts, rows, found)


def _near(parts: Parts, rows: list[Row], found: list[Any]) -> str | None:
    """The rows as they came, beside what the captures left in the gradients: equal to rounding."""
    captured = {name: p.grad for name, p in parts.optimizer.names.items()}
    parts.optimizer.zero_grad()
    for row, (_, _, sums) in zip(rows, found, strict=True):
        loss, stats = parts.model.loss(row)
        loss.backward()
        if not torch.equal(stats.sum_by(row.position_tasks, parts.num_tasks).total, sums.total):
            return "a captured pass counts other positions"
    limit = _NEAR[parts.model.compute_dtype]
    for name, parameter in parts.optimizer.names.items():
        ours, theirs = captured[name], parameter.grad
        if (ours is None) != (theirs is None):
            return f"captured passes and plain ones do not reach the same parameters ({name})"
        if ours is not None and theirs is not None and _distance(ours, theirs) > limit:
            return f"captured passes leave another gradient of {name} than plain ones"
    return None


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """Of the gradient's own size; infinite where a number is not finite."""
    size = theirs.double().norm()
    apart = float((ours.double() - theirs.double()).norm() / size.clamp(min=torch.finfo(torch.float64).tiny))
    return apart if apart == apart else float("inf")


def _plain(parts: Parts, rows: list[Row]) -> None:
    parts.optimizer.zero_grad()
    for row in rows:
        loss, stats = parts.model.loss(row)
        loss.backward()
        stats.sum_by(row.position_tasks, parts.num_tasks)


def _replayed(graphs: RowGraphs, rows: list[Row]) -> None:
    graphs.begin_update()
    for row in rows:
        graphs.replay(row)


def _seconds(clock: Clock, work: Callable[[], None]) -> float:
    began = clock()
    work()
    return clock() - began


def _clock(device: torch.device) -> Clock:
    """Seconds, once the device has done what was asked of it."""

    def seconds() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return seconds


@contextmanager
def _deterministic() -> Iterator[None]:
    was, warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():  # what has no such mode shows in the comparison
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned)
