"""mSFT's rules on dictionaries: every case is a small table a person can check by eye."""

import math

import pytest

from repsft_fast.policies import Continue, History, Msft, MsftSettings, NewStage, Reset, RollBack, Score, Stop
from repsft_fast.policies.msft import kept_snapshots, last_peak
from tests.helpers.policies_simulation import Curve, World, curves, script, simulate

NAN = float("nan")


def table(scores: dict[str, list[float]], n: int = 100, per_epoch: int = 4) -> History:
    """A history whose stage 0 has these scores at 0.00, 0.25, …; moments are m0, m1, …"""
    history = History.start([(task, 64) for task in scores])
    history.took(NewStage(None, tuple(sorted(scores))))
    for k in range(len(next(iter(scores.values())))):
        if k:
            history.tick(k, k / per_epoch, 0)
        history.evaluated(f"m{k}", {task: binary(line[k], n) for task, line in scores.items()})
    return history


def binary(value: float, n: int) -> Score:
    """The first value·n of n items are right: between two such scores only the difference's items move."""
    return (
        Score(NAN, n)
        if math.isnan(value)
        else Score.of([1.0] * round(value * n) + [0.0] * (n - round(value * n)))
    )


def decide(scores, **settings):
    history = table(scores)
    return Msft(MsftSettings(**{"rule": "paper"} | settings)).decide(history, history.active)


class TestPaper:
    def test_earliest_first_maximum_leaves(self):
        assert decide({"a": [0.1, 0.5, 0.6, 0.5, 0.4], "b": [0.1, 0.2, 0.3, 0.4, 0.3]}) == RollBack("m2", "a")

    def test_the_first_of_equal_maxima_counts(self):
        assert decide({"a": [0.1, 0.6, 0.2, 0.6, 0.6], "b": [0.1, 0.2, 0.3, 0.4, 0.3]}) == RollBack("m1", "a")

    def test_ties_go_by_name(self):
        assert decide({"b": [0.1, 0.6, 0.2, 0.1, 0.1], "a": [0.1, 0.3, 0.3, 0.2, 0.1]}) == RollBack("m1", "a")

    def test_the_start_counts(self):
        assert decide({"a": [0.5, 0.4, 0.3, 0.2, 0.1], "b": [0.1, 0.2, 0.3, 0.4, 0.3]}) == RollBack("m0", "a")

    def test_nobody_leaves_when_all_peak_at_the_end(self):
        assert decide({"a": [0.1, 0.2, 0.3, 0.4, 0.5], "b": [0.1, 0.1, 0.1, 0.1, 0.2]}) == NewStage(
            "m4", ("a", "b")
        )

    def test_nothing_is_decided_before_the_stage_ends(self):
        assert decide({"a": [0.5, 0.4, 0.3, 0.2], "b": [0.1, 0.2, 0.3, 0.4]}) == Continue()
        assert decide({"a": [0.5, 0.4, 0.3, 0.2, 0.1]}, compute_budget=2.0) == Continue()

    def test_an_undefined_score_is_no_maximum(self):
        assert decide(
            {"a": [0.1, NAN, 0.6, NAN, 0.4], "b": [NAN] * 5, "c": [0.1, 0.2, 0.3, 0.4, 0.5]}
        ) == RollBack("m2", "a")

    def test_a_score_that_stops_to_be_a_number_is_no_fall(self):
        rising = [0.1, 0.2, 0.3, 0.4, 0.5]
        assert decide({"a": [0.1, 0.5, NAN, NAN, NAN], "b": rising}) == NewStage("m4", ("a", "b"))
        assert decide({"a": [0.1, 0.5, NAN, NAN, NAN], "b": [0.1, 0.2, 0.6, 0.5, 0.4]}) == RollBack("m2", "b")
        assert decide({"a": [0.1, 0.5, 0.4, NAN, NAN], "b": rising}) == RollBack("m1", "a"), (
            "its fall was measured"
        )

    def test_all_undefined_excludes_nobody(self):
        assert decide({"a": [NAN] * 5, "b": [NAN] * 5}) == NewStage("m4", ("a", "b"))

    def test_noise_alone_excludes(self):
        """The trap, on purpose: one item of a hundred decides."""
        assert decide({"a": [0.50, 0.50, 0.51, 0.50, 0.50], "b": [0.1, 0.2, 0.3, 0.4, 0.5]}) == RollBack(
            "m2", "a"
        )

    def test_it_ends_with_no_active_task_and_after_max_stages(self):
        run = simulate(
            Msft(MsftSettings(rule="paper")), script({"a": [0.1, 0.2, 0.1], "b": [0.1, 0.2, 0.3, 0.1]})
        )
        assert [d.drop for d in run.log if isinstance(d, RollBack)] == ["a", "b"]
        assert run.log[-1] == Stop("policy", "no task is active any more")
        rising = script({"a": [k / 100 for k in range(100)]})
        run = simulate(Msft(MsftSettings(rule="paper", max_stages=3)), rising)
        assert run.log[-1] == Stop("policy", "3 stages are done")
        assert len(run.history.stages) == 3


