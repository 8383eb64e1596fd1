"""`evaluate.tasks` during a run: the model answers in its own words, and nothing of the run notices.

Neither weights nor random streams are touched, seconds are no part of training's, and what goes wrong is told
and ends nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from repsft_fast import distributed
from repsft_fast.data.store import TokenStore
from repsft_fast.evaluate.asked import Engine
from repsft_fast.evaluate.judging import Judge
from repsft_fast.evaluate.teacher_forced import TeacherForced
from repsft_fast.models import stops_of
from repsft_fast.report.format import count, duration
from repsft_fast.rundir.made import TASKS
from repsft_fast.suite.engines import engine_of
from repsft_fast.suite.evaluation import Under
from repsft_fast.suite.results import TaskResult, result_of_task, words_of
from repsft_fast.training.account import Spans
from repsft_fast.training.parts import Parts
from repsft_fast.training.reporter import Reporter


class _Leaving(Exception):
    """A signal asks the run to end: a look is cut short."""


class TaskEvaluation:
    """The looks at a run's tasks. All ranks call its methods."""

    def __init__(self, parts: Parts, reporter: Reporter, spans: Spans, leaving: Callable[[], Any]):
        """leaving: whether a signal asks the run to end."""
        self.parts, self.reporter, self.spans, self._leaving = parts, reporter, spans, leaving

    def when_due(self) -> None:
        """A look every `evaluate.tasks_every_epochs`."""
        every = self.parts.config.evaluate.tasks_every_epochs
        if self.parts.asked and every is not None and self.parts.progress.ended_on(every):
            self.look()

    def look(self) -> dict[str, Any] | None:
        """Every task answered and judged now: an event of metrics.jsonl, a note, and files below tasks/ in
        the run's folder. What the event says, None where there are no tasks or it could not be done."""
        if not self.parts.asked:
            return None
        began = time.perf_counter()
        found: dict[str, Any] | None = None
        # On several ranks what fails on one must end all: the others would wait for it.
        alone = self.parts.world.size == 1
        with (
            self.spans("evaluation"),
            self.reporter.only_reports("evaluate.tasks") if alone else nullcontext(),
        ):
            try:
                found = self._look()
            except _Leaving:
                self.reporter.note("evaluate.tasks: cut short by a signal")
            except torch.OutOfMemoryError as error:  # met by all ranks
                todo = "lower evaluate.batch_replies"
                self.reporter.trouble(
                    f"evaluate.tasks: out of memory ({str(error).partition('.')[0]}); {todo}"
                )
        seconds = time.perf_counter() - began
        self.reporter.exclude_seconds(seconds)
        if found is None:
            return None
        line = {"epoch": round(self.parts.progress.epochs, 4), "seconds": seconds, **found}
        self.reporter.event("tasks", line)
        return line

    def _look(self) -> dict[str, Any]:
        parts = self.parts
        engine, notes = engine_of(parts.config, parts.model, parts.world, parts.tokenizer)
        under = self._under(engine)
        results: dict[str, TaskResult] = {}
        with Judge(note=self.reporter.note) if parts.world.is_main else nullcontext() as judge:
            for asked in parts.asked:
                results[asked.task.name] = result_of_task(
                    under, asked, judge, trusted=parts.config.model.trust_remote_code, told=self._told
                )
        tasks = {name: one.as_json() for name, one in results.items()}
        generated = sum(one.generated for one in results.values())
        seconds = sum(one.seconds for one in results.values())
        for text in notes:
            self.reporter.note(text)
        words = " · ".join(words_of(one) for one in results.values())
        rate = f"{count(generated / seconds)} tok/s" if generated and seconds else "nothing generated"
        self.reporter.note(f"tasks: {words} ({duration(seconds)}, {rate}, {engine.name})")
        return {"engine": engine.name, "tasks": tasks}

    def _told(self, *_: Any) -> None:
        # Alone: ranks that walk in step would not all hear the signal at the same reply.
        if self.parts.world.size == 1 and self._leaving():
            raise _Leaving

    def _scorer(self, store: TokenStore) -> TeacherForced:
        """In rows like the training's, but for a store with texts that are longer."""
        parts, longest = self.parts, int(store.index.lengths.max())
        if longest <= parts.row_tokens:
            return parts.scorer(store)
        every = range(len(store.index))
        return TeacherForced(
            store, every, row_tokens=longest, bucket_tokens=1, world=parts.world, apart=parts.plan.apart
        )

    def _under(self, engine: Engine) -> Under:
        parts = self.parts
        done = parts.lasting.all_work.updates
        folder = parts.folder / TASKS / f"update-{done:08d}"
        with distributed.raise_together(parts.world):
            if parts.world.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                # of a look that was cut short, or of a run that went on from before it
                for file in folder.glob("*.jsonl"):
                    file.unlink()
        ends = {*stops_of(parts.model), parts.tokenizer.eos_token_id} - {None}
        return Under(
            model=parts.model,
            tokenizer=parts.tokenizer,
            engine=engine,
            world=parts.world,
            end_ids=tuple(sorted(ends)),
            row_tokens=parts.row_tokens,
            packed=parts.config.batch.pack,
            scorer=self._scorer,
            folder=folder,
            identity={"run": str(parts.config.run.folder), "update": done},
        )
