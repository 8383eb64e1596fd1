"""The table: what may be appended, what it answers, and that JSON holds all of it."""

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repsft_fast.errors import TrainingError
from repsft_fast.policies import (
    Continue,
    Decay,
    History,
    NewStage,
    Probe,
    Reweight,
    RollBack,
    Score,
    SkipSamples,
    Stop,
    due,
    explain,
    shares,
)


def opened(tasks=("a", "b")) -> History:
    history = History.start([(task, 64) for task in tasks])
    history.took(NewStage(None, tuple(tasks)))
    return history


def scores(**values: float) -> dict[str, Score]:
    return {task: Score(value, 10) for task, value in values.items()}


class TestAppending:
    def test_two_tasks_of_one_name_and_no_tasks_are_refused(self):
        with pytest.raises(TrainingError, match=r"two tasks have one name.*\['a'\]"):
            History.start([("a", 1), ("b", 1), ("a", 2)])
        with pytest.raises(TrainingError, match="mixture: has no tasks"):
            History.start([])

    def test_an_evaluation_covers_every_task_once(self):
        history = opened()
        with pytest.raises(TrainingError, match="must cover every task"):
            history.evaluated("m0", scores(a=0.1))
        history.evaluated("m0", scores(a=0.1, b=0.2))
        with pytest.raises(TrainingError, match="moment id is taken"):
            history.evaluated("m0", scores(a=0.1, b=0.2))

    def test_here_is_the_moment_until_the_next_update(self):
        history = opened()
        history.evaluated("m0", scores(a=0.1, b=0.2))
        assert history.here == "m0"
        history.tick(0, 0.0, 0)
        assert history.here == "m0"
        history.tick(1, 0.1, 10)
        assert history.here is None
        history.took(RollBack("m0", "a"))
        assert history.here == "m0"

    def test_a_moment_nobody_evaluated_is_refused(self):
        with pytest.raises(TrainingError, match="no such moment"):
            opened().took(RollBack("m7", "a"))

    def test_a_probe_that_nobody_makes_is_an_error_not_a_loop(self):
        history = opened()
        history.took(Probe(("a",)))
        with pytest.raises(TrainingError, match="asks again for a probe"):
            history.took(Probe(("a",)))

    def test_continue_is_not_recorded(self):
        history = opened()
        history.took(Continue())
        assert len(history.decisions) == 1

    def test_without_a_stage(self):
        with pytest.raises(TrainingError, match="no stage is open"):
            _ = History.start([("a", 1)]).stage


class TestEnd:
    def test_the_code_of_the_last_stop_is_kept_through_json(self):
        history = opened()
        assert history.ended_by is None
        history.took(Stop("plateau", "token accuracy has not risen by 0.001 for 2 epochs"))
        assert history.ended_by == "plateau"
        assert History.load(json.loads(json.dumps(history.values()))).ended_by == "plateau"

    def test_a_stop_can_be_taken_back_and_nothing_else(self):
        history = opened()
        history.took(Stop("budget", "the budget of 2 epochs is spent"))
        for _ in range(2):
            history.take_back_stop()
            assert history.ended_by is None
            assert [type(t.decision) for t in history.decisions] == [NewStage]


class TestWindow:
    def test_stages_that_followed_on_with_the_same_tasks_are_one(self):
        history = opened()
        for k in range(6):
            if k:
                history.tick(k, k / 2 if k < 3 else (k - 2) / 2, 0)
            history.evaluated(f"m{k}", scores(a=0.1, b=0.2))
            if k == 2:
                history.took(NewStage("m2", ("a", "b")))
        assert [e.snapshot_id for e in history.window()] == [f"m{k}" for k in range(6)]
        assert [e.snapshot_id for e in history.of_stage(1)] == ["m2", "m3", "m4", "m5"]
        history.took(RollBack("m4", "b"))
        history.took(NewStage("m4", ("a",)))
        assert [e.snapshot_id for e in history.window()] == ["m4"]
        assert not history.stage.follows

    def test_a_roll_back_breaks_it_even_when_nobody_leaves(self):
        history = opened()
        history.evaluated("m0", scores(a=0.1, b=0.2))
        history.tick(1, 0.5, 0)
        history.evaluated("m1", scores(a=0.1, b=0.2))
        history.took(RollBack("m0", None))
        history.took(NewStage("m0", ("a", "b")))
        assert [e.snapshot_id for e in history.window()] == ["m0"]

    def test_a_task_that_leaves_breaks_it(self):
        history = opened()
        history.evaluated("m0", scores(a=0.1, b=0.2))
        history.tick(1, 0.5, 0)
        history.evaluated("m1", scores(a=0.1, b=0.2))
        history.took(NewStage("m1", ("a",)))
        assert history.stage.follows
        assert [e.snapshot_id for e in history.window()] == ["m1"]


