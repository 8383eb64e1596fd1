"""From settings to tasks and prompts: what `evaluate.tasks` names is read, and spelled for one tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from repsft_fast.config import Config
from repsft_fast.config.task_sections import EvalTask
from repsft_fast.errors import ConfigError, RepsftError, describe
from repsft_fast.evaluate.answers import find_extractor
from repsft_fast.evaluate.asked import GREEDY, NUCLEUS, SAMPLED, Sampling, Task
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
    if task.kind == "choice" and settings.n > 1:
        notes.append(f"{name}: compares choices by likelihood, one look each: n does nothing")
    find_extractor(task.extractor, trusted=config.model.trust_remote_code)
    return task, notes


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


def digest(asked: list[Asked]) -> str:
    """Ranks that were started from other files would ask other things."""
    return hashlib.blake2b(repr([one.identity() for one in asked]).encode(), digest_size=16).hexdigest()
