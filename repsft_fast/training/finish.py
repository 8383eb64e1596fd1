"""How a run ends: weights on disk, result.json, the picture. Also when it ends badly.

A checkpoint of the end stands before any of it (`Saver.save_end`), so whatever fails here can be done again: by --resume, which
trains nothing then, or by `repsft export`. The model comes first and is written aside, then moved to its place; what only
reports comes last and cannot fail the run.
"""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repsft_fast import distributed
from repsft_fast.errors import ModelError, RepsftError, TrainingError, describe
from repsft_fast.models import save_pretrained
from repsft_fast.policies.statistics import pooled
from repsft_fast.report import result as results
from repsft_fast.report.result import RunResult
from repsft_fast.training import made
from repsft_fast.training.account import account, in_words
from repsft_fast.training.conductor import BUDGET, Conductor
from repsft_fast.training.examples import show_answers
from repsft_fast.training.parts import Parts, versions
from repsft_fast.training.scoring import TaskScorer, finite, line_of, standard_error
from repsft_fast.training.signals import CODES
from repsft_fast.training.standing import standing

if TYPE_CHECKING:
    from repsft_fast.config import Config
    from repsft_fast.training.reporter import Reporter
    from repsft_fast.training.saver import Saver

ADAPTERS = "adapter"  # their folder in the run's, where the run's own is the merged model's
PICTURE = "run.png"  # its module imports matplotlib, which takes half a second


class FolderLost(TrainingError):
    """The folder is no longer this run's alone: nothing more is written to it."""


def finish(parts: Parts, reporter: Reporter, conductor: Conductor, saver: Saver | None = None) -> RunResult:
    """Save the model, write result.json and run.png, say goodbye. All ranks call it; the main one writes."""
    conductor.read_ledger()
    seconds, kept = time.perf_counter() - reporter.started, parts.progress.work.copy()
    moment = conductor.put_back_result()
    if moment is not None and parts.progress.updates == 0:
        reporter.note(f"the result is the model as it was before training: no later moment scored better ({conductor.words})")
    with again_later(parts, saver, "the model could not be saved"):
        save_model(parts, reporter)
    with again_later(parts, saver, "the model is saved, but the test split could not be scored"):
        tested = evaluate_test(parts)
    answers = show_answers(parts, reporter, parts.data.seen, parts.data.held_out)
    more: dict[str, Any] = {"answers": answers, "moment": moment, "test": tested, "snapshots": conductor.moments.spent()}
    if parts.config.mixture.policy is not None:
        more |= mixture_result(conductor, moment) | {"account": account(parts, conductor, seconds, kept)}
        for line in in_words(more["account"]):
            reporter.note(line)
    result = result_of(parts, reporter, code_of(conductor), conductor.words, conductor.last_epoch, **more)
    with again_later(parts, saver, "the model is saved, but result.json could not be written"):
        if parts.world.is_main:
            results.write(result)
    reporter.end(result.__dict__ | {"success": result.success})
    if parts.world.is_main:
        with reporter.only_reports("the picture of the run"):
            draw(parts.config)
        if reporter.troubles != result.more["troubles"]:
            with suppress(OSError):
                results.write(replace(result, more=result.more | {"troubles": list(reporter.troubles)}))
    distributed.barrier("end of the run")
    return result


def last_look(parts: Parts, conductor: Conductor, saver: Saver) -> None:
    """The end of a run is always validated. Where that is the best so far and the best is kept, a checkpoint holds it too."""
    if parts.progress.ended_on(parts.config.evaluate.every_epochs):
        return
    before = parts.progress.best
    conductor.validate()
    if parts.config.evaluate.keep == "best" and parts.progress.best != before:
        saver.save_end(validated=True)


@contextmanager
def again_later(parts: Parts, saver: Saver | None, what: str) -> Iterator[None]:
    """What fails inside is told with what was saved before it, and how to go on from there."""
    try:
        yield
    except Exception as error:
        if distributed.of_the_wire(error):
            raise
        words = str(error) if isinstance(error, RepsftError) else f"{type(error).__name__}: {error}"
        stands, on = "no checkpoint is there", f"--resume makes the run again from its beginning, in {parts.folder}"
        if saver is not None and saver.last is not None:
            on = f"--resume goes on from there, or `repsft export {parts.folder} --to FOLDER` writes the model elsewhere"
        if saver is not None and saver.last is not None and not saver.failed:
            stands = f"the end of the run is saved in {saver.last.name}"
        elif saver is not None and saver.last is not None:
            stands = f"the end could not be saved as a checkpoint either ({saver.failed}), the newest is {saver.last.name}"
        lora = parts.config.model.lora
        if lora is not None and lora.merge and (folder := parts.folder / ADAPTERS).is_dir():
            stands += f"; the trained adapters are saved, whole, in {folder.absolute()}: peft can merge them"
        todo = f"{stands}. Mend that, then {on}"
        kind = ModelError if isinstance(error, ModelError) else TrainingError
        raise kind(describe(str(parts.folder), f"{what}: {words}", todo=todo)) from error


def save_model(parts: Parts, reporter: Reporter) -> None:
    """The trained model or adapters; adapters that are merged are saved first as they are, in a folder inside the run's."""
    lora = parts.config.model.lora
    if lora is None or not lora.merge:
        _save(parts, reporter, parts.folder, dtype="auto" if lora is not None else parts.config.model.save_dtype)
        return
    _save(parts, reporter, parts.folder / ADAPTERS)
    _save(parts, reporter, parts.folder, dtype=parts.config.model.save_dtype, merge_lora=True)


