"""The trainer: builds the parts, runs the one loop, ends by rule.

for every epoch:  for every update of its plan:  train_step;  log, evaluate, save when due
                  judge the epoch by its exact counts;  stop, decay or go on
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from repsft_fast import distributed
from repsft_fast.config import Config
from repsft_fast.data.plan import Ahead, Update
from repsft_fast.report.result import RunResult
from repsft_fast.throughput import Work
from repsft_fast.training.conductor import Conductor
from repsft_fast.training.ended import Ended, ended_before, picture, say
from repsft_fast.training.finish import finish, interrupted, last_look, left
from repsft_fast.training.moments import Moments, closed_list
from repsft_fast.training.nonfinite import Refused, reverts
from repsft_fast.training.parts import Parts, build
from repsft_fast.training.policy import build_policy, moments_needed, weights_are_enough
from repsft_fast.training.progress import crosses
from repsft_fast.training.recovery import Recovery, use_row_tokens
from repsft_fast.training.reporter import Reporter
from repsft_fast.training.rundir import RunFolder, settle
from repsft_fast.training.saver import Saver, saves_on_the_way
from repsft_fast.training.signals import Signals
from repsft_fast.training.step import OutOfMemory, train_step


def train(
    config: Config | Mapping[str, Any] | str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    dry_run: bool = False,
    resume: bool = False,
    on_update: Callable[[Work], None] | None = None,
) -> RunResult | None:
    """Train by settings; the run's folder holds the model, metrics, picture and result when this returns.

    config: a Config, a nested dict, a YAML file or a recipe's name; overrides (nested or dotted) win. dry_run prints the
    resolved settings and the plan and returns None. on_update is called after every update with the work done so far.
    resume goes on from the newest whole checkpoint in the run's folder. A run that SIGTERM or SIGINT ended has saved itself,
    and its result says so.
    Raises RepsftError: ConfigError, DataError, ModelError before any work is spent, TrainingError when the run cannot go on.
    """
    if dry_run:
        from repsft_fast.training.dry_run import describe_run

        describe_run(_settings(config, overrides))
        return None
    quiet_libraries()
    distributed.start()
    try:
        with distributed.together():
            settings = _settings(config, overrides)
        distributed.same_everywhere("--resume", str(bool(resume)))
        with RunFolder(settings, resume=resume) as folder:
            ended = ended_before(settings) if resume else None
            if ended is not None and ended.is_done:
                say(ended)
                picture(settings)
                return ended.result
            return run(build(settings, on_update=on_update), resume=resume, folder=folder, ended=ended)
    finally:
        distributed.stop()


def _settings(config: Config | Mapping[str, Any] | str | Path, overrides: Mapping[str, Any] | None) -> Config:
    return config if isinstance(config, Config) and overrides is None else Config.of(config, overrides)


def quiet_libraries() -> None:
    """The run has its own line to watch; progress bars of the libraries would write over it."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def run(parts: Parts, *, resume: bool = False, folder: RunFolder | None = None, ended: Ended | None = None) -> RunResult:
    """The one loop, and what comes before and after it. folder: the run's, held; ended: what a resumed run finds of its end."""
    policy = build_policy(parts)
    state = closed_list(parts)
    moments = Moments(
        parts,
        state,
        moments_needed(parts, policy),
        weights_only=weights_are_enough(parts.config),
        whole=2 if reverts(parts.config) else 1 if saves_on_the_way(parts.config) else 0,
    )
    reporter = Reporter(parts)
    conductor = Conductor(parts, reporter, policy, moments)
    recovery = Recovery(parts, moments, conductor, reporter)
    with Signals() as signals:
        lock = folder.lock if folder is not None else None
        saver = Saver(parts, state, moments, conductor, reporter, signals, recovery, lock, began=not resume)
        try:
            if resume:
                done = saver.resume(folder, ended)
                if ended is not None and (done or parts.progress.reason is not None):
                    say(ended, again=not done)
                    if done:
                        return ended.result
            reporter.open_trackers()  # not before: they write into the folder
            settle(parts)
            reporter.start()
            for text in folder.others if folder is not None else ():
                reporter.note(text)
            conductor.begin()
            for text in moments.messages:
                reporter.note(text)
            use_row_tokens(parts)
            recovery.keep_safe()
            loop(parts, reporter, conductor, saver, recovery)
            if not saver.leaving:
                saver.save_end()
                last_look(parts, conductor, saver)
            saver.close()
            return finish(parts, reporter, conductor, saver) if not saver.leaving else left(parts, reporter, conductor, saver)
        except BaseException as error:
            lost = distributed.lost_rank(error, parts.world)
            saver.close(str(lost) if lost is not None else "")
            if saver.began:  # a resumption that was refused has changed nothing, not the result either
                interrupted(parts, reporter, lost or error)
            if lost is not None:
                raise lost from error
            raise
        finally:
            saver.close()
            reporter.live.close()
            moments.close()


def loop(parts: Parts, reporter: Reporter, conductor: Conductor, saver: Saver, recovery: Recovery) -> None:
    """Epoch after epoch, until a rule, the budget or a signal ends it. What goes wrong on the way is met here."""
    while parts.progress.reason is None and not saver.leaving:
        try:
            run_epoch(parts, reporter, conductor, saver, recovery)
            if parts.progress.reason is None:
                saver.between_updates()
        except Refused as refused:
            recovery.go_back(refused)
        except OutOfMemory as problem:
            if not recovery.retried(problem):
                saver.save_what_is_whole(problem)
                raise recovery.out_of_memory(problem) from problem
        except torch.OutOfMemoryError as error:  # in an evaluation, which changes nothing
            raise recovery.out_of_memory(OutOfMemory(error, torn=False)) from None


def run_epoch(parts: Parts, reporter: Reporter, conductor: Conductor, saver: Saver, recovery: Recovery) -> None:
    """One pass over the active samples, from the cursor on; left early when a decision ends it or moves the cursor."""
    progress, config = parts.progress, parts.config
    with conductor.spans("planning"):
        epoch = parts.plan.epoch(
            progress.stage,
            progress.epoch,
            active=progress.active,
            task_weights=progress.task_weights,
            skip=progress.skip,
            draws=progress.draws,
        )
    if not len(epoch):
        conductor.empty_epoch()
        return
    asked = time.perf_counter()
    for update in Ahead(epoch, progress.update):
        reporter.waited(time.perf_counter() - asked)
        if recovery.is_passed_over(update.cursor):
            progress.update_passed(len(epoch))
        else:
            train_step(parts, update)
            progress.step_done(parts.work_of(update), len(epoch))
            if parts.on_update is not None:
                parts.on_update(progress.all_work)
        if evaluation_due(update, len(epoch), config.evaluate.every_epochs):
            conductor.validate()
        if conductor.after_update(update, len(epoch)):
            return
        if progress.update < len(epoch) and saver.between_updates():
            return
        asked = time.perf_counter()
    conductor.end_of_epoch()


def evaluation_due(update: Update, updates_in_epoch: int, every_epochs: float) -> bool:
    """True when this update crosses a multiple of `every_epochs`, counted within the stage."""
    before = update.cursor.epoch + Fraction(update.cursor.update, updates_in_epoch)
    return crosses(before, before + Fraction(1, updates_in_epoch), every_epochs)
