"""What a run writes into its folder, and where that folder may be: nowhere that what the run reads would be
written over.

By what a path leads to, not by its spelling. A new folder inside a model's folder is as good a place as any.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from repsft_fast.config import Config
from repsft_fast.errors import ConfigError, describe
from repsft_fast.rundir import made
from repsft_fast.rundir.lock import NAME as LOCK
from repsft_fast.rundir.made import LEFT_BY_A_RUN, PICTURES, TASKS, TRACKERS, is_model_name

_GENERATION = re.compile(r"^(\.writing-|\.trash-)?gen-\d+")
# of a folder that is read by what these name, not by what is in it
_SAVED_WHOLE = ("state.json", "dataset_dict.json")


def names_of(config: Config) -> list[str]:
    """Files and folders, besides the saved model's, that a run with these settings writes into its folder."""
    lora = config.model.lora
    return [
        *LEFT_BY_A_RUN,
        PICTURES[0],
        *([PICTURES[1]] if config.mixture.policy is not None else []),
        *(["adapter"] if lora is not None and lora.merge else []),
        *([TASKS] if config.evaluate.tasks is not None else []),
        *(name for name in TRACKERS if name in config.log.trackers),
    ]


def own_code(config: Config) -> set[str]:
    """Names of the model's own Python files, which are saved with it."""
    path = config.model.path
    if not config.model.trust_remote_code or path is None or not os.path.isdir(path):
        return set()
    return {name for name in os.listdir(path) if name.endswith(".py")}


def check_place(config: Config, *, resume: bool) -> None:
    """ConfigError where what the run reads is the run's folder, or lies in it under a name that is
    written."""
    folder = Path(config.run.folder)
    run = os.path.realpath(folder)
    code = own_code(config)
    written = {*names_of(config), made.FILE, LOCK} | code
    # By what each path leads to: spellings, links and names on the hub all end in one comparison.
    for setting, given in _read_from(config):
        path = os.path.expanduser(given)
        real = os.path.realpath(path)
        of_data = setting.startswith("data.") and setting != "data.cache_folder"
        if of_data and not resume and _matches(path, run, written):
            raise _misplaced(
                f"is where {setting} finds its files: the run's own would be taken for rows", config, given
            )
        # A folder the run makes would be found where a name was meant.
        if not os.path.lexists(path):
            by_name = of_data or setting in ("model.path", "tokenizer.path")
            if by_name and _is_below(run, real):
                wrong = (
                    f"would take the place of {setting}, which is looked for here before it is asked for on"
                    " the hub"
                )
                raise _misplaced(wrong, config, given)
            if real != run and setting != "data.cache_folder":  # which is made where it is not there
                continue
        # The same folder under another name: samefile sees bind mounts and disks that know no upper case.
        if real == run or (os.path.exists(run) and os.path.exists(path) and os.path.samefile(path, run)):
            raise _misplaced(f"is the folder of {setting}, which the run would write over", config, given)
        # Inside it only the names that are written matter; around it all that is read as rows.
        if _is_below(real, run):
            top = os.path.relpath(real, run).split(os.sep)[0]
            if top in written or is_model_name(top):
                raise _misplaced(
                    f"is where {setting} lies, under a name that the run writes itself ({top})", config, given
                )
        elif of_data and not resume and os.path.isdir(path) and _is_below(run, real):
            hidden = any(part.startswith((".", "_")) for part in os.path.relpath(run, real).split(os.sep))
            if not hidden and not any(os.path.exists(os.path.join(real, name)) for name in _SAVED_WHOLE):
                wrong = (
                    f"lies in the folder of {setting}, all of which is read: the run's own files would be"
                    " taken for rows"
                )
                raise _misplaced(
                    wrong, config, given, "choose a folder outside it, or name the files: folder/*.jsonl"
                )
    # A checkpoint is pruned whole, with whatever lies in it.
    for above, name in itertools.pairwise(Path(run).parts):
        if above == "checkpoints" and _GENERATION.match(name):
            raise _misplaced("lies in another run's checkpoint, which that run may delete", config, run)


def _matches(pattern: str, run: str, names: Iterable[str]) -> bool:
    """Whether a glob means files that a run writes in this folder."""
    top, deep, _ = os.path.abspath(pattern).partition("**")
    if deep:
        end = os.path.basename(pattern)
        return _is_below(run, os.path.realpath(top)) and any(fnmatchcase(name, end) for name in names)
    return glob.has_magic(pattern) and any(Path(run, name).match(os.path.abspath(pattern)) for name in names)


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _misplaced(wrong: str, config: Config, given: str, todo: str = "choose another folder") -> ConfigError:
    got = config.run.folder if given == config.run.folder else f"{config.run.folder} ({given})"
    return ConfigError(describe("run.folder", wrong, got=got, todo=todo))


def _read_from(config: Config) -> Iterator[tuple[str, str]]:
    """(Setting, path or name) of everything that the run reads."""
    model, data = config.model, config.data
    if model.path is not None:
        yield "model.path", model.path
        if model.gguf_file is not None:
            yield "model.gguf_file", os.path.join(model.path, model.gguf_file)
    if model.lora is not None and (given := getattr(model.lora, "from")) is not None:
        yield "model.lora.from", given
    if config.tokenizer.path is not None:
        yield "tokenizer.path", config.tokenizer.path
    template = config.tokenizer.chat_template
    if template is not None and len(template) < 4096 and os.path.isfile(template):
        yield "tokenizer.chat_template", template
    if data.cache_folder is not None:
        yield "data.cache_folder", data.cache_folder
    for split, sources in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        for source in _flat(sources):
            yield f"data.{split}", source


def _flat(sources: Any) -> Iterator[str]:
    if isinstance(sources, str):
        yield sources
    elif isinstance(sources, dict):
        for source in sources.values():
            yield from _flat(source)
    elif isinstance(sources, list | tuple):
        for source in sources:
            yield from _flat(source)
