"""Between updates: read the counters, evaluate, keep the policy's table, ask it, and obey what it decides.

The loop trains; the policy decides; this is the only place where the two meet. A decision is obeyed in one place each
(`_obey`), recorded, and the policy is asked again until it says Continue.
"""

from __future__ import annotations

import math
import time
from fractions import Fraction
from typing import Any

import numpy as np

from repsft_fast.data.plan import Update
from repsft_fast.errors import TrainingError, describe
from repsft_fast.evaluate.teacher_forced import SampleScores, TeacherForced
from repsft_fast.metrics import summarise
from repsft_fast.optim import reset as reset_optimizer
from repsft_fast.policies import (
    Continue,
    Decay,
    Decision,
    History,
    NewStage,
    Probe,
    Reweight,
    RollBack,
    SkipSamples,
    Stop,
    due,
    explain,
    shares,
)
from repsft_fast.policies.decisions import to_json
from repsft_fast.policies.statistics import pooled
from repsft_fast.stats import TokenStats
from repsft_fast.training.account import Spans
from repsft_fast.training.examples import show_answers
from repsft_fast.training.moments import Moments
from repsft_fast.training.no_gradient import ZeroGradients
from repsft_fast.training.nonfinite import Refusals, check_weights
from repsft_fast.training.parts import Parts
from repsft_fast.training.reporter import Reporter
from repsft_fast.training.scoring import TaskScorer, finite, line_of, work_of
from repsft_fast.training.standing import said_of_scores, standing

BUDGET = "the budget is spent"


