"""Every task's score on its validation rows: what a policy decides by, and what it cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from repsft_fast.data.store import TokenStore
from repsft_fast.errors import ConfigError, describe
from repsft_fast.evaluate.answered import Answered
from repsft_fast.evaluate.teacher_forced import SampleScores
from repsft_fast.metrics import summarise
from repsft_fast.models import stops_of
from repsft_fast.policies.statistics import Score
from repsft_fast.throughput import Work
from repsft_fast.training.parts import Parts


@dataclass(frozen=True)
class Scored:
    """scores: per task, items in a fixed order, higher is better. line: what metrics.jsonl says. work: forward only."""

    scores: dict[str, Score]
    line: dict[str, Any]
    work: Work


class TaskScorer:
    """Scores a store's samples by the metric of the settings: one packed forward pass, and generation for `answer`."""

    def __init__(self, parts: Parts, store: TokenStore):
        """Raises ConfigError or DataError now for what could not be scored later."""
        self.parts, self.store = parts, store
        self.metric = parts.config.mixture.metric
        self._forced = parts.validation if store is parts.data.validation and parts.validation else parts.scorer(store)
        self._answered: Answered | None = None
        if self.metric == "answer":
            if parts.tokenizer is None:
                wrong = "answer reads text, and there is no tokenizer"
                raise ConfigError(describe("mixture.metric", wrong, todo="set tokenizer.path"))
            name, limit = parts.config.mixture.extractor, parts.config.mixture.answer_tokens
            self._answered = Answered(
                store,
                range(len(store.index)),
                parts.tokenizer,
                extractor=name,
                trusted=parts.config.model.trust_remote_code,
                max_new_tokens=limit,
                end_ids=stops_of(parts.model),
            )

    def __call__(self) -> Scored:
        parts, names = self.parts, self.parts.data.task_names
        found = self._forced(parts.model)
        work = work_of(found)
        line = line_of(found, names)
        items = None
        if self._answered is not None:
            answers = self._answered(parts.model)
            # What a model says whose numbers are none is no answer, wrong or right.
            items = np.where(np.isfinite(found.items("exact_match")), answers.right, np.nan)
            work.add(Work(samples=len(items), tokens=answers.tokens, trained=answers.generated,
                          sum_squared_lengths=answers.sum_squared_lengths))  # fmt: skip
            line["answer"], line["finished"] = finite(float(items.mean())), float(answers.finished.mean())
        else:
            items = found.items(self.metric)
        scores = by_task(items, found.tasks, names)
        line["scores"] = {task: finite(score.value) for task, score in scores.items()}
        line["errors"] = {task: standard_error(score) for task, score in scores.items()}
        return Scored(scores, line, work)


def work_of(found: SampleScores) -> Work:
    """What a forward-only pass over these samples read, all ranks."""
    return Work(samples=len(found.samples), tokens=found.tokens, trained=found.trained,
                sum_squared_lengths=found.sum_squared_lengths)  # fmt: skip


def line_of(found: SampleScores, names: tuple[str, ...]) -> dict[str, Any]:
    """Loss, token accuracy, … and exact match, over everything and per task, as JSON; whatever metric decides.

    Null where a row's numbers were not finite: `nonfinite` says in how many trained tokens.
    """
    line, right = summarise(found.by_task(len(names)), names), found.items("exact_match")
    parts = [(line, right), *((line["tasks"][name], right[found.tasks == i])
                              for i, name in enumerate(names) if name in line.get("tasks", {}))]  # fmt: skip
    for part, items in parts:
        part["exact_match"] = finite(float(items.mean()))
        if part.get("nonfinite"):
            part["token_accuracy"] = None
    return line


def by_task(items: np.ndarray, tasks: np.ndarray, names: tuple[str, ...]) -> dict[str, Score]:
    """Per-item scores by task name; a task without validation rows is undefined (NaN), never best and never excluded."""
    return {name: Score.of(items[tasks == i].tolist()) for i, name in enumerate(names)}


def standard_error(score: Score) -> float | None:
    """Of the mean over the items; None where it cannot be known."""
    if not score.defined or score.items is None or score.n < 2:
        return None
    return float(np.std(score.items, ddof=1) / math.sqrt(score.n))


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
