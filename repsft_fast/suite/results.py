"""A task's result: replies judged and counted, or choices compared; as JSON and in one line."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from repsft_fast.distributed import raise_together
from repsft_fast.errors import DataError, describe
from repsft_fast.evaluate.answers import answer_in, find_extractor
from repsft_fast.evaluate.asked import Task
from repsft_fast.evaluate.judging import Judge
from repsft_fast.evaluate.multiple_choice import ChoiceProbe, ChoiceScores
from repsft_fast.evaluate.record import line_of
from repsft_fast.evaluate.replies import Asked, Told
from repsft_fast.evaluate.scores import Draw, Figure, Judged, Scores, score
from repsft_fast.suite.evaluation import Answered, Under, answer_task, finish_record

NO_ANSWER = "no answer"


@dataclass(frozen=True)
class TaskResult:
    """What a model made of one task. `scores` is None where replies were generated and another rank judges
    them."""

    task: Task
    problems: tuple[Judged, ...]  # each with the verdicts on its replies; of a choice one
    scores: Scores | None
    seconds: float  # of generating, or of the pass over choices
    generated: int = 0  # tokens, of those made now
    choices: ChoiceScores | None = None
    undecided: list[dict[str, str]] = field(default_factory=list)  # pairs nobody could judge

    def as_json(self) -> dict[str, Any]:
        sampling = self.task.sampling
        found: dict[str, Any] = {"kind": self.task.kind, "seconds": self.seconds}
        if self.choices is not None:
            figures = self.choices.to_json()
            accuracy = None if self.scores is None else as_json(self.scores.acc)
            return found | figures | {"accuracy": accuracy}
        found |= {
            "generated_tokens": self.generated,
            "sampling": {"n": sampling.n, "temperature": sampling.temperature, "top_p": sampling.top_p,
                         "max_tokens": sampling.max_new_tokens, "seed": sampling.seed},
            "extractor": self.task.extractor,
            "undecided_pairs": self.undecided,
        }  # fmt: skip
        return found | (self.scores.to_json() if self.scores is not None else {})


def as_json(figure: Figure) -> dict[str, Any]:
    return {"value": figure.value, "low": figure.low, "high": figure.high}


def result_of_task(
    under: Under,
    asked: Asked,
    judge: Judge | None,
    *,
    trusted: bool,
    told: Told = lambda request, reply: None,
) -> TaskResult:
    """One task, asked and judged. All ranks call it; judge: on the main rank. trusted: an own extractor may
    run (model.trust_remote_code)."""
    if asked.task.kind == "choice":
        return _compared(under, asked)
    answered = answer_task(under, asked, told)
    unjudged = 0 if judge is None else len(judge.undecided)
    lines: list[dict[str, Any]] = []
    # One rank judges and writes; what fails there, its disk or an own extractor, all hear.
    with raise_together(under.world):
        if judge is not None:
            lines = judged_lines(asked, answered, judge, under.tokenizer, trusted=trusted)
        finish_record(under, asked, lines)
    if judge is None:
        return TaskResult(asked.task, (), None, answered.seconds, answered.generated)
    problems = problems_of(asked.task, lines)
    undecided = [
        {"got": one.got, "reference": one.reference, "why": one.why} for one in judge.undecided[unjudged:]
    ]
    return TaskResult(
        asked.task, problems, score(problems), answered.seconds, answered.generated, undecided=undecided
    )


def judged_lines(
    asked: Asked, answered: Answered, judge: Judge, tokenizer: Any, *, trusted: bool
) -> list[dict[str, Any]]:
    """A line for every reply, in order of (prompt, draw), with its answer and the verdict on it."""
    task = asked.task
    extract = find_extractor(task.extractor, trusted=trusted)
    prompts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in asked.prompts]
    got = {}
    for (prompt, draw), text in answered.texts.items():
        choices = len(task.problems[prompt].choices)
        got[prompt, draw] = answer_in(extract, text, prompt=prompts[prompt], choices=choices)
    verdicts = judge([(answer, task.problems[prompt].answer) for (prompt, _), answer in got.items()])
    lines = []
    for ((prompt, draw), answer), verdict in zip(got.items(), verdicts, strict=True):
        problem, reply = task.problems[prompt], answered.found[prompt, draw]
        lines.append({
            "prompt": prompt, "draw": draw, "problem": problem.name, "group": problem.group,
            "verdict": NO_ANSWER if answer is None else verdict, "answer": answer,
            "reference": problem.answer, "tokens": len(reply.ids),
            "text": answered.texts[prompt, draw], **line_of(reply),
        })  # fmt: skip
    return lines


def problems_of(task: Task, lines: Sequence[Mapping[str, Any]]) -> tuple[Judged, ...]:
    """The lines by problem, their draws in order."""
    draws: dict[int, list[Draw]] = {number: [] for number in range(len(task.problems))}
    for line in lines:
        draws[line["prompt"]].append(Draw(line["verdict"], line["finished"], line["tokens"], line["entropy"]))
    return tuple(
        Judged(problem.name, tuple(draws[number]), problem.group)
        for number, problem in enumerate(task.problems)
    )


def _compared(under: Under, asked: Asked) -> TaskResult:
    """A multiple choice by log-likelihood: one pass over all choices."""
    began = time.perf_counter()
    device = under.world.device
    probe = ChoiceProbe(asked.task, under.tokenizer, device=device, scorer=under.scorer)
    found = probe(under.model)
    problems = tuple(
        Judged(one.name, (Draw("right" if one.right else "wrong", True, 0),), one.group)
        for one in found.problems
    )
    if wrong := sum(not one.chosen for one in found.problems):
        raise DataError(
            describe(asked.task.name, f"{wrong} problems have log-probabilities that are no numbers")
        )
    return TaskResult(asked.task, problems, score(problems), time.perf_counter() - began, choices=found)


def words_of(result: TaskResult) -> str:
    """gsm 41.0 % (35–47), ended 89 %"""
    if result.scores is None:
        return result.task.name
    said = f"{result.task.name} {interval_words(result.scores.acc)}"
    if result.choices is None:
        said += f", ended {interval_words(result.scores.ended, interval=False)}"
    return said


def interval_words(figure: Figure, *, interval: bool = True) -> str:
    """41.0 % (35.2–46.9)"""
    if figure.value is None:
        return "–"
    said = f"{100 * figure.value:.1f} %"
    if not interval or figure.low is None or figure.high is None:
        return said
    return f"{said} ({100 * figure.low:.1f}–{100 * figure.high:.1f})"
