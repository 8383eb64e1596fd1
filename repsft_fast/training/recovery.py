"""When numbers go wrong or memory runs out: back to the last good state, or smaller rows, and on.

numbers.on_nonfinite: revert   the newest snapshot in memory is put back and the refused update is passed over
                               from then on
numbers.on_spike: revert       the same for loss spikes; what they are judged by is kept, so that a new level
                               is accepted
numbers.on_out_of_memory: retry   rows are halved (law 2: the same gradients) and the update is made again
"""

from __future__ import annotations

import gc
import time
from functools import partial
from typing import Any

import torch

from repsft_fast.data.plan import Cursor
from repsft_fast.distributed import gathered_stay
from repsft_fast.errors import TrainingError, describe
from repsft_fast.training.conductor import Conductor
from repsft_fast.training.parts import Parts
from repsft_fast.training.refusals import Refused, reverts
from repsft_fast.training.reporter import Reporter
from repsft_fast.training.row_lengths import longest_of, plan_of, said
from repsft_fast.training.samples import build_plan
from repsft_fast.training.snapshots import Snapshots
from repsft_fast.training.step import OutOfMemory
from repsft_fast.training.warm_up import warm_up

MAX_REVERTS = 8  # to one state: more, and it is not good


class Recovery:
    """Owns the last good state: taken whenever counters were read, were clean and a decision or checkpoint
    has just passed."""

    def __init__(self, parts: Parts, snapshots: Snapshots, conductor: Conductor, reporter: Reporter):
        self.parts, self.snapshots, self.conductor, self.reporter = parts, snapshots, conductor, reporter
        self.reverts = reverts(parts.config)
        self._marker: tuple[Any, ...] | None = None
        self._times = self._times_spiked = 0

    def snapshot_last_good(self, *, saved: bool = False) -> None:
        """Called between updates. Remembers this state when the policy's table grew since the last, or
        `saved` says so."""
        if not self.reverts:
            return
        history = self.conductor.history
        marker = (history.clock, len(history.decisions), self.parts.progress.stage, self.parts.progress.epoch)
        if saved or marker != self._marker:
            self.conductor.read_ledger()
            self.snapshots.snapshot_last_good()
            self._marker, self._times, self._times_spiked = marker, 0, 0
            self.conductor.refusals.go_back_on_spikes = True

    def go_back(self, refused: Refused) -> None:
        """Put the last good state back and pass the refused updates over from now on. TrainingError when that
        does not help: numbers that are not finite end the run, spikes are skipped from here on, until the
        next good state."""
        progress = self.parts.progress
        if refused.spikes_alone:
            self._times_spiked += 1
            self.conductor.refusals.go_back_on_spikes = self._times_spiked < MAX_REVERTS
        else:
            self._times += 1
        if self._times > MAX_REVERTS:
            todo = "look at the samples named above, or begin in another folder with a lower optim.lr"
            wrong = f"went back {MAX_REVERTS} times and is not finite again"
            raise TrainingError(describe("training", wrong, todo=todo), code="nonfinite")
        after = progress.updates
        with self.parts.spikes.lasting():
            self.snapshots.revert_to_last_good()
        self.parts.lasting.passed_over = sorted(
            {*map(tuple, self.parts.lasting.passed_over), *refused.cursors}
        )
        self.reporter.event(
            "revert", {"from": after, "passed_over": [list(cursor) for cursor in refused.cursors]}
        )
        self.reporter.note(
            f"went back from update {after} to {progress.updates}; the refused update is passed over"
        )

    def is_passed_over(self, cursor: Cursor) -> bool:
        return (cursor.stage, cursor.epoch, cursor.update) in map(tuple, self.parts.lasting.passed_over)

    def retried(self, problem: OutOfMemory) -> bool:
        """Halve the rows, so that the update is made again; False where that is not asked for or not
        possible.

        Not on several ranks: the others wait for this one in a message (a gather, a sum) that cannot be
        called back. All end with this rank's words (`distributed.lost_rank`), and a resumed run takes the
        rows they name.
        """
        before = row_tokens(self.parts)
        if not self._halved(problem):
            return False
        smaller = row_tokens(self.parts)
        self.reporter.note(
            f"out of memory in rows of {before} tokens: the update is made again in rows of {smaller}"
        )
        self._say_shapes()
        self.reporter.exclude_seconds(self.compile_layers())
        return True

    def compile_layers(self) -> float:
        """Make the graphs that today's rows need (`training.warm_up`), of shorter rows where memory runs out
        in it, as in an update. Seconds. TrainingError (out_of_memory) where no shorter ones are to be had."""
        in_vain = 0.0
        while True:
            before, began = row_tokens(self.parts), time.perf_counter()
            try:
                return in_vain + warm_up(self.parts, self.reporter.note)
            except OutOfMemory as problem:
                if not self._halved(problem):
                    raise self.out_of_memory(problem) from None
            except torch.OutOfMemoryError as error:  # of an evaluation's row, which is not halved
                raise self.out_of_memory(OutOfMemory(error, torn=False)) from None
            in_vain += time.perf_counter() - began
            smaller = row_tokens(self.parts)
            self.reporter.note(
                f"out of memory in rows of {before} tokens, for which layers were compiled: rows take"
                f" {smaller} from here on"
            )
            self._say_shapes()

    def _say_shapes(self) -> None:
        if (shapes := said(self.parts.plan)) is not None:
            self.reporter.note(shapes)

    def _halved(self, problem: OutOfMemory) -> bool:
        parts, smaller = self.parts, smaller_rows(self.parts)
        if (
            parts.config.numbers.on_out_of_memory == "stop"
            or smaller is None
            or problem.torn
            or parts.world.size > 1
        ):
            return False
        gc.collect()
        if parts.world.device.type == "cuda":
            torch.cuda.empty_cache()
        parts.lasting.row_tokens = smaller
        use_row_tokens(parts)
        return True

    def out_of_memory(self, problem: OutOfMemory) -> TrainingError:
        """The error that says what to lower and by how much."""
        now, smaller = row_tokens(self.parts), smaller_rows(self.parts)
        if smaller is not None:
            todo = f"lower batch.row_tokens from {now} to {smaller}; the updates stay the same"
        else:
            needs = f"batch.row_tokens is {now} and the longest sample needs that"
            if self.parts.plan.apart.alone_above == 0:
                needs = "batch.pack is false, so that a row is one sample already"
            less = "lower data.max_tokens or use optim.name: adamw8bit"
            todo = (
                f"{needs}: set model.activation_checkpointing: full and --resume; or, in another folder,"
                f" {less}"
            )
        if gathered_stay(self.parts.model):
            todo += "; or set distributed.keep_gathered: false, which gathers weights anew for every row"
        state = "nothing was changed"
        if problem.stuck:
            state = (
                f"no weight was changed, but FSDP2 of torch {torch.__version__} cannot be put back after an"
                " error inside an update (torch 2.13 can): start again, with --resume where there is a"
                " checkpoint"
            )
        elif problem.torn:
            state = "the state may be half an update ahead: --resume goes on from the last checkpoint"
        if self.parts.config.numbers.on_out_of_memory == "retry" and self.parts.world.size > 1:
            state += "; a retry works on one rank alone: the others wait inside a message of the old rows"
        where = f"update {self.parts.progress.updates + 1}"
        words = describe(where, f"out of memory ({problem}); {state}", todo=todo)
        return TrainingError(words, code="out_of_memory")


