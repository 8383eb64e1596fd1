"""Between updates: checkpoints when due, the end when a signal asked for it. `resume` is the way back in.

A checkpoint is the closed list of state, the policy's table and snapshots, and what a foreign run is told by.
It is written by a thread from a frozen copy, so training waits for the copy only. Everything is decided alike
on every rank.
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
from repsft_fast.distributed import (
    LostRank,
    all_sum,
    barrier,
    broadcast_from_main,
    disarm,
    max_over_hosts,
    raise_together,
)
from repsft_fast.models import write_state
from repsft_fast.rundir.folder import CHECKPOINTS
from repsft_fast.rundir.identity import deciders, identity
from repsft_fast.rundir.lock import RunLock
from repsft_fast.rundir.made import METRICS
from repsft_fast.schedule import NEEDS_TOTAL
from repsft_fast.signals import Signals
from repsft_fast.state import RunState
from repsft_fast.training import budget, decided
from repsft_fast.training.conductor import Conductor
from repsft_fast.training.parts import Parts
from repsft_fast.training.reporter import Reporter
from repsft_fast.training.snapshots import BEST, Snapshots
from repsft_fast.training.step import OutOfMemory

_ASK_EVERY_S = 1.0  # ranks ask each other for signals and clocks about this often
# Counters that every rank holds a share of. On disk they are whole, and come back to one rank.
_PARTIAL_SUMS = ("ledger/", "samples/")


class Saver:
    """Owns the writer and the clock of the checkpoints.

    leaving     the signal that ends the run, once all ranks know it
    last        the newest generation known to be whole
    failed      why the newest save is not, where it is not
    """

    def __init__(
        self,
        parts: Parts,
        state: RunState,
        snapshots: Snapshots,
        conductor: Conductor,
        reporter: Reporter,
        signals: Signals,
        lock: RunLock | None = None,
    ):
        """lock: of the run's folder; None on ranks that do not write."""
        self.parts, self.state, self.snapshots = parts, state, snapshots
        self.conductor, self.reporter, self.signals, self.lock = conductor, reporter, signals, lock
        self.folder = Path(parts.folder) / CHECKPOINTS
        self.leaving = 0
        self.last: Path | None = None
        self.failed = ""
        self._settings = parts.config.checkpoint
        self._parent: int | None = None
        # the newest generation from before the decay of the learning rate
        self._extendable: int | None = None
        self._validated = False  # the end was looked at, where a longer run would not have
        self._tokenizer = tokenizer_fingerprint(parts.tokenizer)
        self._at_end = False  # the state is that of the end, and saved
        self._next_number = 0
        self._writer: checkpoint.BackgroundWriter | None = None
        self._saved_at, self._best_at = parts.lasting.all_work.updates, 0
        self._clock = self._asked = time.monotonic()
        # the update at which ranks ask each other next, and how far apart that is
        self._ask_at, self._stride = 0, 1
        self._weights = _names_of_weights(parts.model)

    # In the loop ------------------------------------------------------------------------------------------

    def between_updates(self) -> bool:
        """Called when an update and all that followed from it are done. True when the run must end here."""
        if self.leaving:
            return True
        self._collect()
        done, every = self.parts.lasting.all_work.updates, self._settings.every_updates
        signal, late = self._agreed(done)
        if signal:
            self.save("a signal", wait=True)
            self.leaving = signal
        elif done > self._saved_at and ((every and done % every == 0) or late or self._is_best()):
            self.save("due")
        elif done > self._saved_at and self._decay_is_next():
            self.save("the decay is next")
        return bool(self.leaving)

    @property
    def is_saved(self) -> bool:
        """Whether the newest checkpoint is of the state as it is."""
        return self.parts.lasting.all_work.updates == self._saved_at

    def _agreed(self, done: int) -> tuple[int, bool]:
        """(signal of any rank or 0, whether a rank's clock says a checkpoint is due); the same on every
        rank."""
        now = time.monotonic()
        minutes = self._settings.every_minutes
        late = minutes is not None and now - self._clock >= 60.0 * minutes
        if self.parts.world.size == 1:
            return self.signals.received, late
        # A message in every update would cost more than it tells: about one a second, at updates that every
        # rank reckons alike from the slowest one's pace.
        if done < self._ask_at:
            return 0, False
        each_us = int((now - self._asked) * 1e6 / self._stride)
        signal, any_late, each_us = max_over_hosts(
            self.parts.world, self.signals.received, int(late), each_us
        )
        self._asked, self._stride = now, max(1, min(64, int(_ASK_EVERY_S * 1e6 / max(1, each_us))))
        self._ask_at = done + self._stride
        return signal, bool(any_late)

    def _is_best(self) -> bool:
        """Whether the state is the best validation's, and no checkpoint holds it as that yet."""
        best, now = self.parts.lasting.best, self.parts.progress.updates
        if not self._settings.keep_best or best is None:
            return False
        return best["update"] == now and now != self._best_at

    def _decay_is_next(self) -> bool:
        """Whether this is the last moment before the budget starts the decay, and no checkpoint is as
        good."""
        at = self.parts.progress.updates
        wanted = (
            self._settings.keep_extendable and self.parts.schedule.decays_on_demand and self._can_extend()
        )
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

    # Saving -----------------------------------------------------------------------------------------------

    def save(self, why: str, *, wait: bool = False) -> None:
        """Freeze the state and have it written. A save that fails is told and the run goes on: what was whole
        stays whole.

        stall_seconds is what the save costs training, its copy; waited_seconds goes to writers, the one
        before it as a rule.
        """
        parts, world = self.parts, self.parts.world
        self._check_lock()
        # No checkpoint of a state that an unread veto would end; what the device does until then is training.
        self.conductor.read_ledger()
        started = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - started
        # All ranks write into one generation. Some may see a newer one than others do.
        writer = self._writer or self._start_writer()
        there = max_over_hosts(world, checkpoint.next_generation(self.folder))
        number = max(self._next_number, *there)
        self._next_number = number + 1
        best = parts.lasting.best if self._is_best() else None
        self._submit(writer, number, copy=not wait, score=-best["loss"] if best is not None else None)
        if self._settings.keep_extendable and self._can_extend():
            self._extendable = number
        self._saved_at, self._clock = parts.lasting.all_work.updates, time.monotonic()
        self._best_at = parts.progress.updates if best is not None else self._best_at
        # Live tensors instead of a copy: nothing may change before they are written.
        if wait or not self.snapshots.freezes:
            submitted = time.perf_counter()
            self.wait()
            barrier(world, f"checkpoint {number}")
            waited += time.perf_counter() - submitted
        seconds = time.perf_counter() - started
        self.reporter.exclude_seconds(seconds)
        facts = {
            "generation": number,
            "why": why,
            "stall_seconds": seconds - waited,
            "waited_seconds": waited,
        }
        self.reporter.event("checkpoint", facts)

    def _submit(
        self, writer: checkpoint.BackgroundWriter, number: int, *, copy: bool, score: float | None
    ) -> None:
        """Freeze the state and hand it to the writer."""
        told = len(self.snapshots.messages)
        held = self.snapshots.freeze(copy=copy)
        for text in self.snapshots.messages[told:]:
            self.reporter.note(text)
        tensors = self._whole_shares(held.tensors)
        values = self._values(held.values, best=any(name.startswith(f"{BEST}/") for name in tensors))
        writer.submit(
            number,
            tensors,
            values,
            done=held.release,
            write_model=self._write_model if self.parts.world.is_main else None,
            protect=self._protected(),
            score=score,
        )
        held.reader = self

    def save_end(self, *, validated: bool = False) -> None:
        """The state at the end, before anything is made of it: what fails from here on can be done again.

        validated: once more, with what a last validation found; a run with a larger budget would not have
        looked there.
        """
        if validated or not self._at_end:
            self._validated = validated
            self.save("the end, validated" if validated else "the end", wait=True)
            self._at_end = True

    def _check_lock(self) -> None:
        """FolderLost, or what stands for it on other ranks, when the folder is no longer this run's alone."""
        with raise_together(self.parts.world):
            if self.lock is not None:
                self.lock.check()

    def save_what_is_whole(self, problem: OutOfMemory) -> None:
        """A checkpoint before the run ends for want of memory, where checkpoints are asked for and the state
        is whole."""
        if saves_on_the_way(self.parts.config) and not problem.torn and self.parts.world.size == 1:
            self.save("out of memory", wait=True)

    def _values(self, snapshots: dict[str, Any], *, best: bool) -> dict[str, Any]:
        """The host half of a checkpoint, as JSON."""
        parts, history = self.parts, self.conductor.history
        return {
            "state": self.state.values(),
            "conductor": self.conductor.values(),
            "moments": snapshots,
            "best": best,
            "decided": {
                **decided.record(parts),
                "budget": budget.record(parts.config, parts.budget, parts.schedule),
                "deciders": deciders(parts.config, parts.world),
                "tokenizer": self._tokenizer,
            },
            "ended_by": history.ended_by if parts.progress.reason is not None else None,
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

    def give_up_on(self, lost: LostRank) -> None:
        """Another rank has died: the save under way fails unless its part was there. Called by the thread
        that saw it."""
        writer = self._writer
        if writer is not None:
            writer.give_up(str(lost))

    def close(self, lost: str = "") -> None:
        """End the thread; what it was writing is written. lost: another rank's end, whose part is then not
        waited for.

        Without one, this rank is not ended for another's from here on: what it has to write, the model, is
        worth it.
        """
        if not lost:
            disarm(self.parts.world)
        if self._writer is not None:
            if lost:
                self._writer.give_up(lost)
            self._tell(self._writer.close())
            self._writer = None

    def _start_writer(self) -> checkpoint.BackgroundWriter:
        parts, world = self.parts, self.parts.world
        attempt = broadcast_from_main(world, f"{uuid.uuid4().int >> 66:x}")
        self._writer = checkpoint.BackgroundWriter(
            self.folder,
            parent=self._parent,
            keep_last=self._settings.keep_last,
            keep_best=int(self._settings.keep_best),
            rank=world.rank,
            world_size=world.size,
            attempt=attempt,
            identity=identity(parts.config, parts.tokenizer, parts.base, parts.data.digest),
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
                facts = {
                    "generation": outcome.generation,
                    "seconds": outcome.seconds,
                    "deleted": list(outcome.deleted),
                }
                self.reporter.event("checkpoint_written", facts | outcome.spent.named())

    def _whole_shares(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Counters of which every rank holds a share, summed; all else as it is."""
        if self.parts.world.size == 1:
            return tensors
        return {name: all_sum(t.clone()) if is_partial_sum(name) else t for name, t in tensors.items()}

    def _write_model(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """The generation's weights as from_pretrained loads them. In the writer's thread: live weights are
        not read."""
        read: dict[str, Tensor] = {}
        state: dict[str, Tensor] = {}
        for name, saved in self._weights.items():
            if isinstance(saved, Tensor):
                state[name] = saved
                continue
            if saved not in read:
                read[saved] = tensors[saved]
            state[name] = read[saved]  # tied weights stay one tensor
        dtype = self.parts.config.model.save_dtype
        write_state(self.parts.model, self.parts.tokenizer, state, folder, dtype=dtype)

    def _metrics_bytes(self) -> int:
        path = Path(self.parts.folder) / METRICS
        return path.stat().st_size if self.parts.world.is_main and path.exists() else 0

    # Resuming (`resume`) ----------------------------------------------------------------------------------

    def load(self, values: Mapping[str, Any]) -> None:
        """The host half of a checkpoint into the run."""
        self.state.load_values(values["state"])
        self.conductor.load(values["conductor"])
        self._extendable = values.get("extendable")

    def continue_from(self, generation: Path) -> None:
        """The state is this generation's: the next one follows it."""
        self._parent = checkpoint.number_of(generation.name)
        self.last = generation
        self._saved_at = self.parts.lasting.all_work.updates
        self._at_end = self.parts.progress.reason is not None
        # Its values were made before it had a number.
        if self._settings.keep_extendable and self._can_extend():
            self._extendable = self._parent


def saves_on_the_way(config: Config) -> bool:
    """Whether checkpoints are asked for before the end."""
    settings = config.checkpoint
    return bool(settings.every_updates or settings.every_minutes or settings.keep_best)


def is_partial_sum(name: str) -> bool:
    """Whether this tensor of the closed list is a rank's share of a sum."""
    return any(name.startswith(share) or f"/{share}" in name for share in _PARTIAL_SUMS)


def _names_of_weights(model: Any) -> dict[str, str | Tensor]:
    """`state_dict` name → name on the closed list, or the tensor itself where nothing changes it (frozen, a
    buffer)."""
    live = {id(p): f"model/{name}" for name, p in model.named_parameters() if p.requires_grad}
    return {name: live.get(id(t), t.detach()) for name, t in model.state_dict(keep_vars=True).items()}
