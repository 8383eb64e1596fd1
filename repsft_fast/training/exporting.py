"""`repsft export RUN`: the model folder out of a checkpoint, for a run that has none or not the one that is wanted.

The weights are those that the run itself would save if it ended at that checkpoint, through the same writer: the best
validation's where `evaluate.keep: best` kept some, the moment that a mixture's policy names, else the state. No data is read.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
from pydantic_core import PydanticCustomError

from repsft_fast import checkpoint
from repsft_fast.checkpoint.files import read_small, sync_folder, sync_tree
from repsft_fast.config import Config
from repsft_fast.config.paths import expand
from repsft_fast.distributed import World
from repsft_fast.errors import CheckpointError, ConfigError, ModelError, RepsftError, describe
from repsft_fast.models import save_pretrained
from repsft_fast.models.lora import lora_said
from repsft_fast.policies import History
from repsft_fast.report import result as results
from repsft_fast.runlock import RunLock
from repsft_fast.training import identity, made
from repsft_fast.training.finish import ADAPTERS
from repsft_fast.training.moments import BEST, MOMENT
from repsft_fast.training.parts import build_model, build_tokenizer
from repsft_fast.training.policy import named_result
from repsft_fast.training.rundir import SETTINGS
from repsft_fast.training.saver import FOLDER

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_ALONE = World(0, 1, 0, torch.device("cpu"))
_MODEL = "model/"
_SMALL_BYTES = 1 << 24


@dataclass(frozen=True)
class Exported:
    """What was written where; `notes` are for the user."""

    folder: Path
    generation: int
    update: int  # after which the weights stood so
    which: str  # in words: the best validation, the moment of a mixture, the state
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Chosen:
    """The weights that a generation's run would save, by the beginning of their names in it."""

    prefix: str
    update: int
    which: str


def export(
    run: str | Path,
    *,
    to: str | Path | None = None,
    generation: int | None = None,
    merge: bool | None = None,
    dtype: Dtype | None = None,
    base: str | None = None,
) -> Exported:
    """Write the model of a run from its newest whole checkpoint, or from `generation`.

    to      a new or empty folder; None = the run's own, which then gets what its settings say, from the newest checkpoint
    merge   adapters added into the weights, or alone; None = model.lora.merge
    dtype   of whole models; None = model.save_dtype
    base    where model.path lies now, if it was moved

    Whole or not at all. Raises ConfigError for what cannot be asked, CheckpointError where no checkpoint can be used or the
    folder cannot be written, ModelError where the base is not there.
    """
    folder = _run_folder(run)
    config = _settings(folder, base)
    lora = config.model.lora
    merged = (lora is not None and lora.merge) if merge is None else merge
    _check_request(folder, config, to, generation, merge, dtype)
    target = None if to is None else _new_folder(to, folder)
    with _held(folder, read_only=target is not None):
        path, problems = _generation(folder, generation)
        values = checkpoint.values_of(path)
        try:
            chosen = _choose(config, values, path)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            wrong = "is of a version whose table of the run is another"
            todo = f"its model folder, of its last update, is {path / 'hf'}"
            raise CheckpointError(describe(path.name, wrong, got=f"{type(error).__name__}: {error}", todo=todo)) from error
        if target is None:
            _refuse_less(folder, values, path)
        if lora is not None:
            config = _with(config, "lora", lora.model_copy(update={"merge": merged}))
        model, tokenizer = _model(config, path, on_gpu="rng/cuda" in values["state"])
        said = _check_same(config, model, tokenizer, path)
        _fill(model, path, chosen)
        _stop_where_the_run_did(model, path)
        how: dict[str, Any] = {"dtype": dtype or config.model.save_dtype} if lora is None or merged else {}
        notes = [*problems, *([said] if said is not None else [])]
        if lora is not None and not merged and lora.merge:
            notes += lora_said(model)
        if target is None and merged:  # as a run does, before anything that could fail for want of memory
            _write(model, tokenizer, folder / ADAPTERS, run=folder)
        where = {"into": folder, "run": folder} if target is None else {"into": target}
        notes += _write(model, tokenizer, **where, merge_lora=merged, **how)
        if target is None and (folder / results.FILE).exists() and _ended_well(folder) is None:
            notes.append(f"{results.FILE} stays as it is: it says how the run ended")
    return Exported(
        folder if target is None else target, checkpoint.read_manifest(path).generation, chosen.update, chosen.which, notes
    )


# What is asked for --------------------------------------------------------------------------------------------------


def _run_folder(run: str | Path) -> Path:
    """The run's folder, which is there and a run's."""
    folder = Path(_filled_in("export", run))
    todo = "give the folder of a run: its run.folder"
    if not str(run) or not os.path.isdir(folder):
        raise ConfigError(describe("export", "there is no such folder", got=str(run), todo=todo))
    if not (folder / SETTINGS).exists() and not (folder / FOLDER).exists():
        above = next((parent for parent in folder.absolute().parents if (parent / SETTINGS).exists()), None)
        todo = todo if above is None else f"did you mean {above}?"
        raise ConfigError(describe("export", f"is no run's folder: it holds no {SETTINGS}", got=str(run), todo=todo))
    return folder


