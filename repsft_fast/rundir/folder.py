"""The run's folder: locked against a second run, refused where the run would write over what it did not make.

Before anything is spent, every name the run would write is looked at: what has one and is not the run's by
its record (`made`) refuses the folder, as does a link or a folder where a file would be. All other
files are left alone and named once. run.yaml holds the settings as given, and what the run decides where they
leave it open, as soon as it is decided.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from repsft_fast import distributed
from repsft_fast.config import Config
from repsft_fast.distributed import World
from repsft_fast.errors import ConfigError, RepsftError, TrainingError, describe
from repsft_fast.files import replace_file, replacing
from repsft_fast.rundir import made
from repsft_fast.rundir.lock import NAME as LOCK
from repsft_fast.rundir.lock import RunLock
from repsft_fast.rundir.made import (
    LEFT_BY_A_RUN,
    METRICS,
    PICTURES,
    SETTINGS,
    TRACKERS,
    Made,
    kind_of,
    listed,
)
from repsft_fast.rundir.place import check_place, names_of, own_code

CHECKPOINTS, ADAPTERS = "checkpoints", "adapter"  # folders in the run's own


class HoldsARun(ConfigError):
    """The folder holds a run that --resume would go on with."""


class RunFolder:
    """Context manager around a whole run. Only the main rank locks and writes; what it is refused, all are.

    world    the run's ranks; None = a process by itself
    lock     held while the run lasts; None on other ranks
    others   sentences to be said once, on the main rank: of files in it that are not the run's, of a lock
             that holds nobody off
    """

    def __init__(self, config: Config, *, world: World | None = None, resume: bool = False):
        self.config = config
        self.world = world if world is not None else distributed.alone("cpu")
        self.resume = resume
        self.folder = Path(config.run.folder)
        self.others: list[str] = []
        self.lock: RunLock | None = None
        self._new: list[Path] = []  # folders that are not there yet, the innermost first
        self._began: Made | None = None  # the record of what this start may write, once it is on the disk

    def __enter__(self) -> RunFolder:
        with distributed.raise_together(self.world):
            if self.world.is_main:
                self._take()
        return self

    def _take(self) -> None:
        try:
            check_place(self.config, resume=self.resume)
            self._new = [path for path in (self.folder, *self.folder.parents) if not os.path.lexists(path)]
            # what is refused is left as it was, without so much as a lock
            self._check_contents(models=not self.resume)
            self.lock = RunLock(self.folder)
            try:
                found = self._check_contents()
                self.others = self._others(found)
                if not self.resume:
                    found.names |= set(names_of(self.config))
                    made.record(found)
                    self._began = found
                    write_settings(self.config, {})
                    return
                if found != Made.read(self.folder):  # a run of before there were records
                    made.record(found)
                _part_from_copies(self.folder / METRICS)  # which the run will hold open
            except BaseException:
                self._give_back()
                raise
        except RepsftError:
            raise
        except (OSError, ValueError) as error:  # a name with a NUL, a folder that may not be read
            words = getattr(error, "strerror", None) or str(error)
            raise ConfigError(
                describe("run.folder", f"cannot be used ({words})", got=str(self.folder))
            ) from error

    def accepted(self, config: Config, decided: Iterable[str] = ()) -> None:
        """--resume: the checkpoint took these settings, so that they are the run's, and so are the names they
        write. decided: dotted settings that keep what the run before decided, where they are left open."""
        if self.lock is not None:
            made.claim(self.folder, names_of(config))
            write_settings(config, settings_before(config, decided))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.lock is None:
            return
        if error is not None and not self.resume and self._never_began():
            self._give_back()
        self.lock.close()

    def _never_began(self) -> bool:
        """Nothing was computed, so that the corrected run may have the folder."""
        metrics = self.folder / METRICS
        nothing = not os.path.lexists(metrics) or (kind_of(metrics) == "file" and metrics.stat().st_size == 0)
        return nothing and set(_used(self.folder)) <= {SETTINGS, METRICS}

    def _give_back(self) -> None:
        """The folder as it was found, of a start that came to nothing."""
        assert self.lock is not None
        if self._began is not None and self.lock.lost() is None:
            # which were not there, or the start would have been refused
            for name in (*TRACKERS, SETTINGS, METRICS):
                if name in self._began.names and kind_of(self.folder / name) == (
                    "folder" if name in made.FOLDERS else "file"
                ):
                    shutil.rmtree(self.folder / name) if name in made.FOLDERS else (
                        self.folder / name
                    ).unlink()
            (self.folder / made.FILE).unlink(missing_ok=True)
        self.lock.close(remove=self.lock.created)
        for path in self._new:
            try:
                path.rmdir()
            except OSError:  # somebody put something there
                break

    # What is in it ----------------------------------------------------------------------------------------

    def _check_contents(self, *, models: bool = True, advise: bool = True) -> Made:
        """The record of what is the run's. ConfigError where the folder cannot be had. models: also by their
        contents."""
        if self.resume:
            return self._of_the_run(models=models)
        folder = self.folder
        found = (Made.read(folder) if folder.is_dir() else None) or Made(folder)
        names = names_of(self.config)
        begun = [name for name in LEFT_BY_A_RUN if os.path.lexists(folder / name)]
        before = kind_of(folder / LOCK) == "file" and (self.lock is None or not self.lock.created)
        taken = Made(folder).not_ours([*names, *begun]) | _for_a_moment(
            folder, names, known=before or bool(found.names)
        )
        taken |= Made(folder).not_our_model(".", own_code(self.config))
        if not taken:
            return Made(folder)
        used = {name: why for name, why in taken.items() if name in LEFT_BY_A_RUN}
        more = {name: why for name, why in taken.items() if name not in LEFT_BY_A_RUN}
        wrong = [f"holds another run ({listed(used)})"] if used else []
        todo = "choose another folder, or move them away"
        kind = ConfigError
        if used and advise and self._can_be_resumed():
            kind, todo = HoldsARun, "choose another folder, or continue that run with --resume"
        elif more:
            wrong.append(f"holds what the run would write and did not make: {listed(more)}")
        expected = "a new or empty folder" if used else "a folder without them"
        raise kind(
            describe("run.folder", ", and ".join(wrong), expected=expected, got=str(folder), todo=todo)
        )

    def _can_be_resumed(self) -> bool:
        try:
            RunFolder(self.config, world=self.world, resume=True)._of_the_run()
        except (RepsftError, OSError):
            return False
        return True

    def _of_the_run(self, *, models: bool = True) -> Made:
        """--resume: the record of the run that is there. ConfigError, with advice that works, where none
        is."""
        folder = self.folder
        found = made.known(folder) if folder.is_dir() and _used(folder) else None
        if found is None:
            raise self._no_run()
        names = names_of(self.config)
        there = [name for name in (*LEFT_BY_A_RUN, *PICTURES) if os.path.lexists(folder / name)]
        taken = found.not_ours({*names, *(name for name in there if name in found.names)})
        taken |= _for_a_moment(folder, names, known=True)
        taken |= found.not_our_model(".", own_code(self.config)) if models else {}
        if models and "adapter" not in taken and ("adapter" in names or "adapter" in found.models):
            taken |= found.not_our_model("adapter")
        if taken:
            wrong = f"the folder holds what the run would write and did not make: {listed(taken)}"
            todo = "move them away, then --resume writes what is missing"
            if "checkpoints" in taken:
                todo = "put the folder of checkpoints itself there: without it the run cannot go on"
            raise ConfigError(describe("--resume", wrong, got=str(folder), todo=todo))
        return found

    def _no_run(self) -> ConfigError:
        folder = self.folder
        kind = kind_of(folder)
        if kind is None:
            wrong = "there is no such folder"
        elif not folder.is_dir():
            wrong = f"run.folder is a {kind}"
        else:
            wrong = "there is no run to continue"
        expected, todo = f"a run's files in {folder}", "give the folder of a run"
        inside = sorted(glob.glob(os.path.join(glob.escape(str(folder)), "*", SETTINGS)))[:3]
        if inside:
            todo = f"give one of the runs in it: {', '.join(os.path.dirname(path) for path in inside)}"
        else:
            try:
                RunFolder(self.config, world=self.world)._check_contents(advise=False)
            except (RepsftError, OSError):
                pass
            else:
                todo = "drop --resume to begin one" if kind is None or folder.is_dir() else todo
        return ConfigError(describe("--resume", wrong, expected=expected, todo=todo))

    def _others(self, found: Made) -> list[str]:
        names = {*found.names, *names_of(self.config), LOCK, made.FILE}
        names |= {name.split("/")[0] for name in found.models.get(".", {})} | set(found.models)
        passing, there = _passing(names), sorted(os.listdir(self.folder))
        left = [n for n in there if n not in names and not passing.match(n) and not n.startswith(made.STAGED)]
        said = [self.lock.message] if self.lock is not None and self.lock.message else []
        return [
            *said,
            *(
                [f"left alone, for the run did not make them: {listed(dict.fromkeys(left, ''))}"]
                if left
                else []
            ),
        ]


def _used(folder: Path) -> list[str]:
    return [name for name in LEFT_BY_A_RUN if os.path.lexists(folder / name)]


def _passing(names: Iterable[str]) -> re.Pattern[str]:
    """Hidden names that files have while they are written: .result.json.<32 digits>, and of older versions
    .run.yaml.4711.tmp and .run.png.part."""
    ours = "|".join(re.escape(name.lstrip(".")) for name in sorted(names))
    return re.compile(rf"\.({ours})\.(\d+\.tmp|part|[0-9a-f]{{32}})$")


def _for_a_moment(folder: Path, names: list[str], *, known: bool) -> dict[str, str]:
    """Names under which the run writes its files before they get their own; a run before may have left plain
    ones."""
    passing = _passing([*names, made.FILE])
    there = [name for name in sorted(os.listdir(folder)) if passing.match(name)] if folder.is_dir() else []
    kinds = {name: kind_of(folder / name) for name in there}
    return {
        name: "" if kind == "file" else f"a {kind}"
        for name, kind in kinds.items()
        if not known or kind != "file"
    }


def _part_from_copies(path: Path) -> None:
    """`cp -al` gives a folder's files second names elsewhere: what is added to this one is not added to the
    copy."""
    if kind_of(path) == "file" and path.stat().st_nlink > 1:
        with replacing(path) as new:
            shutil.copy2(path, new, follow_symlinks=False)


# What is in run.yaml --------------------------------------------------------------------------------------


def settle(config: Config, world: World, decided: Mapping[str, Any]) -> None:
    """What is decided by now ({dotted setting: value}) goes into run.yaml. All ranks may call it."""
    if world.is_main and any(is_open(config, name) for name in decided):
        write_settings(config, decided)


def write_settings(config: Config, decided: Mapping[str, Any]) -> None:
    """run.yaml, in which settings that are left open have the given values."""
    for name, value in decided.items():
        if is_open(config, name):
            section, _, setting = name.rpartition(".")
            inner = getattr(config, section).model_copy(update={setting: value})
            config = config.model_copy(update={section: inner})
    config = _that_can_be_read(config)
    path = Path(config.run.folder) / SETTINGS
    try:
        replace_file(path, config.to_yaml().encode(), SETTINGS)
    except OSError as error:
        raise TrainingError(describe(str(path), "cannot be written", got=error.strerror)) from error


def _that_can_be_read(config: Config) -> Config:
    """Rows that were decided hold every sample there is, and may be shorter than samples could have been:
    then data.max_tokens is what they hold, which is the same data, or these settings would refuse each
    other."""
    rows, longest = config.batch.row_tokens, config.data.max_tokens
    if not isinstance(rows, int) or longest is None or longest <= rows + 1:
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"max_tokens": rows + 1})})


def settings_before(config: Config, names: Iterable[str]) -> dict[str, Any]:
    """{dotted setting: value} of what the folder's run.yaml says of these, without those that it leaves open;
    {} where it is not there or cannot be read."""
    try:
        found = Config.of(Path(config.run.folder) / SETTINGS)
    except (ConfigError, OSError):
        return {}
    values = found.to_dict()
    return {name: _at(values, name) for name in names if not is_open(found, name)}


def is_open(config: Config, name: str) -> bool:
    """Whether a dotted setting is left to the run: null or auto."""
    return _at(config.to_dict(), name) in (None, "auto")


def _at(values: Any, name: str) -> Any:
    for step in name.split("."):
        values = values[step]
    return values
