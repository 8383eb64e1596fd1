"""Replies judged: an answer found in each, compared with its reference, and counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from repsft_fast.evaluate.answers import answer_in, find_extractor
from repsft_fast.evaluate.asked import Task
from repsft_fast.evaluate.judging import Judge
from repsft_fast.evaluate.record import line_of
from repsft_fast.evaluate.replies import Asked
from repsft_fast.suite.evaluation import Answered

NO_ANSWER = "no answer"


@dataclass(frozen=True)
class Judged:
    """What every reply to a task was worth: `lines` for its file, in order of (prompt, draw)."""

    task: Task
    lines: list[dict[str, Any]]


def judge_task(asked: Asked, answered: Answered, judge: Judge, tokenizer: Any, *, trusted: bool) -> Judged:
    """Judge all replies to a task. trusted: an own extractor may run (model.trust_remote_code)."""
    task = asked.task
    extract = find_extractor(task.extractor, trusted=trusted)
    prompts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in asked.prompts]
    got = {
        (prompt, draw): answer_in(extract, text, prompt=prompts[prompt], choices=len(task.problems[prompt].choices))
        for (prompt, draw), text in answered.texts.items()
    }
    verdicts = judge([(answer, task.problems[prompt].answer) for (prompt, _), answer in got.items()])
    lines = []
    for (prompt, draw), verdict in zip(got, verdicts, strict=True):
        problem, reply, answer = task.problems[prompt], answered.found[prompt, draw], got[prompt, draw]
        lines.append({
            "prompt": prompt, "draw": draw, "problem": problem.name, "group": problem.group,
            "verdict": NO_ANSWER if answer is None else verdict, "answer": answer, "reference": problem.answer,
            "tokens": len(reply.ids), "text": answered.texts[prompt, draw], **line_of(reply),
        })  # fmt: skip
    return Judged(task, lines)
