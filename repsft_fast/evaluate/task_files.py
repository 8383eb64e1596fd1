"""Task files → tasks: files, folders, hub ids and generated tasks, read as the training data are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from repsft_fast.data.filetypes import stem_of
from repsft_fast.data.gym import gym_rows, is_gym_source
from repsft_fast.data.source import Source
from repsft_fast.data.sources import list_sources, open_rows, without_copies
from repsft_fast.data.text_rows import BadRow
from repsft_fast.errors import ConfigError, DataError, describe, did_you_mean
from repsft_fast.evaluate.asked import Problem, Sampling, Task
from repsft_fast.evaluate.layouts import LAYOUTS, LETTERS, Fields, Item, check, detect
from repsft_fast.evaluate.prompts import LETTERED, STYLES, check_template, fill
from repsft_fast.seeded import key_of, permutation

KINDS = ("auto", "generate", "choice")
ONE_GREEDY = Sampling()
NAMED_AT_MOST = 5  # columns that are not used, in a note
# A .csv of MMLU as its authors wrote it has no header, and its file is the subject: abstract_algebra_test.csv
BARE = ("question", "A", "B", "C", "D", "answer")


def read_task(
    name: str,
    # path(s), a folder, a hub id ("owner/name" or "owner/name:subset"), reasoning-gym:TASK?size=…&seed=…
    source: str | Path | Sequence[str | Path],
    *,
    layout: str = "auto",  # a key of layouts.LAYOUTS; auto: by the columns of the first row
    kind: str = "auto",  # generate | choice (by log-likelihood); auto: as the layout has it
    split: str = "test",  # of a folder or hub id; where there is one split, that
    limit: int | None = None,  # so many problems, drawn by seed, in their order: a larger limit has them all
    prompt: str | None = None,  # a template of one's own: {question}, and {choices} where there are
    sampling: Sampling = ONE_GREEDY,
    seed: int = 42,  # of the limit's draw and of the order of GPQA's choices
    where: str = "--tasks",  # what the user wrote it in, for errors
) -> tuple[Task, list[str]]:
    """(the task, what is to be said of it).

    Raises ConfigError for arguments that cannot be meant, DataError naming source, row and column for what
    cannot be read; no row is passed over.
    """
    _check_arguments(name, layout, kind, limit, where)
    notes: list[str] = []
    if isinstance(source, str) and is_gym_source(source):
        layout, items = _gym_items(source, layout, where)
    else:
        layout, items = _file_items(source, layout, split, seed, notes)
    if not items:
        raise DataError(describe(str(source), "is empty", expected="at least one problem"))
    choices = _all_or_none(items)
    kind = LAYOUTS[layout].kind if kind == "auto" else kind
    if kind == "choice" and not choices:
        wrong = "compares choices, and the problems have none"
        raise ConfigError(describe(where, wrong, got=f"{name} ({layout})", todo="let the model generate"))
    if prompt is not None:
        # Plain rows may show their choices in the question already, and texts may be compared in their place.
        shown = choices and kind == "generate" and layout != "plain"
        check_template(prompt, where, choices=choices, shown=shown)
    make = _compared if kind == "choice" else _generated
    named = zip(_names([item for item, _ in items], notes, name), items, strict=True)
    problems = [make(item, problem, place, layout, prompt) for problem, (item, place) in named]
    chosen = _chosen(problems, limit, seed, name, notes)
    extractor = "choice" if choices else LAYOUTS[layout].extractor
    kinds: dict[str, Any] = {"kind": kind}
    return Task(name, tuple(chosen), extractor=extractor, sampling=sampling, **kinds), notes


def _check_arguments(name: str, layout: str, kind: str, limit: int | None, where: str) -> None:
    if not name.strip():
        raise ConfigError(describe(where, "has a task without a name", todo="write one"))
    for value, allowed, what in ((layout, ("auto", *LAYOUTS), "layout"), (kind, KINDS, "kind")):
        if value not in allowed:
            near = did_you_mean(value, allowed)
            todo = f"did you mean {near}?" if near else None
            expected = " | ".join(allowed)
            raise ConfigError(
                describe(where, f"has no such {what} of a task", expected=expected, got=value, todo=todo)
            )
    if limit is not None and limit < 1:
        raise ConfigError(describe(where, "has a limit too small", expected="at least 1", got=limit))


def _gym_items(source: str, layout: str, where: str) -> tuple[str, list[tuple[Item, str]]]:
    if layout not in ("auto", "plain"):
        todo = "leave the layout away"
        raise ConfigError(
            describe(where, f"has a layout for {source}, which is generated", got=layout, todo=todo)
        )
    items = []
    for number, row in enumerate(gym_rows(source), 1):
        place = f"{source}:{number}"
        if not row["answer"].strip():
            wrong = "has no answer to compare with"
            raise DataError(describe(place, wrong, todo="take another task"))
        question = row["messages"][0]["content"]
        items.append((Item(question, row["answer"].strip()), place))
    return "plain", items


def _file_items(
    source: str | Path | Sequence[str | Path], layout: str, split: str, seed: int, notes: list[str]
) -> tuple[str, list[tuple[Item, str]]]:
    """(the layout, (item, its place) of every row)."""
    listed = list_sources(source, split, beside=())
    opened = [(one, *_open(one, split, layout)) for one in listed]
    without_copies(opened)
    notes += dict.fromkeys(note for one in listed for note in one.notes)
    items: list[tuple[Item, str]] = []
    unused: Counter[str] = Counter()
    asked = layout
    for one, rows, _ in opened:
        before = len(items)
        for raw, place in rows:
            if isinstance(raw, BadRow):
                raise raw
            row = Fields(raw, place, merged=one.merged)
            if layout == "auto":
                layout = detect(row)
            check(row, layout)
            items.append((LAYOUTS[layout].read(row, seed), place))
            unused.update(set(row.columns) - row.used)
        if len(items) == before:
            raise DataError(describe(one.name, "is empty", expected="at least one row"))
    if asked == "auto":
        notes.append(f"{listed[0].name}: read as {layout}, by its columns")
    if unused:
        shown = [column for column, _ in unused.most_common(NAMED_AT_MOST)]
        more = f" and {len(unused) - len(shown)} more" if len(unused) > len(shown) else ""
        notes.append(f"{listed[0].name}: columns not used: {', '.join(shown)}{more}")
    if alike := sum(len(set(item.choices)) < len(item.choices) for item, _ in items):
        notes.append(f"{listed[0].name}: {alike} problems have two choices of one text: letters are judged")
    return layout, items


def _open(source: Source, split: str, layout: str) -> tuple[Iterator[tuple[Any, str]], str]:
    """The source's rows with their places, and the hash of what it holds."""
    if source.kind in ("csv", "tsv") and layout in ("auto", "mmlu") and _is_bare(source, split):
        assert source.path is not None
        subject = re.sub(r"_(test|val|dev)$", "", stem_of(source.path))
        rows, digest = open_rows(source, split, columns=BARE)
        return ((row | {"subject": subject}, place) for row, place in rows), digest
    return open_rows(source, split)