class TestTested:
    """The mechanics, at a fixed z and from the first look on; what alpha makes of it is in test_overfit."""

    TASK_B = [0.1, 0.2, 0.3, 0.4, 0.5]  # noqa: RUF012

    @staticmethod
    def decide(scores, **settings):
        return decide(
            scores, **{"rule": "tested", "z": 2.33, "min_looks": 1, "compute_budget": 9.0} | settings
        )

    def test_a_fall_within_the_noise_excludes_nobody(self):
        scores = {"a": [0.10, 0.50, 0.51, 0.50, 0.50], "b": self.TASK_B}
        assert self.decide(scores, compute_budget=1.0) == NewStage("m4", ("a", "b"))

    def test_a_significant_fall_held_for_patience_evaluations_excludes_at_once(self):
        scores = {"a": [0.1, 0.6, 0.4, 0.4], "b": [0.1, 0.2, 0.3, 0.4]}
        assert self.decide(scores) == RollBack("m1", "a")
        assert self.decide(scores, patience=3) == Continue()
        assert self.decide({"a": [0.1, 0.6, 0.4], "b": [0.1, 0.2, 0.3]}) == Continue()

    def test_a_recovery_starts_the_count_again(self):
        assert self.decide({"a": [0.1, 0.6, 0.4, 0.59, 0.4]}) == Continue()
        assert self.decide({"a": [0.1, 0.6, 0.4, 0.59, 0.4, 0.4]}, z=1.0) == RollBack("m1", "a")
        assert self.decide({"a": [0.1, 0.6, 0.4, 0.59, 0.4, 0.4]}) == Continue(), "it wobbles as much"

    def test_of_several_found_the_earliest_peak_leaves_and_of_equals_the_first_by_name(self):
        late, early = [0.5, 0.6, 0.9, 0.2, 0.2], [0.5, 0.9, 0.2, 0.2, 0.2]
        assert self.decide({"a": late, "b": early}) == RollBack("m1", "b")
        assert self.decide({"a": late, "b": early, "c": early}) == RollBack("m1", "b")

    def test_ties_go_to_the_later_peak(self):
        assert self.decide({"a": [0.5, 0.6, 0.6, 0.6, 0.3, 0.3]}) == RollBack("m3", "a")

    def test_min_delta(self):
        scores = {"a": [0.1, 0.6, 0.4, 0.4]}
        assert self.decide(scores, min_delta=0.19) == RollBack("m1", "a")
        assert self.decide(scores, min_delta=0.2) == Continue()

    def test_a_task_that_has_only_ever_fallen_leaves_back_to_the_start(self):
        falling = {"a": [0.6, 0.4, 0.3, 0.2], "b": [0.0, 0.0, 0.0, 0.0]}
        assert self.decide(falling) == RollBack("m0", "a")

    def test_a_task_that_stands_still_has_not_started_and_stays(self):
        assert self.decide({"a": [0.0, 0.01, 0.0, 0.0], "b": [0.02, 0.0, 0.0, 0.0]}) == Continue()

    def test_nobody_leaves_before_min_looks(self):
        fall = [0.9, 0.9, 0.9, 0.9, 0.5, 0.5, 0.5]
        assert self.decide({"a": fall}, min_looks=8) == Continue()
        assert self.decide({"a": [*fall, 0.5]}, min_looks=8) == RollBack("m3", "a")
        assert self.decide({"a": [*fall, NAN, NAN, 0.5]}, min_looks=9) == Continue(), "no score is no look"

    def test_looks_of_earlier_stages_count_and_a_stages_start_is_none(self):
        settings = MsftSettings(compute_budget=1.0, z=2.33)
        fall = items_of({"a": [0.9, 0.9, 0.9, 0.9, 0.5], "b": [k / 50 for k in range(40)]})
        (back,) = [d for d in simulate(Msft(settings), fall).log if isinstance(d, RollBack)][:1]
        run = simulate(Msft(settings), fall)
        taken = next(t for t in run.history.decisions if isinstance(t.decision, RollBack))
        # looks 0 … 4 in stage 0, 5 … 8 in stage 1: the eighth is the third after the border
        assert (taken.stage, taken.update, back.drop) == (1, 7 * run.history.evaluations[1].update, "a")

    def test_undefined_now_means_not_now(self):
        assert self.decide({"a": [0.1, 0.6, 0.4, 0.4, NAN]}) == Continue()
        assert self.decide({"a": [0.1, 0.6, 0.4, NAN, 0.4]}) == RollBack("m1", "a")

    def test_a_task_with_one_validation_row_never_leaves(self):
        history = table({"a": [0.0, 1.0, 0.0, 0.0]}, n=1)
        policy = Msft(MsftSettings(rule="tested", compute_budget=9.0, z=0.0, min_looks=1))
        assert policy.decide(history, history.active) == Continue()

    def test_a_peak_may_lie_before_the_last_stage_border(self):
        """Nobody left, so training was not broken: a fall that spans two stages is seen."""
        fall = [0.57, 0.59, 0.6, 0.6, 0.57, 0.55, 0.53, 0.51, 0.49, 0.47]
        run = simulate(
            Msft(MsftSettings(rule="tested", max_stages=4, z=2.33, min_looks=1)),
            items_of({"a": fall, "b": [k / 50 for k in range(40)]}),
        )
        (back,) = [d for d in run.log if isinstance(d, RollBack)]
        peak = run.history.evaluation_of(back.to)
        assert (back.drop, peak.stage, peak.epochs) == ("a", 0, 0.75)
        assert run.history.decisions[-1].stage > 1

    def test_in_the_last_stage_nobody_leaves(self):
        history = table({"a": [0.1, 0.6, 0.4, 0.4], "b": [0.1, 0.2, 0.3, 0.4]})
        policy = Msft(MsftSettings(rule="tested", max_stages=1, z=2.33, min_looks=1))
        assert policy.decide(history, history.active) == Continue()
        history.tick(4, 1.0, 0)
        history.evaluated("m4", {"a": binary(0.4, 100), "b": binary(0.4, 100)})
        assert policy.decide(history, history.active) == Stop("policy", "1 stage is done")


