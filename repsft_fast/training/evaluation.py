"""Everything that looks at the model without training it: validation, every task's score, answers to a few
prompts."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from repsft_fast import seeded
from repsft_fast.data.sample import Sample
from repsft_fast.data.store import TokenStore
from repsft_fast.errors import ConfigError, describe
from repsft_fast.evaluate.answered import Answered
from repsft_fast.evaluate.generate import generate
from repsft_fast.evaluate.teacher_forced import SampleScores, TeacherForced
from repsft_fast.metrics import summarise
from repsft_fast.models import stops_of
from repsft_fast.policies.statistics import Score
from repsft_fast.stats import TokenStats
from repsft_fast.throughput import Work
from repsft_fast.training.account import Spans
from repsft_fast.training.parts import Parts
from repsft_fast.training.reporter import Reporter
from repsft_fast.training.snapshots import Snapshots


class Evaluation:
    """Everything that looks at the model and trains nothing: validation, every task's score, the counts that
    a rule stops by. Its work is counted, and its seconds are no part of training's."""

    def __init__(self, parts: Parts, reporter: Reporter, snapshots: Snapshots, spans: Spans, *, tasks: bool):
        """tasks: the policy decides by every task's score, where there are validation rows."""
        self.parts, self.reporter, self.snapshots, self.spans = parts, reporter, snapshots, spans
        held_out = parts.data.validation
        self.scorer = TaskScorer(parts, held_out) if tasks and held_out is not None else None

    def validate(self) -> None:
        """Loss and token accuracy on the validation set; the best state is kept where that is the setting."""
        assert self.parts.validation is not None
        started = time.perf_counter()
        scores = self.parts.validation(self.parts.model)
        line = line_of(scores, self.parts.data.task_names)
        self.reporter.evaluation(line, time.perf_counter() - started)
        if bad := line.get("nonfinite"):
            words = f"the validation loss is not a number at update {self.parts.progress.updates:,}"
            self.reporter.note(f"{words} ({bad:,} of {line['total']:,} trained tokens): it is no best")
        show_answers(self.parts, self.reporter, None)
        if self.remember_best(line) and self.parts.config.evaluate.keep == "best":
            self.snapshots.keep_best()
        self.reporter.exclude_seconds(time.perf_counter() - started)

    def score_tasks(self) -> tuple[Scored, float]:
        """(every task's score on its validation rows, the seconds it took)."""
        assert self.scorer is not None
        started = time.perf_counter()
        with self.spans("evaluation"):
            found = self.scorer()
        self.parts.lasting.evaluated.add(found.work)
        return found, time.perf_counter() - started

    def remember_best(self, line: dict[str, Any]) -> bool:
        """Whether this validation has the lowest loss so far."""
        progress, lasting, loss = self.parts.progress, self.parts.lasting, line.get("loss")
        if loss is None or (lasting.best is not None and loss >= lasting.best["loss"]):
            return False
        lasting.best = {"update": progress.updates, "loss": loss, "token_accuracy": line["token_accuracy"]}
        return True

    def training_counts(self) -> tuple[TokenStats, str]:
        """Exact counts that stopping is judged by: the epoch's own training pass, or the probe subset under
        today's weights."""
        if self.parts.probe is None:
            return self.parts.ledger.epoch_totals(), "training pass"
        return self._look(self.parts.probe).by_task(self.parts.num_tasks), "probe"

    def sample_losses(self, skipped: list[int]) -> dict[int, float] | None:
        """Mean loss of every sample over the epoch; those that skipped the backward pass are passed forward
        now. None for policies that do not ask for it."""
        if self.parts.sample_stats is None:
            return None
        stats = self.parts.sample_stats.read()
        means, seen = stats.mean("loss"), stats.total > 0
        losses = {int(i): float(means[i]) for i in seen.nonzero()[:, 0]}
        if skipped:
            found = self._look(self.parts.scorer(self.parts.data.train, skipped))
            passed = zip(found.samples, found.stats.mean("loss"), strict=True)
            losses |= {int(i): float(loss) for i, loss in passed}
        return losses

    def own_counts(self, correct: int, total: int) -> tuple[int, int] | None:
        """(correct, total) trained tokens of the model as it stands, on the same few training samples each
        time; None where its numbers are not finite. Given: `training_counts`, which with a probe are these.
        All ranks call it."""
        if self.parts.probe is not None:
            return correct, total
        data = self.parts.data.train
        samples = look_samples(len(data.index), int(data.index.trained.sum()))
        sums = self._look(_own_scorer(self.parts, samples)).by_task(self.parts.num_tasks)
        return None if int(sums.nonfinite.sum()) else (int(sums.correct.sum()), int(sums.total.sum()))

    def _look(self, scorer: TeacherForced) -> SampleScores:
        """A forward-only pass over training samples."""
        started = time.perf_counter()
        with self.spans("evaluation"):
            found = scorer(self.parts.model)
        self.parts.lasting.evaluated.add(work_of(found))
        self.reporter.exclude_seconds(time.perf_counter() - started)
        return found


SAVED_SAMPLES = 200  # of the training samples that the saved model is measured on, at most


