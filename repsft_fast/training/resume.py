"""The way back in: which checkpoint --resume goes on from, whether it is this run's, and its state put back.

Nothing in the folder is changed before the checkpoint has taken the settings; then run.yaml says the new ones
and the result of the run before is no longer there.

A larger budget goes on from where it begins to matter. A run that had it from the start would have made the
same updates up to there, so the extended run equals that one, bit for bit.

    wsd             the decay ends with the budget: back to before its first update
    constant        nothing falls: on from the last state, its end taken back
    cosine, linear  every update's rate depends on the budget: there is no such point
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repsft_fast import checkpoint
from repsft_fast.distributed import broadcast_from_main, raise_together
from repsft_fast.errors import CheckpointError, ConfigError, TrainingError, describe, open_plain
from repsft_fast.report.result import FILE as RESULT
from repsft_fast.rundir import identity
from repsft_fast.rundir.ended import Ended
from repsft_fast.rundir.folder import RunFolder, settings_before
from repsft_fast.rundir.made import METRICS
from repsft_fast.schedule import NEEDS_TOTAL
from repsft_fast.training import budget, decided, gathered
from repsft_fast.training.parts import Parts
from repsft_fast.training.run import Run
from repsft_fast.training.saver import is_partial_sum
from repsft_fast.training.snapshots import BEST, SNAPSHOT

_SHOWN = 5  # of what is wrong with newer checkpoints
_LONGEST_LINE = 1 << 24
# tensors that checkpoints of older versions lack; the state begins with zeros there
_LATER = ("spikes/",)
_OTHER_FOLDER = "choose another folder for a run of its own"


@dataclass(frozen=True)
class ResumePoint:
    """Where a resumed run goes on.

    path      of the generation; None: at the beginning, the run was ended before its first
    problems  what was wrong with newer ones
    raised    the budget is larger than that of the run before
    is_done   the run has ended and its result is whole: nothing is left to do, and nothing was changed
    """

    path: Path | None
    problems: tuple[str, ...] = ()
    raised: bool = False
    is_done: bool = False


def resume(run: Run, folder: RunFolder | None = None, ended: Ended | None = None) -> ResumePoint:
    """Go on from the newest whole checkpoint, or with a larger budget from the one before it mattered. All
    ranks call it.

    folder: the run's, told once the checkpoint has taken the settings. ended: the result that the run has.
    Raises CheckpointError when there are checkpoints and none is whole, ForeignCheckpoint for another run's,
    ConfigError for a budget that cannot be had.
    """
    found = _found(run, ended)
    if found.path is None and ended is not None:
        return replace(found, is_done=True)
    if found.path is None:
        _begin_anew(run, folder)
        return found
    values, resharded = _load(run, found.path)
    saved = values.get("decided", {})
    said = _keep_warmup(saved["budget"], run.parts) if "budget" in saved else None
    # Where the smaller budget had ended the run it has not; of a run that has ended otherwise nothing may be
    # other than it is, and if nothing of its model is missing, nothing is left to do.
    if found.raised:
        run.conductor.take_back_stop()
    elif ended is not None and not ended.lacks:
        run.saver.continue_from(found.path)
        return replace(found, is_done=True)
    kept = decided.resume(run.parts, saved)
    if kept and (weights := gathered.decide(run.parts)) is not None:  # of other rows, or other chunks
        kept.append(weights)
    _accepted(run, folder)
    _cut_metrics(run, values["metrics_bytes"])
    _say(run, said if found.raised else None)
    if resharded:  # the streams are of other ranks: these go on with new ones, the same at every resumption
        torch.manual_seed(
            run.parts.config.run.seed + 1_000_003 * run.parts.progress.updates + run.parts.world.rank
        )
    run.reporter.resumed(values["seconds"])
    _tell(run, found, kept, saved.get("deciders"), resharded)
    run.saver.continue_from(found.path)
    return found


def _found(run: Run, ended: Ended | None) -> ResumePoint:
    """The main rank's choice, on every rank."""
    parts, saver = run.parts, run.saver
    found = ResumePoint(None)
    with raise_together(parts.world):
        if parts.world.is_main:
            found = _origin(saver.folder, parts, ended)
    number = None if found.path is None else checkpoint.number_of(found.path.name)
    number, problems, raised = broadcast_from_main(parts.world, [number, list(found.problems), found.raised])
    path = None if number is None else saver.folder / checkpoint.folder_name(number)
    return ResumePoint(path, tuple(problems), raised)