class TestEndsAndWeights:
    FALL = [0.9, 0.9, 0.9, 0.9, 0.5]  # noqa: RUF012

    def test_it_ends_when_no_task_with_a_score_is_left(self):
        for settings in (MsftSettings(rule="paper"), MsftSettings(z=2.33)):
            run = simulate(Msft(settings), items_of({"a": self.FALL, "dark": [NAN]}))
            assert [d.drop for d in run.log if isinstance(d, RollBack)] == ["a"]
            assert run.log[-1] == Stop(
                "policy",
                "no task with a score is active any more: `dark` alone would be trained by no measure",
            )

    def test_without_any_score_it_goes_on_to_its_end(self):
        run = simulate(Msft(MsftSettings(rule="paper", max_stages=2)), script({"dark": [NAN]}))
        assert run.log[-1] == Stop("policy", "2 stages are done")

    @pytest.mark.parametrize("rule", ["paper", "tested"])
    @pytest.mark.parametrize("rehearsal", [0.0, 0.1])
    def test_weight_0_is_never_active_never_rehearsed_and_still_scored(self, rule, rehearsal):
        settings = MsftSettings(rule=rule, z=2.33, rehearsal=rehearsal, weights={"probe": 0.0, "b": 0.5})
        world = items_of({"probe": self.FALL, "a": self.FALL, "b": [k / 50 for k in range(40)]})
        run = simulate(Msft(settings), world)
        assert all("probe" not in s.active and "probe" not in (s.weights or {}) for s in run.history.stages)
        assert all(d.drop != "probe" for d in run.log if isinstance(d, RollBack))
        assert any(d.drop == "a" for d in run.log if isinstance(d, RollBack))
        assert all(e.scores["probe"].defined for e in run.history.evaluations)

    def test_a_weight_0_task_is_not_what_the_run_compares(self):
        weights = {"b": 0.0, "c": 0.0}
        alone = Msft(MsftSettings(weights=weights)).at_start({"a": 200, "b": 200, "c": 200}, True)
        assert alone == Msft(MsftSettings()).at_start({"a": 200}, True)
        assert alone != Msft(MsftSettings()).at_start({"a": 200, "b": 200, "c": 200}, True)