def _save(parts: Parts, reporter: Reporter, folder: Path, **how: Any) -> None:
    """Written aside, on the disk, then moved to where it belongs: no half a model stands there, and nobody else's is lost."""
    with distributed.together():
        aside = made.stage(parts.folder) if parts.world.is_main else parts.folder  # where other ranks write nothing
    try:
        for text in save_pretrained(parts.model, parts.tokenizer, aside, world=parts.world, **how):
            reporter.note(text)
        if parts.world.is_main:
            made.publish(aside, folder)  # on the disk when it returns: a result that says success stands for its weights
    finally:
        if parts.world.is_main:
            shutil.rmtree(aside, ignore_errors=True)


def code_of(conductor: Conductor) -> str:
    """The result's code for what ended the run."""
    if conductor.words.startswith(BUDGET):
        return "budget"
    if conductor.parts.config.mixture.policy is not None:
        return "policy"
    if "has not risen" in conductor.words:
        return "plateau"
    return "token_accuracy" if conductor.words.startswith("token accuracy") else "budget"


def left(parts: Parts, reporter: Reporter, conductor: Conductor, saver: Saver) -> RunResult:
    """A signal ended the run and its state is saved: result.json says where, and nothing else is done."""
    name = signal.Signals(saver.leaving).name
    last = f"; --resume goes on from {saver.last.name}" if saver.last is not None else ""
    saved = f"it could not be saved ({saver.failed})" if saver.failed else "saved"
    words = f"{name} after update {parts.progress.updates}: {saved}{last}"
    result = result_of(parts, reporter, CODES[saver.leaving], words, conductor.last_epoch, signal=int(saver.leaving))
    if parts.world.is_main:
        _write(result)
    reporter.end(result.__dict__ | {"success": result.success})
    distributed.barrier("end of the run")
    return result


def interrupted(parts: Parts, reporter: Reporter, error: BaseException) -> None:
    """Leave result.json behind when the run ends by an error, so that whoever finds the folder knows why."""
    if not parts.world.is_main or isinstance(error, FolderLost):
        return
    code: Any = "error"
    if isinstance(error, KeyboardInterrupt):
        code = "interrupted"
    elif isinstance(error, TrainingError) and getattr(error, "code", None):
        code = error.code  # type: ignore[attr-defined]
    words = str(error) if isinstance(error, RepsftError) else f"{type(error).__name__}: {error}"
    result = result_of(parts, reporter, code, words or type(error).__name__, {})
    _write(result)
    reporter.end(result.__dict__ | {"success": False})


def _write(result: RunResult) -> None:
    """result.json of a run that did not end well: what ended it is what the user has to know, not that a disk is full too."""
    try:
        results.write(result)
    except OSError as problem:
        with suppress(OSError, ValueError):
            print(f"{results.FILE} could not be written: {problem}", file=sys.stderr, flush=True)


def result_of(parts: Parts, reporter: Reporter, code: Any, words: str, last_epoch: dict[str, Any], **more: Any) -> RunResult:
    progress = parts.progress
    return RunResult(
        code=code,
        reason=words,
        folder=str(parts.folder),
        updates=progress.updates,
        epochs=round(progress.epochs, 4),
        token_accuracy=progress.token_accuracy,
        seconds=time.perf_counter() - reporter.started,
        tokens=progress.all_work.tokens,
        trained_tokens=progress.all_work.trained,
        seed=parts.config.run.seed,
        loss=last_epoch.get("loss"),
        validation_loss=(progress.best or {}).get("loss"),
        tasks=last_epoch.get("tasks", {}),
        versions=versions(parts.world.device),
        more={
            "vetoed": progress.vetoed,
            "spiked": progress.spiked,
            "read": dict(parts.data.files),
            "dropped": dict(parts.data.dropped),
            "work": progress.all_work.values(),
            "troubles": list(reporter.troubles),
            **more,
        },
    )


def evaluate_test(parts: Parts) -> dict[str, Any] | None:
    """The test split, read once, here: means over all tasks and per task, exact match included. None without one."""
    if parts.data.test is None:
        return None
    if parts.config.mixture.policy is not None:
        found = TaskScorer(parts, parts.data.test)()
        return {**found.line, "pooled": finite(pooled(found.scores, [t for t, s in found.scores.items() if s.n]))}
    return line_of(parts.scorer(parts.data.test)(parts.model), parts.data.task_names)


def mixture_result(conductor: Conductor, moment: str | None) -> dict[str, Any]:
    """How the tasks stood at the end, and each task's score in the result, with what it lost since its best."""
    history = conductor.history
    stood = standing(history, conductor.moments, conductor.parts.config.mixture)
    found: dict[str, Any] = {"standing": stood, "evaluations": len(history.evaluations), "stages": len(history.stages)}
    if moment is None:
        return {"mixture": found}
    at = history.moment(moment)
    tasks = {}
    for name, score in at.scores.items():
        best = stood["tasks"][name]["best"]
        forgotten = best - score.value if best is not None and score.defined else None
        tasks[name] = {"score": finite(score.value), "error": standard_error(score), "below_its_best": forgotten}
    found["result"] = {
        "moment": moment,
        "stage": at.stage,
        "epochs": at.epochs,
        "pooled": finite(pooled(at.scores, history.measured_tasks())),
        "tasks": tasks,
    }
    return {"mixture": found}


def draw(config: Config) -> None:
    if config.mixture.policy is not None:
        from repsft_fast.report import mixture_picture, timeline

        timeline.write(config.run.folder)
        mixture_picture.draw(config.run.folder)
        return
    from repsft_fast.report.picture import draw

    draw(config.run.folder)