class Conductor:
    """Owns the policy's history. Everything it changes is on the closed list of state."""

    def __init__(self, parts: Parts, reporter: Reporter, policy: Any, moments: Moments):
        self.parts, self.reporter, self.policy, self.moments = parts, reporter, policy, moments
        index, names = parts.data.train.index, parts.data.task_names
        counts = np.bincount(index.tasks, minlength=len(names))
        self.history = History.start((name, int(n)) for name, n in zip(names, counts, strict=True))
        self.last_epoch: dict[str, Any] = {}
        self.words = ""
        self.spans = Spans()
        self.refusals = Refusals(parts, reporter)
        self.zero_gradients = ZeroGradients(parts.config.loss.skip_below, reporter)
        self.scorer = (
            TaskScorer(parts, parts.data.validation) if policy.evaluations_per_epoch and parts.data.validation else None
        )
        self.looks_at: int | None = None  # the update at which the policy is asked though no epoch ends
        self._unread: dict[int, Update] = {}

    def begin(self) -> None:
        """Open the first stage and score the untrained model where the policy wants to know it."""
        if self.history.stages:
            return
        self._ask()
        if self.policy.evaluations_per_epoch:
            self._score_tasks()
            self._ask()

    def values(self) -> dict[str, Any]:
        """What a resumed run must know of the policy, as JSON."""
        known = {"history": self.history.values(), "last_epoch": self.last_epoch, "words": self.words}
        return {**known, "seconds": dict(self.spans.seconds)}

    def load(self, values: dict[str, Any]) -> None:
        self.history = History.load(values["history"])
        self.last_epoch, self.words = values["last_epoch"], values["words"]
        self.spans.seconds = dict(values["seconds"])
        self.looks_at = self.policy.next_call(self.history) if self.history.stages else None

    def after_update(self, update: Update, updates_in_epoch: int) -> bool:
        """Called after every update. True when the epoch's plan no longer holds: the run ended or the cursor moved."""
        progress, config = self.parts.progress, self.parts.config
        self._unread.setdefault(progress.updates - 1, update)
        if progress.updates % config.log.every_updates == 0:
            self.read_ledger()
        self._tick()
        after = progress.stage_epochs
        before = after - Fraction(1, updates_in_epoch)
        if due(before, after, self.policy.evaluations_per_epoch):
            self._score_tasks()
        elif not (self.looks_at is not None and progress.updates >= self.looks_at) and not self._schedule_is_over():
            return False
        # At the epoch's end its counts come first: end_of_epoch asks. A decision sees no unread veto.
        self.read_ledger()
        return progress.update < updates_in_epoch and self._ask()

    def empty_epoch(self) -> None:
        """An epoch whose samples all skip it: it passes whole, or it would never end."""
        progress = self.parts.progress
        before = progress.stage_epochs
        progress.update = progress.updates_in_epoch = 1
        self._tick()
        if due(before, progress.stage_epochs, self.policy.evaluations_per_epoch):
            self._score_tasks()
        self.end_of_epoch()

    def end_of_epoch(self) -> None:
        """Judge the epoch by its exact counts, then go on to the next one, or wherever the policy says."""
        progress = self.parts.progress
        self.read_ledger()
        totals, source = self._training_counts()
        counts = {name: (int(totals.correct[i]), int(totals.total[i])) for i, name in enumerate(self.parts.data.task_names)}
        correct, total = (sum(c[k] for c in counts.values()) for k in (0, 1))
        progress.token_accuracy = correct / total if total else None
        skipped, kept = progress.skip, {"kept_share": progress.kept_most, "kept_guess": progress.kept_guess}
        progress.next_epoch()
        self.history.epoch_ended(counts, self._sample_losses(skipped))
        self.last_epoch = summarise(totals, self.parts.data.task_names)
        self.reporter.epoch({**self.last_epoch, **(kept if self.parts.config.loss.skip_below else {})}, source)
        self.parts.ledger.start_epoch()
        self._ask()

    def read_ledger(self) -> None:
        """The one wait for the device. What was refused is met as the settings say: it may end the run, or raise Refused."""
        records = self.parts.ledger.read()  # what the device still has to do is training
        with self.spans("records"):
            self.reporter.updates(records)
            self.zero_gradients.look(records)
        if self.parts.config.loss.skip_below:
            self.parts.progress.saw_kept([record.kept for record in records if not record.vetoed])
        unread, self._unread = self._unread, {}
        self.refusals.look(records, unread)

    def validate(self) -> None:
        """Loss and token accuracy on the validation set; the best moment is kept where that is the setting.

        A policy that scores tasks looks at the same rows by its own clock, and then this is not needed.
        """
        if self.parts.validation is None or self.policy.evaluations_per_epoch:
            return
        self.read_ledger()
        started = time.perf_counter()
        scores = self.parts.validation(self.parts.model)
        line = line_of(scores, self.parts.data.task_names)
        seconds = time.perf_counter() - started
        self.reporter.evaluation(line, seconds)
        if bad := line.get("nonfinite"):
            words = f"the validation loss is not a number at update {self.parts.progress.updates:,}"
            self.reporter.note(f"{words} ({bad:,} of {line['total']:,} trained tokens): it is no best")
        show_answers(self.parts, self.reporter, None)
        if self._remember_best(line) and self.parts.config.evaluate.keep == "best":
            self.moments.keep_best()
        self.reporter.apart(time.perf_counter() - started)

    # The policy --------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        progress = self.parts.progress
        self.history.tick(progress.updates, float(progress.stage_epochs), progress.all_work.tokens, self._schedule_is_over())

    def _schedule_is_over(self) -> bool:
        return self.parts.schedule.finished(self.parts.progress.updates)

    def _ask(self) -> bool:
        """Ask and obey until the policy says Continue. True when training does not simply go on."""
        moved = False
        with self.spans("decisions"):
            while True:
                decision: Decision = self.policy.decide(self.history, self.history.active)
                if isinstance(decision, Continue):
                    if not self._budget_is_spent():
                        break
                    decision = Stop(f"{BUDGET} ({self.parts.budget.reason})")
                stood_at = self.history.here
                self.history.took(decision)
                moved |= self._obey(decision, stood_at)
                if isinstance(decision, Stop):
                    break
            self.moments.keep_only(self.policy.kept(self.history, self.history.active))
            self.looks_at = self.policy.next_call(self.history)
            if self.parts.config.mixture.policy is not None:
                with self.reporter.only_reports("how the tasks stand"):
                    self.reporter.mixture(standing(self.history, self.moments, self.parts.config.mixture))
        return moved

    def _budget_is_spent(self) -> bool:
        """A mixture's policy knows stages, not the budget: where one was set, discarded branches count too."""
        parts = self.parts
        if parts.config.mixture.policy is None or parts.budget.derived:
            return False
        return parts.progress.all_work.updates >= parts.budget.updates

    def _obey(self, decision: Decision, stood_at: str | None) -> bool:
        parts, progress = self.parts, self.parts.progress
        if isinstance(decision, Stop):
            progress.reason = self.words = decision.reason
            self._tell("decision", {"decision": "stop", "reason": decision.reason})
            return True
        if isinstance(decision, Decay):
            end = parts.schedule.trigger_decay(progress.updates, decision.updates)
            self.reporter.event("decay", {"reason": decision.reason, "ends_at": end, "epoch": progress.epochs})
            self.reporter.note(f"{decision.reason}: the learning rate decays until update {end:,}")
            return False
        if isinstance(decision, RollBack):
            self._roll_back(decision)
            return True
        if isinstance(decision, NewStage):
            return self._open_stage(decision, stood_at)
        if isinstance(decision, Reweight):
            self._mix(decision.weights)
            parts.spikes.begin_anew()
            progress.next_epoch()
            words = explain(decision, self.history)
            self._tell("decision", {"decision": "reweight", "weights": decision.weights, "text": words})
            self.reporter.note(words)
            return True
        if isinstance(decision, SkipSamples):
            progress.leave_out(sorted(decision.ids))
            parts.spikes.begin_anew()
            words = explain(decision, self.history)
            self._tell("decision", {"decision": "skip", "samples": len(decision.ids), "text": words})
            self.reporter.note(words)
            return False
        if isinstance(decision, Probe):
            with self.spans("probes"):
                self._probe(decision)
            self._tell("decision", {"decision": "probe", "tasks": list(decision.tasks)})
            return False
        raise TrainingError(describe("policy", "took a decision nobody obeys", got=type(decision).__name__))

    def _open_stage(self, decision: NewStage, stood_at: str | None) -> bool:
        parts, progress = self.parts, self.parts.progress
        stage = self.history.stage
        first = stage.number == 0
        if decision.start is not None and decision.start != stood_at:
            self._go_back_to(decision.start, "a stage begins there")
        names = parts.data.task_names
        everybody = len(decision.active) == len(names)
        trained = set(decision.active) | {t for t, w in (decision.weights or {}).items() if w > 0}
        progress.next_stage(stage.data_key, stage.update)
        progress.active = None if everybody else sorted(names.index(t) for t in trained)
        self._mix(decision.weights)
        parts.spikes.begin_anew()
        if not first:
            if decision.reset.optimizer == "reset":
                reset_optimizer(parts.optimizer)
            parts.ledger.start_epoch()
        if self.parts.config.mixture.policy is not None:
            words = explain(decision, self.history)
            begun = {"active": list(decision.active), "start": decision.start, "weights": decision.weights}
            self._tell("stage", {**begun, "reset": to_json(decision)["reset"] if not first else None, "text": words})
            self.reporter.note(words)
        return not first

    def _roll_back(self, decision: RollBack) -> None:
        words = explain(decision, self.history, losses=self.parts.config.mixture.metric == "nll")
        seconds = self._go_back_to(decision.to, "roll-back")
        self.parts.spikes.begin_anew()
        self._tell("roll_back", {"to": decision.to, "drop": decision.drop, "seconds": seconds, "text": words})
        self.reporter.note(f"{words}, {seconds * 1e3:.1f} ms")

    def _go_back_to(self, moment: str, why: str) -> float:
        """Put a kept moment back. Returns the seconds it took the host."""
        tier = self.moments.tier(moment)
        started = time.perf_counter()
        with self.spans("reverts"):
            self.moments.restore(moment)
        seconds = time.perf_counter() - started
        self.reporter.apart(seconds)
        self._tell("revert", {"moment": moment, "why": why, "tier": tier, "seconds": seconds})
        return seconds

    def _tell(self, kind: str, values: dict[str, Any]) -> None:
        """An event of the mixture. `done` counts the updates made, discarded ones too, so that it orders everything."""
        if self.parts.config.mixture.policy is None:
            self.reporter.event(kind, values)
            return
        progress = self.parts.progress
        place = {"stage": self.history.stage.number, "epoch": round(progress.epochs, 4), "done": progress.all_work.updates}
        self.reporter.event(kind, {**place, **values})

    def _mix(self, rates: dict[str, float] | None) -> None:
        """Draw tasks at these rates (1 = each sample once per epoch) from the next plan on; None: every sample once."""
        progress, names, sizes = self.parts.progress, self.parts.data.task_names, self.history.tasks
        if rates is None:
            progress.task_weights = progress.draws = None
            return
        progress.task_weights = {names.index(task): share for task, share in shares(sizes, rates, rates).items()}
        progress.draws = max(1, round(math.fsum(rate * sizes[task] for task, rate in rates.items())))

    def _probe(self, decision: Probe) -> None:
        from repsft_fast.training.probe import look_ahead

        self.history.probed(look_ahead(self.parts, self.moments, decision.tasks))

    # Scores ------------------------------------------------------------------------------------------------------

    def _score_tasks(self) -> None:
        """Every task's score on its validation rows at this moment; the moment is kept if the policy may come back to it."""
        assert self.scorer is not None
        self.read_ledger()
        started = time.perf_counter()
        with self.spans("evaluation"):
            found = self.scorer()
        seconds = time.perf_counter() - started
        progress, history = self.parts.progress, self.history
        progress.looked.add(found.work)
        name = f"{len(history.stages) - 1}.{len(history.evaluations)}"
        history.evaluated(name, found.scores)
        with self.spans("decisions"):
            kept = self.policy.kept(history, history.active)
            self.moments.keep_only(kept)  # first let go, so that the new moment finds a place
        line = {
            **found.line,
            "stage": history.stage.number,
            "stage_epochs": round(float(progress.stage_epochs), 6),
            "done": progress.all_work.updates,
            "moment": name,
            "pooled": finite(pooled(found.scores, history.measured_tasks())),
            "active": sorted(history.active),
        }
        self._remember_best(line)
        with self.spans("records"):
            self.reporter.evaluation(line, seconds)
            for text in said_of_scores(history):
                self.reporter.note(text)
        if name in kept:
            self._keep(name)
        self.reporter.apart(time.perf_counter() - started)

    def _keep(self, name: str) -> None:
        started = time.perf_counter()
        with self.spans("snapshots"):
            self.moments.take(name)
        self._tell("snapshot", {"moment": name, "tier": self.moments.tier(name), "seconds": time.perf_counter() - started})

    def _remember_best(self, line: dict[str, Any]) -> bool:
        """Whether this validation has the lowest loss so far."""
        progress, loss = self.parts.progress, line.get("loss")
        if loss is None or (progress.best is not None and loss >= progress.best["loss"]):
            return False
        progress.best = {"update": progress.updates, "loss": loss, "token_accuracy": line["token_accuracy"]}
        return True

    def _training_counts(self) -> tuple[TokenStats, str]:
        """Exact counts that stopping is judged by: the epoch's own training pass, or the probe subset under today's weights."""
        if self.parts.probe is None:
            return self.parts.ledger.epoch_totals(), "training pass"
        return self._look(self.parts.probe).by_task(self.parts.num_tasks), "probe"

    def _sample_losses(self, skipped: list[int]) -> dict[int, float] | None:
        """Mean loss of every sample over the epoch; those that skipped the backward pass are passed forward now."""
        if self.parts.sample_stats is None:
            return None
        stats = self.parts.sample_stats.read()
        means, seen = stats.mean("loss"), stats.total > 0
        losses = {int(i): float(means[i]) for i in seen.nonzero()[:, 0]}
        if skipped:
            found = self._look(self.parts.scorer(self.parts.data.train, skipped))
            losses |= {int(i): float(loss) for i, loss in zip(found.samples, found.stats.mean("loss"), strict=True)}
        return losses

    def _look(self, scorer: TeacherForced) -> SampleScores:
        """A forward-only pass over training samples; counted, and no part of the training's seconds."""
        started = time.perf_counter()
        with self.spans("evaluation"):
            found = scorer(self.parts.model)
        self.parts.progress.looked.add(work_of(found))
        self.reporter.apart(time.perf_counter() - started)
        return found

    def put_back_result(self) -> str | None:
        """The policy's result into the model, at the end: the moment's name, or None when the last state is the result."""
        self.moments.put_back_best()
        name = self.policy.result(self.history)
        if name is not None and name != self.history.here:
            self._go_back_to(name, "the result")
        check_weights(self.parts)
        return name