class TestResult:
    SCORES = {"a": [0.1, 0.9, 0.2], "b": [0.3, 0.3, 0.6]}  # noqa: RUF012

    def test_which_mean_names_it(self):
        history = History.start([("a", 8), ("b", 8)])
        history.took(NewStage(None, ("a", "b")))
        for k, (a, b) in enumerate(zip(*self.SCORES.values())):
            history.tick(k, k / 4, 0)
            history.evaluated(f"m{k}", {"a": binary(a, 10), "b": binary(b, 1000)})
        assert Msft(MsftSettings(pool="items")).result(history) == "m2"
        assert Msft(MsftSettings(pool="tasks")).result(history) == "m1"

    def test_saturation_keeps_the_last_state_unless_asked_for_the_best(self):
        history = table({"a": [0.1, 0.9, 0.2]})
        for exclude_on, keep, result in (
            ("overfit", None, "m1"),
            ("overfit", "last", None),
            ("saturation", None, None),
            ("saturation", "best", "m1"),
        ):
            policy = Msft(MsftSettings(exclude_on=exclude_on, keep=keep))
            assert policy.result(history) == result
            assert ("m1" in policy.kept(history, frozenset())) == (result == "m1")
            assert policy.most_kept(3) == (3 if exclude_on == "overfit" else 0) + (result == "m1")


def items_of(scores: dict[str, list[float]], n: int = 100) -> World:
    world = script(scores)
    plain = world.score
    world.score = lambda task, state: binary(plain(task, state).value, n)
    return world


class TestSaturation:
    @staticmethod
    def world() -> World:
        world = script({"a": [0.1, 0.2, 0.3], "b": [0.1, 0.2, 0.3], "c": [0.1]})
        # correct of 100: a is memorised after its 2nd epoch, b after its 3rd, c never
        world.tokens = lambda task, state: (
            min(100, int({"a": 49, "b": 33, "c": 1}[task] * state[task])),
            100,
        )
        return world

    def test_tasks_leave_where_they_stand_at_the_epochs_end(self):
        run = simulate(
            Msft(
                MsftSettings(exclude_on="saturation", token_accuracy=0.98, compute_budget=9.0, max_stages=9)
            ),
            self.world(),
        )
        assert not any(isinstance(d, RollBack) for d in run.log)
        assert [s.active for s in run.history.stages][:2] == [("a", "b", "c"), ("b", "c")]
        first_drop = run.history.stages[1]
        assert run.history.evaluation_of(first_drop.start).epochs == 2.0
        assert first_drop.follows

    def test_the_threshold_is_exact(self):
        history = table({"a": [0.1, 0.1, 0.1, 0.1, 0.1]})
        for correct, expected in ((9699, Continue()), (9700, Stop("policy", "every task is memorised"))):
            copy = History.load(history.values())
            copy.epoch_ended({"a": (correct, 10_000)})
            policy = Msft(MsftSettings(exclude_on="saturation", token_accuracy=0.97, compute_budget=9.0))
            assert policy.decide(copy, copy.active) == expected

    def test_all_memorised_ends_the_run(self):
        world = self.world()
        world.tokens = lambda task, state: (10, 10)
        run = simulate(Msft(MsftSettings(exclude_on="saturation")), world)
        assert run.log[-1] == Stop("policy", "every task is memorised")
        assert run.updates_trained == 12


