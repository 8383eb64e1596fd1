"""From settings to tasks and prompts: what `evaluate.tasks` names is read, and spelled for one tokenizer."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from repsft_fast.config import Config
from repsft_fast.config.task_sections import EvalTask
from repsft_fast.errors import ConfigError, DataError, RepsftError, describe
from repsft_fast.evaluate.answers import find_extractor
from repsft_fast.evaluate.asked import GREEDY, NUCLEUS, SAMPLED, Problem, Sampling, Task
from repsft_fast.evaluate.extraction import last_number
from repsft_fast.evaluate.prompts import prompt_ids
from repsft_fast.evaluate.replies import Asked
from repsft_fast.evaluate.task_files import read_task

_KINDS = {"auto": "auto", "generation": "generate", "likelihood": "choice"}
SETTING = "evaluate.tasks"


@dataclass(frozen=True)
class Tasks:
    """What is asked, read and checked. `harness`: names of lm-eval's own tasks, by ours."""

    tasks: tuple[Task, ...]
    harness: Mapping[str, EvalTask]
    notes: tuple[str, ...]  # for the user


def read_tasks(config: Config) -> Tasks:
    """Every task of the settings. ConfigError or DataError with all problems, a line each."""
    tasks, harness, notes = [], {}, []
    problems: list[RepsftError] = []
    for name, settings in (config.evaluate.tasks or {}).items():
        if settings.layout == "lm_eval":
            harness[name] = settings
            continue
        try:
            task, said = _task(name, settings, config)
        except RepsftError as error:
            problems.append(error)
            continue
        tasks.append(task)
        notes += said
    if problems:
        raise type(problems[0])("\n".join(map(str, problems)))
    return Tasks(tuple(tasks), harness, tuple(notes))


def _task(name: str, settings: EvalTask, config: Config) -> tuple[Task, list[str]]:
    where = f"{SETTING} [{name}]"
    task, notes = read_task(
        name,
        settings.source,
        layout=settings.layout,
        kind=_KINDS[settings.by],
        split=settings.split,
        limit=settings.limit,
        prompt=settings.prompt,
        sampling=sampling_of(settings, config.run.seed),
        seed=config.run.seed,
        where=where,
    )
    if settings.extractor is not None:
        if task.kind == "choice":
            todo = "drop it, or set by: generation"
            wrong = "compares choices by likelihood, so that no answer is extracted"
            raise ConfigError(describe(where, wrong, got=f"extractor: {settings.extractor}", todo=todo))
        task = replace(task, extractor=settings.extractor)
    # In a sentence a number is found, and words are not: "the sum is 7" answers 7.
    elif task.extractor == "final" and all(last_number(p.answer) == p.answer for p in task.problems):
        task = replace(task, extractor="number")
    if task.kind == "choice" and settings.n > 1:
        notes.append(f"{name}: compares choices by likelihood, one look each: n does nothing")
    if not settings.chat:
        task = replace(task, problems=tuple(_as_text(problem) for problem in task.problems))
    find_extractor(task.extractor, trusted=config.model.trust_remote_code)
    return task, notes


def _as_text(problem: Problem) -> Problem:
    """Asked without a chat template. DataError for a chat of several turns."""
    if problem.text is not None:
        return problem
    if len(problem.messages) > 1:
        wrong = "is a chat of several turns, which no text says"
        raise DataError(describe(problem.where, wrong, todo="set chat: true"))
    return replace(problem, text=str(problem.messages[0]["content"]))


def sampling_of(settings: EvalTask, seed: int) -> Sampling:
    """One reply greedily; several at temperature 0.6 and top-p 0.95; or as the settings say."""
    several = settings.n > 1
    temperature = settings.temperature
    if temperature is None:
        temperature = SAMPLED if several else GREEDY
    top_p = settings.top_p
    if top_p is None:
        top_p = NUCLEUS if several else 1.0
    return Sampling(settings.n, temperature, top_p, settings.max_tokens, seed)


def asked_of(tasks: Tasks, tokenizer: Any, config: Config) -> tuple[list[Asked], list[str]]:
    """The tasks as this tokenizer spells them, and what is to be said of that."""
    asked, notes = [], []
    for task in tasks.tasks:
        prompts, said = prompt_ids(
            task.problems,
            tokenizer,
            template_kwargs=config.tokenizer.template_kwargs,
            parse_special=config.tokenizer.special_tokens == "parse",
        )
        asked.append(Asked(task, tuple(map(tuple, prompts))))
        notes += [f"{task.name}: {text}" for text in said]
    return asked, notes


FORM_TOKENS = 3  # of the end of a prompt: what a chat template writes before a reply


def other_form(asked: Sequence[Asked], trained: Sequence[Sequence[int]], tokenizer: Any) -> list[str]:
    """A sentence for every task whose prompts end in what no training sample has before its reply: another
    chat template, or none. trained: what stands before the first trained token of some samples."""
    said = []
    known = _tail(trained)
    for one in asked:
        if one.task.kind == "choice" or not trained:
            continue
        tail = _tail(one.prompts) if len(one.prompts) > 1 else tuple(one.prompts[0][-FORM_TOKENS:])
        if _ends_in(tail, trained) and _ends_in(known, one.prompts):
            continue
        asks, learns = (repr(tokenizer.decode(list(ids), skip_special_tokens=False)) for ids in (tail, known))
        said.append(
            f"{one.task.name}: its prompts end in {asks}, and those that are trained on in {learns}: the"
            f" model is asked in another form than it learns ({SETTING} [{one.task.name}.chat])"
        )
    return said


def _tail(texts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """What all of them end in, FORM_TOKENS at most."""
    tail: list[int] = []
    for tokens in itertools.islice(zip(*(text[::-1] for text in texts)), FORM_TOKENS):
        if len(set(tokens)) > 1:
            break
        tail.append(tokens[0])
    return tuple(tail[::-1])


def _ends_in(tail: tuple[int, ...], texts: Sequence[Sequence[int]]) -> bool:
    """Whether one of them does; a single token says nothing."""
    return len(tail) < 2 or any(tuple(text[-len(tail) :]) == tail for text in texts)


def digest(asked: list[Asked]) -> str:
    """Ranks that were started from other files would ask other things."""
    return hashlib.blake2b(repr([one.identity() for one in asked]).encode(), digest_size=16).hexdigest()
