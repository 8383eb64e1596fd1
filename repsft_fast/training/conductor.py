"""Between updates: read the counters, keep the policy's table, ask it, and obey what it decides.

The loop trains; the policy decides; this is the only place where the two meet. Each decision but
Continue has one method that obeys it; it is recorded, and the policy is asked again until it says Continue.
"""

from __future__ import annotations

import math
import time
from fractions import Fraction
from typing import Any

import numpy as np

from repsft_fast.data.plan import Update
from repsft_fast.errors import TrainingError, describe
from repsft_fast.metrics import summarise
from repsft_fast.optim import reset as reset_optimizer
from repsft_fast.policies import (
    Continue,
    Decay,
    Decision,
    History,
    NewStage,
    Policy,
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
from repsft_fast.training.account import Spans
from repsft_fast.training.evaluation import Evaluation, Scored, finite
from repsft_fast.training.outcome import said_of_scores, standing
from repsft_fast.training.parts import Parts
from repsft_fast.training.policy import said_at_start
from repsft_fast.training.probe import look_ahead
from repsft_fast.training.refusals import Refusals, ZeroGradients, check_weights
from repsft_fast.training.reporter import Reporter
from repsft_fast.training.snapshots import Snapshots

BUDGET = "the budget is spent"


class Conductor:
    """Owns the policy's history, which a checkpoint holds beside the closed list of state (`values`, `load`).
    end_reason: why the run ended, once it has. last_epoch: means over the last judged epoch, as metrics.jsonl
    says them. looks_at: the update at which the policy is asked though no epoch ends.
    """

    def __init__(self, parts: Parts, reporter: Reporter, policy: Policy, snapshots: Snapshots):
        self.parts, self.reporter, self.policy, self.snapshots = parts, reporter, policy, snapshots
        index, names = parts.data.train.index, parts.data.task_names
        counts = np.bincount(index.tasks, minlength=len(names))
        self.history = History.start((name, int(n)) for name, n in zip(names, counts, strict=True))
        self.last_epoch: dict[str, Any] = {}
        self.end_reason = ""
        self.spans = Spans()
        self.evaluation = Evaluation(
            parts, reporter, snapshots, self.spans, tasks=bool(policy.evaluations_per_epoch)
        )
        self.refusals = Refusals(parts, reporter)
        self.zero_gradients = ZeroGradients(parts.config.loss.skip_below, reporter)
        self.looks_at: int | None = None
        self._unread: dict[int, Update] = {}

    def begin(self) -> None:
        """Open the first stage and score the untrained model where the policy wants to know it."""
        if self.history.stages:
            return
        for text in said_at_start(self.parts.config, self.parts.data):
            self.reporter.note(text)
        self._ask()
        if self.policy.evaluations_per_epoch:
            self._score_tasks()
            self._ask()

    def values(self) -> dict[str, Any]:
        """What a resumed run must know of the policy, as JSON."""
        known = {"history": self.history.values(), "last_epoch": self.last_epoch, "words": self.end_reason}
        return {**known, "seconds": dict(self.spans.seconds)}

    def load(self, values: dict[str, Any]) -> None:
        """The way back from `values`."""
        self.history = History.load(values["history"])
        self.last_epoch, self.end_reason = values["last_epoch"], values["words"]
        self.spans.seconds = dict(values["seconds"])
        self.looks_at = self.policy.next_call(self.history) if self.history.stages else None

    def take_back_stop(self) -> None:
        """The run has not ended after all: a larger budget goes on from here."""
        if self.parts.progress.reason is not None:
            self.history.take_back_stop()
            self.end_reason, self.parts.progress.reason = "", None

    # When -------------------------------------------------------------------------------------------------

    def after_update(self, update: Update, updates_in_epoch: int) -> bool:
        """Called after every update. True when the epoch's plan no longer holds: the run ended or the cursor
        moved."""
        progress, config = self.parts.progress, self.parts.config
        # An update that was passed over comes with the number of the one before, whose samples stay named.
        self._unread.setdefault(progress.updates - 1, update)
        if progress.updates % config.log.every_updates == 0:
            self.read_ledger()
        self._tick()
        # Most updates are no moment to decide at: nothing is read, and the device is not waited for.
        after = progress.stage_epochs
        before = after - Fraction(1, updates_in_epoch)
        if due(before, after, self.policy.evaluations_per_epoch):
            self._score_tasks()
        elif not self._looks_now() and not self._schedule_is_over():
            return False
        # At the epoch's end its counts come first: end_of_epoch asks. A decision sees no unread veto.
        self.read_ledger()
        return progress.update < updates_in_epoch and self._ask()

    def _looks_now(self) -> bool:
        return self.looks_at is not None and self.parts.progress.updates >= self.looks_at

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
        progress, names = self.parts.progress, self.parts.data.task_names
        self.read_ledger()
        # Integers of the whole pass, per task: a rule compares these and no mean of means.
        totals, source = self.evaluation.training_counts()
        counts = {name: (int(totals.correct[i]), int(totals.total[i])) for i, name in enumerate(names)}
        correct, total = (sum(c[k] for c in counts.values()) for k in (0, 1))
        self.parts.lasting.token_accuracy = correct / total if total else None
        # The cursor moves on before the policy is asked, so that what it decides is of the next epoch.
        skipped, kept = progress.skip, {"kept_share": progress.kept_most, "kept_guess": progress.kept_guess}
        progress.next_epoch()
        looks = self.policy.wants_own(self.history, correct, total)
        own = self.evaluation.own_counts(correct, total) if looks else None
        self.history.epoch_ended(counts, self.evaluation.sample_losses(skipped), own)
        self.last_epoch = summarise(totals, names)
        said: dict[str, Any] = {"own_token_accuracy": own[0] / own[1]} if own and own[1] else {}
        said |= kept if self.parts.config.loss.skip_below else {}
        self.reporter.epoch({**self.last_epoch, **said}, source)
        self.parts.ledger.start_epoch()
        self._ask()

    def read_ledger(self) -> None:
        """The loop's one wait for the device. What was refused is met as the settings say: it may end the
        run, or raise Refused."""
        records = self.parts.ledger.read()  # what the device still has to do is training
        with self.spans("records"):
            self.reporter.updates(records)
            self.zero_gradients.look(records)
        if self.parts.config.loss.skip_below:
            shares_kept = [record.kept for record in records if not record.vetoed]
            self.parts.progress.record_kept_share(shares_kept)
        unread, self._unread = self._unread, {}
        self.refusals.look(records, unread)

    def validate(self) -> None:
        """Validation loss and token accuracy, where there are rows for it.

        A policy that scores tasks looks at the same rows by its own clock, and then this is not needed.
        """
        if self.parts.validation is not None and not self.policy.evaluations_per_epoch:
            self.read_ledger()
            self.evaluation.validate()

    # Asking -----------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        progress, tokens = self.parts.progress, self.parts.lasting.all_work.tokens
        self.history.tick(progress.updates, float(progress.stage_epochs), tokens, self._schedule_is_over())

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
                    decision = Stop("budget", f"{BUDGET} ({self.parts.budget.reason})")
                stood_at = self.history.here
                self.history.took(decision)
                moved |= self._obey(decision, stood_at)
                if isinstance(decision, Stop):
                    break
            # What was decided may have let go of snapshots, and moved the next moment to look at.
            self.snapshots.keep_only(self.policy.kept(self.history, self.history.active))
            self.looks_at = self.policy.next_call(self.history)
            if self.parts.config.mixture.policy is not None:
                with self.reporter.only_reports("how the tasks stand"):
                    self.reporter.mixture(standing(self.history, self.snapshots, self.parts.config.mixture))
        return moved

    def _budget_is_spent(self) -> bool:
        """A mixture's policy knows stages, not the budget: of one that was set, discards are part."""
        parts = self.parts
        if parts.config.mixture.policy is None or parts.budget.derived:
            return False
        return parts.lasting.all_work.updates >= parts.budget.updates

    # Obeying: one method a decision -----------------------------------------------------------------------

    def _obey(self, decision: Decision, stood_at: str | None) -> bool:
        """True when the epoch's plan no longer holds. stood_at: the snapshot that the state is equal to."""
        match decision:
            case Stop():
                return self._stop(decision)
            case Decay():
                return self._decay(decision)
            case RollBack():
                return self._roll_back(decision)
            case NewStage():
                return self._open_stage(decision, stood_at)
            case Reweight():
                return self._reweight(decision)
            case SkipSamples():
                return self._skip_samples(decision)
            case Probe():
                return self._probe(decision)
        raise TrainingError(describe("policy", "took a decision nobody obeys", got=type(decision).__name__))

    def _stop(self, decision: Stop) -> bool:
        self.parts.progress.reason = self.end_reason = decision.reason
        self._tell("decision", {"decision": "stop", "reason": decision.reason})
        return True

    def _decay(self, decision: Decay) -> bool:
        progress = self.parts.progress
        end = self.parts.schedule.trigger_decay(progress.updates, decision.updates)
        self.reporter.event("decay", {"reason": decision.reason, "ends_at": end, "epoch": progress.epochs})
        self.reporter.note(f"{decision.reason}: the learning rate decays until update {end:,}")
        return False

    def _roll_back(self, decision: RollBack) -> bool:
        words = explain(decision, self.history, losses=self.parts.config.mixture.metric == "nll")
        seconds = self._go_back_to(decision.to, "roll-back")
        self.parts.spikes.begin_anew()
        facts = {"to": decision.to, "drop": decision.drop, "seconds": seconds, "text": words}
        self._tell("roll_back", facts)
        self.reporter.note(f"{words}, {seconds * 1e3:.1f} ms")
        return True

    def _open_stage(self, decision: NewStage, stood_at: str | None) -> bool:
        parts, progress = self.parts, self.parts.progress
        stage = self.history.stage
        first = stage.number == 0
        if decision.start is not None and decision.start != stood_at:
            self._go_back_to(decision.start, "a stage begins there")
        # Tasks with a weight of their own are trained though they are not active (rehearsal).
        names = parts.data.task_names
        everybody = len(decision.active) == len(names)
        trained = set(decision.active) | {t for t, w in (decision.weights or {}).items() if w > 0}
        progress.next_stage(stage.data_key, stage.update)
        progress.active = None if everybody else sorted(names.index(t) for t in trained)
        self._draw_at(decision.weights)
        # What came before belongs to another mixture: neither a measure for spikes nor for this epoch.
        parts.spikes.begin_anew()
        if not first:
            if decision.reset.optimizer == "reset":
                reset_optimizer(parts.optimizer)
            parts.ledger.start_epoch()
        if self.parts.config.mixture.policy is not None:
            words = explain(decision, self.history)
            begun = {"active": list(decision.active), "start": decision.start, "weights": decision.weights}
            reset = to_json(decision)["reset"] if not first else None
            self._tell("stage", {**begun, "reset": reset, "text": words})
            self.reporter.note(words)
        return not first

    def _reweight(self, decision: Reweight) -> bool:
        self._draw_at(decision.weights)
        self.parts.spikes.begin_anew()
        self.parts.progress.next_epoch()
        self._announce(decision, {"decision": "reweight", "weights": decision.weights})
        return True

    def _skip_samples(self, decision: SkipSamples) -> bool:
        self.parts.progress.leave_out(sorted(decision.ids))
        self.parts.spikes.begin_anew()
        self._announce(decision, {"decision": "skip", "samples": len(decision.ids)})
        return False

    def _probe(self, decision: Probe) -> bool:
        with self.spans("probes"):
            self.history.probed(look_ahead(self.parts, self.snapshots, decision.tasks))
        self._tell("decision", {"decision": "probe", "tasks": list(decision.tasks)})
        return False

    def _announce(self, decision: Reweight | SkipSamples, facts: dict[str, Any]) -> None:
        """Recorded and told, in the same words."""
        words = explain(decision, self.history)
        self._tell("decision", {**facts, "text": words})
        self.reporter.note(words)

    # What obeying takes -----------------------------------------------------------------------------------

    def _go_back_to(self, snapshot_id: str, why: str) -> float:
        """Put a kept snapshot back. Returns the seconds it took the host."""
        tier = self.snapshots.tier(snapshot_id)
        started = time.perf_counter()
        with self.spans("reverts"):
            self.snapshots.restore(snapshot_id)
        seconds = time.perf_counter() - started
        self.reporter.exclude_seconds(seconds)
        self._tell("revert", {"moment": snapshot_id, "why": why, "tier": tier, "seconds": seconds})
        return seconds

    def _draw_at(self, rates: dict[str, float] | None) -> None:
        """Draw tasks at these rates (1 = each sample once per epoch) from the next plan on; None: every
        sample once."""
        progress, names, sizes = self.parts.progress, self.parts.data.task_names, self.history.tasks
        if rates is None:
            progress.task_weights = progress.draws = None
            return
        drawn = shares(sizes, rates, rates)
        progress.task_weights = {names.index(task): share for task, share in drawn.items()}
        progress.draws = max(1, round(math.fsum(rate * sizes[task] for task, rate in rates.items())))

    def _tell(self, kind: str, values: dict[str, Any]) -> None:
        """An event of the mixture. `done` counts the updates made, discarded ones too, so that it orders
        everything."""
        if self.parts.config.mixture.policy is None:
            self.reporter.event(kind, values)
            return
        epoch, done = round(self.parts.progress.epochs, 4), self.parts.lasting.all_work.updates
        self.reporter.event(
            kind, {"stage": self.history.stage.number, "epoch": epoch, "done": done, **values}
        )

    # Scores -----------------------------------------------------------------------------------------------

    def _score_tasks(self) -> None:
        """Every task's score at this moment; the state is kept if the policy may come back to it."""
        self.read_ledger()
        started = time.perf_counter()
        found, seconds = self.evaluation.score_tasks()
        history = self.history
        snapshot_id = f"{len(history.stages) - 1}.{len(history.evaluations)}"
        history.evaluated(snapshot_id, found.scores)
        with self.spans("decisions"):
            kept = self.policy.kept(history, history.active)
            self.snapshots.keep_only(kept)  # first let go, so that the new one finds a place
        line = self._evaluation_line(found, snapshot_id)
        self.evaluation.remember_best(line)
        with self.spans("records"):
            self.reporter.evaluation(line, seconds)
            for text in said_of_scores(history):
                self.reporter.note(text)
        if snapshot_id in kept:
            self._keep(snapshot_id)
        self.reporter.exclude_seconds(time.perf_counter() - started)

    def _evaluation_line(self, found: Scored, snapshot_id: str) -> dict[str, Any]:
        """What metrics.jsonl says of an evaluation, as JSON."""
        mixture = self.parts.config.mixture
        return {
            **found.line,
            "stage": self.history.stage.number,
            "stage_epochs": round(float(self.parts.progress.stage_epochs), 6),
            "done": self.parts.lasting.all_work.updates,
            "moment": snapshot_id,
            "pooled": finite(pooled(found.scores, self.history.measured_tasks(), mixture.pool)),
            "active": sorted(self.history.active),
        }

    def _keep(self, snapshot_id: str) -> None:
        started = time.perf_counter()
        with self.spans("snapshots"):
            self.snapshots.take(snapshot_id)
        tier, seconds = self.snapshots.tier(snapshot_id), time.perf_counter() - started
        self._tell("snapshot", {"moment": snapshot_id, "tier": tier, "seconds": seconds})

    def restore_result(self) -> str | None:
        """The policy's result into the model, at the end: the snapshot's id, or None when the last state is
        the result."""
        self.snapshots.restore_best()
        snapshot_id = self.policy.result(self.history)
        if snapshot_id is not None and snapshot_id != self.history.here:
            self._go_back_to(snapshot_id, "the result")
        check_weights(self.parts)
        return snapshot_id
