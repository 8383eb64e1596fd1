"""The baselines, each on a mixture small enough to know the answer."""

import math

import pytest

from repsft_fast.policies import (
    BaselineSettings,
    Continual,
    Dynamix,
    Ies,
    Probe,
    Reset,
    Reweight,
    RollBack,
    Sft,
    SkipSamples,
    SoftSro,
    Sro,
    Stop,
    shares,
)
from repsft_fast.policies.baselines import dynamix_probabilities, mastered, values_of
from repsft_fast.policies.records import Epoch, Probed
from tests.helpers.policies_simulation import World, script, simulate

NAN = float("nan")
RISING = [k / 40 for k in range(40)]
TWO_PEAKS = {"a": [0.1, 0.5, 0.9, 0.2], "b": [0.1, 0.2, 0.3, 0.4, 0.5, 0.9, 0.1], "c": RISING}


def test_sft_trains_everything_and_takes_the_best_pooled_moment():
    run = simulate(
        Sft(BaselineSettings(compute_budget=2.0)), script({"a": [0.1, 0.9, 0.2], "b": [0.1, 0.2, 0.3]})
    )
    assert run.updates_trained == 16
    assert run.log[-1] == Stop("policy", "2 epochs are done")
    assert run.history.evaluation_of(run.result).epochs == 0.25
    assert run.most_held == 1


class TestContinual:
    def test_each_task_goes_on_from_the_peak_of_the_one_before(self):
        run = simulate(Continual(BaselineSettings(compute_budget=2.0)), script(TWO_PEAKS))
        assert [s.active for s in run.history.stages] == [("a",), ("b",), ("c",)]
        assert [d.drop for d in run.log if isinstance(d, RollBack)] == ["a", "b"]  # c peaks at its end
        starts = [run.history.evaluation_of(s.start).epochs for s in run.history.stages[1:]]
        assert starts == [0.5, 1.25]
        assert run.state == {"a": 0.5, "b": 1.25, "c": 2}
        assert run.result == run.history.here

    def test_the_order_can_be_named(self):
        run = simulate(Continual(BaselineSettings(order=("c", "a"))), script(TWO_PEAKS))
        assert [s.active for s in run.history.stages] == [("c",), ("a",), ("b",)]

    def test_an_undefined_task_is_trained_to_the_end(self):
        run = simulate(Continual(), script({"a": [NAN], "b": [0.1, 0.9, 0.1]}))
        assert run.log[-1] == Stop("policy", "every task has had its turn")
        assert run.state == {"a": 1, "b": 0.25}

    def test_a_peak_at_the_last_tasks_middle_is_the_result(self):
        run = simulate(Continual(), script({"a": [0.1, 0.9, 0.1]}))
        assert run.history.evaluation_of(run.result).epochs == 0.25
        assert run.result in run.held


class TestSro:
    def test_second_run_from_the_base_drops_each_task_at_its_peak(self):
        run = simulate(Sro(BaselineSettings(compute_budget=3.0)), script(TWO_PEAKS))
        second = run.history.stages[1:]
        assert [s.active for s in second] == [("a", "b", "c"), ("b", "c"), ("c",)]
        assert second[0].start == run.history.evaluations[0].snapshot_id
        assert second[0].update == 0
        assert run.state == {"a": 0.5, "b": 1.25, "c": 3}
        assert run.log[-1] == Stop("policy", "every task has been dropped at its peak")

    def test_the_optimizer_goes_on_when_a_task_is_dropped(self):
        run = simulate(Sro(BaselineSettings(compute_budget=3.0)), script(TWO_PEAKS))
        resets = [d.reset for d in run.log if hasattr(d, "reset")]
        assert resets == [Reset(), Reset("reset", "rewind", "continue"), Reset("restore"), Reset("restore")]

    def test_a_task_that_peaks_at_the_base_is_not_trained(self):
        run = simulate(Sro(), script({"a": [0.9, 0.1], "b": RISING}))
        assert run.history.stages[1].active == ("b",)
        run = simulate(Sro(), script({"a": [0.9, 0.1], "n": [NAN]}))
        assert run.log[-1] == Stop("policy", "no task ever rose above the base")
        assert run.result is None

    def test_the_result_comes_from_the_second_run(self):
        run = simulate(Sro(BaselineSettings(compute_budget=3.0)), script(TWO_PEAKS))
        assert run.history.evaluations[-1].stage >= 1
        winner = [e.stage for e in run.history.evaluations if e.snapshot_id == run.result]
        assert max(winner) >= 1


class TestSoftSro:
    def test_rates_are_proportional_to_peak_epochs_and_the_epoch_keeps_its_length(self):
        run = simulate(SoftSro(BaselineSettings(compute_budget=3.0)), script(TWO_PEAKS))
        stage = run.history.stages[1]
        assert stage.weights["b"] / stage.weights["a"] == pytest.approx(1.25 / 0.5)
        assert stage.weights["c"] / stage.weights["a"] == pytest.approx(3.0 / 0.5)
        assert sum(stage.weights.values()) * 64 == pytest.approx(3 * 64)
        assert len(run.history.stages) == 2
        assert run.log[-1] == Stop("policy", "3 epochs are done")

    def test_a_peak_at_the_base_is_left_out(self):
        run = simulate(SoftSro(), script({"a": [0.9, 0.1], "b": RISING}))
        assert run.history.stages[1].weights == {"b": pytest.approx(1.0)}
        run = simulate(SoftSro(), script({"a": [0.9, 0.1]}))
        assert run.log[-1] == Stop("policy", "no task ever rose above the base")


def epochs_of(*lines: dict[int, float] | None) -> list[Epoch]:
    return [Epoch(k, 0, k, float(k), {}, line) for k, line in enumerate(lines, start=1)]


