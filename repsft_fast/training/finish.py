"""How a run ends: weights on disk, result.json, the picture. Also when it ends badly.

A checkpoint of the end stands before any of it (`Saver.save_end`), so whatever fails here can be done again:
by --resume, which trains nothing then, or by `repsft export`. The model comes first and is written aside,
then moved to its place; what only reports comes last and cannot fail the run.
"""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from repsft_fast import distributed
from repsft_fast.errors import ModelError, RepsftError, TrainingError, describe
from repsft_fast.models import save_pretrained
from repsft_fast.policies.statistics import pooled
from repsft_fast.report import pictures
from repsft_fast.report import result as results
from repsft_fast.report.result import RunResult
from repsft_fast.rundir import publish
from repsft_fast.rundir.folder import ADAPTERS
from repsft_fast.rundir.lock import FolderLost
from repsft_fast.signals import CODES
from repsft_fast.suite.tasks import FORM_TOKENS
from repsft_fast.training import graph_choice
from repsft_fast.training.account import account, in_words
from repsft_fast.training.evaluation import TaskScorer, finite, line_of, saved_accuracy, show_answers
from repsft_fast.training.outcome import mixture_result, result_of
from repsft_fast.training.parts import Parts
from repsft_fast.training.reporter import Reporter
from repsft_fast.training.run import Run
from repsft_fast.training.saver import Saver


def finish(run: Run) -> RunResult:
    """Save the model, write result.json and run.png, say goodbye. All ranks call it; the main one writes."""
    parts, reporter, conductor = run.parts, run.reporter, run.conductor
    conductor.read_ledger()
    # Before the result is put back, which takes the work of the branch it leaves with it.
    seconds, kept = time.perf_counter() - reporter.started, parts.progress.work.copy()
    snapshot_id = conductor.restore_result()
    if snapshot_id is not None and parts.progress.updates == 0:
        words = "the result is the model as it was before training: no later moment scored better"
        reporter.note(f"{words} ({conductor.end_reason})")
    with _again_later(parts, run.saver, "the model could not be saved"):
        save_model(parts, reporter)
    with _again_later(parts, run.saver, "the model is saved, but the test split could not be scored"):
        tested = evaluate_test(parts)
    what = "the model is saved, but its own token accuracy could not be measured"
    with _again_later(parts, run.saver, what):
        saved = saved_accuracy(parts, reporter)
    tasks = run.tasks.look()
    more: dict[str, Any] = {
        "answers": show_answers(parts, reporter, parts.data.seen, parts.data.held_out),
        "moment": snapshot_id,
        "test": tested,
        "tasks": tasks,
        # how what is asked ends, of the samples: `repsft eval` compares its prompts with it
        "before_replies": sorted({tuple(ids[-FORM_TOKENS:]) for ids in parts.data.before_replies}),
        "snapshots": run.snapshots.spent(),
        "saved_token_accuracy": saved and asdict(saved),
    }
    if parts.config.mixture.policy is not None:
        more |= mixture_result(conductor.history, run.snapshots, parts.config.mixture, snapshot_id)
        more["account"] = account(parts, conductor.spans, seconds, kept)
        for line in in_words(more["account"]):
            reporter.note(line)
    for line in graph_choice.said(parts):
        reporter.note(line)
    code = conductor.history.ended_by
    result = result_of(parts, reporter, code, conductor.end_reason, conductor.last_epoch, **more)
    result = replace(result, saved_token_accuracy=None if saved is None else saved.token_accuracy)
    with _again_later(parts, run.saver, "the model is saved, but result.json could not be written"):
        if parts.world.is_main:
            results.write(result)
    reporter.end(result.__dict__ | {"success": result.success})
    _draw(run, result)
    distributed.barrier(parts.world, "end of the run")
    return result


def final_validation(run: Run) -> None:
    """The end of a run is always validated. Where that is the best so far and the best is kept, a checkpoint
    holds it too."""
    parts = run.parts
    if parts.progress.ended_on(parts.config.evaluate.every_epochs):
        return
    before = parts.lasting.best
    run.conductor.validate()
    if parts.config.evaluate.keep == "best" and parts.lasting.best != before:
        run.saver.save_end(validated=True)


def _draw(run: Run, result: RunResult) -> None:
    """The picture, which is part of the report: if it fails, the result says so and stays what it is."""
    config, reporter = run.parts.config, run.reporter
    if not run.parts.world.is_main:
        return
    with reporter.only_reports("the picture of the run"):
        pictures.draw(config.run.folder, mixture=config.mixture.policy is not None)
    if reporter.troubles != result.more["troubles"]:
        with suppress(OSError):
            results.write(replace(result, more=result.more | {"troubles": list(reporter.troubles)}))


# The model ------------------------------------------------------------------------------------------------


