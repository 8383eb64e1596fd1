"""Part I: what holding, putting back, checking, writing and moving the real state of a 0.6B run costs."""

from __future__ import annotations

import dataclasses
import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import cases, timing
from benchmarks.suites.gpu.goals import Card, Found, Goal
from benchmarks.suites.gpu.heads import name_of
from benchmarks.suites.gpu.session import Session
from benchmarks.suites.gpu.training import Point, point, settings_of

SNAPSHOT, PINNED, HASH, OPTIMIZER, CHECKPOINT = (
    "snapshot",
    "snapshot, pinned",
    "state hash",
    "optimizer",
    "checkpoint",
)
WITH_WEIGHTS = "adamw on masters"
ONE_LAUNCH, TORCHS = "one launch, bf16 weights written", "torch's fused, then copied to bf16"
ONE_LAUNCH_ALONE, TORCHS_ALONE = "one launch, fp32 alone", "torch's fused, fp32 alone"
PLAIN = "plain copy of as many bytes"
BEFORE, DURING = "an update before the save", "an update while it is written"
OPTIMIZERS = ("adamw8bit", "adamw", "bnb_adamw8bit")
COMPILING = "torchao_adamw8bit"  # its step is compiled at the first call
PARAMETERS, SIDE = 1 << 30, 4096
SAVED_AT = 16  # the update after which the one checkpoint is written; as many follow, less one
PINNED_BYTES = 24 << 30  # set, so that the figure does not hang on what the host has free


def run(session: Session) -> None:
    toy = session.rehearsal
    with tempfile.TemporaryDirectory() as folder, session.attempt("the real state of a 0.6B run"):
        if not session.late("snapshot and revert", 0.0 if toy else 20.0):
            of_the_state(session, Path(folder))
    _let_go(session)
    if not session.late("checkpoint", 0.0 if toy else 25.0) and not session.blocked(
        "checkpoint", ("checkpoint", "any")
    ):
        with tempfile.TemporaryDirectory() as folder, session.attempt("checkpoint"):
            checkpoint(session, Path(folder))
    _let_go(session)
    for dtype in (torch.bfloat16, torch.float32):
        what = f"optimizers in {name_of(dtype)}"
        if not session.late(what, 0.0 if toy else 5.0) and not session.blocked(
            what, ("adamw8bit", name_of(dtype))
        ):
            with session.attempt(what):
                optimizers(session, dtype, OPTIMIZERS)
            _let_go(session)
    if not session.late(WITH_WEIGHTS, 0.0 if toy else 6.0) and not session.blocked(
        WITH_WEIGHTS, ("adamw", "float32")
    ):
        with session.attempt(WITH_WEIGHTS):
            adamw_on_masters(session)
        _let_go(session)
    if not toy and not session.late(COMPILING, 25.0):
        with session.attempt(COMPILING):
            optimizers(session, torch.bfloat16, (COMPILING,))


def of_the_state(session: Session, folder: Path) -> None:
    """Take, put back and check the closed list of a run that has made two updates."""
    from repsft_fast.training.snapshots import closed_list

    parts = made_parts(session, folder)
    tensors = closed_list(parts).tensors()
    held = sum(t.numel() * t.element_size() for t in tensors.values())
    points = (
        ("snapshot and revert", ("snapshot", "any"), 3.0, snapshots),
        ("state hash", ("state hash", "any"), 2.0, state_hash),
        ("snapshot in pinned memory", ("snapshot", "any"), 8.0, pinned),
        ("the way through files", ("snapshot", "any"), 25.0, files),
    )
    for what, proof, needs_s, measured in points:
        if session.late(what, 0.0 if session.rehearsal else needs_s) or session.blocked(what, proof):
            continue
        with session.attempt(what):
            measured(session, tensors, held)


def wanted(session: Session, updates: int) -> Point:
    """Updates of Qwen3-0.6B: 2 rows of 8,192 tokens, half of them trained."""
    made = point("Qwen3-0.6B", "Qwen3-0.6B", "plain", 8192, toy=session.rehearsal)
    return dataclasses.replace(made, updates=updates)


def made_parts(session: Session, folder: Path) -> Any:
    """The parts of a run that has made two updates, so that the moments are not zeros."""
    from repsft_fast.config import Config
    from repsft_fast.training.build import build
    from repsft_fast.training.step import train_step

    config = Config.of(settings_of(session, wanted(session, 2), folder))
    parts = build(config)
    for update in parts.plan.epoch(0, 0):
        train_step(parts, update)
    parts.ledger.read()
    return parts


