"""Between updates: checkpoints when due, the end when a signal asked for it; and the way back in on --resume.

A checkpoint is the closed list of state, the policy's table and moments, and what a foreign run is told by. It is written
by a thread from a frozen copy, so training waits for the copy only. Everything is decided alike on every rank.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repsft_fast import checkpoint
from repsft_fast.config import Config
from repsft_fast.distributed import Loss, all_sum, at_ease, barrier, largest, last_words, lost_error, when_dead
from repsft_fast.errors import CheckpointError, describe
from repsft_fast.models import write_state
from repsft_fast.report.result import FILE as RESULT
from repsft_fast.state import RunState
from repsft_fast.training import chunks
from repsft_fast.training.conductor import Conductor
from repsft_fast.training.finish import interrupted
from repsft_fast.training.moments import BEST, MOMENT, Moments
from repsft_fast.training.parts import Parts
from repsft_fast.training.recovery import Recovery
from repsft_fast.training.reporter import Reporter
from repsft_fast.training.rundir import chunk_bytes_before
from repsft_fast.training.signals import Signals
from repsft_fast.training.step import OutOfMemory

FOLDER = "checkpoints"
_LOOK_EVERY_S = 1.0  # ranks ask each other for signals and clocks about this often
# Settings that say how fast or where, not what: a resumed run may have others. `chunks` says it where loss.chunk_bytes differs.
_FREE = (
    "run.folder", "model.attention", "model.layer_kernels", "model.activation_checkpointing", "model.compile",
    "model.trust_remote_code", "model.save_dtype", "tokenizer", "data", "batch.row_tokens", "batch.bucket_tokens",
    "loss.chunk_bytes", "numbers", "log", "checkpoint", "distributed", "snapshot", "evaluate.generate_samples",
    "evaluate.generate_tokens",
)  # fmt: skip
# Counters that every rank holds a share of. On disk they are whole, and come back to one rank.
_SHARES = ("ledger/", "samples/")


class Saver:
    """Owns the writer and the clock of the checkpoints. `leaving` is the signal that ends the run, once all ranks know it."""

    def __init__(
        self,
        parts: Parts,
        state: RunState,
        moments: Moments,
        conductor: Conductor,
        reporter: Reporter,
        signals: Signals,
        recovery: Recovery,
    ):
        self.parts, self.state, self.moments = parts, state, moments
        self.conductor, self.reporter, self.signals, self.recovery = conductor, reporter, signals, recovery
        self.folder = Path(parts.folder) / FOLDER
        self.leaving = 0
        self.last: Path | None = None  # the newest generation known to be whole
        self.failed = ""  # why the newest save is not, where it is not
        self._settings = parts.config.checkpoint
        self._parent: int | None = None
        self._next_number = 0
        self._writer: checkpoint.BackgroundWriter | None = None
        self._saved_at, self._best_at = parts.progress.all_work.updates, 0
        self._clock = self._looked = time.monotonic()
        self._look_at, self._stride = 0, 1  # the update at which ranks ask each other next, and how far apart that is
        moments.make_room = self.wait
        when_dead(self._do_not_wait_for)
        last_words(lambda loss: interrupted(parts, reporter, lost_error(loss, parts.world.rank)))
        self._weights = _names_of_weights(parts.model)

    # In the loop -----------------------------------------------------------------------------------------------------

    def between_updates(self) -> bool:
        """Called when an update and all that followed from it are done. True when the run must end here."""
        if self.leaving:
            return True
        self._collect()
        done = self.parts.progress.all_work.updates
        every = self._settings.every_updates
        signal, late = self._agreed(done)
        if signal:
            self.save("a signal", wait=True)
            self.leaving = signal
        elif done > self._saved_at and ((every and done % every == 0) or late or self._is_best()):
            self.save("due")
        self.recovery.keep_safe(saved=done == self._saved_at)
        return bool(self.leaving)

    def _agreed(self, done: int) -> tuple[int, bool]:
        """(signal of any rank or 0, whether a rank's clock says a checkpoint is due); the same on every rank."""
        now = time.monotonic()
        minutes = self._settings.every_minutes
        late = minutes is not None and now - self._clock >= 60.0 * minutes
        if self.parts.world.size == 1:
            return self.signals.received, late
        if done < self._look_at:
            return 0, False
        each_us = int((now - self._looked) * 1e6 / self._stride)
        signal, any_late, each_us = largest(self.signals.received, int(late), each_us)
        self._looked, self._stride = now, max(1, min(64, int(_LOOK_EVERY_S * 1e6 / max(1, each_us))))
        self._look_at = done + self._stride
        return signal, bool(any_late)

    def _is_best(self) -> bool:
        best = self.parts.progress.best
        return self._settings.keep_best and best is not None and best["update"] == self.parts.progress.updates != self._best_at

    # Saving ----------------------------------------------------------------------------------------------------------

    def save(self, why: str, *, wait: bool = False) -> None:
        """Freeze the state and have it written. A save that fails is told and the run goes on: what was whole stays whole.

        stall_seconds is what the save costs training, its copy; waited_seconds goes to writers, the one before it as a rule.
        """
        parts, progress = self.parts, self.parts.progress
        self.conductor.read_ledger()  # no checkpoint of a state that an unread veto would end; what the device does is training
        started = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - started
        writer = self._writer or self._start_writer()
        self._next_number = max(self._next_number, *largest(checkpoint.next_generation(self.folder)))
        number, self._next_number = self._next_number, self._next_number + 1
        held = self.moments.freeze()
        tensors = self._whole_shares(held.tensors)
        values = self._values(held.values, best=any(name.startswith(f"{BEST}/") for name in tensors))
        best = progress.best if self._is_best() else None
        writer.submit(
            number,
            tensors,
            values,
            done=held.release,
            write_model=self._write_model if parts.world.is_main else None,
            score=-best["loss"] if best is not None else None,
        )
        self._saved_at, self._clock = progress.all_work.updates, time.monotonic()
        self._best_at = progress.updates if best is not None else self._best_at
        if wait or not self.moments.freezes:
            submitted = time.perf_counter()
            self.wait()
            barrier(f"checkpoint {number}")
            waited += time.perf_counter() - submitted
        seconds = time.perf_counter() - started
        self.reporter.apart(seconds)
        facts = {"generation": number, "why": why, "stall_seconds": seconds - waited, "waited_seconds": waited}
        self.reporter.event("checkpoint", facts)

    def save_what_is_whole(self, problem: OutOfMemory) -> None:
        """A checkpoint before the run ends for want of memory, where checkpoints are asked for and the state is whole."""
        if saves_on_the_way(self.parts.config) and not problem.torn and self.parts.world.size == 1:
            self.save("out of memory", wait=True)

    def _values(self, moments: dict[str, Any], *, best: bool) -> dict[str, Any]:
        """The host half of a checkpoint, as JSON."""
        return {
            "state": self.state.values(),
            "conductor": self.conductor.values(),
            "moments": moments,
            "best": best,
            "decided": {"chunk_bytes": chunks.decided(self.parts)},
            "metrics_bytes": self._metrics().stat().st_size if self.parts.world.is_main else 0,
            "seconds": time.perf_counter() - self.reporter.started,
        }

    def wait(self) -> None:
        """Until the save under way has ended."""
        if self._writer is not None:
            self._writer.wait()
            self._collect()

    def _do_not_wait_for(self, loss: Loss) -> None:
        """Another rank has died: the save under way fails unless its part was there. Called by the thread that saw it."""
        writer = self._writer
        if writer is not None:
            writer.give_up(str(loss))

    def close(self, lost: str = "") -> None:
        """End the thread; what it was writing is written. lost: another rank's end, whose part is then not waited for.

        Without one, this rank is not ended for another's from here on: what it has to write, the model, is worth it.
        """
        if not lost:
            at_ease()
        if self._writer is not None:
            if lost:
                self._writer.give_up(lost)
            self._tell(self._writer.close())
            self._writer = None

    def _start_writer(self) -> checkpoint.BackgroundWriter:
        world = self.parts.world
        (attempt,) = largest(uuid.uuid4().int >> 66 if world.is_main else 0)
        self._writer = checkpoint.BackgroundWriter(
            self.folder,
            parent=self._parent,
            keep_last=self._settings.keep_last,
            keep_best=int(self._settings.keep_best),
            rank=world.rank,
            world_size=world.size,
            attempt=f"{attempt:x}",
            identity=identity(self.parts),
        )
        return self._writer

    def _collect(self) -> None:
        if self._writer is not None:
            self._tell(self._writer.poll())

    def _tell(self, outcomes: list[checkpoint.Outcome]) -> None:
        for outcome in outcomes:
            self.failed = str(outcome.error) if outcome.path is None else ""
            if outcome.error is not None:
                self.reporter.note(f"checkpoint {outcome.generation}: {outcome.error}")
            if outcome.path is not None:
                self.last = outcome.path
                facts = {"generation": outcome.generation, "seconds": outcome.seconds, "deleted": list(outcome.deleted)}
                self.reporter.event("checkpoint_written", facts | outcome.spent.named())

    def _whole_shares(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Counters of which every rank holds a share, summed; all else as it is."""
        if self.parts.world.size == 1:
            return tensors
        return {name: all_sum(t.clone()) if _is_share(name) else t for name, t in tensors.items()}

    def _write_model(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """The generation's weights as from_pretrained loads them. In the writer's thread: live weights are not read."""
        read: dict[str, Tensor] = {}
        state: dict[str, Tensor] = {}
        for name, saved in self._weights.items():
            if isinstance(saved, Tensor):
                state[name] = saved
                continue
            if saved not in read:
                read[saved] = tensors[saved]
            state[name] = read[saved]  # tied weights stay one tensor
        write_state(self.parts.model, self.parts.tokenizer, state, folder, dtype=self.parts.config.model.save_dtype)

    def _metrics(self) -> Path:
        return Path(self.parts.folder) / "metrics.jsonl"

    # Resuming --------------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Go on from the newest whole checkpoint; from the beginning where the run was ended before its first.

        Raises CheckpointError when there are checkpoints and none is whole, and ForeignCheckpoint for another run's.
        """
        parts = self.parts
        if parts.world.is_main:
            (Path(parts.folder) / RESULT).unlink(missing_ok=True)  # how it ended before is no longer how it ended
        found, problem = self._newest() if parts.world.is_main else (None, None)
        answer = 1 if problem is not None else 2 if found is None else found.number + 3
        (answer,) = largest(answer if parts.world.is_main else 0)
        if answer == 1:
            raise problem or CheckpointError(describe(str(self.folder), "rank 0 found no whole checkpoint"))
        if answer == 2:
            self._truncate_metrics(0)
            self.reporter.note("--resume: the run ended before its first checkpoint, so it begins anew")
            (before,) = largest(chunk_bytes_before(parts.config) or 0 if parts.world.is_main else 0)
            if before:  # what killed runs began with is in run.yaml, so that any number of beginnings make one run
                self._say(chunks.resume(parts, before))
            return
        path = self.folder / f"gen-{answer - 3:08d}"
        values, resharded = self._load(path)
        self._parent = answer - 3
        self.last = path
        self._truncate_metrics(values["metrics_bytes"])
        if resharded:
            torch.manual_seed(parts.config.run.seed + 1_000_003 * parts.progress.updates + parts.world.rank)
        self._saved_at = parts.progress.all_work.updates
        self.reporter.resumed(values["seconds"])
        problems = list(found.problems) if found is not None else []
        for text in problems:
            self.reporter.note(f"--resume: {text}")
        if "decided" in values:
            self._say(chunks.resume(parts, values["decided"]["chunk_bytes"]))
        elif (now := chunks.decided(parts)) is not None:
            self._say(f"an older version wrote the checkpoint, which names no loss.chunk_bytes: {now:,} bytes from here on")
        which = "the newest whole checkpoint" if problems else "the newest checkpoint"
        self.reporter.note(f"--resume: goes on after update {parts.progress.updates} from {path.name}, {which}")
        self.reporter.event("resume", {"generation": answer - 3, "problems": problems, "resharded": resharded})

    def _say(self, text: str | None) -> None:
        if text is not None:
            self.reporter.note(f"--resume: {text}")

    def _newest(self) -> tuple[checkpoint.Generation | None, CheckpointError | None]:
        checkpoint.clean(self.folder)
        try:
            return checkpoint.newest(self.folder), None
        except CheckpointError as error:
            return None, error if checkpoint.generations(self.folder) else None

    def _load(self, path: Path) -> tuple[dict[str, Any], bool]:
        """Everything of a generation into the run: kept moments first pass through the live tensors into their pools."""
        parts = self.parts
        place: dict[str, Any] = {"rank": parts.world.rank, "world_size": parts.world.size, "looked_at": True}

        def fill(tensors: Mapping[str, Tensor], prefix: str = "") -> checkpoint.Resumed:
            ignore = () if prefix else (MOMENT, f"{BEST}/")
            loaded = checkpoint.load(path, tensors, prefix=prefix, ignore=ignore, identity=identity(parts), **place)
            for name, tensor in tensors.items():
                if _is_share(name) and not parts.world.is_main:
                    tensor.zero_()
            return loaded

        live = self.state.tensors()
        loaded = fill(live)
        values: dict[str, Any] = loaded.values
        for name, kept in values["moments"].items():
            self.moments.put_in(name, kept, partial(fill, prefix=f"{MOMENT}{name}/"))
        if values["best"]:
            self.moments.put_in(BEST, None, partial(fill, prefix=f"{BEST}/"))
        if values["moments"] or values["best"]:
            fill(live)
        self._put_back(values)
        return values, loaded.resharded

    def _put_back(self, values: dict[str, Any]) -> None:
        self.state.load_values(values["state"])
        self.conductor.load(values["conductor"])

    def _truncate_metrics(self, size: int) -> None:
        """Forget the lines of updates that will be made again."""
        path = self._metrics()
        if self.parts.world.is_main and path.exists() and path.stat().st_size > size:
            os.truncate(path, size)


def saves_on_the_way(config: Config) -> bool:
    settings = config.checkpoint
    return bool(settings.every_updates or settings.every_minutes or settings.keep_best)


def identity(parts: Parts) -> dict[str, Any]:
    """What a run and its resumption must have in common: the data as tokens, and the settings that change numbers."""
    return {"data": parts.data.digest} | dict(sorted(_flat(parts.config)))


def _flat(config: Config) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []

    def walk(values: Mapping[str, Any], prefix: str) -> None:
        for key, value in values.items():
            name = f"{prefix}{key}"
            if any(name == free or name.startswith(f"{free}.") for free in _FREE):
                continue
            if isinstance(value, Mapping) and name != "model.config":
                walk(value, f"{name}.")
            else:
                found.append((name, list(value) if isinstance(value, tuple) else value))

    walk(config.to_dict(), "")
    return found


def _names_of_weights(model: Any) -> dict[str, str | Tensor]:
    """`state_dict` name → name on the closed list, or the tensor itself where nothing changes it (frozen, a buffer)."""
    live = {id(p): f"model/{name}" for name, p in model.named_parameters() if p.requires_grad}
    return {name: live.get(id(t), t.detach()) for name, t in model.state_dict(keep_vars=True).items()}


def _is_share(name: str) -> bool:
    return any(name.startswith(share) or f"/{share}" in name for share in _SHARES)