def _filled_in(where: str, path: str | Path) -> str:
    try:
        return expand(str(path))
    except PydanticCustomError as error:
        raise ConfigError(describe(where, error.message(), got=str(path))) from error


def _settings(folder: Path, base: str | None) -> Config:
    """The run's settings, the base where it lies now."""
    file = folder / SETTINGS
    if not file.is_file():
        wrong = "is missing: without it nobody knows which model the weights are of"
        raise ConfigError(describe(str(file), wrong, todo=_as_it_was_saved(folder)))
    try:
        config = Config.of(file)
    except ConfigError as error:
        found = [problem.partition("; ")[0] for problem in error.problems]  # what to do is another thing here
        raise ConfigError([*found, f"{file}: is not as the run wrote it; {_as_it_was_saved(folder)}"]) from error
    if base is None:
        return config
    if config.model.path is None:
        raise ConfigError(describe("--base", "the run has no base: it began with random weights", got=base, todo="drop it"))
    return _with(config, "path", _filled_in("--base", base))


def _as_it_was_saved(folder: Path) -> str:
    """The way out where a model cannot be built: what stands in every checkpoint."""
    try:
        whole = checkpoint.newest(folder / FOLDER).path
    except CheckpointError:
        return "restore it"
    return f"restore it, or take the model folder in the newest whole checkpoint, of its last update: {whole / 'hf'}"


def _check_request(
    folder: Path, config: Config, to: Any, generation: int | None, merge: bool | None, dtype: Dtype | None
) -> None:
    lora = config.model.lora
    if merge and lora is None:
        raise ConfigError(describe("--merge", "there are no adapters to merge: the run trained all of it", todo="drop it"))
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
            raise ConfigError(describe(name, wrong, got=str(folder), todo="give a new folder for another model: --to FOLDER"))


def _new_folder(to: str | Path, run: Path) -> Path:
    """A folder that is new or empty, its links followed."""
    target = Path(_filled_in("--to", to)).resolve()
    if target == run.resolve():
        raise ConfigError(describe("--to", "is the run's own folder", got=str(to), todo="drop it to complete the run"))
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


@contextlib.contextmanager
def _held(folder: Path, *, read_only: bool) -> Iterator[None]:
    """The run's lock, so that no checkpoint goes while it is read. An archive that nobody can write in has no run either."""
    if read_only and not os.access(folder, os.W_OK):
        yield
        return
    with RunLock(folder):
        yield


# Which weights ------------------------------------------------------------------------------------------------------


def _generation(folder: Path, number: int | None) -> tuple[Path, list[str]]:
    """(a whole generation, what was wrong with newer ones)."""
    there = checkpoint.generations(folder / FOLDER)
    if not there:
        wrong, todo = "the run has no checkpoint", "train it again: --resume begins anew where a run has none"
        if _ended_well(folder):
            todo = "a run that has ended keeps its model in its folder"
        raise ConfigError(describe(str(folder), wrong, todo=todo))
    if number is None:
        try:
            found = checkpoint.newest(folder / FOLDER)
        except CheckpointError as error:
            problems = str(error).splitlines()[1:]
            wrong = f"none of {len(there)} checkpoints is whole, so there is nothing to export"
            raise CheckpointError("\n".join([describe(str(folder / FOLDER), wrong), *problems])) from error
        return found.path, list(found.problems)
    if number not in there:
        raise ConfigError(
            describe("--generation", "there is no such checkpoint", expected=", ".join(map(str, there)), got=number)
        )
    path = folder / FOLDER / checkpoint.folder_name(number)
    if problems := checkpoint.verify(path):
        others = ", ".join(str(other) for other in there if other != number)
        other = f"there are others: {others}; without --generation the newest whole one is taken" if others else None
        raise CheckpointError("\n  ".join([describe("--generation", f"{path.name} is damaged", todo=other), *problems]))
    return path, []


def _choose(config: Config, values: dict[str, Any], path: Path) -> _Chosen:
    """As `finish` does: the best validation's weights, then the moment that the policy names, else the state."""
    progress = values["state"]["progress"]
    history = History.load(values["conductor"]["history"])
    moment = named_result(config, history)
    if moment is not None and moment != history.here:
        if moment not in values["moments"]:
            wrong = f"does not hold moment {moment}, which its policy names as the result"
            raise CheckpointError(
                describe(path.name, wrong, got=", ".join(values["moments"]) or "none", todo="give an older one")
            )
        update = values["moments"][moment]["progress"]["updates"]
        return _Chosen(f"{MOMENT}{moment}/", update, f"moment {moment}, the mixture's result")
    if values["best"]:
        return _Chosen(f"{BEST}/", progress["best"]["update"], "the best validation")
    return _Chosen("", progress["updates"], "the last" if moment is None else f"moment {moment}, the mixture's result")


