"""The stopping rules: exact thresholds, decay before stop, budgets that end exactly where they say."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repsft_fast.policies import Continue, Decay, History, NewStage, Saturation, SaturationSettings, Stop
from repsft_fast.policies.foresight import predicted
from repsft_fast.policies.saturation import epochs_without_rise
from repsft_fast.schedule import Schedule
from tests.helpers.policies_simulation import Driver, script, simulate

NO_RULE = {"token_accuracy": None}


def after_epochs(counts: list[tuple[int, int]], updates: int = 100, **given) -> tuple[Saturation, History]:
    history = History.start([("a", 64), ("b", 64)])
    policy = Saturation(SaturationSettings(**given))
    history.took(policy.decide(history, history.active))
    for k, (correct, total) in enumerate(counts, start=1):
        history.tick(k * updates, float(k), k * 1000)
        history.epoch_ended({"a": (correct, total), "b": (0, 0)})
    return policy, history


def verdict(counts, **given):
    policy, history = after_epochs(counts, **given)
    return policy.decide(history, history.active)


class TestTokenAccuracy:
    @pytest.mark.parametrize(
        ("correct", "total", "fires"),
        [
            (97, 100, True),
            (969_999, 1_000_000, False),
            (970_000, 1_000_000, True),
            (97 * 10**16 - 1, 10**18, False),
            (0, 0, False),
        ],
    )
    def test_compares_integers(self, correct, total, fires):
        """97·10^16 − 1 of 10^18 is 0.97 as a float."""
        assert isinstance(verdict([(correct, total)], decays=False), Stop if fires else Continue)

    def test_tasks_are_added_as_counts(self):
        policy = Saturation(SaturationSettings(decays=False, token_accuracy=0.5))
        history = History.start([("a", 64), ("b", 64)])
        history.took(NewStage(None, ("a", "b")))
        history.tick(10, 1.0, 5)
        history.epoch_ended({"a": (10, 10), "b": (0, 90)})  # the mean of the ratios would be 0.5
        assert policy.decide(history, history.active) == Continue()

    def test_the_reason_names_the_counts(self):
        reason = "token accuracy 98.00 % reached 97 % after epoch 1 (98 of 100 tokens)"
        assert verdict([(98, 100)], decays=False) == Stop("token_accuracy", reason)

    def test_exactly_one(self):
        assert verdict([(99, 100)], decays=False, token_accuracy=1.0) == Continue()
        assert isinstance(verdict([(100, 100)], decays=False, token_accuracy=1.0), Stop)

    def test_judged_at_the_epochs_end_only(self):
        policy, history = after_epochs([(98, 100)], decays=False)
        history.tick(101, 1.01, 1010)
        assert policy.decide(history, history.active) == Continue()

    def test_off(self):
        assert verdict([(100, 100)], token_accuracy=None, plateau_epochs=5) == Continue()


class TestDecay:
    def test_decay_first_then_stop_when_the_schedule_is_done(self):
        policy, history = after_epochs([(98, 100)], updates=100)
        decay = policy.decide(history, history.active)
        reason = "token accuracy 98.00 % reached 97 % after epoch 1 (98 of 100 tokens)"
        assert decay == Decay("token_accuracy", reason, 10)
        history.took(decay)
        assert policy.decide(history, history.active) == Continue()
        history.tick(109, 1.09, 1090, schedule_finished=False)
        assert policy.decide(history, history.active) == Continue()
        history.tick(110, 1.1, 1100, schedule_finished=True)
        assert policy.decide(history, history.active) == Stop("token_accuracy", reason)

    def test_a_second_rule_during_the_decay_changes_nothing(self):
        policy, history = after_epochs([(98, 100)], updates=100, decay_updates=300)
        history.took(policy.decide(history, history.active))
        history.tick(200, 2.0, 2000)
        history.epoch_ended({"a": (100, 100), "b": (0, 0)})
        assert policy.decide(history, history.active) == Continue()

    def test_the_decay_is_cut_to_the_budget(self):
        assert verdict([(98, 100)], updates=100, budget_updates=104).updates == 4
        assert verdict([(98, 100)], updates=100, budget_updates=1000).updates == 10

    def test_a_schedule_that_ends_by_itself(self):
        policy, history = after_epochs([(50, 100)], decays=False)
        history.tick(150, 1.5, 1500, schedule_finished=True)
        assert policy.decide(history, history.active) == Stop("budget", "the schedule has come to its end")

    def test_a_budget_spent_before_the_decay_is_done_ends_the_run_by_the_rule_that_began_it(self):
        """Tokens go faster than they did when the length was chosen."""
        for counts, code, settings_ in (
            ([(98, 100)], "token_accuracy", {}),
            ([(50, 100), (50, 100)], "plateau", {"plateau_epochs": 1}),
            ([(50, 100)] * 9, "budget", {}),
        ):
            policy, history = after_epochs(counts, budget_tokens=9900, **settings_)
            decay = policy.decide(history, history.active)
            history.took(decay)
            update = len(counts) * 100 + 1
            history.tick(update, update / 100, 9900)
            reason = f"{decay.reason}; the budget of 9900 tokens is spent before the decay was done"
            assert policy.decide(history, history.active) == Stop(code, reason)


class TestForeseen:
    """A decay that begins where the finished model is predicted at the accuracy that is wanted."""

    LOOKS = (800, 850, 890, 920)

    def run(self, looks=LOOKS, passes=None, **given):
        policy = Saturation(SaturationSettings(**given))
        history = History.start([("a", 64)])
        history.took(policy.decide(history, history.active))
        for k, own in enumerate(looks, start=1):
            history.tick(k * 100, float(k), k * 1000)
            passed = passes[k - 1] if passes else 700
            look = (own, 1000) if policy.wants_own(history, passed, 1000) else None
            history.epoch_ended({"a": (passed, 1000)}, None, look)
        return policy, history

    def decided(self, *args, **given):
        policy, history = self.run(*args, **given)
        return policy.decide(history, history.active)

    def test_begins_before_the_accuracy_is_reached(self):
        now, later = predicted([(n, 1000) for n in self.LOOKS], 0.4, 40)
        assert 0.92 < now < later < 1
        assert self.decided(token_accuracy=math.nextafter(later, 1)) == Continue()
        fired = self.decided(token_accuracy=math.nextafter(later, 0))
        at, percent = "token accuracy 92.00 % after epoch 4", f"{100 * now:.1f} %"
        begins = f"{at}, decaying now so that the finished model is predicted at {percent}"
        ended = f"{at}; a decay from there was predicted to end at {percent}"
        assert fired == Decay("token_accuracy", begins, 40, ended)

    def test_epochs_of_the_decay_are_counted_in_this_runs(self):
        """A longer decay brings further."""
        _, later = predicted([(n, 1000) for n in self.LOOKS], 0.4, 40)
        above = math.nextafter(later, 1)
        assert isinstance(self.decided(token_accuracy=above, decay_updates=50), Decay)
        assert self.decided(token_accuracy=above, decay_updates=40) == Continue()

    def test_looks_begin_with_a_pass_that_got_far_and_go_on(self):
        _, history = self.run(passes=[699, 700, 600, 710])
        assert [e.own for e in history.epochs] == [None, (850, 1000), (890, 1000), (920, 1000)]

    @pytest.mark.parametrize(
        "given",
        [
            {"decays": False},
            {"decay_token_accuracy": 0.97},
            {"token_accuracy": 0.89},
            {"token_accuracy": 1.0},
            {"token_accuracy": None, "budget_updates": 10**6},
        ],
    )
    def test_no_looks_where_nothing_is_predicted(self, given):
        policy, history = self.run(**given)
        assert [e.own for e in history.epochs] == [None] * 4
        assert policy.decide(history, history.active) == Continue()

    def test_no_looks_once_it_decays(self):
        policy, history = self.run(token_accuracy=0.92)
        history.took(policy.decide(history, history.active))
        assert not policy.wants_own(history, 950, 1000)

    def test_nothing_trained_is_no_look(self):
        policy, history = self.run()
        assert not policy.wants_own(history, 0, 0)

    def test_a_look_of_an_epoch_before_says_nothing_now(self):
        """Its numbers were not finite this time."""
        policy, history = self.run(token_accuracy=0.92)
        history.tick(500, 5.0, 5000)
        history.epoch_ended({"a": (700, 1000)})
        assert policy.decide(history, history.active) == Continue()

    def test_at_the_latest_where_the_pass_reaches_it(self):
        decay = self.decided(looks=(500,), passes=[970])
        assert decay.reason.startswith("token accuracy 97.00 % reached 97 % after epoch 1")

    def test_a_number_is_the_plain_trigger(self):
        decay = self.decided(passes=[700, 800, 850, 900], decay_token_accuracy=0.9)
        assert decay.reason == "token accuracy 90.00 % reached 90 % after epoch 4 (900 of 1,000 tokens)"
        assert self.decided(passes=[700, 800, 850, 899], decay_token_accuracy=0.9) == Continue()
        assert self.decided(passes=[970] * 4, decay_token_accuracy=0.99) == Continue()

    def test_a_number_says_nothing_without_a_decay(self):
        assert self.decided(passes=[900] * 4, decay_token_accuracy=0.9, decays=False) == Continue()

    def test_goes_on_the_same_from_its_json(self):
        policy, history = self.run(token_accuracy=0.92)
        again = History.load(json.loads(json.dumps(history.values())))
        assert again == history
        assert policy.decide(again, again.active) == policy.decide(history, history.active)


class TestPlateau:
    def test_fires_after_patience_epochs_without_a_rise(self):
        rising = [(50, 100), (60, 100), (60, 100), (60, 100)]
        assert verdict(rising[:3], decays=False, plateau_epochs=2) == Continue()
        reason = "token accuracy has not risen by 0.001 for 2 epochs"
        assert verdict(rising, decays=False, plateau_epochs=2) == Stop("plateau", reason)
        decay = verdict(rising, plateau_epochs=2)
        assert (decay.code, decay.reason, decay.stop_reason) == ("plateau", reason, None)

    def test_a_rise_of_exactly_min_delta_does_not_count(self):
        assert isinstance(verdict([(500, 1000), (501, 1000)], decays=False, plateau_epochs=1), Stop)
        assert verdict([(5000, 10_000), (5011, 10_000)], decays=False, plateau_epochs=1) == Continue()

    def test_small_rises_add_up(self):
        counts = [(5000 + 6 * k, 10_000) for k in range(6)]
        _, history = after_epochs(counts, plateau_epochs=9)
        assert epochs_without_rise(history.epochs, 0.001) == 1  # +12 counts every second epoch

    def test_epochs_without_targets_do_not_count(self):
        _, history = after_epochs([(50, 100), (0, 0), (0, 0)], plateau_epochs=9)
        assert epochs_without_rise(history.epochs, 0.0) == 0


WORLD = script({"a": [0.0]}, samples=160)  # 10 updates per epoch, 100 tokens each


class TestBudget:
    @pytest.mark.parametrize("name", ["wsd", "constant"])
    @settings(max_examples=60, deadline=None)
    @given(updates=st.integers(1, 400))
    def test_in_updates_ends_exactly(self, name, updates):
        policy = Saturation(SaturationSettings(**NO_RULE, budget_updates=updates, decays=name == "wsd"))
        run = simulate(policy, WORLD, schedule=Schedule(name, 1.0))
        assert run.updates_trained == updates
        if name == "wsd" and updates > 1:
            (decay,) = [d for d in run.log if isinstance(d, Decay)]
            start = run.schedule.decay_start
            assert start + decay.updates == updates
            assert start - 1 + max(1, round((start - 1) / 10)) < updates  # no sooner than needed
            assert (decay.code, decay.reason) == (
                "budget",
                f"the budget of {updates} updates is nearly spent",
            )
        if updates > 1:
            assert run.log[-1] == Stop("budget", f"the budget of {updates} updates is spent")

    @settings(max_examples=40, deadline=None)
    @given(epochs=st.sampled_from((0.5, 1.0, 1.5, 2.0, 3.0, 10.0, 32.0)))
    def test_in_epochs_ends_exactly(self, epochs):
        run = simulate(Saturation(SaturationSettings(**NO_RULE, budget_epochs=epochs)), WORLD)
        assert run.updates_trained == 10 * epochs
        assert run.schedule.end() == 10 * epochs

    @settings(max_examples=40, deadline=None)
    @given(tokens=st.integers(1, 20_000))
    def test_in_tokens_ends_with_the_update_that_spends_it(self, tokens):
        run = simulate(Saturation(SaturationSettings(**NO_RULE, budget_tokens=tokens)), WORLD)
        assert run.updates_trained == math.ceil(tokens / 100)

    def test_the_first_budget_reached_ends_the_run(self):
        given = SaturationSettings(
            **NO_RULE, budget_updates=35, budget_epochs=3.0, budget_tokens=100_000, decays=False
        )
        run = simulate(Saturation(given), WORLD, schedule=Schedule("constant", 1.0))
        assert run.updates_trained == 30
        assert run.log[-1] == Stop("budget", "the budget of 3 epochs is spent")

    def test_saturation_before_the_budget(self):
        world = script({"a": [0.0]}, samples=160)
        world.tokens = lambda task, state: (min(100, int(10 * state[task])), 100)
        run = simulate(Saturation(SaturationSettings(token_accuracy=0.5, budget_updates=1000)), world)
        assert run.schedule.decay_start == 50
        assert run.updates_trained == 55

    def test_between_calls_nothing_is_asked(self):
        """No update in the middle of an epoch asks the policy, unless a budget or a decay ends there."""

        class Counting(Driver):
            asked = 0

            def ask(self):
                Counting.asked += 1
                super().ask()

        Counting(Saturation(SaturationSettings(**NO_RULE, budget_updates=95)), WORLD).run()
        assert Counting.asked <= 2 + 9 + 3


@pytest.mark.parametrize(
    ("given_", "text"),
    [
        ({"token_accuracy": 0.0}, "stop.token_accuracy: is not an accuracy"),
        ({"token_accuracy": 97.0}, "stop.token_accuracy"),
        ({"token_accuracy": math.nan}, "stop.token_accuracy"),
        ({"plateau_epochs": 0}, "stop.plateau_epochs"),
        ({"plateau_min_delta": math.nan}, "stop.plateau_min_delta"),
        ({"budget_updates": 0}, "budget.updates: leaves nothing to do, expected above 0, got 0"),
        ({"budget_epochs": math.nan}, "budget.epochs"),
        ({"token_accuracy": None}, "nothing would ever end the run"),
    ],
)
def test_settings_that_cannot_be_used_are_named(given_, text):
    (problem,) = SaturationSettings(**given_).problems()
    assert text in problem


def test_the_defaults_can_be_used():
    assert SaturationSettings().problems() == []
