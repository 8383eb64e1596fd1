"""The trainer: builds the parts, runs the one loop, ends by rule.

for every epoch:  for every update of its plan:  train_step;  log, evaluate, save when due
                  judge the epoch by its exact counts;  stop, decay or go on
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from repsft_fast import distributed
from repsft_fast.config import Config
from repsft_fast.report.result import RunResult
from repsft_fast.rundir.ended import Ended, finished_result, picture, say
from repsft_fast.rundir.folder import RunFolder, settle
from repsft_fast.signals import Signals
from repsft_fast.throughput import Work
from repsft_fast.training import decided, garbage, graph_choice
from repsft_fast.training.build import build
from repsft_fast.training.finish import final_validation, finish, result_of_error, result_of_signal
from repsft_fast.training.parts import Parts
from repsft_fast.training.recovery import use_row_tokens
from repsft_fast.training.refusals import Refused
from repsft_fast.training.resume import resume as resume_run
from repsft_fast.training.row_lengths import said
from repsft_fast.training.run import Run
from repsft_fast.training.step import OutOfMemory, train_step
from repsft_fast.training.warm_up import compiler_failed


def train(
    config: Config | Mapping[str, Any] | str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    on_update: Callable[[Work], None] | None = None,
) -> RunResult:
    """Train by settings; the run's folder holds the model, metrics, picture and result when this returns.

    config: a Config, a nested dict, a YAML file or a recipe's name; overrides (nested or dotted) win.
    on_update is called after every update with the work done so far. resume goes on from the newest whole
    checkpoint in the run's folder. A run that SIGTERM or SIGINT ended has saved itself, and its result says
    so. `repsft_fast.dry_run` prints what a run would do instead.
    Raises RepsftError: ConfigError, DataError, ModelError before any work is spent, TrainingError when the
    run cannot go on.
    """
    quiet_libraries()
    with distributed.lifecycle() as world:
        with distributed.raise_together(world):
            settings = settings_of(config, overrides)
        distributed.same_everywhere(world, "--resume", str(bool(resume)))
        with RunFolder(settings, world=world, resume=resume) as folder:
            ended = finished_result(settings, world) if resume else None
            # Nothing is missing and nothing asked for could change anything: the model is not even loaded.
            if ended is not None and ended.is_done:
                say(ended, world)
                picture(settings, world)
                return ended.result
            parts = build(settings, world=world, on_update=on_update)
            return run(parts, resume=resume, folder=folder, ended=ended)


def settings_of(
    config: Config | Mapping[str, Any] | str | Path, overrides: Mapping[str, Any] | None = None
) -> Config:
    """What `train` takes as settings, checked. ConfigError names each that cannot be used."""
    if isinstance(config, Config) and overrides is None:
        return config
    return Config.of(config, overrides)


def quiet_libraries() -> None:
    """The run has its own line to watch; progress bars of the libraries would write over it."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def run(
    parts: Parts, *, resume: bool = False, folder: RunFolder | None = None, ended: Ended | None = None
) -> RunResult:
    """The one loop, and what comes before and after it. folder: the run's, held; ended: what a resumed run
    finds of its end."""
    signals = Signals()
    lock = folder.lock if folder is not None else None
    this = Run.of(parts, signals, lock=lock, began=not resume)
    # Not before: what was made up to here takes seconds that a signal may end at once, and nothing is lost.
    with signals:
        _listen_for_deaths(this)
        try:
            if resume:
                origin = resume_run(this, folder, ended)
                # The run had ended: either all of its model is there, or what is missing is written again.
                if ended is not None and (origin.is_done or parts.progress.reason is not None):
                    say(ended, parts.world, again=not origin.is_done)
                    if origin.is_done:
                        return ended.result
            with garbage.kept_out():
                begin(this, folder)
                loop(this)
            if this.saver.leaving:
                this.saver.close()
                return result_of_signal(this)
            this.saver.save_end()
            final_validation(this)
            this.saver.close()
            return finish(this)
        except BaseException as error:
            lost = distributed.lost_rank(error, parts.world)
            this.saver.close(str(lost) if lost is not None else "")
            # A resumption that was refused has changed nothing, not the result either.
            if this.began:
                result_of_error(this, lost or error)
            if lost is not None:
                raise lost from error
            raise
        finally:
            this.close()