def _ended_well(folder: Path) -> results.RunResult | None:
    """The result of a run that ended by rule or budget."""
    try:
        found = results.read(folder)
    except RepsftError:
        return None
    return found if found.success else None


def _refuse_less(folder: Path, values: dict[str, Any], path: Path) -> None:
    """A run that ended well has a model of its end: one of an earlier update does not take its place."""
    ended = _ended_well(folder)
    if ended is None:
        return
    work, saved = ended.more.get("work"), values["state"]["progress"]["all_work"]["updates"]
    done = work.get("updates") if isinstance(work, dict) else None
    if done is not None and done != saved:
        wrong = f"the run ended after update {done}, and its newest whole checkpoint, {path.name}, is of update {saved}"
        raise ConfigError(describe(str(folder), wrong, todo="give a new folder for that one: --to FOLDER"))


# The model ----------------------------------------------------------------------------------------------------------


def _model(config: Config, path: Path, *, on_gpu: bool) -> tuple[Any, Any]:
    """The run's model on the CPU, as it began, and its tokenizer. Nothing computes with it, so kernels are the plain ones.

    on_gpu: where it was trained. There a base of adapters is held, and merged, in bfloat16 unless the settings say otherwise.
    """
    changes = {"attention": "auto", "layer_kernels": "none", "compile": False, "activation_checkpointing": "none"}
    if config.model.compute_dtype == "auto" and on_gpu:
        changes["compute_dtype"] = "bfloat16"
    for name, value in changes.items():
        config = _with(config, name, value)
    try:
        tokenizer = build_tokenizer(config)
        return build_model(config, _ALONE, tokenizer), tokenizer
    except ModelError as error:
        raise ModelError(f"{error}; {_other_ways(path)}") from error


def _with(config: Config, name: str, value: Any) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={name: value})})


def _check_same(config: Config, model: Any, tokenizer: Any, path: Path) -> str | None:
    """That base and settings are those of the checkpoint, but for the data. What is to be said where nobody knows."""
    saved = checkpoint.read_manifest(path).identity
    parts = SimpleNamespace(
        config=config,
        tokenizer=tokenizer,
        base=identity.base_of(model, config, _ALONE),
        data=SimpleNamespace(digest=saved.get("data")),
    )
    try:
        decided = checkpoint.values_of(path).get("decided", {})
        said = identity.check(path.name, saved, identity.identity(cast(Any, parts)))
        return said or identity.check_tokenizer(path.name, decided, tokenizer)
    except checkpoint.ForeignCheckpoint as error:
        raise CheckpointError(f"{str(error).partition('; resume')[0]}; {_other_ways(path)}") from error


def _other_ways(path: Path) -> str:
    return (
        f"see that base and {SETTINGS} are as they were (--base FOLDER: where the base lies now), or take the checkpoint's own "
        f"model folder, of its last update: {path / 'hf'}"
    )


def _fill(model: Any, path: Path, chosen: _Chosen) -> None:
    """The chosen weights into the model, verified while they are read."""
    live: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            live[f"{_MODEL}{name}"] = parameter
    weights = f"{chosen.prefix}{_MODEL}"
    others = [name for name in checkpoint.read_manifest(path).tensors if not name.startswith(weights)]
    checkpoint.load(path, live, prefix=chosen.prefix, ignore=others, looked_at=True)


def _stop_where_the_run_did(model: Any, path: Path) -> None:
    """The ends of trained turns, which the run found in its data, out of the checkpoint's generation_config.json."""
    name = "hf/generation_config.json"
    if model.generation_config is None or name not in checkpoint.read_manifest(path).files:
        return
    saved = json.loads(read_small(path, name, _SMALL_BYTES))
    if "eos_token_id" in saved:
        model.generation_config.eos_token_id = saved["eos_token_id"]


# On the disk --------------------------------------------------------------------------------------------------------


def _write(model: Any, tokenizer: Any, into: Path, run: Path | None = None, **how: Any) -> list[str]:
    """Written aside, on the disk, then moved in: whole or not at all. What is to be said of it.

    run: whose own model it is; there no file goes that the run did not make. None: `into` is new.
    """
    try:
        aside = made.stage(run) if run is not None else into.parent / f".export-{uuid.uuid4().hex[:12]}"
        try:
            said = save_pretrained(model, tokenizer, aside, **how)
            sync_tree(aside)
            if run is not None:
                made.publish(aside, into)
            else:
                os.rename(aside, into)
                sync_folder(into.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except RepsftError:
        raise
    except Exception as error:  # the disk's, or a library's that does not say OSError
        words = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
        wrong = f"the model could not be written ({words}); nothing of it is left, and the checkpoint is as it was"
        raise CheckpointError(describe(str(into), wrong, todo="mend that, or write it to another disk with --to")) from error
    return said