def row_tokens(parts: Parts) -> int:
    """Of the rows that are packed now. Where a resumption asks for shorter ones than the run had come to,
    those."""
    return min(parts.lasting.row_tokens or parts.row_tokens, parts.row_tokens)


def smaller_rows(parts: Parts) -> int | None:
    """Half the row, in whole buckets, and no shorter than the longest sample; None when there is nothing left
    to halve."""
    if parts.plan.apart.alone_above == 0:
        return None  # one sample a row: no setting of rows makes one shorter
    bucket = parts.plan.bucket_tokens
    longest = int(parts.data.train.index.lengths.max())
    wanted = max(row_tokens(parts) // 2, longest)
    smaller = -(-wanted // bucket) * bucket
    return smaller if smaller < row_tokens(parts) else None


def use_row_tokens(parts: Parts) -> None:
    """Pack rows as the progress says, after a retry or a resumption."""
    if row_tokens(parts) == parts.row_tokens:  # the plan is of these
        return
    index, longest = parts.data.train.index, longest_of(parts.data)
    # Shorter rows take other lengths, where they take few: chosen as the first were.
    make = build_plan if parts.row_lengths is None else partial(plan_of, longest=longest)
    parts.plan = make(parts.config, index, parts.world, row_tokens=parts.lasting.row_tokens)