def _listen_for_deaths(run: Run) -> None:
    """When another rank dies, its part of a checkpoint will not come; and if this rank is ended for it, the
    result says why. Both are called by the thread that saw it."""
    world = run.parts.world

    def leave_a_result(lost: distributed.LostRank) -> None:
        if run.began:
            result_of_error(run, distributed.error_naming(lost, world.rank))

    distributed.on_rank_death(world, run.saver.give_up_on)
    distributed.before_exit(world, leave_a_result)


def begin(run: Run, folder: RunFolder | None) -> None:
    """What is said and decided before the first update, of this process or of the run."""
    parts, reporter = run.parts, run.reporter
    reporter.open_trackers()  # not before: they write into the folder
    reporter.start()
    for text in folder.others if folder is not None else ():
        reporter.note(text)
    use_row_tokens(parts)
    # What cannot be compiled is decided by it, too: not before may anything be written down.
    if seconds := run.recovery.compile_layers():
        run.conductor.spans.add("compiling", seconds)
        reporter.exclude_seconds(seconds)
    for text in graph_choice.begin(parts, reporter.note):
        reporter.note(text)
    settle(parts.config, parts.world, decided.as_settings(parts))
    run.conductor.begin()
    for text in run.snapshots.messages:
        reporter.note(text)
    if (shapes := said(parts.plan)) is not None:
        reporter.note(shapes)
    run.recovery.snapshot_last_good()


def loop(run: Run) -> None:
    """Epoch after epoch, until a rule, the budget or a signal ends it. What goes wrong on the way is met
    here."""
    recovery, saver = run.recovery, run.saver
    while run.parts.progress.reason is None and not saver.leaving:
        try:
            run_epoch(run)
            if run.parts.progress.reason is None:
                run.between_updates()
        except Refused as refused:
            recovery.go_back(refused)
        except OutOfMemory as problem:
            if not recovery.retried(problem):
                saver.save_what_is_whole(problem)
                raise recovery.out_of_memory(problem) from problem
        except torch.OutOfMemoryError as error:  # in an evaluation, which changes nothing
            raise recovery.out_of_memory(OutOfMemory(error, torn=False)) from None
        except RuntimeError as error:  # the compiler's, of rows that it meets as they come
            if (told := compiler_failed(run.parts, error)) is None:
                raise
            raise told from error


def run_epoch(run: Run) -> None:
    """One pass over the active samples, from the cursor on; left early when a decision ends it or moves the
    cursor."""
    parts, conductor = run.parts, run.conductor
    progress = parts.progress
    with conductor.spans("planning"):
        epoch = parts.plan.epoch(
            progress.stage,
            progress.epoch,
            active=progress.active,
            task_weights=progress.task_weights,
            skip=progress.skip,
            draws=progress.draws,
        )
    # All samples may skip an epoch (`ies`): it still counts, or it would never end.
    if not len(epoch):
        conductor.empty_epoch()
        return

    # The next rows are made by a thread while the device works: what the loop waits for them is told apart.
    with parts.rows_ahead(epoch, progress.update) as ahead:
        for update in ahead:
            if run.recovery.is_passed_over(update.cursor):
                progress.advance(len(epoch))
            else:
                train_step(parts, update)
                parts.step_done(update, len(epoch))
                if parts.on_update is not None:
                    parts.on_update(parts.lasting.all_work)
            run.reporter.add_data_wait(ahead.take_waited())
            if progress.ended_on(parts.config.evaluate.every_epochs):
                conductor.validate()
            run.tasks.when_due()

            # From here on the cursor may lie elsewhere: then this plan is not the one to go on with.
            if conductor.after_update(update, len(epoch)):
                return
            if progress.update < len(epoch) and run.between_updates():
                return
    conductor.end_of_epoch()
    garbage.collect()
