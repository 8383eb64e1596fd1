"""The settings of one task that a model is judged by: `evaluate.tasks`, and `repsft eval --tasks`."""

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from repsft_fast.config.paths import NO_PATHS, refused
from repsft_fast.config.section import Section
from repsft_fast.config.values import Count, Name, NotNegative, Share, Source, Text
from repsft_fast.errors import did_you_mean

_ODD = re.compile(r"[^A-Za-z0-9._-]+")


class EvalTask(Section):
    """One task: where its problems are, how they are asked, how answers are read."""

    source: Source
    """File, folder, hub id or reasoning-gym:TASK?size=N&seed=S; the name of a task with layout lm_eval."""
    layout: Literal["auto", "plain", "aime", "gpqa", "gsm8k", "math500", "mmlu", "lm_eval"] = "auto"
    """Which columns it has; auto: recognised by them."""
    by: Literal["auto", "generation", "likelihood"] = "auto"
    """Answers are generated, or choices are compared by log-likelihood; auto: likelihood for mmlu alone."""
    n: Count = 1
    """Replies to each problem."""
    temperature: NotNegative | None = None
    """0: greedy; null: 0 for one reply, 0.6 for several."""
    top_p: Share | None = None
    """Nucleus that replies are drawn from; null: 1 for one reply, 0.95 for several."""
    max_tokens: Count = 4096
    """Longest reply in tokens."""
    extractor: Text | None = None
    """How the answer is found: final, boxed, hashes, choice, last_number, number, whole, or
    package.module:function; null: as the layout says, number where all answers are numbers."""
    prompt: Text | None = None
    """What is asked, with {question} and {choices} in it; null: as the layout says."""
    chat: bool = True
    """Asked as the user's turn of a chat, where the tokenizer has a template; false: as the text it is."""
    split: Text = "test"
    """Split of a hub dataset."""
    limit: Count | None = None
    """This many problems, chosen by seed; null: all."""


def as_tasks(value: Any) -> Any:
    """{name: source} and [source, …] as {name: {source: …}}: names of sources without one are their own."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list | tuple):
        named: dict[str, Any] = {}
        for source in value:
            if not isinstance(source, str | Mapping):
                raise refused(f"holds {source!r} in a list", expected="sources as text, or {name: source}")
            several = {name_of(source): source} if isinstance(source, str) else source
            if both := named.keys() & several.keys():
                wrong = f"holds two sources that would both be called {next(iter(both))}"
                raise refused(wrong, todo="name them: {name: source}")
            named |= several
        value = named
    if not isinstance(value, Mapping):
        raise refused(f"is {value!r}", expected="sources, or {name: source}")
    if not value:
        raise refused("names no task", todo="{name: source}, or null")
    return {str(name): _as_task(name, given) for name, given in value.items()}


def _as_task(name: Any, given: Any) -> Any:
    if _ODD.search(str(name)) or not str(name).strip("."):
        wrong = f"names a task {str(name)!r}, and files are called by it"
        raise refused(wrong, expected="letters, digits, dots, - and _", todo=f"say {_plain(str(name))}")
    if isinstance(given, EvalTask):
        return given
    if isinstance(given, str):
        return {"source": given}
    if not isinstance(given, Mapping):
        raise refused(f"of {name} is {given!r}", expected="one source, or {source: …, n: …}")
    for key in given:
        if key not in EvalTask.model_fields:
            near = did_you_mean(str(key), EvalTask.model_fields)
            known = ", ".join(EvalTask.model_fields)
            todo = f"did you mean {near}?" if near else None
            raise refused(f"of {name} has {key}, which is not known", expected=known, todo=todo)
    if "source" not in given:
        raise refused(f"of {name} has no source", todo=f"{{{name}: {{source: FILE}}}}")
    return given


def name_of(source: str) -> str:
    """What a source without a name is called: its file's stem, its generator's task.

    >>> name_of("data/aime24.jsonl"), name_of("reasoning-gym:chain_sum?size=20"), name_of("openai/gsm8k")
    ('aime24', 'chain_sum', 'gsm8k')
    """
    for prefix in NO_PATHS:
        source = source.removeprefix(prefix)
    return _plain(PurePath(source.partition("?")[0]).name.partition(".")[0])


def _plain(name: str) -> str:
    return _ODD.sub("_", name).strip("._") or "task"


Tasks = Annotated[dict[Name, EvalTask], BeforeValidator(as_tasks)]