class TestNewStage:
    SCORES = {"a": [0.1, 0.5, 0.2, 0.2, 0.2], "b": [0.1, 0.2, 0.3, 0.4, 0.5]}  # noqa: RUF012

    def after_roll_back(self, **settings) -> tuple[History, NewStage]:
        history, policy = table(self.SCORES), Msft(MsftSettings(**{"rule": "paper"} | settings))
        history.took(policy.decide(history, history.active))
        assert history.active == {"b"}
        decision = policy.decide(history, history.active)
        history.took(decision)
        return history, decision

    def test_it_starts_at_the_peak_with_a_new_optimizer(self):
        history, decision = self.after_roll_back()
        assert decision == NewStage("m1", ("b",), None, Reset("reset", "continue", "continue"))
        stage = history.stage
        # the schedule goes on, the order is fresh
        assert (stage.update, stage.data_key, stage.follows) == (4, 1, False)
        assert history.evaluations[-1].snapshot_id == "m1"
        assert (history.evaluations[-1].epochs, history.evaluations[-1].stage) == (0.0, 1)

    def test_rewind(self):
        history, decision = self.after_roll_back(optimizer="restore", schedule="rewind", data="rewind")
        assert decision.reset == Reset("restore", "rewind", "rewind")
        assert (history.stage.update, history.stage.data_key) == (1, 0)

    def test_rehearsal_keeps_excluded_tasks_at_a_share_of_their_rate(self):
        _, decision = self.after_roll_back(rehearsal=0.05)
        assert decision.active == ("b",)
        assert decision.weights == {"b": 1.0, "a": 0.05}
        _, decision = self.after_roll_back(rehearsal=0.05, weights={"a": 2.0, "b": 3.0})
        assert decision.weights == {"b": 3.0, "a": 0.1}

    @pytest.mark.parametrize(
        ("settings", "rate"),
        [
            ({"rule": "tested"}, 0.05),
            ({"rule": "tested", "rehearsal": 0.0}, 0.0),
            ({"rule": "paper"}, 0.0),
            ({"rule": "paper", "rehearsal": 0.3}, 0.3),
            ({"rule": "tested", "exclude_on": "saturation"}, 0.0),
        ],
    )
    def test_rule_tested_alone_rehearses_by_itself(self, settings, rate):
        assert MsftSettings(**settings).rehearsed == rate

    def test_what_it_rehearses_by_itself_is_drawn(self):
        world = curves({"a": Curve(0.9, 0.9, 0.1, 0.3), "b": Curve(0.1, 0.9, 20, 0)}, 200, 1)
        run = simulate(Msft(MsftSettings(compute_budget=4.0, max_stages=3)), world)
        (*_, last) = [d for d in run.log if isinstance(d, NewStage)]
        assert (last.active, last.weights) == (("b",), {"b": 1.0, "a": 0.05})

    def test_going_on_from_the_end_rewinds_nothing(self):
        decision = decide(
            {"a": [0.1, 0.2, 0.3, 0.4, 0.5]}, optimizer="restore", schedule="rewind", data="rewind"
        )
        assert decision == NewStage("m4", ("a",), None, Reset("restore", "continue", "continue"))


class TestKept:
    def test_paper_keeps_first_peaks_and_the_best(self):
        history = table({"a": [0.1, 0.5, 0.5, 0.2], "b": [0.1, 0.2, 0.3, 0.2], "c": [NAN] * 4})
        assert kept_snapshots(history, history.active, "first") == {"m1", "m2"}
        assert kept_snapshots(history, frozenset("c"), "first") == {"m2"}  # the best pooled: 0.5 + 0.3

    def test_tested_keeps_last_peaks_of_tasks_that_have_started(self):
        history = table({"a": [0.1, 0.5, 0.5, 0.2], "b": [0.3, 0.0, 0.0, 0.3], "c": [0.9, 0.1, 0.1, 0.9]})
        assert Msft(MsftSettings(rule="tested")).kept(history, history.active) == {"m2", "m3"}
        assert last_peak(history.evaluations, "a") == 2

    def test_nothing_before_the_first_evaluation(self):
        history = History.start([("a", 3)])
        assert Msft().kept(history, history.active) == set()
        assert Msft().result(history) is None


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"compute_budget": 0.2},
            "mixture.compute_budget: is shorter than one evaluation interval, expected at least 0.25 epochs",
        ),
        ({"compute_budget": NAN}, "mixture.compute_budget"),
        ({"compute_budget": math.inf}, "mixture.compute_budget"),
        ({"evaluations_per_epoch": 0}, "mixture.evaluations_per_epoch: is too small"),
        ({"max_stages": 0}, "mixture.max_stages: cannot be used, expected at least 1, got 0"),
        ({"patience": 0}, "mixture.patience"),
        ({"rehearsal": 1.5}, "mixture.rehearsal: cannot be used, expected at least 0, at most 1, got 1.5"),
        ({"z": NAN}, "mixture.z"),
        ({"min_delta": -0.1}, "mixture.min_delta"),
        ({"min_looks": -1}, "mixture.min_looks"),
        ({"alpha": 0.0}, "mixture.alpha: is not a share, expected above 0, below 1, got 0.0"),
        ({"alpha": NAN}, "mixture.alpha"),
        ({"exclude_on": "saturation", "token_accuracy": 0.0}, "stop.token_accuracy"),
        ({"weights": {"a": -1.0}}, "mixture.weights.a: is not a rate"),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings, text):
    (problem,) = MsftSettings(**{"rule": "paper"} | settings).problems()
    assert text in problem


def test_the_defaults_can_be_used():
    assert MsftSettings(rule="paper").problems() == []