@dataclass(frozen=True)
class Saved:
    """The saved model's own token accuracy: right of total trained tokens, over so many training samples."""

    correct: int
    total: int
    samples: int
    nonfinite: int
    seconds: float

    @property
    def token_accuracy(self) -> float | None:
        """None where it is not known: no trained token, or numbers that were not finite."""
        return self.correct / self.total if self.total and not self.nonfinite else None


def look_samples(samples: int, tokens: int) -> int:
    """How many training samples an epoch's look at the model takes: an eighth, so that it costs a
    twenty-fourth of the epoch; more where that is not 50 samples or not 1,000 trained tokens; at most
    SAVED_SAMPLES."""
    enough = math.ceil(1_000 * samples / max(tokens, 1))
    return min(samples, SAVED_SAMPLES, max(math.ceil(samples / 8), 50, enough))


def _own_scorer(parts: Parts, samples: int) -> TeacherForced:
    chosen = seeded.choice(parts.config.run.seed, len(parts.data.train.index), samples)
    return parts.scorer(parts.data.train, [int(one) for one in chosen])


def saved_accuracy(parts: Parts, reporter: Reporter) -> Saved | None:
    """One forward pass of the model as it stands over the probe's samples, or at most SAVED_SAMPLES training
    samples fixed by the seed. All ranks call it. Draws nothing, trains nothing, is counted as no work.

    None, and a note, where memory runs out, of one rank or of several.
    """
    started, count = time.perf_counter(), len(parts.data.train.index)
    try:
        found = (parts.probe or _own_scorer(parts, min(SAVED_SAMPLES, count)))(parts.model)
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0].strip() or "no words"
        reporter.note(f"the saved model's own token accuracy is not known: out of memory ({reason})")
        return None
    sums = found.by_task(parts.num_tasks)
    correct, total, bad = (int(one.sum()) for one in (sums.correct, sums.total, sums.nonfinite))
    return Saved(correct, total, len(found.samples), bad, time.perf_counter() - started)


@dataclass(frozen=True)
class Scored:
    """scores: per task, items in a fixed order, higher is better. line: what metrics.jsonl says. work:
    forward only."""

    scores: dict[str, Score]
    line: dict[str, Any]
    work: Work


class TaskScorer:
    """Scores a store's samples by the metric of the settings: one packed forward pass, and generation for
    `answer`."""

    def __init__(self, parts: Parts, store: TokenStore):
        """Raises ConfigError or DataError now for what could not be scored later."""
        self.parts, self.store = parts, store
        self.metric = parts.config.mixture.metric
        self._forced = (
            parts.validation if store is parts.data.validation and parts.validation else parts.scorer(store)
        )
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
    """Loss, token accuracy, … and exact match, over everything and per task, as JSON; whatever metric
    decides.

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
    """Per-item scores by task name; a task without validation rows is undefined (NaN), never best and never
    excluded."""
    return {name: Score.of(items[tasks == i].tolist()) for i, name in enumerate(names)}


def standard_error(score: Score) -> float | None:
    """Of the mean over the items; None where it cannot be known."""
    if not score.defined or score.items is None or score.n < 2:
        return None
    return float(np.std(score.items, ddof=1) / math.sqrt(score.n))


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def show_answers(parts: Parts, reporter: Reporter, *groups: Sequence[Sample] | None) -> list[dict[str, Any]]:
    """`answer_examples` of each group, told. They only show: what goes wrong is a note, but on several ranks,
    which answer together and would wait for one that gave up."""
    found: list[dict[str, Any]] = []
    with reporter.only_reports("answers to prompts") if parts.world.size == 1 else nullcontext():
        for samples in groups:
            found += answer_examples(parts, samples)
    for answer in found:
        reporter.event("answer", answer)
    return found


def answer_examples(parts: Parts, samples: Sequence[Sample] | None = None) -> list[dict[str, Any]]:
    """The model's own answers to a few prompts, beside the reference. Greedy. Empty without a tokenizer.

    Of `samples`, or of the held-out ones; `seen` says whether a prompt was trained on.
    """
    seen = (samples is None and not parts.data.held_out) or samples is parts.data.seen
    examples = samples if samples is not None else parts.data.held_out or parts.data.seen
    if parts.tokenizer is None or not examples:
        return []
    prompts = [sample.ids[: sample.trained.index(True)] for sample in examples]
    # Where the saved model stops. Rows without an end of their own have none but the tokenizer's.
    end_ids = sorted({*stops_of(parts.model), parts.tokenizer.eos_token_id} - {None})
    replies = generate(
        parts.model,
        prompts,
        end_ids=end_ids,
        max_new_tokens=parts.config.evaluate.generate_tokens,
        pad_id=parts.tokenizer.pad_token_id or 0,
    )
    decode = parts.tokenizer.decode
    return [
        {
            "task": sample.task,
            "seen": seen,
            "prompt": decode(prompt, skip_special_tokens=True),
            "reference": decode(sample.ids[len(prompt) :], skip_special_tokens=True),
            "answer": decode(reply.ids, skip_special_tokens=True),
            "finished": reply.finished,
        }
        for sample, prompt, reply in zip(examples, prompts, replies, strict=True)
    ]
