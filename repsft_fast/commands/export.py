"""`repsft export RUN`: the model folder out of a checkpoint, for a run that has none or not the one that is
wanted.

The weights are those that the run itself would save if it ended at that checkpoint, through the same writer:
the best validation's where `evaluate.keep: best` kept some, the snapshot that a mixture's policy names, else
the state. No data is read.
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
from typing import Any, cast

import torch

from repsft_fast import checkpoint
from repsft_fast.checkpoint.files import read_small
from repsft_fast.commands.export_choice import Chosen, choose, ended_well, refuse_less, whole_generation
from repsft_fast.commands.export_request import (
    Dtype,
    check_request,
    new_folder,
    run_folder,
    settings_of,
    with_model,
)
from repsft_fast.config import Config
from repsft_fast.distributed import World
from repsft_fast.errors import CheckpointError, ConfigError, ModelError, RepsftError, describe
from repsft_fast.files import sync_folder, sync_tree
from repsft_fast.models import save_pretrained
from repsft_fast.models.lora import lora_said
from repsft_fast.report import result as results
from repsft_fast.report import visible
from repsft_fast.rundir import identity, publish
from repsft_fast.rundir.folder import ADAPTERS, SETTINGS
from repsft_fast.rundir.lock import RunLock
from repsft_fast.training.build import build_model, build_tokenizer
from repsft_fast.training.trainer import quiet_libraries

_ALONE = World(0, 1, 0, torch.device("cpu"))
_MODEL = "model/"
_SMALL_BYTES = 1 << 24


@dataclass(frozen=True)
class Exported:
    """What was written where; `notes` are for the user."""

    folder: Path
    generation: int
    update: int  # after which the weights stood so
    which: str  # in words: the best validation, the snapshot of a mixture, the state
    notes: list[str] = field(default_factory=list)


def export(
    run: str,
    *,
    to: str | None,
    generation: int | None,
    merge: str | None,
    dtype: str | None,
    base: str | None,
) -> None:
    """Write a run's model from a checkpoint and say what was written: of which update, and where."""
    problems = []
    if merge not in (None, "true", "false"):
        problems.append(describe("--merge", "cannot be used", expected="true or false", got=merge))
    if dtype not in (None, "auto", "float32", "bfloat16", "float16"):
        problems.append(
            describe("--dtype", "cannot be used", expected="auto, float32, bfloat16 or float16", got=dtype)
        )
    if problems:
        raise ConfigError(problems)

    # A library's progress bars would stand between the lines that say what was written.
    quiet_libraries()
    merged = None if merge is None else merge == "true"
    done = export_model(run, to=to, generation=generation, merge=merged, dtype=cast("Any", dtype), base=base)
    console = visible.console()
    for note in done.notes:
        visible.show(console, visible.one_line(note), "yellow")
    words = (
        f"the model of update {done.update:,} ({done.which}), from checkpoint {done.generation}:"
        f" {done.folder}"
    )
    visible.show(console, visible.one_line(words))


def export_model(
    run: str | Path,
    *,
    to: str | Path | None = None,
    generation: int | None = None,
    merge: bool | None = None,
    dtype: Dtype | None = None,
    base: str | None = None,
) -> Exported:
    """Write the model of a run from its newest whole checkpoint, or from `generation`.

    to      a new or empty folder; None = the run's own, which then gets what its settings say, from the
            newest checkpoint
    merge   adapters added into the weights, or alone; None = model.lora.merge
    dtype   of whole models; None = model.save_dtype
    base    where model.path lies now, if it was moved

    Whole or not at all. Raises ConfigError for what cannot be asked, CheckpointError where no checkpoint can
    be used or the folder cannot be written, ModelError where the base is not there.
    """
    folder = run_folder(run)
    config = settings_of(folder, base)
    lora = config.model.lora
    merged = (lora is not None and lora.merge) if merge is None else merge
    check_request(folder, config, to, generation, merge, dtype)
    target = None if to is None else new_folder(to, folder)

    # A run that goes on meanwhile would delete the checkpoint that is being read.
    with _held(folder, read_only=target is not None):
        path, notes = whole_generation(folder, generation)
        values = checkpoint.values_of(path)
        chosen = choose(config, values, path)
        if target is None:
            refuse_less(folder, values, path)

        # The base comes from elsewhere: what is not that of the checkpoint is refused before weights meet it.
        if lora is not None:
            config = with_model(config, "lora", lora.model_copy(update={"merge": merged}))
        model, tokenizer = _model(config, path, on_gpu="rng/cuda" in values["state"])
        said = _check_same(config, model, tokenizer, path)
        notes += [said] if said is not None else []
        _fill(model, path, chosen)
        _stop_where_the_run_did(model, path)

        # Adapters first, as a run does: before anything that could fail for want of memory.
        how: dict[str, Any] = {"dtype": dtype or config.model.save_dtype} if lora is None or merged else {}
        if lora is not None and not merged and lora.merge:
            notes += lora_said(model)
        if target is None and merged:
            _write(model, tokenizer, folder / ADAPTERS, run=folder)
        where = {"into": folder, "run": folder} if target is None else {"into": target}
        notes += _write(model, tokenizer, **where, merge_lora=merged, **how)
        if target is None and (folder / results.FILE).exists() and ended_well(folder) is None:
            notes.append(f"{results.FILE} stays as it is: it says how the run ended")
    whole = checkpoint.read_manifest(path).generation
    return Exported(target or folder, whole, chosen.update, chosen.which, notes)


