"""Tasks of lm-eval (EleutherAI's evaluation harness, extra `eval`) on a model that is loaded already, through
its Python entry point. What it leaves changed is put back."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import random
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from repsft_fast.errors import ConfigError, DataError, RepsftError, TrainingError, describe, did_you_mean
from repsft_fast.hub import offline, why_not_reached

# To `datasets` these are readers of local files, not data sets.
_READERS = {"json", "csv", "parquet", "text", "arrow", "pandas"}


def run_lm_eval(
    model: nn.Module,  # a transformers causal LM, on its device
    tokenizer: Any,
    tasks: Sequence[str],  # names of tasks, groups and tags, as lm-eval lists them
    *,
    limit: int | None = None,  # the first so many problems of each task
    batch_size: int = 8,
    task_folder: str | Path | None = None,  # of .yaml tasks of one's own, which go before lm-eval's
    trusted: bool = False,  # whether that folder's code may run (model.trust_remote_code)
    where: str = "--lm-eval",  # what the user wrote the tasks in, for errors
) -> dict[str, Any]:
    """{"lm_eval": its version, "tasks": {task: {"version", "samples", "metrics": {metric: {"value", "stderr",
    "higher_is_better"}}}}}, JSON as it is; figures that are no numbers are null. A metric behind a filter of
    answers is called METRIC,FILTER.

    Mode of the model, random numbers (its seeds are the process's), default dtype, environment and logging
    are afterwards what they were, on every way out. ConfigError where it is not installed, on several ranks,
    for unknown tasks and a folder that is not trusted; DataError where a data set cannot be had;
    TrainingError for whatever else fails in it. torch.OutOfMemoryError passes through.
    """
    _check(tasks, limit, task_folder, trusted, where)
    with _put_back(model):
        try:
            import lm_eval
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            wrong = f"needs lm-eval, which cannot be imported ({error})"
            raise ConfigError(describe(where, wrong, todo="pip install 'repsft-fast[eval]'")) from error
        manager = TaskManager(include_path=None if task_folder is None else str(task_folder))
        _check_names(tasks, manager.all_tasks, where)
        unreached = _unreached(tasks, manager)
        try:
            with offline(unreached is not None), torch.compiler.set_stance("force_eager"):
                # A copy: it is given a padding token where it has none.
                asked = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
                results: Any = lm_eval.simple_evaluate(
                    asked, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False
                )
        except (RepsftError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # its tasks and data sets may raise anything
            cause = f"{type(error).__name__}: {(str(error) or 'no words').splitlines()[0]}"
            if unreached is not None:
                wrong = f"cannot have the data of {', '.join(tasks)} from the hub ({unreached}; {cause})"
                todo = "download them beforehand, or name tasks of your own files"
                raise DataError(describe(where, wrong, todo=todo)) from error
            raise TrainingError(describe(where, f"lm-eval failed ({cause})", got=", ".join(tasks))) from error
    return {"lm_eval": results["lm_eval_version"], "tasks": _figures(results)}


def _check(
    tasks: Sequence[str], limit: int | None, folder: str | Path | None, trusted: bool, where: str
) -> None:
    if not tasks:
        raise ConfigError(describe(where, "names no task", expected="names of lm-eval's tasks"))
    if limit is not None and limit < 1:
        raise ConfigError(describe(where, "has a limit too small", expected="at least 1", got=limit))
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    if joined and (ranks := torch.distributed.get_world_size()) > 1:
        wrong, todo = (
            "runs lm-eval on one rank alone",
            "save the model, and evaluate the folder with one process",
        )
        raise ConfigError(describe(where, wrong, got=f"{ranks} ranks", todo=todo))
    if folder is None:
        return
    if not Path(folder).is_dir():
        todo = "name the folder that holds the tasks' .yaml files"
        raise ConfigError(describe(where, "has no such folder of tasks", got=folder, todo=todo))
    if not trusted:  # its .yaml files name functions (!function) and hold templates that reach Python
        wrong = "names a folder of tasks, whose code is not run unasked"
        todo = "read it, and set model.trust_remote_code to true if it may run here"
        raise ConfigError(describe(where, wrong, got=folder, todo=todo))


def _check_names(tasks: Sequence[str], known: Sequence[str], where: str) -> None:
    for name in tasks:
        if name not in known:
            near = did_you_mean(name, known)
            todo = f"did you mean {near}?" if near else "`lm-eval ls tasks` lists them"
            raise ConfigError(describe(where, "is no task of lm-eval", got=name, todo=todo))


def _unreached(tasks: Sequence[str], manager: Any) -> str | None:
    """Why a data set of these tasks cannot be had from the hub. Asked before `datasets` asks, which takes
    minutes to give up."""
    left: list[Any] = list(tasks)
    seen: set[str] = set()
    while left:
        config = left.pop()
        if isinstance(config, str):
            entry = manager.task_index.get(config)
            if entry is None or config in seen:
                continue
            seen.add(config)
            if entry.kind.name == "TAG":  # of a tag: the tasks that have it
                left += sorted(entry.tags)
            config = entry.cfg or {}
        if isinstance(config.get("task"), list):
            left += config["task"]
        path = config.get("dataset_path")
        asked = path and path not in _READERS and not os.path.exists(path)
        if asked and (why := why_not_reached(path, "dataset")):
            return why
    return None


def _figures(results: Any) -> dict[str, Any]:
    tasks = {}
    for name, line in results["results"].items():
        metrics = {}
        for key, value in line.items():
            metric, comma, behind = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                metrics[metric if behind == "none" else key] = {
                    "value": _number(value),
                    "stderr": _number(line.get(f"{metric}_stderr,{behind}")),
                    "higher_is_better": results["higher_is_better"].get(name, {}).get(metric),
                }
        samples = results["n-samples"].get(name, {}).get("effective")
        tasks[name] = {"version": results["versions"].get(name), "samples": samples, "metrics": metrics}
    return tasks


def _number(value: object) -> float | None:
    """None for "N/A", NaN and whatever else is no figure."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@contextlib.contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """What lm-eval and what it imports change in a process is inside alone."""
    was_training, dtype, environment = model.training, torch.get_default_dtype(), dict(os.environ)
    python, numpy = random.getstate(), np.random.get_state()
    loggers = [logging.getLogger(name) for name in (None, "lm_eval")]
    logged = [(logger, logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    devices = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    try:
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            yield
    finally:
        model.train(was_training)
        torch.set_default_dtype(dtype)
        random.setstate(python)
        np.random.set_state(numpy)
        for logger, level, propagate, handlers in logged:
            logger.setLevel(level)
            logger.propagate, logger.handlers = propagate, handlers
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)
