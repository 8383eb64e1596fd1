"""What a run tells: metrics.jsonl always, the live line and trackers on the main rank only. One method per kind of event."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from repsft_fast.metrics import JsonLines, UpdateRecord, summarise
from repsft_fast.report.live import Live
from repsft_fast.report.words import rows_of
from repsft_fast.throughput import Work, peak_memory_bytes
from repsft_fast.trackers import Trackers
from repsft_fast.training.parts import Parts


class Reporter:
    """Turns counters into records. Rates are over the time since the last reading, waiting for data told apart."""

    def __init__(self, parts: Parts):
        self.parts = parts
        main = parts.world.is_main
        self.live = Live(main)
        self.lines = JsonLines(parts.folder / "metrics.jsonl" if main else None)
        self.trackers = (
            Trackers(parts.config.log.trackers, parts.folder, parts.config.to_dict(), note=self.note) if main else None
        )
        self.started = self._last = time.perf_counter()
        self._work = parts.progress.all_work.copy()
        self._waited = 0.0
        self._apart = 0.0  # seconds since the last reading that went into evaluation, snapshots, saving
        self._speed: dict[str, Any] = {}

    def start(self) -> None:
        parts, config = self.parts, self.parts.config
        mixture = config.mixture
        judged = mixture.policy is None or (mixture.policy == "msft" and mixture.exclude_on == "saturation")
        self.live.start(
            {
                "folder": str(parts.folder),
                "updates": parts.budget.most,
                "ends_by_rule": mixture.policy is not None,
                "updates_per_epoch": parts.budget.updates_per_epoch,
                "samples": len(parts.data.train.index),
                "tasks": list(parts.data.task_names),
                "target": config.stop.token_accuracy if judged else None,
                "device": str(parts.world.device),
                "ranks": parts.world.size,
            }
        )
        if parts.data.files:
            self.note(f"read: {rows_of(parts.data.files)}")
        for text in [*config.warnings, *parts.data.warnings]:
            self.note(text)
        if parts.data.dropped:
            self.note("dropped: " + ", ".join(f"{n} × {reason}" for reason, n in sorted(parts.data.dropped.items())))

    def resumed(self, seconds: float) -> None:
        """The run goes on: `seconds` of it were spent before, and the work done until now is not this reading's."""
        self.started -= seconds
        self._work = self.parts.progress.all_work.copy()

    def waited(self, seconds: float) -> None:
        """Time the loop stood still for its next update."""
        self._waited += seconds

    def apart(self, seconds: float) -> None:
        """Time that was not training, so that tokens/s is the trainer's and not the evaluation's."""
        self._apart += seconds

    def updates(self, records: list[UpdateRecord]) -> None:
        """A reading of the ledger: one line per update in metrics.jsonl, the newest on the live line."""
        if not records:
            return
        speed = self._measure()
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
            }
            if record is records[-1]:
                line |= speed
            self._write(line)
        schedule = self.parts.schedule  # read each time: a roll-back may take a decay back
        self.live.ends_at(schedule.decay_start + (schedule.decay_length or 1) if schedule.decay_start is not None else None)
        self.live.update(line)

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
        self.live.epoch(line)

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
        self.live.evaluation(line)

    def mixture(self, standing: Mapping[str, Any]) -> None:
        """How the tasks stand, after every decision. For the eye only: the lines of evaluations and decisions say it all."""
        self.live.mixture(standing)

    def note(self, text: str) -> None:
        self.lines.write({"kind": "note", "update": self.parts.progress.updates, "text": text})
        self.live.note(text)

    def end(self, result: Mapping[str, Any]) -> None:
        self.live.end(dict(result))
        if self.trackers is not None:
            self.trackers.finish(result)
        self.lines.close()

    def event(self, kind: str, values: Mapping[str, Any]) -> None:
        """Anything else for metrics.jsonl (decay, decision, snapshot, checkpoint)."""
        self._write({"kind": kind, "update": self.parts.progress.updates, **values})

    def _write(self, line: dict[str, Any]) -> None:
        self.lines.write(line)
        if self.trackers is not None:
            self.trackers.log(line)

    def _epoch(self) -> float:
        return round(self.parts.progress.epochs, 4)

    def _measure(self) -> dict[str, Any]:
        now, parts = time.perf_counter(), self.parts
        seconds = max(now - self._last - self._apart, 1e-9)
        done: Work = parts.progress.all_work.minus(self._work)
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
            "tokens": parts.progress.all_work.tokens,
            "trained_tokens": parts.progress.all_work.trained,
            "slots": parts.progress.all_work.slots,
        }
        self._last, self._work, self._waited, self._apart = now, parts.progress.all_work.copy(), 0.0, 0.0
        return self._speed


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None