def snapshots(session: Session, tensors: dict[str, torch.Tensor], held: int) -> None:
    """Beside a copy of the same bytes in one piece; and the host's own time, which training waits for on a
    busy queue."""
    from repsft_fast.snapshot import SnapshotPool

    pool = SnapshotPool(tensors, keep=1, device_bytes=2 * held, pinned_bytes=0)
    source = torch.ones(held, dtype=torch.uint8, device=session.device)
    target = torch.empty_like(source)
    pool.take("kept", {})

    def take() -> None:
        pool.release("kept")
        pool.take("kept", {})

    calls = {PLAIN: lambda: target.copy_(source), "take": take, "put back": lambda: pool.restore("kept")}
    shape = {"bytes": held, "tensors": len(tensors)}
    session.measure(SNAPSHOT, calls, shape, dtype="mixed", budget_s=2.0, moved_bytes=2 * held)
    host = []
    for _ in range(5):
        _wait(session)
        began = time.perf_counter()
        take()
        host.append(1e3 * (time.perf_counter() - began))
    session.record(SNAPSHOT, "take, the host alone", host, shape, dtype="mixed")
    pool.close()


def state_hash(session: Session, tensors: dict[str, torch.Tensor], held: int) -> None:
    from csrc_triton.state_hash import checksum
    from repsft_fast.state import local

    shards = [local(tensor) for tensor in tensors.values()]
    whole = torch.ones(held, dtype=torch.uint8, device=session.device)
    calls = {
        "tensor by tensor": lambda: [checksum(shard) for shard in shards],
        "in one piece": lambda: checksum(whole),
    }
    shape = {"bytes": held, "tensors": len(tensors)}
    session.measure(HASH, calls, shape, dtype="mixed", budget_s=1.0, moved_bytes=held)


def pinned(session: Session, tensors: dict[str, torch.Tensor], held: int) -> None:
    """The same into pinned host memory and back, over the bus."""
    from repsft_fast.snapshot import SnapshotPool

    if session.device != "cuda":
        session.leave_out("snapshot in pinned memory", "the state is in host memory already")
        return
    began = time.perf_counter()
    pool = SnapshotPool(tensors, keep=1, device_bytes=0, pinned_bytes=2 * held)
    made_ms = 1e3 * (time.perf_counter() - began)
    shape = {"bytes": held, "tensors": len(tensors)}
    session.record(PINNED, "room made", [made_ms], shape, dtype="mixed")
    pool.take("kept", {})

    def take() -> None:
        pool.release("kept")
        pool.take("kept", {})

    calls = {"take": take, "put back": lambda: pool.restore("kept")}
    times = timing.interleave(calls, device=session.device, rounds=2, warmup=0)
    for name, rounds in times.items():
        session.record(PINNED, name, rounds, shape, dtype="mixed", moved_bytes=held)
    pool.close()


def files(session: Session, tensors: dict[str, torch.Tensor], held: int) -> None:
    """One way out to a file and back into the same tensors, in the page cache: the least that a revert
    through files costs."""
    from repsft_fast.state import local

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state.pt")
        _wait(session)
        began = time.perf_counter()
        torch.save({name: local(tensor).detach().cpu() for name, tensor in tensors.items()}, path)
        with torch.no_grad():
            for name, tensor in torch.load(path, weights_only=True).items():
                local(tensors[name]).copy_(tensor)
        _wait(session)
        out_and_back = 1e3 * (time.perf_counter() - began)
    session.record(
        SNAPSHOT, "through files", [out_and_back], {"bytes": held, "tensors": len(tensors)}, dtype="mixed"
    )