class TestIes:
    def test_second_differences_by_hand(self):
        """A straight line is mastered; a curve of second difference 0.02 is not at δ = 0.02, and is at
        0.021."""
        line = [{0: 1.0 - 0.1 * e, 1: 0.01 * e * e} for e in range(6)]
        assert mastered(epochs_of(*line), 0.001) == (0,)
        assert mastered(epochs_of(*line), 0.0199) == (0,)
        assert mastered(epochs_of(*line), 0.021) == (0, 1)

    def test_swings_that_cancel_are_not_mastery(self):
        swings = [{0: v} for v in (0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0)]
        assert mastered(epochs_of(*swings[:6]), 0.5) == ()

    def test_not_before_epoch_six(self):
        flat = [{0: 1.0}] * 6
        assert mastered(epochs_of(*flat[:5]), 0.1) == ()
        assert mastered(epochs_of(*flat), 0.1) == (0,)

    def test_a_gap_or_a_nan_in_the_last_five_epochs_is_not_mastery(self):
        assert mastered(epochs_of(*[{0: 1.0}] * 5, {}), 0.1) == ()
        assert mastered(epochs_of({0: 1.0}, {0: NAN}, *[{0: 1.0}] * 4), 0.1) == ()
        assert mastered(epochs_of({0: NAN}, *[{0: 1.0}] * 5), 0.1) == (0,)
        assert mastered(epochs_of(*[None] * 6), 0.1) == ()

    def test_mastered_samples_skip_the_next_epoch_only_and_are_judged_again(self):
        seen = []

        def losses(state, skipped):
            seen.append(skipped)
            epoch = int(state["a"])
            return {0: 1.0, 1: float(epoch % 2), 2: 1.0 if epoch < 8 else 5.0}

        world = script({"a": [0.1]})
        world.losses = losses
        run = simulate(Ies(BaselineSettings(compute_budget=9.0)), world)
        assert [d.ids for d in run.log if isinstance(d, SkipSamples)] == [(0, 2), (0, 2), (0,)]
        assert seen == [()] * 6 + [(0, 2), (0, 2), (0,)]
        assert sum(e.losses is not None for e in run.history.epochs) == 5


class TestDynamix:
    def test_values_by_hand(self):
        probes = [
            Probed(1, 0, 50, {"a": (2.0, 1.0), "b": (2.0, 1.9), "c": (2.0, 1.45)}),
            Probed(2, 0, 100, {"a": (2.0, NAN), "b": (1.0, 0.5), "c": (1.0, 1.0)}),
        ]
        first = values_of(probes[:1])
        assert first == {
            "a": pytest.approx(0.05),
            "b": 0.0,
            "c": pytest.approx(0.05 * (0.275 - 0.05) / (0.5 - 0.05)),
        }
        second = values_of(probes)
        assert second["a"] == first["a"]  # undefined: left alone
        assert second["b"] == pytest.approx(0.05)
        assert second["c"] == pytest.approx(0.95 * first["c"])

    def test_equal_rewards_prefer_nobody(self):
        assert values_of([Probed(1, 0, 50, {"a": (2.0, 1.0), "b": (4.0, 2.0)})]) == {"a": 0.0, "b": 0.0}

    def test_probabilities_by_hand(self):
        found = dynamix_probabilities({"a": 0.5, "b": 0.0}, {"a": 0.25, "b": 0.75}, beta=2.0)
        a, b = 0.25 * math.e, 0.75
        assert found["a"] == pytest.approx(0.7 * a / (a + b) + 0.15)
        assert sum(found.values()) == pytest.approx(1.0)

    def test_without_rewards_it_is_the_prior_and_some_uniform(self):
        assert dynamix_probabilities({}, {"a": 0.2, "b": 0.8}) == {
            "a": pytest.approx(0.7 * 0.2 + 0.15),
            "b": pytest.approx(0.71),
        }

    def test_probes_then_reweights_every_t_updates(self):
        world = World({"a": 480, "b": 160}, script({"a": [0.1], "b": [0.1]}).score, probe=self.probe)
        run = simulate(Dynamix(BaselineSettings(compute_budget=4.0, every_updates=50)), world)
        probes = [t.update for t in run.history.decisions if isinstance(t.decision, Probe)]
        reweights = [t for t in run.history.decisions if isinstance(t.decision, Reweight)]
        assert probes == [50, 100, 150] == [t.update for t in reweights]
        expected = dynamix_probabilities(values_of(run.history.probes), {"a": 0.75, "b": 0.25})
        drawn = shares(run.history.tasks, reweights[-1].decision.weights, ["a", "b"])
        assert drawn == {task: pytest.approx(p) for task, p in expected.items()}
        assert drawn["b"] > shares(run.history.tasks, reweights[0].decision.weights, ["a", "b"])["b"]

    @staticmethod
    def probe(task, state):
        return (1.0, 0.5) if task == "b" else (1.0, 0.9)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"compute_budget": 0.1}, "mixture.compute_budget: is shorter than one evaluation interval"),
        ({"compute_budget": NAN}, "mixture.compute_budget"),
        ({"every_updates": 0}, "mixture.every_updates"),
        ({"memory": 1.5}, "mixture.memory: cannot be used, expected at least 0, at most 1, got 1.5"),
        ({"explore": NAN}, "mixture.explore"),
        ({"delta": -1.0}, "mixture.delta"),
        ({"first_epoch": 4}, "mixture.first_epoch: cannot be used, expected at least 5, got 4"),
        ({"order": ("a", "a")}, "mixture.order: names a task twice"),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings, text):
    (problem,) = BaselineSettings(**settings).problems()
    assert text in problem