def _origin(folder: Path, parts: Parts, ended: Ended | None) -> ResumePoint:
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
            wrong = (
                "is of a run that had checkpoints, and none is there: it would begin anew over its own"
                " history"
            )
            todo = f"put the folder {folder.name} back, no link to it, or start another run in another folder"
            raise ConfigError(describe(str(parts.folder), wrong, todo=todo)) from None
        return ResumePoint(None)
    saved = checkpoint.values_of(found.path).get("decided", {})
    mine = identity.identity(parts.config, parts.tokenizer, parts.base, parts.data.digest)
    said = [
        identity.check(found.path.name, found.manifest.identity, mine),
        identity.check_tokenizer(found.path.name, saved, parts.tokenizer),
    ]
    problems = (*found.problems, *(text for text in said if text is not None))
    if not _is_raised(saved.get("budget"), parts):
        return ResumePoint(found.path, problems)
    return ResumePoint(before_it_mattered(folder, parts), problems, raised=True)


def _had_checkpoints(metrics: Path) -> bool:
    try:
        with open_plain(metrics) as file:
            # As bytes: a line that a kill has torn, or that nobody can parse, says it too.
            return any(b'"kind": "checkpoint_written"' in line for line in file)
    except OSError:
        return False


# A larger budget ------------------------------------------------------------------------------------------


def _is_raised(saved: Mapping[str, Any] | None, parts: Parts) -> bool:
    """Whether the settings ask for a larger budget than the checkpoint's. ConfigError where it cannot be had.

    saved: `budget.record` of the run before; None where an older version wrote none, and its settings are
    part of its identity.
    """
    now = budget.record(parts.config, parts.budget, parts.schedule)
    if saved is None or saved["settings"] == now["settings"] or saved["updates"] == now["updates"]:
        return False
    before, after = saved["updates"], now["updates"]
    had, asked = (f"{_words(of['settings'])} ({of['updates']:,} updates)" for of in (saved, now))
    if after < before:
        wrong = "is smaller than the one the run has"
        todo = f"a run is not shortened: leave the budget as it was, or {_OTHER_FOLDER}"
        raise ConfigError(describe("budget", wrong, expected=had, got=asked, todo=todo))
    if (name := parts.config.schedule.name) in NEEDS_TOTAL:
        wrong = (
            f"cannot be raised under schedule.name: {name}, whose rate at every update depends on the budget"
        )
        todo = f"{_OTHER_FOLDER}; wsd and constant can be extended"
        raise ConfigError(describe("budget", wrong, expected=had, got=asked, todo=todo))
    return True


def before_it_mattered(folder: Path, parts: Parts) -> Path:
    """The newest whole generation from which a run with a larger budget would have gone on alike.

    ConfigError when the run ended by something other than its budget, or when no such generation was kept.
    """
    paths, _ = checkpoint.candidates(folder)
    for path in paths:
        try:
            values = checkpoint.values_of(path)
        except CheckpointError:
            continue
        state, rule = values["state"], values.get("ended_by")
        if rule is not None and rule != "budget":
            words = state["progress"]["reason"]
            wrong = f"does not end this run, which ended by its rule ({words})"
            todo = (
                f"a larger budget changes nothing: leave it as it was, or {_OTHER_FOLDER} with another rule"
            )
            raise ConfigError(describe("budget", wrong, todo=todo))
        as_if = state["schedule"]["decay_start"] is None and not values.get("validated", False)
        if as_if and not checkpoint.verify(path):
            return path
    wrong = "cannot be raised: no whole checkpoint from before the decay of the learning rate is there"
    if parts.config.schedule.name == "constant":
        wrong = "cannot be raised: no whole checkpoint is there that the longer run would have had"
    todo = f"checkpoint.keep_extendable: true keeps one; {_OTHER_FOLDER}"
    raise ConfigError(describe("budget", wrong, got=str(folder), todo=todo))


def _keep_warmup(saved: Mapping[str, Any], parts: Parts) -> str | None:
    """Let the schedule warm up as the run began, which is past by now; what is to be said where the settings
    mean another."""
    before, now = saved["warmup_updates"], parts.schedule.warmup_updates
    parts.schedule.warmup_updates = before
    parts.budget = replace(parts.budget, warmup_updates=before)
    if before == now:
        return None
    return (
        f"the warm-up stays at {before:,} updates, as the run began, where optim.warmup_fraction of the"
        f" larger budget would be {now:,}: the run equals one that had this budget and optim.warmup_updates:"
        f" {before} from the start"
    )


def _words(settings: Mapping[str, Any]) -> str:
    set_ones = [f"budget.{name}: {value}" for name, value in settings.items() if value is not None]
    return ", ".join(set_ones) or "no budget"


# The state ------------------------------------------------------------------------------------------------


def _begin_anew(run: Run, folder: RunFolder | None) -> None:
    """The run before was ended before its first checkpoint."""
    parts, names = run.parts, decided.settings_decided()
    # What killed runs began with is in run.yaml, so that any number of beginnings make one run.
    before = settings_before(parts.config, names) if parts.world.is_main else {}
    kept = decided.begin_anew(parts, broadcast_from_main(parts.world, before))
    if kept and (weights := gathered.decide(parts)) is not None:
        kept.append(weights)
    _accepted(run, folder)
    _cut_metrics(run, 0)
    run.reporter.note("--resume: the run ended before its first checkpoint, so it begins anew")
    for text in kept:
        _say(run, text)


