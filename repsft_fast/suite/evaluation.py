"""One task, from its prompts to its result: answered by an engine, kept in a file, judged, counted."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from repsft_fast.data.store import TokenStore
from repsft_fast.distributed import World, gather_everywhere
from repsft_fast.evaluate.asked import Engine, Generation
from repsft_fast.evaluate.record import Record, line_of
from repsft_fast.evaluate.replies import Asked, Told, answer, text_of
from repsft_fast.evaluate.reply_entropy import reply_entropies
from repsft_fast.evaluate.teacher_forced import TeacherForced

Found = dict[tuple[int, int], Generation]  # by (prompt, draw)


@dataclass(frozen=True)
class Under:
    """A model under evaluation, and where its replies are kept."""

    model: Any
    tokenizer: Any
    engine: Engine
    world: World
    end_ids: tuple[int, ...]
    row_tokens: int
    packed: bool
    scorer: Callable[[TokenStore], TeacherForced]  # of all samples of a store, over the ranks
    folder: Path | None  # of the files of replies; None: they are kept nowhere
    identity: Mapping[str, Any]  # what replies depend on besides the task
    # each rank holds the whole model and answers its share; False: all ranks answer all, together
    shared: bool = False


@dataclass(frozen=True)
class Answered:
    """All replies to a task, on every rank."""

    found: Found
    seconds: float
    generated: int  # tokens generated now, over all ranks: others were in the file
    texts: dict[tuple[int, int], str]


def answer_task(under: Under, asked: Asked, told: Told = lambda request, reply: None) -> Answered:
    """Every reply, new or out of the file of an evaluation that was cut short. All ranks call it."""
    world, several = under.world, under.shared and under.world.size > 1
    part = (world.rank, world.size) if several else (0, 1)
    began = time.perf_counter()
    with _record(under, asked, several) as record:
        if several:
            _share_known(world, record)
        replies = answer(under.engine, asked, record, end_ids=under.end_ids, part=part, told=told)
    found, generated = dict(replies.found), replies.generated
    if several:
        lines = [[*key, line_of(reply)] for key, reply in found.items()]
        for line in (line for ranks in gather_everywhere(world, lines) for line in ranks):
            found[line[0], line[1]] = Generation(**line[2])
        generated = sum(gather_everywhere(world, generated))
    found = _with_entropies(under, asked, found)
    text = text_of(under.tokenizer, under.end_ids)
    texts = {key: text(found[key]) for key in sorted(found)}
    return Answered(found, time.perf_counter() - began, generated, texts)


@contextmanager
def _record(under: Under, asked: Asked, several: bool) -> Iterator[Record | None]:
    # Ranks that walk in step would wait for one whose disk is full: there the file is written at the end.
    if under.folder is None or (under.world.size > 1 and not several):
        yield None
        return
    with Record(
        path_of(under, asked, under.world.rank), _identity(under, asked), text_of=_text(under)
    ) as record:
        for path in _left_by_more_ranks(under, asked) if under.world.is_main else ():
            with Record(path, _identity(under, asked), text_of=_text(under)) as left:
                record.known |= left.known
        yield record


def _left_by_more_ranks(under: Under, asked: Asked) -> list[Path]:
    """Files of ranks that a launch before this one had, and this one has not."""
    if under.folder is None:
        return []
    found = {
        path: int(rank[1])
        for path in sorted(under.folder.glob(f"{asked.task.name}.rank*.jsonl"))
        if (rank := re.fullmatch(re.escape(asked.task.name) + r"\.rank(\d+)\.jsonl", path.name))
    }
    return [path for path, rank in found.items() if rank >= (under.world.size if under.shared else 1)]


def finish_record(under: Under, asked: Asked, lines: Sequence[Mapping[str, Any]]) -> None:
    """The task's file with what each reply was worth, in place of what was written as they came. The main
    rank writes; all ranks call it."""
    if under.folder is None:
        return
    if under.world.is_main:
        with Record(path_of(under, asked, 0), _identity(under, asked), text_of=_text(under)) as record:
            record.finish(lines)
        for path in _left_by_more_ranks(under, asked):
            path.unlink()
    elif under.shared:
        path_of(under, asked, under.world.rank).unlink(missing_ok=True)


def path_of(under: Under, asked: Asked, rank: int) -> Path:
    assert under.folder is not None
    return under.folder / (f"{asked.task.name}.jsonl" if rank == 0 else f"{asked.task.name}.rank{rank}.jsonl")


def _text(under: Under) -> Any:
    return text_of(under.tokenizer, under.end_ids)


def _identity(under: Under, asked: Asked) -> dict[str, Any]:
    return {**under.identity, "engine": under.engine.name, "end_ids": list(under.end_ids), **asked.identity()}


def _share_known(world: World, record: Record | None) -> None:
    """What any rank's file holds need not be answered again, however many ranks there were."""
    known = [] if record is None else [[*key, line_of(reply)] for key, reply in record.known.items()]
    everyones = gather_everywhere(world, known)
    if record is not None:
        record.known |= {(p, d): Generation(**line) for ranks in everyones for p, d, line in ranks}


def _with_entropies(under: Under, asked: Asked, found: Found) -> Found:
    """Replies whose engine does not say their entropy get it by one teacher-forced pass."""
    missing = [key for key, reply in sorted(found.items()) if reply.entropy is None and reply.ids]
    texts = [(asked.prompts[prompt], found[prompt, draw].ids) for prompt, draw in missing]
    means = reply_entropies(
        under.model, texts, row_tokens=under.row_tokens, world=under.world, packed=under.packed
    )
    return found | {key: replace(found[key], entropy=mean) for key, mean in zip(missing, means, strict=True)}
