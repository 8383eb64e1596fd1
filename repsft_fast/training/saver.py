"""Between updates: checkpoints when due, the end when a signal asked for it. `resuming` is the way back in.

A checkpoint is the closed list of state, the policy's table and moments, and what a foreign run is told by. It is written
by a thread from a frozen copy, so training waits for the copy only. Everything is decided alike on every rank.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from repsft_fast import checkpoint
from repsft_fast.config import Config
from repsft_fast.data.cache import tokenizer_fingerprint
from repsft_fast.distributed import Loss, all_sum, at_ease, barrier, largest, last_words, lost_error, together, when_dead
from repsft_fast.errors import describe
from repsft_fast.models import write_state
from repsft_fast.runlock import RunLock
from repsft_fast.schedule import NEEDS_TOTAL
from repsft_fast.state import RunState
from repsft_fast.training import chunks, extend, resuming
from repsft_fast.training.conductor import Conductor
from repsft_fast.training.ended import Ended
from repsft_fast.training.finish import FolderLost, code_of, interrupted
from repsft_fast.training.identity import deciders, identity
from repsft_fast.training.made import METRICS
from repsft_fast.training.moments import BEST, Moments
from repsft_fast.training.parts import Parts
from repsft_fast.training.recovery import Recovery
from repsft_fast.training.reporter import Reporter
from repsft_fast.training.resuming import is_share
from repsft_fast.training.rundir import RunFolder
from repsft_fast.training.signals import Signals
from repsft_fast.training.step import OutOfMemory

FOLDER = "checkpoints"
_LOOK_EVERY_S = 1.0  # ranks ask each other for signals and clocks about this often


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
        lock: RunLock | None = None,
        *,
        began: bool = True,
    ):
        self.lock = lock
        self.parts, self.state, self.moments = parts, state, moments
        self.conductor, self.reporter, self.signals, self.recovery = conductor, reporter, signals, recovery
        self.folder = Path(parts.folder) / FOLDER
        self.leaving = 0
        self.last: Path | None = None  # the newest generation known to be whole
        self.failed = ""  # why the newest save is not, where it is not
        self._settings = parts.config.checkpoint
        self._parent: int | None = None
        self._extendable: int | None = None  # the newest generation from before the decay of the learning rate
        self.began = began  # False until a checkpoint, or that there is none, has taken the settings of a resumed run
        self._validated = False  # the end was looked at, where a longer run would not have
        self._tokenizer = tokenizer_fingerprint(parts.tokenizer)
        self._at_end = False  # the state is that of the end, and saved
        self._next_number = 0
        self._writer: checkpoint.BackgroundWriter | None = None
        self._saved_at, self._best_at = parts.progress.all_work.updates, 0
        self._clock = self._looked = time.monotonic()
        self._look_at, self._stride = 0, 1  # the update at which ranks ask each other next, and how far apart that is
        moments.make_room = self.wait
        when_dead(self._do_not_wait_for)
        last_words(lambda loss: interrupted(parts, reporter, lost_error(loss, parts.world.rank)) if self.began else None)
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
        elif done > self._saved_at and self._decay_is_next():
            self.save("the decay is next")
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

    def _decay_is_next(self) -> bool:
        """Whether this is the last moment before the budget starts the decay, and no checkpoint is as good."""
        at = self.parts.progress.updates
        wanted = self._settings.keep_extendable and self.parts.schedule.decays_on_demand and self._can_extend()
        if not wanted or self.conductor.looks_at != at + 1:
            return False
        return self._extendable is None or at - self._saved_at > at // 100

    def _can_extend(self) -> bool:
        """Whether a run with a larger budget would have the state there is now."""
        schedule = self.parts.schedule
        return schedule.name not in NEEDS_TOTAL and schedule.decay_start is None and not self._validated

    def _protected(self) -> list[int]:
        """The generation that a larger budget would go on from, once newer ones are no place for that."""
        return [] if self._extendable is None or self._can_extend() else [self._extendable]

    # Saving ----------------------------------------------------------------------------------------------------------

    def save(self, why: str, *, wait: bool = False) -> None:
        """Freeze the state and have it written. A save that fails is told and the run goes on: what was whole stays whole.

        stall_seconds is what the save costs training, its copy; waited_seconds goes to writers, the one before it as a rule.
        """
        parts, progress = self.parts, self.parts.progress
        self._check_lock()
        self.conductor.read_ledger()  # no checkpoint of a state that an unread veto would end; what the device does is training
        started = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - started
        writer = self._writer or self._start_writer()
        self._next_number = max(self._next_number, *largest(checkpoint.next_generation(self.folder)))
        number, self._next_number = self._next_number, self._next_number + 1
        told = len(self.moments.messages)
        held = self.moments.freeze(copy=not wait)
        for text in self.moments.messages[told:]:
            self.reporter.note(text)
        tensors = self._whole_shares(held.tensors)
        values = self._values(held.values, best=any(name.startswith(f"{BEST}/") for name in tensors))
        best = progress.best if self._is_best() else None
        writer.submit(
            number,
            tensors,
            values,
            done=held.release,
            write_model=self._write_model if parts.world.is_main else None,
            protect=self._protected(),
            score=-best["loss"] if best is not None else None,
        )
        if self._settings.keep_extendable and self._can_extend():
            self._extendable = number
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

    def save_end(self, *, validated: bool = False) -> None:
        """The state at the end, before anything is made of it: what fails from here on can be done again.

        validated: once more, with what a last validation found; a run with a larger budget would not have looked there.
        """
        if validated or not self._at_end:
            self._validated = validated
            self.save("the end, validated" if validated else "the end", wait=True)
            self._at_end = True

    def _check_lock(self) -> None:
        """FolderLost, or what stands for it on other ranks, when the folder is no longer this run's alone."""
        with together():
            if self.lock is not None and (words := self.lock.lost()) is not None:
                todo = "nothing more is written; see what runs there, then --resume goes on from its last checkpoint"
                raise FolderLost(describe(str(self.parts.folder), words, todo=todo))

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
            "decided": {
                "chunk_bytes": chunks.decided(self.parts),
                "budget": extend.record(self.parts),
                "deciders": deciders(self.parts),
                "tokenizer": self._tokenizer,
            },
            "ended_by": code_of(self.conductor) if self.parts.progress.reason is not None else None,
            "extendable": self._extendable,
            "validated": self._validated,
            "metrics_bytes": self._metrics_bytes(),
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
                self.reporter.trouble(f"checkpoint {outcome.generation}: {outcome.error}")
            if outcome.path is not None:
                self.last = outcome.path
                facts = {"generation": outcome.generation, "seconds": outcome.seconds, "deleted": list(outcome.deleted)}
                self.reporter.event("checkpoint_written", facts | outcome.spent.named())

    def _whole_shares(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Counters of which every rank holds a share, summed; all else as it is."""
        if self.parts.world.size == 1:
            return tensors
        return {name: all_sum(t.clone()) if is_share(name) else t for name, t in tensors.items()}

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

    def _metrics_bytes(self) -> int:
        path = Path(self.parts.folder) / METRICS
        return path.stat().st_size if self.parts.world.is_main and path.exists() else 0

    # Resuming --------------------------------------------------------------------------------------------------------

    def resume(self, folder: RunFolder | None = None, ended: Ended | None = None) -> bool:
        """`resuming.resume`; whether the run has ended and its result is whole, so that nothing is left to do."""
        found = resuming.resume(self, folder, ended)
        if found.path is not None:
            self._parent = checkpoint.number_of(found.path.name)
            self.last = found.path
            self._saved_at = self.parts.progress.all_work.updates
            self._at_end = self.parts.progress.reason is not None
            if self._settings.keep_extendable and self._can_extend():  # its values were made before it had a number
                self._extendable = self._parent
        return found.is_done

    def put_back(self, values: dict[str, Any]) -> None:
        """The host half of a checkpoint into the run."""
        self.state.load_values(values["state"])
        self.conductor.load(values["conductor"])
        self._extendable = values.get("extendable")


def saves_on_the_way(config: Config) -> bool:
    settings = config.checkpoint
    return bool(settings.every_updates or settings.every_minutes or settings.keep_best)


def _names_of_weights(model: Any) -> dict[str, str | Tensor]:
    """`state_dict` name → name on the closed list, or the tensor itself where nothing changes it (frozen, a buffer)."""
    live = {id(p): f"model/{name}" for name, p in model.named_parameters() if p.requires_grad}
    return {name: live.get(id(t), t.detach()) for name, t in model.state_dict(keep_vars=True).items()}