@contextlib.contextmanager
def _held(folder: Path, *, read_only: bool) -> Iterator[None]:
    """The run's lock, so that no checkpoint goes while it is read. An archive that nobody can write in has no
    run either."""
    if read_only and not os.access(folder, os.W_OK):
        yield
        return
    with RunLock(folder):
        yield


# The model --------------------------------------------------------------------------------------------------


def _model(config: Config, path: Path, *, on_gpu: bool) -> tuple[Any, Any]:
    """The run's model on the CPU, as it began, and its tokenizer. Nothing computes with it, so kernels are
    the plain ones.

    on_gpu: where it was trained. There a base of adapters is held, and merged, in bfloat16 unless the
    settings say otherwise.
    """
    changes = {
        "attention": "auto",
        "layer_kernels": "none",
        "compile": False,
        "activation_checkpointing": "none",
    }
    if config.model.compute_dtype == "auto" and on_gpu:
        changes["compute_dtype"] = "bfloat16"
    for name, value in changes.items():
        config = with_model(config, name, value)
    try:
        tokenizer = build_tokenizer(config)
        return build_model(config, _ALONE, tokenizer), tokenizer
    except ModelError as error:
        raise ModelError(f"{error}; {_other_ways(path)}") from error


def _check_same(config: Config, model: Any, tokenizer: Any, path: Path) -> str | None:
    """That base and settings are those of the checkpoint, but for the data. What is to be said where nobody
    knows."""
    saved = checkpoint.read_manifest(path).identity
    base = identity.base_of(model, config, _ALONE)
    now = identity.identity(config, tokenizer, base, saved.get("data"))
    try:
        decided = checkpoint.values_of(path).get("decided", {})
        todo = _other_ways(path)
        said = identity.check(path.name, saved, now, todo=todo)
        return said or identity.check_tokenizer(path.name, decided, tokenizer, todo=todo)
    except checkpoint.ForeignCheckpoint as error:
        raise CheckpointError(str(error)) from error


def _other_ways(path: Path) -> str:
    return (
        f"see that base and {SETTINGS} are as they were (--base FOLDER: where the base lies now), or take the"
        f" checkpoint's own model folder, of its last update: {path / 'hf'}"
    )


def _fill(model: Any, path: Path, chosen: Chosen) -> None:
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
    """The ends of trained turns, which the run found in its data, out of the checkpoint's
    generation_config.json."""
    name = "hf/generation_config.json"
    if model.generation_config is None or name not in checkpoint.read_manifest(path).files:
        return
    saved = json.loads(read_small(path, name, _SMALL_BYTES))
    if "eos_token_id" in saved:
        model.generation_config.eos_token_id = saved["eos_token_id"]


# On the disk ------------------------------------------------------------------------------------------------


def _write(model: Any, tokenizer: Any, into: Path, run: Path | None = None, **how: Any) -> list[str]:
    """Written aside, on the disk, then moved in: whole or not at all. What is to be said of it.

    run: whose own model it is; there no file goes that the run did not make. None: `into` is new.
    """
    try:
        aside = publish.stage(run) if run is not None else into.parent / f".export-{uuid.uuid4().hex[:12]}"
        try:
            said = save_pretrained(model, tokenizer, aside, **how)
            sync_tree(aside)
            if run is not None:
                publish.publish(aside, into)
            else:
                os.rename(aside, into)
                sync_folder(into.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except RepsftError:
        raise
    except Exception as error:  # the disk's, or a library's that does not say OSError
        system_words = error.strerror if isinstance(error, OSError) else None
        words = system_words or f"{type(error).__name__}: {error}"
        wrong = (
            f"the model could not be written ({words}); nothing of it is left, and the checkpoint is as"
            " it was"
        )
        todo = "mend that, or write it to another disk with --to"
        raise CheckpointError(describe(str(into), wrong, todo=todo)) from error
    return said
