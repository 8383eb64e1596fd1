"""The way back in: which checkpoint --resume goes on from, whether it is this run's, and its state put back.

Nothing in the folder is changed before the checkpoint has taken the settings; then run.yaml says the new ones and the result of
the run before is no longer there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repsft_fast import checkpoint
from repsft_fast.distributed import largest, together
from repsft_fast.errors import CheckpointError, ConfigError, TrainingError, describe, open_plain
from repsft_fast.report.result import FILE as RESULT
from repsft_fast.training import chunks, extend, identity
from repsft_fast.training.made import METRICS
from repsft_fast.training.moments import BEST, MOMENT
from repsft_fast.training.rundir import RunFolder, chunk_bytes_before

if TYPE_CHECKING:
    from repsft_fast.training.ended import Ended
    from repsft_fast.training.parts import Parts
    from repsft_fast.training.saver import Saver

_SHOWN = 5  # of what is wrong with newer checkpoints
_LONGEST_LINE = 1 << 24
_LATER = ("spikes/",)  # tensors that checkpoints of older versions lack; the state begins with zeros there
# Counters that every rank holds a share of. On disk they are whole, and come back to one rank.
_SHARES = ("ledger/", "samples/")


@dataclass(frozen=True)
class Origin:
    """Where a resumed run goes on."""

    path: Path | None  # of the generation; None: at the beginning, the run was ended before its first
    problems: tuple[str, ...] = ()  # what was wrong with newer ones
    raised: bool = False  # the budget is larger than that of the run before
    is_done: bool = False  # the run has ended and its result is whole: nothing is left to do, and nothing was changed


def resume(saver: Saver, folder: RunFolder | None, ended: Ended | None) -> Origin:
    """Go on from the newest whole checkpoint, or with a larger budget from the one before it mattered. All ranks call it.

    folder: the run's, told once the checkpoint has taken the settings. ended: the result that the run has.
    Raises CheckpointError when there are checkpoints and none is whole, ForeignCheckpoint for another run's, ConfigError for a
    budget that cannot be had.
    """
    parts, reporter = saver.parts, saver.reporter
    found = Origin(None)
    with together():
        if parts.world.is_main:
            found = _origin(saver.folder, parts, ended)
    number = checkpoint.number_of(found.path.name) if found.path is not None else None
    place, raised = largest(0 if number is None else number + 1, int(found.raised))
    if not place and ended is not None:
        return Origin(None, is_done=True)
    if not place:
        _accepted(saver, folder)
        _truncate_metrics(saver, 0)
        reporter.note("--resume: the run ended before its first checkpoint, so it begins anew")
        (before,) = largest(chunk_bytes_before(parts.config) or 0 if parts.world.is_main else 0)
        if before:  # what killed runs began with is in run.yaml, so that any number of beginnings make one run
            _say(saver, chunks.resume(parts, before))
        return found
    path = saver.folder / checkpoint.folder_name(place - 1)
    values, resharded = _load(saver, path)
    decided = values.get("decided", {})
    said = extend.keep_warmup(decided["budget"], parts) if "budget" in decided else None
    if raised:
        _take_back_end(saver)
    elif ended is not None and not ended.lacks:  # of the same content: nothing can be other than it is
        return Origin(path, is_done=True)
    _accepted(saver, folder)
    _truncate_metrics(saver, values["metrics_bytes"])
    _say(saver, said if raised else None)
    if resharded:
        torch.manual_seed(parts.config.run.seed + 1_000_003 * parts.progress.updates + parts.world.rank)
    reporter.resumed(values["seconds"])
    for text in found.problems[:_SHOWN]:
        _say(saver, text)
    if (more := len(found.problems) - _SHOWN) > 0:
        _say(saver, f"and {more} more like these")
    if decided:
        _say(saver, chunks.resume(parts, decided["chunk_bytes"]))
    elif (now := chunks.decided(parts)) is not None:
        _say(saver, f"an older version wrote the checkpoint, which names no loss.chunk_bytes: {now:,} bytes from here on")
    if "deciders" in decided:
        _say(saver, identity.other_deciders(decided["deciders"], identity.deciders(parts)))
    which = "the newest whole checkpoint" if found.problems else "the newest checkpoint"
    if raised:
        which = f"from where a budget of {parts.budget.updates:,} updates makes no difference yet"
    reporter.note(f"--resume: goes on after update {parts.progress.updates} from {path.name}, {which}")
    reporter.event("resume", {"generation": place - 1, "problems": list(found.problems), "resharded": resharded})
    return Origin(path, found.problems, bool(raised))


def _origin(folder: Path, parts: Parts, ended: Ended | None) -> Origin:
    """On the main rank: the generation, once it is seen to be this run's and the budget can be had."""
    checkpoint.clean(folder)
    try:
        found = checkpoint.newest(folder)
    except CheckpointError:
        if checkpoint.generations(folder):
            raise
        if ended is not None and (ended.lacks or ended.budget):
            wrong = "has ended and holds no checkpoint to go on from"
            todo = "its result stays as it is; start another run in another folder"
            raise ConfigError(describe(str(parts.folder), wrong, todo=todo)) from None
        if ended is None and _had_checkpoints(Path(parts.folder) / METRICS):
            wrong = "is of a run that had checkpoints, and none is there: it would begin anew over its own history"
            todo = f"put the folder {folder.name} back, no link to it, or start another run in another folder"
            raise ConfigError(describe(str(parts.folder), wrong, todo=todo)) from None
        return Origin(None)
    decided = checkpoint.values_of(found.path).get("decided", {})
    said = [
        identity.check(found.path.name, found.manifest.identity, identity.identity(parts)),
        identity.check_tokenizer(found.path.name, decided, parts.tokenizer),
    ]
    problems = (*found.problems, *(text for text in said if text is not None))
    if not extend.is_raised(decided.get("budget"), parts):
        return Origin(found.path, problems)
    return Origin(extend.origin(folder, parts), problems, raised=True)