def checkpoint(session: Session, folder: Path) -> None:
    """One save in a run of the trainer: what training waits for, where the writer's time goes, what updates
    cost meanwhile."""
    from repsft_fast.training.trainer import train

    saved_at = 4 if session.rehearsal else SAVED_AT
    made = settings_of(session, wanted(session, 2 * saved_at - 1), folder)
    made["budget"] = {"updates": 2 * saved_at - 1, "epochs": None}
    made["checkpoint"] = {"every_updates": saved_at, "keep_last": 1}
    # every update is read, so that it has a time of its own
    made["log"] = {**made["log"], "every_updates": 1}
    if session.device == "cuda":
        made["snapshot"] = {"pinned_bytes": PINNED_BYTES}
    stamps = Stamps(session.device)
    train(made, on_update=stamps)

    # The trainer's own lines: they tell the stall apart from what the writer does beside the updates.
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    saves = [line for line in lines if line["kind"] in ("checkpoint", "checkpoint_written")]
    size = sum(path.stat().st_size for path in (folder / "run" / "checkpoints").rglob("*") if path.is_file())
    shape = {"bytes": size, "updates": 2 * saved_at - 1, "saved_at": saved_at}
    spent = {
        name: value for line in saves for name, value in line.items() if name.endswith("seconds") and value
    }
    for name, seconds in sorted(spent.items()):
        session.record(
            CHECKPOINT,
            name.removesuffix("seconds").rstrip("_") or "whole save",
            [1e3 * seconds],
            shape,
            dtype="mixed",
        )

    # The first update after a save is queued behind the copy; the last ones may come when the writer is done.
    writes_ms = 1e3 * max(spent.values())
    before, after = stamps.times[saved_at // 2 : saved_at], stamps.times[saved_at:]
    during, passed = [], 0.0
    for each in after:
        passed += each
        if passed > writes_ms:
            break
        during.append(each)
    session.record(CHECKPOINT, BEFORE, before, shape, dtype="mixed")
    session.record(
        CHECKPOINT, DURING, during or after[:1], shape, dtype="mixed", measured_updates=len(during)
    )


class Stamps:
    """Milliseconds from one update to the next, on the host; every update is read there, so it is done."""

    def __init__(self, device: str):
        self.device, self.times, self._last = device, list[float](), time.perf_counter()

    def __call__(self, work: Any) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.times.append(1e3 * (now - self._last))
        self._last = now


def optimizers(session: Session, dtype: torch.dtype, names: tuple[str, ...]) -> None:
    """One update of square matrices. Peak bytes are beyond the state."""
    side, count = (64, 1 << 13) if session.rehearsal else (SIDE, PARAMETERS)
    tensors = count // (side * side)
    calls: dict[str, Callable[[], Any]] = {}
    for name in names:
        try:
            call = cases.optimizer_step(name, dtype, tensors, side, session.device)
            call()
            calls[name] = call
        except Exception as error:  # a package's own trouble must not take the others with it
            if name == "adamw8bit":
                raise
            session.leave_out(f"{name} in {name_of(dtype)}", f"{type(error).__name__}: {str(error)[:100]}")
    if calls:
        moved = adamw8bit_bytes(count, dtype.itemsize)
        session.measure(
            OPTIMIZER, calls, {"parameters": count}, dtype=name_of(dtype), budget_s=2.0, moved_bytes=moved
        )


def adamw_on_masters(session: Session) -> None:
    """The update kernel beside torch's fused AdamW, with the bf16 weights and without."""
    side, count = (64, 1 << 13) if session.rehearsal else (SIDE, PARAMETERS // 2)
    tensors = count // (side * side)
    calls = {
        name: cases.adamw_step(ours=ours, copies=copies, tensors=tensors, side=side, device=session.device)
        for name, (ours, copies) in WAYS.items()
    }
    for names, per_element in (((ONE_LAUNCH, TORCHS), 30), ((ONE_LAUNCH_ALONE, TORCHS_ALONE), 28)):
        shape, moved = {"parameters": count, "per_element": per_element}, per_element * count
        both = {name: calls[name] for name in names}
        session.measure(WITH_WEIGHTS, both, shape, dtype="float32", budget_s=1.5, moved_bytes=moved)


WAYS = {  # (ours, bf16 weights)
    ONE_LAUNCH: (True, True),
    TORCHS: (False, True),
    ONE_LAUNCH_ALONE: (True, False),
    TORCHS_ALONE: (False, False),
}


def adamw8bit_bytes(parameters: int, itemsize: int) -> int:
    """Weight read and written, gradient read, two codes of a byte read and written, a scale for every 256 of
    each."""
    return int(parameters * (3 * itemsize + 4 + 4 / 256))


def _wait(session: Session) -> None:
    if session.device == "cuda":
        torch.cuda.synchronize()


def _let_go(session: Session) -> None:
    gc.collect()
    if session.device == "cuda":
        torch.cuda.empty_cache()


def _through_files(found: Found) -> float | None:
    times = [found.p50(SNAPSHOT, name) for name in ("through files", "take", "put back")]
    return None if None in times else times[0] / (times[1] + times[2])  # type: ignore[operator]


def _over_its_floor(op: str, implementation: str) -> Callable[[Found], float | None]:
    """Over the time that its counted bytes take at today's copy rate: the inverse of the share that its
    record holds."""

    def read(found: Found) -> float | None:
        share = found.value(
            op, implementation, "share_of_bytes_per_s", **({"dtype": "bfloat16"} if op == OPTIMIZER else {})
        )
        return None if share is None else 1 / share

    return read


def _stall(found: Found) -> float | None:
    stall = found.p50(CHECKPOINT, "stall")
    return None if stall is None else stall / 600e3


STATE_BYTES = 596e6 * 12  # fp32 weights and two moments of Qwen3-0.6B


def _over_the_bus(card: Card) -> float | None:
    rate = card.ceilings.get("down_bytes_per_s")
    return None if rate is None else 1e3 * STATE_BYTES / rate


def _to_disk(card: Card) -> float | None:
    """The state and the model folder."""
    rate = card.ceilings.get("disk_bytes_per_s")
    return None if rate is None else 1e3 * STATE_BYTES * 4 / 3 / rate


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _copies(name: str) -> Callable[[Found], float | None]:
    return lambda found: found.ratio(SNAPSHOT, name, PLAIN)


def _ms(op: str, implementation: str, **shape: Any) -> Callable[[Found], float | None]:
    return lambda found: found.p50(op, implementation, **shape)


# The update kernel: 30 B an element, 81 instructions an element of the 200 that the bytes leave room for.
# torch's fused reads 16, writes 12 and, given a clip factor, the gradient too; the copy moves 6: 38, and 32
# alone.
# adamw8bit: 1,730 instructions per 16 elements take 3.2 to 3.7 ms per 10⁹ at perfect issue; its bytes 3.3
# (H100) or 2.3 (H200).
GOALS = (
    Goal("snapshot take, ms", _ms(SNAPSHOT, "take"), predicted=lambda card: card.bytes_ms(2 * STATE_BYTES)),
    Goal("snapshot take / plain copy", _copies("take"), most=1.15, predicted=lambda card: 1.05),
    Goal("snapshot put back / plain copy", _copies("put back"), most=1.15, predicted=lambda card: 1.05),
    Goal("snapshot take, the host alone, ms", _ms(SNAPSHOT, "take, the host alone"), most=2.0),
    Goal("through files / take and put back", _through_files, least=100.0),
    Goal("state hash in one piece / its floor", _over_its_floor(HASH, "in one piece"), most=1.35),
    Goal("state hash tensor by tensor / its floor", _over_its_floor(HASH, "tensor by tensor")),
    Goal("snapshot to pinned memory, ms", _ms(PINNED, "take"), predicted=_over_the_bus),
    Goal("checkpoint stall / ten minutes", _stall, most=0.01),
    Goal("checkpoint stall, ms", _ms(CHECKPOINT, "stall"), predicted=_over_the_bus),
    Goal("checkpoint written, ms", _ms(CHECKPOINT, "whole save"), predicted=_to_disk),
    Goal("update while it is written / before", lambda f: f.ratio(CHECKPOINT, DURING, BEFORE), most=1.05),
    Goal(
        "adamw on masters, 2²⁹, ms", _ms(WITH_WEIGHTS, ONE_LAUNCH),
        predicted=lambda card: _times(card.bytes_ms(30 * PARAMETERS / 2), 1.1),
    ),
    Goal(
        "adamw on masters / its floor", _over_its_floor(WITH_WEIGHTS, ONE_LAUNCH), most=1.25,
        predicted=lambda card: 1.1,
    ),
    Goal(
        "adamw on masters / torch's fused, then copied",
        lambda found: found.ratio(WITH_WEIGHTS, ONE_LAUNCH, TORCHS), most=0.9,
        predicted=lambda card: 30 / 38,
    ),
    Goal(
        "adamw in fp32 alone / torch's fused",
        lambda found: found.ratio(WITH_WEIGHTS, ONE_LAUNCH_ALONE, TORCHS_ALONE), most=1.05,
        predicted=lambda card: 28 / 32,
    ),
    Goal(
        "adamw8bit in bf16, 2³⁰, ms", _ms(OPTIMIZER, "adamw8bit", dtype="bfloat16"),
        predicted=lambda card: 6.2,
    ),
    Goal(
        "adamw8bit / its floor", _over_its_floor(OPTIMIZER, "adamw8bit"), most=1.5,
        predicted=lambda card: card.of_kind(H100=1.7, H200=2.5),
    ),
)  # fmt: skip
