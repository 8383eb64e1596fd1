"""Named moments inside a run's evaluations, snapshots, reverts and its end, where crash tests kill or stop
it.

They are planted around the trainer's own functions, so the trainer carries none of them. A moment "half
copied" is made: half of the tensors (of a snapshot on disk: half of its bytes) are copied first, then the
function does all of its work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from repsft_fast.evaluate.teacher_forced import TeacherForced
from repsft_fast.policies import History
from repsft_fast.report import pictures
from repsft_fast.report import result as results
from repsft_fast.snapshot import SnapshotPool
from repsft_fast.snapshot.slots import DISK, PINNED
from repsft_fast.snapshot.tiers import Stored, Tiers
from repsft_fast.state import RunState, local
from repsft_fast.training import finish
from repsft_fast.training.conductor import Conductor
from repsft_fast.training.evaluation import TaskScorer
from repsft_fast.training.reporter import Reporter
from repsft_fast.training.snapshots import Snapshots

Point = Callable[[str], None]

EVALUATION = (
    "evaluation: before", "evaluation: between its rows", "evaluation: after", "evaluation: in the table",
    "evaluation: written down",
)  # fmt: skip
SNAPSHOT = ("snapshot: before", "snapshot: half copied", "snapshot: copied", "snapshot: after")
SAVE = ("frozen: half copied", "frozen: after")
REVERT = (
    "revert: before", "revert: half copied", "revert: copied, values to come", "revert: after", "roll-back: written down",
    "stage: opened",
)  # fmt: skip
FINISH = (
    "finish: before", "finish: the result is in", "finish: before the model", "finish: after the model",
    "finish: before result.json", "finish: after result.json", "finish: after the pictures",
)  # fmt: skip
# Killed at in every run of the tests; all of them, at every passing, with -m slow.
SOME = (
    "evaluation: between its rows", "evaluation: after", "snapshot: before", "snapshot: copied", "revert: half copied",
    "revert: copied, values to come", "roll-back: written down", "finish: before the model", "finish: after result.json",
)  # fmt: skip
POINTS = (*EVALUATION, *SNAPSHOT, *SAVE, *REVERT, *FINISH)


@contextmanager
def planted(point: Point) -> Iterator[None]:
    """While this is open, `point` is called at every moment of POINTS with its name."""
    inside: list[str] = []  # which of our moments a copy belongs to: "snapshot" or "frozen"

    def around(
        holder: Any, name: str, before: str | None = None, after: str | None = None, within: str = ""
    ) -> None:
        original = getattr(holder, name)

        def wrapped(*args: Any, **more: Any) -> Any:
            if before is not None:
                point(before)
            if within:
                inside.append(within)
            try:
                found = original(*args, **more)
            finally:
                if within:
                    inside.pop()
            if after is not None:
                point(after)
            return found

        stack.enter_context(patch.object(holder, name, wrapped))

    score, write, restore, load_values = (
        TeacherForced.__call__,
        Tiers.write,
        SnapshotPool.restore,
        RunState.load_values,
    )

    def between_rows(self: TeacherForced, model: Any) -> Any:
        row, made = self.store.row, 0

        def made_one(*args: Any, **more: Any) -> Any:
            nonlocal made
            made += 1
            if made == 2:
                point("evaluation: between its rows")
            return row(*args, **more)

        with patch.object(self.store, "row", made_one):
            return score(self, model)

    def half_written(self: Tiers, stored: Stored, live: list[list[torch.Tensor]]) -> None:
        if inside:
            # a file has no memory of its own: it is filled through some
            on_disk = stored.slot.level == DISK
            slot = self.layout.in_memory(PINNED) if on_disk else stored.slot
            for kept, now in zip(slot.bits, live, strict=True):
                half = -(-len(now) // 2)
                torch._foreach_copy_(kept[:half], now[:half])
            if on_disk:
                whole = torch.cat(slot.buffers).numpy()
                os.pwrite(stored.slot.fd, whole[: -(-len(whole) // 2)].data, 0)
            point(f"{inside[-1]}: half copied")
        write(self, stored, live)
        if inside == ["snapshot"]:
            point("snapshot: copied")

    def half_restored(self: SnapshotPool, name: str) -> Any:
        if inside == ["revert"]:
            kept = self.hold(name)
            with torch.no_grad():
                for live, frozen in list(zip(self.live.values(), kept.values(), strict=True))[
                    : len(kept) // 2
                ]:
                    local(live).copy_(local(frozen))
            self.unhold(name)
            point("revert: half copied")
        return restore(self, name)

    def values_to_come(self: RunState, values: Any) -> None:
        if inside == ["revert"]:
            point("revert: copied, values to come")
        load_values(self, values)

    with ExitStack() as stack:
        around(TaskScorer, "__call__", "evaluation: before", "evaluation: after")
        around(History, "evaluated", after="evaluation: in the table")
        around(Reporter, "evaluation", after="evaluation: written down")
        around(Snapshots, "take", "snapshot: before", "snapshot: after", within="snapshot")
        around(Snapshots, "freeze", after="frozen: after", within="frozen")
        around(Snapshots, "restore", "revert: before", "revert: after", within="revert")
        around(Conductor, "_roll_back", after="roll-back: written down")
        around(Conductor, "_open_stage", after="stage: opened")
        around(Conductor, "restore_result", "finish: before", "finish: the result is in")
        around(finish, "save_pretrained", "finish: before the model", "finish: after the model")
        around(results, "write", "finish: before result.json", "finish: after result.json")
        around(pictures, "draw", after="finish: after the pictures")
        for holder, name, ours in (
            (TeacherForced, "__call__", between_rows),
            (Tiers, "write", half_written),
            (SnapshotPool, "restore", half_restored),
            (RunState, "load_values", values_to_come),
        ):
            stack.enter_context(patch.object(holder, name, ours))
        yield
