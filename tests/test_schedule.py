"""Learning rates against the formulas of schedule.py's first lines, and the edges of a triggered decay."""

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repsft_fast.errors import TrainingError
from repsft_fast.schedule import Schedule, constant, cosine, default_decay_updates, linear, problems, wsd


def test_cosine_by_hand():
    assert [cosine(u, 1.0, 2, 6) for u in range(7)] == pytest.approx(
        [
            1 / 3,
            2 / 3,
            1.0,
            0.5 * (1 + math.cos(math.pi / 4)),
            0.5,
            0.5 * (1 + math.cos(3 * math.pi / 4)),
            0.0,
        ],
        abs=1e-15,
    )


def test_linear_by_hand():
    assert [linear(u, 2.0, 1, 5) for u in range(7)] == pytest.approx([1.0, 2.0, 1.5, 1.0, 0.5, 0.0, 0.0])


def test_wsd_by_hand():
    assert [wsd(u, 4.0, 1, 3, 3) for u in range(8)] == pytest.approx([2.0, 4.0, 4.0, 3.0, 2.0, 1.0, 0.0, 0.0])


def test_wsd_untriggered_is_constant():
    assert [wsd(u, 3.0, 2, None, 5) for u in range(50)] == [constant(u, 3.0, 2) for u in range(50)]


def test_wsd_triggered_inside_the_warm_up_decays_from_the_rate_reached():
    rates = [wsd(u, 10.0, 9, 4, 4) for u in range(8)]
    assert rates == pytest.approx([1.0, 2.0, 3.0, 4.0, 4.0, 3.0, 2.0, 1.0])


def test_a_decay_of_one_update_is_lower_than_the_stable_rate():
    assert wsd(7, 1.0, 0, 7, 1) == 0.5


@pytest.mark.parametrize(("done", "length"), [(0, 1), (1, 1), (14, 1), (16, 2), (100, 10), (51200, 5120)])
def test_the_default_decay_is_a_tenth_of_the_updates_done_and_at_least_one(done, length):
    assert default_decay_updates(done) == length


@given(lr=st.floats(1e-8, 10), warm=st.integers(0, 40), total=st.integers(1, 80))
def test_rates_are_positive_never_above_the_peak_and_fall_after_the_warm_up(lr, warm, total):
    if warm >= total:
        assert problems("cosine", lr, warm, total)
        return
    assert problems("cosine", lr, warm, total) == []
    for fall in (cosine, linear):
        rates = [fall(u, lr, warm, total) for u in range(total)]
        assert all(0 < r <= lr for r in rates)
        assert rates[: warm + 1] == sorted(rates[: warm + 1])
        assert rates[warm] == lr
        assert all(a > b for a, b in pairwise(rates[warm:]))
        assert fall(total, lr, warm, total) == 0 == fall(total + 5, lr, warm, total)


@given(lr=st.floats(1e-8, 10), warm=st.integers(0, 30), start=st.integers(0, 60), length=st.integers(1, 30))
def test_every_update_of_a_decay_is_lower_than_the_one_before_and_none_is_zero(lr, warm, start, length):
    rates = [wsd(u, lr, warm, start, length) for u in range(start, start + length)]
    assert all(r > 0 for r in rates)
    assert rates[0] < constant(start, lr, warm)
    assert all(a > b for a, b in pairwise(rates))
    assert wsd(start + length, lr, warm, start, length) == 0