class TestBest:
    def test_strictly_better_and_undefined_never(self):
        history = opened()
        for k, (a, b) in enumerate([(0.1, 0.2), (0.5, 0.3), (0.3, 0.5), (float("nan"), 1.0)]):
            history.tick(k, k / 4, 0)
            history.evaluated(f"m{k}", scores(a=a, b=b))
        assert history.best().snapshot_id == "m1"

    def test_a_task_without_rows_counts_nowhere(self):
        history = opened()
        history.evaluated("m0", {"a": Score(0.3, 10), "b": Score.of([])})
        assert history.measured_tasks() == ["a"]
        assert history.best().snapshot_id == "m0"
        history.tick(1, 0.25, 0)
        history.evaluated("m1", {"a": Score(0.2, 10), "b": Score(0.1, 10)})
        assert history.best().snapshot_id == "m1"  # the only moment where both are known


@given(updates=st.integers(1, 200), per_epoch=st.integers(1, 9))
def test_evaluations_fall_on_quarters_rounded_up_each_once_and_on_the_end(updates, per_epoch):
    after = [
        u for u in range(1, updates + 1) if due(Fraction(u - 1, updates), Fraction(u, updates), per_epoch)
    ]
    assert after == sorted({-(-k * updates // per_epoch) for k in range(1, per_epoch + 1)})
    assert not due(Fraction(0), Fraction(9), 0)


class TestShares:
    def test_natural_and_weighted(self):
        assert shares({"a": 30, "b": 10}, None, ["a", "b"]) == {"a": 0.75, "b": 0.25}
        assert shares({"a": 30, "b": 10, "c": 5}, {"a": 1.0, "b": 3.0}, ["a", "b"]) == {"a": 0.5, "b": 0.5}

    @pytest.mark.parametrize(
        "weights", [{"a": 0.0}, {"a": -1.0, "b": 9.0}, {"a": float("nan")}, {"a": float("inf")}]
    )
    def test_weights_that_cannot_be_sampled_from(self, weights):
        with pytest.raises(TrainingError, match="cannot be sampled from"):
            shares({"a": 30, "b": 10}, weights, weights)


class TestExplain:
    @staticmethod
    def history() -> History:
        history = opened(("boolq", "other"))
        for k in range(17):
            if k:
                history.tick(k, k / 4, 0)
            right = 641 if k == 7 else 618
            history.evaluated(
                f"m{k}",
                {
                    "boolq": Score.of([1.0] * right + [0.0] * (1000 - right)),
                    "other": Score(0.1 + k / 100, 50),
                },
            )
        return history

    def test_a_roll_back(self):
        history = self.history()
        expected = (
            "`boolq` peaked at 1.75 epochs (0.641), fell 0.023 ± 0.006 since: excluded; going back 9"
            " evaluations"
        )
        assert explain(RollBack("m7", "boolq"), history) == expected
        history.took(RollBack("m7", "boolq"))
        assert explain(RollBack("m7", "boolq"), history) == expected
        history.took(NewStage("m7", ("other",)))
        assert explain(NewStage("m7", ("other",)), history) == "stage 1: 1 of 2 tasks active"

    def test_a_plateau_a_single_step_and_no_drop(self):
        history = self.history()
        assert "has not risen above it since (0.618)" in explain(RollBack("m3", "boolq"), history)
        assert explain(RollBack("m15", None), history) == "going back 1 evaluation"

    def test_a_loss_is_told_as_the_loss_it_is(self):
        history = opened(("a", "b"))
        for k, loss in enumerate((2.0, 1.25, 1.5, 1.25)):
            if k:
                history.tick(k, k / 4, 0)
            history.evaluated(f"m{k}", {"a": Score.of([-loss] * 4), "b": Score.of([-1.0] * 4)})
            if k == 2:
                text = explain(RollBack("m1", "a"), history, losses=True)
                assert text.startswith("`a` was lowest at 0.25 epochs (1.250), rose 0.250 ± 0.")
        assert "(1.250), has not fallen below it since (1.250)" in explain(
            RollBack("m1", "a"), history, losses=True
        )

    def test_the_others(self):
        history = self.history()
        assert (
            explain(Reweight({"boolq": 3.0, "other": 1.0}), history)
            == "new mixture: `boolq` 75.0%, `other` 25.0%"
        )
        assert (
            explain(SkipSamples((4,)), history)
            == "1 mastered sample skip the backward pass of the next epoch"
        )
        assert explain(Probe(("a", "b")), history) == "looking one update ahead on 2 tasks"
        assert explain(Decay("budget", "full", 1), history) == "full: the learning rate decays over 1 update"
        assert explain(Stop("policy", "enough"), history) == "stopped: enough"
        text = explain(NewStage("m16", ("other",), {"other": 1.0, "boolq": 0.05}), history)
        assert (
            text
            == "stage 1: 1 of 2 tasks active; `boolq` left; 1 excluded task rehearsed (4.8% of the samples)"
        )
