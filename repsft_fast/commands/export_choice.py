"""Which checkpoint `repsft export` takes and which weights in it: those the run itself would save if it ended
there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repsft_fast import checkpoint
from repsft_fast.config import Config
from repsft_fast.errors import CheckpointError, ConfigError, RepsftError, describe
from repsft_fast.policies import History
from repsft_fast.report import result as results
from repsft_fast.rundir.folder import CHECKPOINTS as FOLDER
from repsft_fast.training.policy import named_result
from repsft_fast.training.snapshots import BEST, SNAPSHOT


@dataclass(frozen=True)
class Chosen:
    """The weights that a generation's run would save, by the beginning of their names in it."""

    prefix: str
    update: int
    which: str


def whole_generation(folder: Path, number: int | None) -> tuple[Path, list[str]]:
    """(a whole generation, what was wrong with newer ones). number: None = the newest."""
    there = checkpoint.generations(folder / FOLDER)
    if not there:
        wrong, todo = "the run has no checkpoint", "train it again: --resume begins anew where a run has none"
        if ended_well(folder) is not None:
            todo = "a run that has ended keeps its model in its folder"
        raise ConfigError(describe(str(folder), wrong, todo=todo))
    if number is None:
        return _newest(folder, len(there))
    if number not in there:
        expected = ", ".join(map(str, there))
        raise ConfigError(
            describe("--generation", "there is no such checkpoint", expected=expected, got=number)
        )
    path = folder / FOLDER / checkpoint.folder_name(number)
    if problems := checkpoint.verify(path):
        others = ", ".join(str(other) for other in there if other != number)
        todo = f"there are others: {others}; without --generation the newest whole one is taken"
        damaged = describe("--generation", f"{path.name} is damaged", todo=todo if others else None)
        raise CheckpointError("\n  ".join([damaged, *problems]))
    return path, []


def _newest(folder: Path, count: int) -> tuple[Path, list[str]]:
    """The newest whole one of `count`."""
    try:
        found = checkpoint.newest(folder / FOLDER)
    except CheckpointError as error:
        wrong = f"none of {count} checkpoints is whole, so there is nothing to export"
        raise CheckpointError(describe(str(folder / FOLDER), wrong), problems=error.problems) from error
    return found.path, list(found.problems)


def choose(config: Config, values: dict[str, Any], path: Path) -> Chosen:
    """As `finish` does: the snapshot that the policy names, else the best validation's weights, else the
    state. CheckpointError where the values are not in this version's form."""
    try:
        return _chosen(config, values, path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        wrong = "is of a version whose table of the run is another"
        todo = f"its model folder, of its last update, is {path / 'hf'}"
        raise CheckpointError(
            describe(path.name, wrong, got=f"{type(error).__name__}: {error}", todo=todo)
        ) from error


def _chosen(config: Config, values: dict[str, Any], path: Path) -> Chosen:
    progress = values["state"]["progress"]
    history = History.load(values["conductor"]["history"])
    moment = named_result(config, history)
    if moment is not None and moment != history.here:
        if moment not in values["moments"]:
            wrong = f"does not hold moment {moment}, which its policy names as the result"
            got = ", ".join(values["moments"]) or "none"
            raise CheckpointError(describe(path.name, wrong, got=got, todo="give an older one"))
        update = values["moments"][moment]["progress"]["updates"]
        return Chosen(f"{SNAPSHOT}{moment}/", update, f"moment {moment}, the mixture's result")
    if values["best"]:
        return Chosen(f"{BEST}/", progress["best"]["update"], "the best validation")
    which = "the last" if moment is None else f"moment {moment}, the mixture's result"
    return Chosen("", progress["updates"], which)


def ended_well(folder: Path) -> results.RunResult | None:
    """The result of a run that ended by rule or budget."""
    try:
        found = results.read(folder)
    except RepsftError:
        return None
    return found if found.success else None


def refuse_less(folder: Path, values: dict[str, Any], path: Path) -> None:
    """A run that ended well has a model of its end: one of an earlier update does not take its place."""
    ended = ended_well(folder)
    if ended is None:
        return
    work, saved = ended.more.get("work"), values["state"]["progress"]["all_work"]["updates"]
    done = work.get("updates") if isinstance(work, dict) else None
    if done is not None and done != saved:
        wrong = (
            f"the run ended after update {done}, and its newest whole checkpoint, {path.name}, is of update"
            f" {saved}"
        )
        raise ConfigError(describe(str(folder), wrong, todo="give a new folder for that one: --to FOLDER"))