def _is_bare(source: Source, split: str) -> bool:
    """Whether the first line is a question with four choices and a letter, as MMLU's authors wrote it."""
    try:
        first: dict[str, Any] = next(open_rows(source, split, columns=BARE)[0], ({}, ""))[0]
    except DataError:  # it has other columns than these six
        return False
    return first.get("answer") in set("ABCD")


def _all_or_none(items: Sequence[tuple[Item, str]]) -> bool:
    """Whether the problems have choices. DataError where some have: they are asked and judged otherwise."""
    first = bool(items[0][0].choices)
    for item, place in items:
        if bool(item.choices) != first:
            wrong = (
                "has choices, and rows before it have none"
                if item.choices
                else "has no choices, as rows before it"
            )
            raise DataError(describe(place, wrong, todo="make two tasks of them"))
    return first


def _names(items: Sequence[Item], notes: list[str], task: str) -> list[str]:
    """A name for each, once: its id, else its number in the source.

    Files of several parts count their ids anew, so an id that comes again gets a number behind it; with the
    same question it is the same problem twice.
    """
    seen: dict[str, Item] = {}
    questions: Counter[tuple[Any, ...]] = Counter()
    names = []
    for number, item in enumerate(items, 1):
        name = item.name or str(number)
        questions[item.question, item.choices, str(item.before)] += 1
        if (
            name in seen
            and item.name
            and (item.question, item.before) == (seen[name].question, seen[name].before)
        ):
            wrong = f"holds the problem of the id {name} twice"
            raise DataError(describe(task, wrong, got=item.question[:80], todo="remove one of them"))
        unique, again = name, 2
        while unique in seen:
            unique, again = f"{name}#{again}", again + 1
        seen[unique] = item
        names.append(unique)
    if renamed := sum("#" in name and name.rpartition("#")[0] in seen for name in names):
        notes.append(f"{task}: problems whose id others have, named ID#2 …: {renamed}")
    if copies := sum(count - 1 for count in questions.values()):
        notes.append(f"{task}: questions that are there before, and count twice: {copies}")
    return names


def _generated(item: Item, name: str, place: str, layout: str, prompt: str | None) -> Problem:
    style = LAYOUTS[layout].style
    template = prompt or STYLES["choice" if item.choices and style == "plain" else style]
    asked = fill(template, item.question, item.choices)
    messages = (*item.before, {"role": "user", "content": asked})
    return Problem(name, messages, item.answer, item.group, item.choices, place)


def _compared(item: Item, name: str, place: str, layout: str, prompt: str | None) -> Problem:
    """A problem whose choices are compared by log-likelihood: their letters where the text shows them, else
    their texts."""
    if item.before:
        todo = "let the model generate, or write the row as a prompt"
        raise DataError(describe(place, "is a chat, and choices are compared behind a text", todo=todo))
    template = prompt or ("{question}" if layout == "plain" else LETTERED)
    about = ""
    if prompt is None and layout == "mmlu" and item.group:  # as MMLU's authors head it
        subject = item.group.replace("_", " ")
        about = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    text = about + fill(template, item.question, item.choices, mark=".")
    compared = tuple(LETTERS[: len(item.choices)]) if "{choices}" in template else item.choices
    messages = ({"role": "user", "content": text},)
    return Problem(name, messages, item.answer, item.group, item.choices, place, text, compared)


def _chosen(
    problems: list[Problem], limit: int | None, seed: int, name: str, notes: list[str]
) -> list[Problem]:
    if limit is None or limit >= len(problems):
        return problems
    notes.append(f"{name}: {limit} of {len(problems)} problems, drawn by seed {seed}")
    chosen = permutation(key_of("limit of a task", seed), len(problems))[:limit]
    return [problems[number] for number in sorted(chosen.tolist())]
