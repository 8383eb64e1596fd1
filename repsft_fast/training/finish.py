"""How a run ends: weights on disk, result.json, the picture. Also when it ends badly."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repsft_fast import distributed
from repsft_fast.checkpoint.files import sync_files
from repsft_fast.errors import ModelError, RepsftError, TrainingError, describe
from repsft_fast.models import save_pretrained
from repsft_fast.policies.statistics import pooled
from repsft_fast.report import result as results
from repsft_fast.report.result import RunResult
from repsft_fast.training.account import account, in_words
from repsft_fast.training.conductor import BUDGET, Conductor
from repsft_fast.training.examples import answer_examples
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


def finish(parts: Parts, reporter: Reporter, conductor: Conductor) -> RunResult:
    """Save the model, write result.json and run.png, say goodbye. All ranks call it; the main one writes."""
    conductor.read_ledger()
    if not parts.progress.ended_on(parts.config.evaluate.every_epochs):
        conductor.validate()
    seconds, kept = time.perf_counter() - reporter.started, parts.progress.work.copy()
    moment = conductor.put_back_result()
    save_adapters(parts, reporter)
    tested = evaluate_test(parts)
    answers = answer_examples(parts, parts.data.seen) + answer_examples(parts, parts.data.held_out)
    for answer in answers:
        reporter.event("answer", answer)
    save_model(parts, reporter)
    more: dict[str, Any] = {"answers": answers, "moment": moment, "test": tested, "snapshots": conductor.moments.spent()}
    if parts.config.mixture.policy is not None:
        more |= mixture_result(conductor, moment) | {"account": account(parts, conductor, seconds, kept)}
        for line in in_words(more["account"]):
            reporter.note(line)
    result = result_of(parts, reporter, code_of(conductor), conductor.words, conductor.last_epoch, **more)
    if parts.world.is_main:
        results.write(result)
    reporter.end(result.__dict__ | {"success": result.success})
    if parts.world.is_main:
        _draw(parts.config)
    distributed.barrier("end of the run")
    return result


def save_adapters(parts: Parts, reporter: Reporter) -> None:
    """With LoRA: what was trained, before anything that can fail; where it will be merged, in a folder inside the run's."""
    lora = parts.config.model.lora
    if lora is not None:
        _save(parts, reporter, parts.folder / ADAPTERS if lora.merge else parts.folder)


def save_model(parts: Parts, reporter: Reporter) -> None:
    """The whole model: fully trained, or with adapters merged. Failing at that is told with where the adapters are."""
    lora = parts.config.model.lora
    if lora is None:
        _save(parts, reporter, parts.folder, dtype=parts.config.model.save_dtype)
    elif lora.merge:
        try:
            _save(parts, reporter, parts.folder, dtype=parts.config.model.save_dtype, merge_lora=True)
        except Exception as error:
            words = str(error) if isinstance(error, RepsftError) else f"{type(error).__name__}: {error}"
            wrong = f"the merged model could not be saved: {words}"
            todo = (
                f"the trained adapters are saved, whole, in {(parts.folder / ADAPTERS).absolute()}: merge them with peft, or "
                "mend that and --resume, which makes the updates after the last checkpoint again"
            )
            raise ModelError(describe("model.lora.merge", wrong, todo=todo)) from error


def _save(parts: Parts, reporter: Reporter, folder: Path, **how: Any) -> None:
    for text in save_pretrained(parts.model, parts.tokenizer, folder, world=parts.world, **how):
        reporter.note(text)
    if parts.world.is_main:
        sync_files(folder)  # a result that says success stands for weights that are on the disk


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
    result = result_of(parts, reporter, CODES[saver.leaving], words, conductor.last_epoch)
    if parts.world.is_main:
        results.write(result)
    reporter.end(result.__dict__ | {"success": result.success})
    distributed.barrier("end of the run")
    return result


def ended_before(config: Config) -> RunResult | None:
    """The result of a run that --resume finds at its end, by rule or budget; None when there is something left to do.

    A run that was killed after its result and before its picture gets the picture now.
    """
    folder = Path(config.run.folder)
    if not (folder / results.FILE).exists():
        return None
    try:
        result = results.read(folder)
    except RepsftError:
        return None  # damaged: the checkpoint knows better
    if not result.success:
        return None
    if distributed.place()[0] == 0 and not (folder / PICTURE).exists():
        _draw(config)
    return result


def interrupted(parts: Parts, reporter: Reporter, error: BaseException) -> None:
    """Leave result.json behind when the run ends by an error, so that whoever finds the folder knows why."""
    if not parts.world.is_main:
        return
    code: Any = "error"
    if isinstance(error, KeyboardInterrupt):
        code = "interrupted"
    elif isinstance(error, TrainingError) and getattr(error, "code", None):
        code = error.code  # type: ignore[attr-defined]
    words = str(error) if isinstance(error, RepsftError) else f"{type(error).__name__}: {error}"
    result = result_of(parts, reporter, code, words or type(error).__name__, {})
    results.write(result)
    reporter.end(result.__dict__ | {"success": False})


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
            "read": dict(parts.data.files),
            "dropped": dict(parts.data.dropped),
            "work": progress.all_work.values(),
            **more,
        },
    )


def evaluate_test(parts: Parts) -> dict[str, Any] | None:
    """The test split, read once, here: means over all tasks and per task, exact match included. None without one."""
    if parts.data.test is None:
        return None
    if parts.config.mixture.policy is not None:
        found = TaskScorer(parts, parts.data.test)()
        return {**found.line, "pooled": finite(pooled(found.scores, [t for t, s in found.scores.items() if s.defined]))}
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


def _draw(config: Config) -> None:
    if config.mixture.policy is not None:
        from repsft_fast.report import mixture_picture, timeline

        timeline.write(config.run.folder)
        mixture_picture.draw(config.run.folder)
        return
    from repsft_fast.report.picture import draw

    draw(config.run.folder)