def _had_checkpoints(metrics: Path) -> bool:
    try:
        with open_plain(metrics) as file:
            return any(b'"kind": "checkpoint_written"' in line for line in file)
    except OSError:
        return False


def _load(saver: Saver, path: Path) -> tuple[dict[str, Any], bool]:
    """Everything of a generation into the run: kept moments first pass through the live tensors into their pools."""
    parts, moments = saver.parts, saver.moments
    place: dict[str, Any] = {"rank": parts.world.rank, "world_size": parts.world.size, "looked_at": True}

    def fill(tensors: Mapping[str, Tensor], prefix: str = "") -> checkpoint.Resumed:
        ignore = () if prefix else (MOMENT, f"{BEST}/")
        loaded = checkpoint.load(path, tensors, prefix=prefix, ignore=ignore, may_lack=_LATER, **place)
        for name, tensor in tensors.items():
            if is_share(name) and not parts.world.is_main:
                tensor.zero_()
        return loaded

    live = saver.state.tensors()
    loaded = fill(live)
    values: dict[str, Any] = loaded.values
    for name, kept in values["moments"].items():
        moments.put_in(name, kept, partial(fill, prefix=f"{MOMENT}{name}/"))
    if values["best"]:
        moments.put_in(BEST, None, partial(fill, prefix=f"{BEST}/"))
    if values["moments"] or values["best"]:
        fill(live)
    saver.put_back(values)
    return values, loaded.resharded


def _accepted(saver: Saver, folder: RunFolder | None) -> None:
    """The settings stand: they are written down, and how the run ended before is no longer how it ended."""
    with together():
        if saver.parts.world.is_main:
            if folder is not None:
                folder.accepted(saver.parts.config)
            saver.began = True
            (Path(saver.parts.folder) / RESULT).unlink(missing_ok=True)
    saver.began = True


def _take_back_end(saver: Saver) -> None:
    """Where the smaller budget had ended the run: it has not."""
    progress, conductor = saver.parts.progress, saver.conductor
    if progress.reason is not None:
        conductor.history.decisions.pop()
        conductor.words, progress.reason = "", None


def _truncate_metrics(saver: Saver, size: int) -> None:
    """Forget the lines of updates that will be made again."""
    with together():
        if saver.parts.world.is_main and (path := Path(saver.parts.folder) / METRICS).exists():
            _truncate(saver, path, size)


def _truncate(saver: Saver, path: Path, size: int) -> None:
    try:
        there, whole = path.stat().st_size, _end_of_a_line(path, size)
        if there > whole:
            saver.reporter.lines.cut_to(whole)
    except OSError as error:
        wrong, todo = "cannot be cut back to the checkpoint", "let it be written, or move it away"
        raise TrainingError(describe(str(path), wrong, got=error.strerror, todo=todo)) from error
    if whole < size <= there:
        _say(saver, f"{METRICS} is not as it was at the checkpoint: what stood in it there may be told twice or not at all")
    if there < size:
        words = f"{METRICS} has {there:,} of the {size:,} bytes it had at the checkpoint: pictures lack what was cut"
        _say(saver, words)


def _end_of_a_line(path: Path, size: int) -> int:
    """Where the last whole line within so many bytes ends: there, unless somebody has changed the file."""
    with open_plain(path) as file:
        start = max(0, size - _LONGEST_LINE)
        file.seek(start)
        seen = file.read(size - start)
    return start + seen.rfind(b"\n") + 1 if seen else 0


def _say(saver: Saver, text: str | None) -> None:
    if text is not None:
        saver.reporter.note(f"--resume: {text}")


def is_share(name: str) -> bool:
    return any(name.startswith(share) or f"/{share}" in name for share in _SHARES)