@contextmanager
def _again_later(parts: Parts, saver: Saver, what: str) -> Iterator[None]:
    """What fails inside is told with what was saved before it, and how to go on from there."""
    try:
        yield
    except Exception as error:
        if distributed.of_the_wire(error):
            raise
        words = str(error) if isinstance(error, RepsftError) else f"{type(error).__name__}: {error}"
        todo = f"{_saved_so_far(parts, saver)}. Mend that, then {_way_on(parts, saver)}"
        kind = ModelError if isinstance(error, ModelError) else TrainingError
        raise kind(describe(str(parts.folder), f"{what}: {words}", todo=todo)) from error


def _saved_so_far(parts: Parts, saver: Saver) -> str:
    """What stands on the disk though the end failed, in words."""
    stands = "no checkpoint is there"
    if saver.last is not None and not saver.failed:
        stands = f"the end of the run is saved in {saver.last.name}"
    elif saver.last is not None:
        failed = f"the end could not be saved as a checkpoint either ({saver.failed})"
        stands = f"{failed}, the newest is {saver.last.name}"
    lora = parts.config.model.lora
    if lora is not None and lora.merge and (folder := parts.folder / ADAPTERS).is_dir():
        stands += f"; the trained adapters are saved, whole, in {folder.absolute()}: peft can merge them"
    return stands


def _way_on(parts: Parts, saver: Saver) -> str:
    if saver.last is None:
        return f"--resume makes the run again from its beginning, in {parts.folder}"
    export = f"`repsft export {parts.folder} --to FOLDER` writes the model elsewhere"
    return f"--resume goes on from there, or {export}"


def save_model(parts: Parts, reporter: Reporter) -> None:
    """The trained model or adapters; adapters that are merged are saved first as they are, in a folder inside
    the run's."""
    lora, dtype = parts.config.model.lora, parts.config.model.save_dtype
    if lora is None:
        _save(parts, reporter, parts.folder, dtype=dtype)
    elif not lora.merge:
        _save(parts, reporter, parts.folder, dtype="auto")
    else:
        _save(parts, reporter, parts.folder / ADAPTERS)
        _save(parts, reporter, parts.folder, dtype=dtype, merge_lora=True)


def _save(parts: Parts, reporter: Reporter, folder: Path, **how: Any) -> None:
    """Written aside, on the disk, then moved to where it belongs: no half a model stands there, and nobody
    else's is lost."""
    main = parts.world.is_main
    with distributed.raise_together(parts.world):
        aside = publish.stage(parts.folder) if main else parts.folder  # where other ranks write nothing
    try:
        for text in save_pretrained(parts.model, parts.tokenizer, aside, world=parts.world, **how):
            reporter.note(text)
        # On the disk when it returns: a result that says success stands for its weights.
        if main:
            publish.publish(aside, folder)
    finally:
        if main:
            shutil.rmtree(aside, ignore_errors=True)


def evaluate_test(parts: Parts) -> dict[str, Any] | None:
    """The test split, read once, here: means over all tasks and per task, exact match included. None without
    one."""
    if parts.data.test is None:
        return None
    if parts.config.mixture.policy is not None:
        found = TaskScorer(parts, parts.data.test)()
        measured = [task for task, score in found.scores.items() if score.n]
        return {**found.line, "pooled": finite(pooled(found.scores, measured, parts.config.mixture.pool))}
    return line_of(parts.scorer(parts.data.test)(parts.model), parts.data.task_names)


# Other ends -----------------------------------------------------------------------------------------------


def result_of_signal(run: Run) -> RunResult:
    """A signal ended the run: result.json says where its state is saved, or why not, and no more is done."""
    parts, saver = run.parts, run.saver
    name = signal.Signals(saver.leaving).name
    last = f"; --resume goes on from {saver.last.name}" if saver.last is not None else ""
    saved = f"it could not be saved ({saver.failed})" if saver.failed else "saved"
    words = f"{name} after update {parts.progress.updates}: {saved}{last}"
    code, signaled = CODES[saver.leaving], int(saver.leaving)
    result = result_of(parts, run.reporter, code, words, run.conductor.last_epoch, signal=signaled)
    if parts.world.is_main:
        _write(result)
    run.reporter.end(result.__dict__ | {"success": result.success})
    distributed.barrier(parts.world, "end of the run")
    return result


def result_of_error(run: Run, error: BaseException) -> None:
    """Leave result.json behind when the run ends by an error, so that whoever finds the folder knows why."""
    if not run.parts.world.is_main or isinstance(error, FolderLost):
        return
    code = "error"
    if isinstance(error, KeyboardInterrupt):
        code = "interrupted"
    elif isinstance(error, TrainingError) and error.code is not None:
        code = error.code
    words = str(error) if isinstance(error, RepsftError) else f"{type(error).__name__}: {error}"
    result = result_of(run.parts, run.reporter, code, words or type(error).__name__, {})
    _write(result)
    run.reporter.end(result.__dict__ | {"success": False})


def _write(result: RunResult) -> None:
    """result.json of a run that did not end well: what ended it is what the user has to know, not that a disk
    is full too."""
    try:
        results.write(result)
    except OSError as problem:
        with suppress(OSError, ValueError):
            print(f"{results.FILE} could not be written: {problem}", file=sys.stderr, flush=True)
