"""A run under way: the objects that the loop, its end and a resumption work with, made in their order."""

from __future__ import annotations

from dataclasses import dataclass

from repsft_fast.rundir.lock import RunLock
from repsft_fast.signals import Signals
from repsft_fast.state import RunState
from repsft_fast.training import garbage
from repsft_fast.training.conductor import Conductor
from repsft_fast.training.parts import Parts
from repsft_fast.training.policy import build_policy, snapshots_needed, weights_are_enough
from repsft_fast.training.recovery import Recovery
from repsft_fast.training.refusals import reverts
from repsft_fast.training.reporter import Reporter
from repsft_fast.training.saver import Saver, saves_on_the_way
from repsft_fast.training.snapshots import Snapshots, closed_list
from repsft_fast.training.task_evaluation import TaskEvaluation


@dataclass
class Run:
    """Everything of one run. `began`: False until a checkpoint, or that there is none, has taken the settings
    of a resumed run: up to then its folder stays as it was, the result of the run before too."""

    parts: Parts
    state: RunState
    snapshots: Snapshots
    reporter: Reporter
    conductor: Conductor
    recovery: Recovery
    saver: Saver
    tasks: TaskEvaluation
    began: bool = True

    @staticmethod
    def of(parts: Parts, signals: Signals, *, lock: RunLock | None = None, began: bool = True) -> Run:
        """lock: of the run's folder; None on ranks that do not write. Raises what a policy, snapshots or
        trackers cannot be had for."""
        policy, state = build_policy(parts), closed_list(parts)
        whole = 1 if saves_on_the_way(parts.config) else 0
        snapshots = Snapshots(
            parts,
            state,
            snapshots_needed(parts, policy),
            weights_only=weights_are_enough(parts.config),
            whole=2 if reverts(parts.config) else whole,
        )
        reporter = Reporter(parts)
        conductor = Conductor(parts, reporter, policy, snapshots)
        recovery = Recovery(parts, snapshots, conductor, reporter)
        saver = Saver(parts, state, snapshots, conductor, reporter, signals, lock)
        tasks = TaskEvaluation(parts, reporter, conductor.spans, lambda: signals.received)
        return Run(parts, state, snapshots, reporter, conductor, recovery, saver, tasks, began)

    def between_updates(self) -> bool:
        """Called when an update and all that followed from it are done. True when the run must end here."""
        leaving = self.saver.between_updates()
        if not leaving:
            self.recovery.snapshot_last_good(saved=self.saver.is_saved)
        garbage.collect_when_many()
        return leaving

    def close(self) -> None:
        """Threads, files and page-locked memory are given back."""
        self.saver.close()
        self.reporter.live.close()
        self.snapshots.close()
