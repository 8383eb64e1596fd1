"""What a run tells: metrics.jsonl, the live line and trackers, all on the main rank only. One method per kind
of event.

Whatever happens to them, the run goes on: no method here raises. What went wrong is said once, counted, and
in `troubles`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from repsft_fast import distributed
from repsft_fast.errors import RepsftError
from repsft_fast.metrics import JsonLines, UpdateRecord, summarise
from repsft_fast.report.format import rows_of
from repsft_fast.report.live import Live
from repsft_fast.throughput import Work, peak_memory_bytes
from repsft_fast.trackers import FINISH_S, Trackers, check_there, failed_with
from repsft_fast.training import attention
from repsft_fast.training.parts import Parts
from repsft_fast.training.policy import accuracy_target

MOST_TROUBLES = 50  # distinct ones; of what goes wrong in ever new words the rest is only counted
AFTER_A_FAILURE_S = 10.0  # so long a run that failed waits for its trackers


class Reporter:
    """Turns counters into records. Rates are over the time since the last reading, waiting for data told
    apart.

    Building one raises ConfigError for trackers that are not there, on every rank; nothing raises afterwards.
    """

    def __init__(self, parts: Parts):
        self.parts = parts
        main = parts.world.is_main
        self._troubles: Counter[str] = Counter()
        self._telling = False
        self.live, self.lines = Live(main), JsonLines(None)
        self.trackers: Trackers | None = None
        if main:
            self.lines = JsonLines(parts.folder / "metrics.jsonl", self.trouble)
        with distributed.raise_together(parts.world):
            if main:
                check_there(parts.config.log.trackers)
        self.started = self._last = time.perf_counter()
        self._work = parts.lasting.all_work.copy()
        self._waited = 0.0
        self._apart = 0.0  # seconds since the last reading that went into evaluation, snapshots, saving
        self._speed: dict[str, Any] = {}

    def open_trackers(self) -> None:
        """Once the run may write into its folder."""
        if self.parts.world.is_main:
            with self.only_reports("log.trackers"):
                config = self.parts.config
                self.trackers = Trackers(
                    config.log.trackers, self.parts.folder, config.to_dict(), note=self.trouble
                )

    # What goes wrong --------------------------------------------------------------------------------------

    @contextmanager
    def only_reports(self, what: str) -> Iterator[None]:
        """What is done inside tells of the run and is no part of it: an error there becomes a trouble, and
        the run goes on.

        Memory that the host has not for a picture is such an error; KeyboardInterrupt and SystemExit are not.
        No message between ranks may be inside, for the others would wait for it.
        """
        try:
            yield
        except Exception as error:
            self.trouble(f"{what}: {error if isinstance(error, RepsftError) else failed_with(error)}")

    def trouble(self, text: str) -> None:
        """Something that only reports does not work: said the first time, counted from then on."""
        if text not in self._troubles and len(self._troubles) >= MOST_TROUBLES:
            text = "and others"
        self._troubles[text] += 1
        if self._troubles[text] == 1 and not self._telling:  # telling of a trouble may be one
            self._telling = True
            try:
                self.note(text)
            finally:
                self._telling = False

    @property
    def troubles(self) -> list[str]:
        """What of the reports did not work, for result.json; empty when all did."""
        found = [text if times == 1 else f"{text} ({times} times)" for text, times in self._troubles.items()]
        return [*found, *([self.lines.missing] if self.lines.missing else [])]

    # What is told -----------------------------------------------------------------------------------------

    def start(self) -> None:
        with self.only_reports("the start"):
            self._start()

    def _start(self) -> None:
        parts, config = self.parts, self.parts.config
        self._show(
            self.live.start,
            {
                "folder": str(parts.folder),
                "updates": parts.budget.most,
                "ends_by_rule": config.mixture.policy is not None,
                "updates_per_epoch": parts.budget.updates_per_epoch,
                "samples": len(parts.data.train.index),
                "tasks": list(parts.data.task_names),
                "target": config.stop.token_accuracy if accuracy_target(config) is not None else None,
                "device": attention.device_facts(parts),
                "ranks": parts.world.size,
            },
        )
        if parts.data.files:
            self.note(f"read: {rows_of(parts.data.files)}")
        for text in [*config.warnings, *parts.data.warnings]:
            self.note(text)
        if parts.data.dropped:
            self.note(
                "dropped: " + ", ".join(f"{n} × {reason}" for reason, n in sorted(parts.data.dropped.items()))
            )

    def resumed(self, seconds: float) -> None:
        """The run goes on: `seconds` of it were spent before, and the work done until now is not this
        reading's."""
        self.started -= seconds
        self._work = self.parts.lasting.all_work.copy()

    def add_data_wait(self, seconds: float) -> None:
        """Time the loop stood still for its next update."""
        self._waited += seconds

    def exclude_seconds(self, seconds: float) -> None:
        """Time that was not training, so that tokens/s is the trainer's and not the evaluation's."""
        self._apart += seconds

    def updates(self, records: list[UpdateRecord]) -> None:
        """A reading of the ledger: one line per update in metrics.jsonl, the newest on the live line."""
        if not records:
            return
        speed: dict[str, Any] = {}
        with self.only_reports("throughput"):
            speed = self._measure()
        with self.only_reports("metrics.jsonl"):
            self._updates(records, speed)

    def _updates(self, records: list[UpdateRecord], speed: Mapping[str, Any]) -> None:
        progress = self.parts.progress
        line: dict[str, Any] = {}
        for record in records:
            line = {
                "kind": "update",
                "update": record.update + 1,
                "stage": progress.stage,
                "epoch": self._epoch(),
                **summarise(record.tasks, self.parts.data.task_names),
                "objective": _finite(record.loss),
                "grad_norm": _finite(record.grad_norm),
                "lr": record.lr,
                **({"vetoed": True} if record.vetoed else {}),
                **({"spike": True} if record.spike else {}),
            }
            if record is records[-1]:
                line |= speed
            self._write(line)
        schedule = self.parts.schedule  # read each time: a roll-back may take a decay back
        ends_at = (
            schedule.decay_start + (schedule.decay_length or 1) if schedule.decay_start is not None else None
        )
        self._show(self.live.ends_at, ends_at)
        self._show(self.live.update, line)

    def epoch(self, totals: Mapping[str, Any], accuracy_of: str) -> None:
        progress = self.parts.progress
        line = {
            "kind": "epoch",
            "update": progress.updates,
            "stage": progress.stage,
            "epoch": self._epoch(),
            "accuracy_of": accuracy_of,
            **totals,
            **self._speed,
        }
        self._write(line)
        self._show(self.live.epoch, line)

    def evaluation(self, scores: Mapping[str, Any], seconds: float) -> None:
        line = {
            "kind": "evaluation",
            "update": self.parts.progress.updates,
            "stage": self.parts.progress.stage,
            "epoch": self._epoch(),
            "seconds": seconds,
            **scores,
        }
        self._write(line)
        self._show(self.live.evaluation, line)

    def mixture(self, standing: Mapping[str, Any]) -> None:
        """How the tasks stand, after every decision. For the eye only: the lines of evaluations and decisions
        say it all."""
        self._show(self.live.mixture, standing)

    def note(self, text: str) -> None:
        with self.only_reports("metrics.jsonl"):
            self.lines.write({"kind": "note", "update": self.parts.progress.updates, "text": text})
        self._show(self.live.note, text)

    def end(self, result: Mapping[str, Any]) -> None:
        """The last word. What comes after it (a picture that fails) still reaches metrics.jsonl."""
        self._show(self.live.end, dict(result))
        with self.only_reports("log.trackers"):
            if self.trackers is not None:
                self.trackers.finish(result, FINISH_S if result.get("success") else AFTER_A_FAILURE_S)
        with self.only_reports("metrics.jsonl"):
            self.lines.close()

    def event(self, kind: str, values: Mapping[str, Any]) -> None:
        """Anything else for metrics.jsonl (decay, decision, snapshot, checkpoint)."""
        self._write({"kind": kind, "update": self.parts.progress.updates, **values})

    def _write(self, line: dict[str, Any]) -> None:
        with self.only_reports("metrics.jsonl"):
            self.lines.write(line)
        with self.only_reports("log.trackers"):
            if self.trackers is not None:
                self.trackers.log(line)

    def _show(self, show: Callable[[Any], None], what: Any) -> None:
        with self.only_reports("the live line"):
            show(what)
        if self.live.trouble and self.live.trouble not in self._troubles:
            self.trouble(self.live.trouble)

    def _epoch(self) -> float:
        return round(self.parts.progress.epochs, 4)

    def _measure(self) -> dict[str, Any]:
        now, parts = time.perf_counter(), self.parts
        seconds = max(now - self._last - self._apart, 1e-9)
        done: Work = parts.lasting.all_work.minus(self._work)
        flops = parts.shape.flops(done.tokens, done.trained, done.sum_squared_lengths)
        peak = parts.peak_flops
        self._speed = {
            "slots_per_second": done.slots / seconds,
            "tokens_per_second": done.tokens / seconds,
            "trained_tokens_per_second": done.trained / seconds,
            "model_flops_per_second": flops / seconds,
            "mfu": flops / seconds / peak / parts.world.size if peak else None,
            "memory_bytes": peak_memory_bytes(parts.world.device),
            "data_wait_fraction": min(self._waited / seconds, 1.0),
            "tokens": parts.lasting.all_work.tokens,
            "trained_tokens": parts.lasting.all_work.trained,
            "slots": parts.lasting.all_work.slots,
        }
        self._last, self._work, self._waited, self._apart = now, parts.lasting.all_work.copy(), 0.0, 0.0
        return self._speed


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None
