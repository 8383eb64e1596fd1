"""Multiple choice by log-likelihood, the forgetting probe: which choice does the model find likeliest?

Nothing is generated. Every choice is a sample, question and choice, of which the choice alone is trained, so
the head's forward pass gives its log-probability (2·N·H·V, no logits kept) in packed rows, on every rank its
share. Definitions are lm-eval's: text and choice are encoded together and what is longer than the text's own
tokens is the choice; ties go to the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from repsft_fast.data.sample import Sample
from repsft_fast.data.store import TokenStore
from repsft_fast.errors import ConfigError, DataError, describe
from repsft_fast.evaluate.asked import Problem, Task
from repsft_fast.evaluate.layouts import LETTERS
from repsft_fast.evaluate.prompts import text_ids
from repsft_fast.evaluate.teacher_forced import TeacherForced


@dataclass(frozen=True)
class Chosen:
    """What a model chose in one problem."""

    name: str
    group: str
    chosen: str  # the likeliest choice's letter; "": the model's numbers were not finite
    right: bool
    right_by_length: bool  # the same by log-probability per character of the choice (lm-eval's acc_norm)
    margin: float  # log-probability of the right choice minus that of the likeliest wrong one, nats; or NaN
    logprobs: tuple[float, ...]  # of the choices, nats


@dataclass(frozen=True)
class ChoiceScores:
    """All problems of a task, in their order, the same on every rank."""

    problems: tuple[Chosen, ...]
    tokens: int  # real tokens passed through the model
    trained: int  # positions that reached the head
    sum_squared_lengths: int

    @property
    def accuracy(self) -> float:
        """Share of problems whose likeliest choice is right."""
        return float(np.mean([problem.right for problem in self.problems]))

    @property
    def accuracy_by_length(self) -> float:
        """The same by log-probability per character; equal where letters are compared."""
        return float(np.mean([problem.right_by_length for problem in self.problems]))

    def by_group(self) -> dict[str, tuple[int, float]]:
        """group → (problems, accuracy), in the order of the alphabet."""
        groups: dict[str, list[bool]] = {}
        for problem in sorted(self.problems, key=lambda problem: problem.group):
            groups.setdefault(problem.group, []).append(problem.right)
        return {group: (len(right), float(np.mean(right))) for group, right in groups.items()}

    def to_json(self) -> dict[str, Any]:
        """The figures, without the problems; numbers that are not finite are null."""
        margins = [problem.margin for problem in self.problems if math.isfinite(problem.margin)]
        return {
            "problems": len(self.problems),
            "accuracy": self.accuracy,
            "accuracy_by_length": self.accuracy_by_length,
            "margin": float(np.mean(margins)) if margins else None,
            "not_finite": sum(not problem.chosen for problem in self.problems),
            "groups": {group: {"problems": n, "accuracy": a} for group, (n, a) in self.by_group().items()},
        }

    def lines(self) -> list[dict[str, Any]]:
        """One JSON object a problem."""
        lines = [asdict(problem) for problem in self.problems]
        finite = [{"margin": None, "logprobs": None} if not line["chosen"] else {} for line in lines]
        return [line | change for line, change in zip(lines, finite, strict=True)]


class ChoiceProbe:
    """The problems of one task, tokenised and packed once, asked as often as wanted. Each choice costs a
    forward pass over question and choice."""

    def __init__(
        self,
        task: Task,
        tokenizer: Any,
        *,
        device: torch.device | str,
        scorer: Callable[[TokenStore], TeacherForced],  # such as training.parts.Parts.scorer
        parse_special: bool = False,
    ):
        """ConfigError for a task that compares nothing, DataError naming the problem where a choice has no
        token of its own."""
        self.task = task
        if task.kind != "choice":
            todo = "read it with kind choice, or let the model generate"
            raise ConfigError(describe(task.name, "compares no choices", got=task.kind, todo=todo))
        self.store = TokenStore(_samples(task, tokenizer, parse_special), device)
        self.scorer = scorer(self.store)

    def __call__(self, model: nn.Module) -> ChoiceScores:
        """Ask the model (in eval mode, restored afterwards). Waits for the device once, at the end.

        torch.OutOfMemoryError on every rank where memory runs out on one. DataError for a token, or a
        position, that the model has no embedding for.
        """
        self._check(model)
        scores = self.scorer(model)
        sums = -scores.stats.loss.masked_fill(scores.stats.nonfinite > 0, math.nan).numpy()
        borders = np.cumsum([len(problem.compared) for problem in self.task.problems])[:-1]
        chosen = tuple(map(_chosen, self.task.problems, np.split(sums, borders)))
        return ChoiceScores(chosen, scores.tokens, scores.trained, scores.sum_squared_lengths)

    def _check(self, model: Any) -> None:
        self.store.check_vocabulary(model.get_input_embeddings().weight.shape[0])
        limit, lengths = getattr(model, "position_limit", None), self.store.index.lengths
        if limit is not None and (longest := int(lengths.max())) > limit:
            where = self.store.sources[int(lengths.argmax())]
            wrong = "is longer than the positions that the model has embeddings for"
            raise DataError(
                describe(where, wrong, expected=f"at most {limit} tokens", got=longest, todo="remove the row")
            )


def _samples(task: Task, tokenizer: Any, parse_special: bool) -> list[Sample]:
    """Of every problem every choice, the choice alone trained."""
    pairs = [(problem, f" {choice}") for problem in task.problems for choice in problem.compared]
    texts = [problem.text or "" for problem in task.problems]
    # White space at the end of the text belongs to the choice: as a token of its own it would be an odd one.
    contexts = text_ids([text.rstrip() for text in texts], tokenizer, parse_special=parse_special)
    wholes = text_ids(
        [(problem.text or "") + choice for problem, choice in pairs], tokenizer, parse_special=parse_special
    )
    starts = {problem.name: len(ids) for problem, ids in zip(task.problems, contexts, strict=True)}
    samples = []
    for (problem, choice), ids in zip(pairs, wholes, strict=True):
        start = starts[problem.name]
        if not 1 <= start < len(ids):
            wrong = (
                "compares choices behind no text" if start < 1 else "has a choice without a token of its own"
            )
            raise DataError(describe(problem.where, wrong, got=repr(choice), todo="mend or remove the row"))
        trained = [False] * start + [True] * (len(ids) - start)
        samples.append(Sample(ids, trained, task=task.name, source=problem.where))
    return samples


def _chosen(problem: Problem, logprobs: np.ndarray) -> Chosen:
    right = LETTERS.index(problem.answer)
    if not np.isfinite(logprobs).all():
        return Chosen(problem.name, problem.group, "", False, False, math.nan, tuple(logprobs.tolist()))
    best = int(logprobs.argmax())
    by_length = int((logprobs / [len(choice) for choice in problem.compared]).argmax())
    margin = float(logprobs[right] - np.delete(logprobs, right).max())
    letters = (LETTERS[best], best == right, by_length == right)
    return Chosen(problem.name, problem.group, *letters, margin, tuple(logprobs.tolist()))
