"""What `repsft export` is asked for, checked before anything is loaded: the run's folder, its settings, the
folder to write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic_core import PydanticCustomError

from repsft_fast import checkpoint
from repsft_fast.config import Config
from repsft_fast.config.paths import expand
from repsft_fast.errors import CheckpointError, ConfigError, describe
from repsft_fast.rundir import made
from repsft_fast.rundir.folder import CHECKPOINTS as FOLDER
from repsft_fast.rundir.folder import SETTINGS

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def run_folder(run: str | Path) -> Path:
    """The run's folder, which is there and a run's."""
    folder = Path(_filled_in("export", run))
    todo = "give the folder of a run: its run.folder"
    if not str(run) or not os.path.isdir(folder):
        raise ConfigError(describe("export", "there is no such folder", got=str(run), todo=todo))
    if not (folder / SETTINGS).exists() and not (folder / FOLDER).exists():
        above = next((parent for parent in folder.absolute().parents if (parent / SETTINGS).exists()), None)
        todo = todo if above is None else f"did you mean {above}?"
        raise ConfigError(
            describe("export", f"is no run's folder: it holds no {SETTINGS}", got=str(run), todo=todo)
        )
    return folder


def _filled_in(where: str, path: str | Path) -> str:
    try:
        return expand(str(path))
    except PydanticCustomError as error:
        raise ConfigError(describe(where, error.message(), got=str(path))) from error


def settings_of(folder: Path, base: str | None) -> Config:
    """The run's settings, the base where it lies now."""
    file = folder / SETTINGS
    if not file.is_file():
        wrong = "is missing: without it nobody knows which model the weights are of"
        raise ConfigError(describe(str(file), wrong, todo=_as_it_was_saved(folder)))
    try:
        config = Config.of(file)
    except ConfigError as error:
        found = [problem.partition("; ")[0] for problem in error.problems]  # what to do is another thing here
        raise ConfigError(
            [*found, f"{file}: is not as the run wrote it; {_as_it_was_saved(folder)}"]
        ) from error
    if base is None:
        return config
    if config.model.path is None:
        raise ConfigError(
            describe("--base", "the run has no base: it began with random weights", got=base, todo="drop it")
        )
    return with_model(config, "path", _filled_in("--base", base))


def _as_it_was_saved(folder: Path) -> str:
    """The way out where a model cannot be built: what stands in every checkpoint."""
    try:
        whole = checkpoint.newest(folder / FOLDER).path
    except CheckpointError:
        return "restore it"
    return (
        "restore it, or take the model folder in the newest whole checkpoint, of its last update:"
        f" {whole / 'hf'}"
    )


def check_request(
    folder: Path, config: Config, to: Any, generation: int | None, merge: bool | None, dtype: Dtype | None
) -> None:
    """ConfigError for options that this run's model, or its own folder, cannot take."""
    lora = config.model.lora
    if merge and lora is None:
        raise ConfigError(
            describe("--merge", "there are no adapters to merge: the run trained all of it", todo="drop it")
        )
    if dtype is not None and lora is not None and not (lora.merge if merge is None else merge):
        wrong = "adapters are saved as they are held, float32"
        raise ConfigError(describe("--dtype", wrong, got=dtype, todo="drop it, or add --merge true"))
    if to is not None:
        return
    others = {
        "--generation": generation is not None,
        "--merge": merge is not None and lora is not None and merge != lora.merge,
        "--dtype": dtype is not None and dtype != config.model.save_dtype,
    }
    for name, other in others.items():
        if other:
            wrong = "the run's own folder gets what its settings say, from its newest checkpoint"
            todo = "give a new folder for another model: --to FOLDER"
            raise ConfigError(describe(name, wrong, got=str(folder), todo=todo))


def new_folder(to: str | Path, run: Path) -> Path:
    """A folder that is new or empty, its links followed."""
    target = Path(_filled_in("--to", to)).resolve()
    if target == run.resolve():
        raise ConfigError(
            describe("--to", "is the run's own folder", got=str(to), todo="drop it to complete the run")
        )
    inside = target.relative_to(run.resolve()).parts[0] if target.is_relative_to(run.resolve()) else ""
    wrong = None
    try:
        if not str(to):
            wrong = "is empty"
        elif inside in made.FOLDERS or inside.startswith("."):
            wrong = f"is in {inside}, which is the run's"
        elif target.is_dir():
            wrong = "is not empty" if next(target.iterdir(), None) is not None else None
        elif target.exists() or target.is_symlink():
            wrong = "is no folder"
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        wrong = f"cannot be used ({getattr(error, 'strerror', None) or error})"
    if wrong is not None:
        raise ConfigError(describe("--to", wrong, expected="a new or empty folder", got=str(to)))
    return target


def with_model(config: Config, name: str, value: Any) -> Config:
    """The settings with another value of model.NAME."""
    return config.model_copy(update={"model": config.model.model_copy(update={name: value})})
