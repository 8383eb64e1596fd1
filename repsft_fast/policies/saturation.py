"""Stop when the training data is memorised, learning has stalled, or the budget is spent (paper A's rule and
its neighbours).

Judged at an epoch's end on exact integers: token accuracy = correct / total over the epoch's training pass
(or over a probe subset, if that is what the trainer records). Under a schedule whose decay is triggered the
first rule that fires starts the decay, and the run stops when the decay is done; under any other schedule it
stops at once. A budget is hard: the decay is started early enough to end with it.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

from repsft_fast.errors import describe
from repsft_fast.policies import foresight
from repsft_fast.policies.decisions import Code, Continue, Decay, Decision, NewStage, Reset, Stop
from repsft_fast.policies.history import History
from repsft_fast.policies.protocol import Policy
from repsft_fast.policies.records import Epoch
from repsft_fast.policies.statistics import as_ratio, reaches

PREDICTED_FROM = 0.9  # below it nothing was measured, and the plain rule holds


@dataclass(frozen=True)
class SaturationSettings:
    token_accuracy: float | None = 0.97  # stop at correct / total >= this; None: never
    # where a decay is triggered, it begins at this one; auto: where the finished model is predicted there
    decay_token_accuracy: float | Literal["auto"] = "auto"
    plateau_epochs: int | None = None  # stop when accuracy has not risen for this many epochs; None: never
    plateau_min_delta: float = 0.001  # a smaller rise than this does not count
    budget_updates: int | None = None
    budget_epochs: float | None = None
    budget_tokens: int | None = None  # real tokens
    decays: bool = True  # the schedule has a decay to trigger (Schedule.decays_on_demand)
    decay_fraction: float = 0.1  # its length as a share of the updates done
    decay_updates: int | None = None  # or in updates
    evaluations_per_epoch: int = 0  # the rule needs none

    def problems(self) -> list[str]:
        """What cannot be used, in the settings' names; empty when all is well."""
        found = []
        accuracy, epochs, rise = self.token_accuracy, self.plateau_epochs, self.plateau_min_delta
        if accuracy is not None and not 0 < accuracy <= 1:
            wrong, expected = "is not an accuracy", "above 0, at most 1"
            found.append(describe("stop.token_accuracy", wrong, expected=expected, got=accuracy))
        begins = self.decay_token_accuracy
        if begins != "auto" and not (isinstance(begins, int | float) and 0 < begins <= 1):
            wrong, expected = "is not an accuracy", "auto, or above 0, at most 1"
            found.append(describe("stop.decay_token_accuracy", wrong, expected=expected, got=begins))
        if epochs is not None and epochs < 1:
            found.append(describe("stop.plateau_epochs", "is too small", expected="at least 1", got=epochs))
        if not (math.isfinite(rise) and rise >= 0):
            found.append(describe("stop.plateau_min_delta", "is not a rise", expected="at least 0", got=rise))

        # NaN is neither above 0 nor below it: asked this way round it is refused.
        budgets = {"updates": self.budget_updates, "epochs": self.budget_epochs, "tokens": self.budget_tokens}
        for name, value in budgets.items():
            if value is not None and not value > 0:
                wrong = "leaves nothing to do"
                found.append(describe(f"budget.{name}", wrong, expected="above 0", got=value))
        if all(limit is None for limit in (accuracy, epochs, *budgets.values())):
            todo = "set budget.updates or stop.token_accuracy"
            found.append(describe("budget", "nothing would ever end the run", todo=todo))
        return found


@dataclass(frozen=True)
class _Fired:
    """A rule that fired at this position."""

    code: Code
    reason: str
    stop_reason: str | None = None  # after a decay, where `reason` would no longer be true