class TestTrigger:
    def test_the_run_ends_when_the_decay_is_done(self):
        schedule = Schedule("wsd", 1.0)
        assert schedule.end() is None
        assert not schedule.finished(10**9)
        assert schedule.trigger_decay(40) == 44 == schedule.end()
        assert [schedule.finished(u) for u in (40, 43, 44, 45)] == [False, False, True, True]
        assert schedule.lr(39) == 1.0
        assert schedule.lr(43) == pytest.approx(0.2)

    def test_the_first_trigger_stands(self):
        schedule = Schedule("wsd", 1.0)
        schedule.trigger_decay(40)
        assert schedule.trigger_decay(42, updates=100) == 44

    def test_length_in_updates_and_by_the_decision(self):
        assert Schedule("wsd", 1.0, decay_updates=7).trigger_decay(1000) == 1007
        assert Schedule("wsd", 1.0, decay_updates=7).trigger_decay(1000, updates=3) == 1003
        assert Schedule("wsd", 1.0, decay_fraction=0.5).trigger_decay(10) == 15
        assert Schedule("wsd", 1.0, decay_fraction=0.0).trigger_decay(10) == 11

    def test_at_update_0(self):
        schedule = Schedule("wsd", 1.0)
        assert schedule.trigger_decay(0) == 1
        assert schedule.lr(0) == 0.5

    @pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
    def test_only_wsd_can_be_triggered(self, name):
        with pytest.raises(TrainingError, match=f"{name} has no decay"):
            Schedule(name, 1.0, total_updates=9).trigger_decay(3)

    def test_a_decay_of_no_updates_is_refused(self):
        with pytest.raises(TrainingError, match="at least 1, got 0"):
            Schedule("wsd", 1.0).trigger_decay(3, updates=0)


class TestState:
    def test_goes_through_json_and_back(self):
        schedule = Schedule("wsd", 1.0, warmup_updates=3)
        schedule.trigger_decay(17)
        other = Schedule("wsd", 1.0, warmup_updates=3)
        other.load(json.loads(json.dumps(schedule.values())))
        assert other == schedule
        assert [other.lr(u) for u in range(30)] == [schedule.lr(u) for u in range(30)]

    def test_a_roll_back_undoes_the_trigger(self):
        schedule = Schedule("wsd", 1.0)
        before = schedule.values()
        schedule.trigger_decay(17)
        schedule.load(before)
        assert schedule.end() is None
        assert schedule.lr(18) == 1.0

    def test_half_a_state_is_refused(self):
        with pytest.raises(TrainingError, match="contradicts itself"):
            Schedule("wsd", 1.0).load({"decay_start": 3, "decay_length": None})


def test_ends():
    assert Schedule("cosine", 1.0, total_updates=9).finished(9)
    assert not Schedule("cosine", 1.0, total_updates=9).finished(8)
    assert Schedule("linear", 1.0, total_updates=9).end() == 9
    assert Schedule("constant", 1.0, total_updates=9).end() is None


def test_a_schedule_is_its_function():
    assert Schedule("cosine", 2.0, 3, 20).lr(11) == cosine(11, 2.0, 3, 20)
    assert Schedule("linear", 2.0, 3, 20).lr(11) == linear(11, 2.0, 3, 20)
    assert Schedule("constant", 2.0, 3).lr(1) == constant(1, 2.0, 3) == 1.0
    with pytest.raises(TrainingError, match="cosine needs the run's length"):
        Schedule("cosine", 2.0).lr(0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ("wsdd", 1e-5, 0, 10),
            "schedule.name: is not a schedule, expected one of wsd, cosine, constant, linear, got wsdd",
        ),
        (
            ("wsd", 0.0, 0, 10),
            "optim.lr: is not a learning rate, expected a finite number above 0, got 0.0; at rate 0",
        ),
        (("wsd", float("nan"), 0, 10), "optim.lr"),
        (("wsd", -1e-5, 0, 10), "optim.lr"),
        (("wsd", 1e-5, 0, 0), "budget.updates: leaves nothing to do, expected at least 1, got 0"),
        (
            ("cosine", 1e-5, 10, 10),
            "optim.warmup_updates: the warm-up is as long as the run or longer, expected below 10, got 10",
        ),
        (("wsd", 1e-5, 11, 10), "optim.warmup_updates"),
        (("wsd", 1e-5, -1, None), "optim.warmup_updates: is negative"),
        (("cosine", 1e-5, 0, None), "cosine needs the run's length"),
        (("linear", 1e-5, 0, None), "linear needs the run's length"),
        (("wsd", 1e-5, 0, None, 1.5), "schedule.decay_fraction: is not a share"),
        (("wsd", 1e-5, 0, None, 0.1, 0), "schedule.decay_updates: is too short"),
    ],
)
def test_settings_that_cannot_be_used_are_named(arguments, text):
    (problem,) = problems(*arguments)
    assert problem.startswith(text) or text in problem


def test_all_problems_at_once():
    assert len(problems("wsdd", 0.0, -1, 0)) == 4
    assert problems("wsd", 1e-5, 100, None) == []