def _load(run: Run, path: Path) -> tuple[dict[str, Any], bool]:
    """(values, whether it was of other ranks): everything of a generation into the run. Kept snapshots first
    pass through the live tensors into their pools."""
    world, snapshots = run.parts.world, run.snapshots

    def fill(tensors: Mapping[str, Tensor], prefix: str = "") -> checkpoint.Resumed:
        with run.state.writing():
            loaded = checkpoint.load(
                path,
                tensors,
                prefix=prefix,
                ignore=() if prefix else (SNAPSHOT, f"{BEST}/"),
                may_lack=_LATER,
                rank=world.rank,
                world_size=world.size,
                looked_at=True,
            )
            # A sum that was shared out over ranks comes back to one of them.
            for name, tensor in tensors.items():
                if is_partial_sum(name) and not world.is_main:
                    tensor.zero_()
        return loaded

    # Pools copy from live tensors alone, so each snapshot stands there for a moment; then the state again.
    live = run.state.tensors()
    loaded = fill(live)
    values: dict[str, Any] = loaded.values
    for name, kept in values["moments"].items():
        snapshots.adopt(name, kept, partial(fill, prefix=f"{SNAPSHOT}{name}/"))
    if values["best"]:
        snapshots.adopt(BEST, None, partial(fill, prefix=f"{BEST}/"))
    if values["moments"] or values["best"]:
        fill(live)
    run.saver.load(values)
    return values, loaded.resharded


def _accepted(run: Run, folder: RunFolder | None) -> None:
    """The settings stand: they are written down, and how the run ended before is no longer how it ended."""
    with raise_together(run.parts.world):
        if run.parts.world.is_main:
            if folder is not None:
                folder.accepted(run.parts.config, decided.settings_decided())
            run.began = True
            (Path(run.parts.folder) / RESULT).unlink(missing_ok=True)
    run.began = True


# metrics.jsonl --------------------------------------------------------------------------------------------


def _cut_metrics(run: Run, size: int) -> None:
    """Forget the lines of updates that will be made again."""
    with raise_together(run.parts.world):
        if run.parts.world.is_main and (path := Path(run.parts.folder) / METRICS).exists():
            _cut(run, path, size)


def _cut(run: Run, path: Path, size: int) -> None:
    try:
        there, whole = path.stat().st_size, _end_of_a_line(path, size)
        if there > whole:
            run.reporter.lines.cut_to(whole)
    except OSError as error:
        wrong, todo = "cannot be cut back to the checkpoint", "let it be written, or move it away"
        raise TrainingError(describe(str(path), wrong, got=error.strerror, todo=todo)) from error
    if whole < size <= there:
        words = f"{METRICS} is not as it was at the checkpoint: what stood in it there may be told twice"
        _say(run, f"{words} or not at all")
    if there < size:
        words = f"{METRICS} has {there:,} of the {size:,} bytes it had at the checkpoint"
        _say(run, f"{words}: pictures lack what was cut")


def _end_of_a_line(path: Path, size: int) -> int:
    """Where the last whole line within so many bytes ends: there, unless somebody has changed the file."""
    with open_plain(path) as file:
        start = max(0, size - _LONGEST_LINE)
        file.seek(start)
        seen = file.read(size - start)
    return start + seen.rfind(b"\n") + 1 if seen else 0


# What is said ---------------------------------------------------------------------------------------------


def _tell(
    run: Run, found: ResumePoint, kept: list[str], deciders: Mapping[str, Any] | None, resharded: bool
) -> None:
    """What was wrong with newer checkpoints, what was decided and what decides bits otherwise now, and where
    the run goes on."""
    parts, path = run.parts, found.path
    assert path is not None
    for text in found.problems[:_SHOWN]:
        _say(run, text)
    if (more := len(found.problems) - _SHOWN) > 0:
        _say(run, f"and {more} more like these")
    for text in kept:
        _say(run, text)
    if deciders is not None:
        now_deciding = identity.deciders(parts.config, parts.world)
        _say(run, identity.other_deciders(deciders, now_deciding))
    which = "the newest whole checkpoint" if found.problems else "the newest checkpoint"
    if found.raised:
        which = f"from where a budget of {parts.budget.updates:,} updates makes no difference yet"
    run.reporter.note(f"--resume: goes on after update {parts.progress.updates} from {path.name}, {which}")
    number = checkpoint.number_of(path.name)
    facts = {"generation": number, "problems": list(found.problems), "resharded": resharded}
    run.reporter.event("resume", facts)


def _say(run: Run, text: str | None) -> None:
    if text is not None:
        run.reporter.note(f"--resume: {text}")