class Saturation(Policy):
    """One stage over all tasks, ended by the first rule that fires."""

    settings_type: ClassVar[type] = SaturationSettings
    settings: SaturationSettings
    needs_tasks = False
    names_result = False

    @property
    def accuracy_target(self) -> float | None:
        return self.settings.token_accuracy

    def wants_own(self, history: History, correct: int, total: int) -> bool:
        """From the first epoch on whose pass got far enough, while a decay is still to begin by a
        prediction."""
        if not self._predicts or _decay_of(history) is not None or total == 0:
            return False
        return reaches(correct, total, foresight.FROM) or any(e.own is not None for e in history.epochs)

    def decide(self, history: History, active: frozenset[str]) -> Decision:
        if not history.stages:
            return NewStage(None, tuple(sorted(active)), None, Reset())

        # Once a decay runs, no rule can start another: only its end, or the budget's, is waited for.
        spent = self._spent_budget(history)
        decay = _decay_of(history)
        if decay is not None:
            if history.position.schedule_finished:
                return Stop(decay.code, decay.stop_reason or decay.reason)
            if spent is not None:
                return Stop(decay.code, f"{decay.reason}; {spent} before the decay was done")
            return Continue()

        # What is hard comes before the rules: a decay begun now would train past it.
        if spent is not None:
            return Stop("budget", spent)
        if history.position.schedule_finished:
            return Stop("budget", "the schedule has come to its end")
        fired = self._saturated(history) or self._budget_nearly_spent(history)
        return Continue() if fired is None else self._end(history, fired)

    def next_call(self, history: History) -> int | None:
        """The update at which the budget, or the decay that ends with it, has to be looked at; None = only at
        epochs' ends."""
        at = history.position.update
        ends = [self._budget_end(history)]
        if self.settings.decays and _decay_of(history) is None:
            ends.append(self._decay_start(history))
        ahead = [max(end, at + 1) for end in ends if end is not None]
        if not ahead and at == 0 and (self.settings.budget_epochs or self.settings.budget_tokens):
            return 1  # after one update the rate at which the budget goes is known
        return min(ahead, default=None)

    def kept(self, history: History, active: frozenset[str]) -> set[str]:
        """No snapshot is ever gone back to."""
        return set()

    def most_kept(self, tasks: int) -> int:
        """None."""
        return 0

    def result(self, history: History) -> str | None:
        """None: the state at the end."""
        return None

    # The rules --------------------------------------------------------------------------------------------

    def _saturated(self, history: History) -> _Fired | None:
        """The rule that the epoch fires which ended at this very position."""
        s, last = self.settings, history.epochs[-1] if history.epochs else None
        if last is None or last.update != history.position.update:
            return None
        if fired := self._memorised(history, last) or self._foreseen(history, last):
            return fired
        if s.plateau_epochs is None:
            return None
        since = epochs_without_rise(history.epochs, s.plateau_min_delta)
        if since >= s.plateau_epochs:
            reason = f"token accuracy has not risen by {s.plateau_min_delta:g} for {since} epochs"
            return _Fired("plateau", reason)
        return None

    @property
    def _predicts(self) -> bool:
        s = self.settings
        known = s.token_accuracy is not None and PREDICTED_FROM <= s.token_accuracy < 1
        return s.decays and s.decay_token_accuracy == "auto" and known

    def _memorised(self, history: History, last: Epoch) -> _Fired | None:
        s, (correct, total) = self.settings, _counts(last)
        wanted = s.token_accuracy
        if wanted is not None and s.decays and s.decay_token_accuracy != "auto":
            wanted = s.decay_token_accuracy
        if wanted is None or not reaches(correct, total, wanted):
            return None
        reached = f"token accuracy {100 * correct / total:.2f} % reached {100 * wanted:.4g} %"
        after = f"after epoch {last.epochs:.4g} ({correct:,} of {total:,} tokens)"
        return _Fired("token_accuracy", f"{reached} {after}")

    def _foreseen(self, history: History, last: Epoch) -> _Fired | None:
        """A decay that begins now is predicted to end at the accuracy that is wanted, or nearer to it than
        one that begins an epoch later."""
        looks = [epoch.own for epoch in history.epochs if epoch.own is not None and epoch.own[1]]
        target = self.settings.token_accuracy
        if not self._predicts or last.own is None or not looks or target is None:
            return None
        updates = self._decay_length(last.update)
        now, half_later = foresight.predicted(looks, updates * last.epochs / last.update, updates)
        if half_later < target:
            return None
        at = f"token accuracy {100 * last.own[0] / last.own[1]:.2f} % after epoch {last.epochs:.4g}"
        begins = f"{at}, decaying now so that the finished model is predicted at {100 * now:.1f} %"
        ended = f"{at}; a decay from there was predicted to end at {100 * now:.1f} %"
        return _Fired("token_accuracy", begins, ended)

    def _budget_nearly_spent(self, history: History) -> _Fired | None:
        """Under a schedule whose decay is triggered: the budget that would be spent before a later decay is
        done."""
        start = self._decay_start(history) if self.settings.decays else None
        if start is None or history.position.update < start:
            return None
        budget = self._nearest_budget(history)
        return _Fired("budget", f"{budget} is nearly spent", f"{budget} is spent")

    def _end(self, history: History, fired: _Fired) -> Decision:
        if not self.settings.decays:
            return Stop(fired.code, fired.reason)
        length = self._decay_length(history.position.update)
        end = self._budget_end(history)
        left = length if end is None else end - history.position.update
        if left < 1:
            return Stop(fired.code, fired.reason)
        return Decay(fired.code, fired.reason, min(length, left), fired.stop_reason)

    # The budget -------------------------------------------------------------------------------------------

    def _budgets(self, history: History) -> list[tuple[str, Fraction, Fraction]]:
        """(name, spent, allowed) of each budget that is set."""
        s, at = self.settings, history.position
        given: list[tuple[str, float, float | None]] = [
            ("updates", at.update, s.budget_updates),
            ("epochs", at.epochs, s.budget_epochs),
            ("tokens", at.tokens, s.budget_tokens),
        ]
        return [
            (name, Fraction(spent), as_ratio(allowed))
            for name, spent, allowed in given
            if allowed is not None
        ]

    def _spent_budget(self, history: History) -> str | None:
        for name, spent, allowed in self._budgets(history):
            if spent >= allowed - Fraction(1, 10**9):  # epochs are sums of fractions of an epoch
                return f"the budget of {_plain(allowed)} {name} is spent"
        return None

    def _ends(self, history: History) -> list[tuple[int, str]]:
        """(update at which it will be spent, its name) of each budget, at the rate so far."""
        at, found = history.position.update, []
        for name, spent, allowed in self._budgets(history):
            if name == "updates":
                found.append((int(allowed), f"the budget of {_plain(allowed)} updates"))
            elif spent > 0 and at > 0:
                end = math.ceil(allowed * at / spent - Fraction(1, 10**6))
                found.append((end, f"the budget of {_plain(allowed)} {name}"))
        return sorted(found)

    def _budget_end(self, history: History) -> int | None:
        return min((end for end, _ in self._ends(history)), default=None)

    def _nearest_budget(self, history: History) -> str:
        return self._ends(history)[0][1]

    def _decay_length(self, updates_done: int) -> int:
        return self.settings.decay_updates or max(1, round(updates_done * self.settings.decay_fraction))

    def _decay_start(self, history: History) -> int | None:
        """The first update whose decay would end at or after the budget's end: where it has to start at the
        latest."""
        end = self._budget_end(history)
        if end is None:
            return None
        low, high = 0, end  # u + length(u) never falls, so bisection finds the first u that reaches the end
        while low < high:
            middle = (low + high) // 2
            if middle + self._decay_length(middle) >= end:
                high = middle
            else:
                low = middle + 1
        return low


def _decay_of(history: History) -> Decay | None:
    """The decay that has been started, if one has."""
    return next((t.decision for t in history.decisions if isinstance(t.decision, Decay)), None)


def epochs_without_rise(epochs: list[Epoch], min_delta: float) -> int:
    """How many epochs in a row, up to the last, did not rise by more than min_delta. Epochs without targets
    do not count."""
    best: Fraction | None = None
    since = 0
    delta = as_ratio(min_delta)
    for correct, total in map(_counts, epochs):
        if total == 0:
            continue
        accuracy = Fraction(correct, total)
        if best is None or accuracy > best + delta:
            best, since = accuracy, 0
        else:
            since += 1
    return since


def _counts(epoch: Epoch) -> tuple[int, int]:
    """(correct, total) over all tasks."""
    return sum(c for c, _ in epoch.tokens.values()), sum(n for _, n in epoch.tokens.values())


def _plain(number: Fraction) -> str:
    return str(number.numerator) if number.denominator == 1 else f"{float(number):g}"
