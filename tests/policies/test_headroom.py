"""Head-room: what curves with known peaks have, what it makes of branches and gaps, and how sure it is."""

import json
import math
import random
from statistics import fmean

import pytest

from benchmarks.studies.headroom_coverage import noisy
from repsft_fast.policies import NewStage, RollBack
from repsft_fast.policies.headroom import WINDOW, branches, headroom, of_branches, of_records
from repsft_fast.policies.history import History
from repsft_fast.policies.records import Evaluation
from repsft_fast.policies.statistics import Score
from repsft_fast.policies.student import student_quantile

NAN = float("nan")


def looks_of(curves, score=lambda value: Score(value, 10)):
    """One unbroken branch with these scores look by look."""
    length = len(next(iter(curves.values())))
    return [
        Evaluation(0, f"m{i}", i, i / 4, {t: score(c[i]) for t, c in curves.items()}) for i in range(length)
    ]


def room_of(curves, score=lambda value: Score(value, 10)):
    return of_branches([looks_of(curves, score)], list(curves))


def history_of(curves, active):
    """One stage that trains these tasks, with these scores look by look."""
    history = History.start((task, 8) for task in curves)
    history.took(NewStage(None, active))
    for i in range(len(curves["a"])):
        history.tick(i, i / 4, 0)
        history.evaluated(f"m{i}", {task: Score(curve[i], 10) for task, curve in curves.items()})
    return history


def bump(at, length=21, top=0.8, steep=0.002):
    return [top - steep * (i - at) ** 2 for i in range(length)]


def brute(curves):
    """The definition, word for word, for one branch without gaps."""
    smooth = {t: [fmean(c[max(0, i - 2) : i + 3]) for i in range(len(c))] for t, c in curves.items()}
    length = len(next(iter(smooth.values())))
    common = max(range(length), key=lambda i: fmean(s[i] for s in smooth.values()))
    return fmean(max(s) - s[common] for s in smooth.values()), common


class TestValue:
    def test_known_peaks(self):
        """Parabolas are smoothed by a constant: peaks at 6 and 14, the best for both at 10, 16 steps² each."""
        found = room_of({"a": bump(6), "b": bump(14)})
        assert found.value == pytest.approx(0.002 * 16, abs=1e-12)
        assert found.common.moment == "m10"
        assert [found.tasks[t].at.moment for t in "ab"] == ["m6", "m14"]
        assert found.tasks["a"].own_best == pytest.approx(0.8 - 0.002 * 2, abs=1e-12)  # mean square of −2 … 2
        assert found.tasks["a"].in_common == pytest.approx(0.8 - 0.002 * 18, abs=1e-12)

    @pytest.mark.parametrize("seed", range(20))
    def test_it_is_the_definition(self, seed):
        r = random.Random(seed)
        curves = {f"t{k}": [r.random() for _ in range(r.choice([5, 6, 13]))] for k in range(1)}
        length = len(curves["t0"])
        curves |= {f"t{k}": [r.random() for _ in range(length)] for k in range(1, r.choice([2, 3, 8]))}
        value, common = brute(curves)
        found = room_of(curves)
        assert found.value == pytest.approx(value, abs=1e-12)
        assert found.common.moment == f"m{common}"

    def test_one_best_for_all_is_nothing_to_win(self):
        found = room_of({"a": bump(10), "b": bump(10, top=0.3)})
        assert found.value == 0.0
        assert found.common.moment == found.tasks["a"].at.moment == "m10"

    def test_a_task_that_training_only_harms_is_best_at_the_start(self):
        found = room_of({"a": [0.9 - 0.01 * i for i in range(20)], "b": [0.1 + 0.03 * i for i in range(20)]})
        assert found.tasks["a"].at.moment == "m0"
        assert found.common.moment == "m19"
        assert found.value == pytest.approx((0.89 - 0.72) / 2, abs=1e-12)

    def test_losses_come_negated_and_only_differences_count(self):
        shifted = room_of({"a": [x - 7 for x in bump(6)], "b": [x - 3 for x in bump(14)]})
        assert shifted.value == pytest.approx(room_of({"a": bump(6), "b": bump(14)}).value, abs=1e-12)

    def test_a_single_good_look_is_smoothed_away(self):
        flat = [0.5] * 11
        found = room_of({"a": flat, "b": [*flat[:5], 0.6, *flat[6:]]})
        assert found.value == 0.0
        assert found.tasks["b"].own_best == pytest.approx(0.52)


class TestGaps:
    def test_why_there_is_none(self):
        five = [0.1] * WINDOW
        assert not isinstance(room_of({"a": five, "b": five}), str)
        assert room_of({"a": five[1:], "b": five[1:]}) == "no unbroken stretch of 5 evaluations"
        assert room_of({"a": five, "b": [NAN] * 5}) == "only `a` is trained and scored"
        assert room_of({"a": five}) == "only `a` is trained and scored"
        assert room_of({"a": [NAN] * 5}) == "no task has scores to compare"
        assert of_branches([], ["a", "b"]) == "no unbroken stretch of 5 evaluations"
        apart = {"a": [0.1] * 5 + [NAN] * 5, "b": [NAN] * 5 + [0.1] * 5}
        assert room_of(apart) == "at no evaluation does every task have a score"

    def test_a_task_never_measured_takes_no_part(self):
        curves = {"a": bump(6), "b": bump(14)}
        assert room_of(curves | {"dark": [NAN] * 21}) == room_of(curves)

    def test_a_task_that_no_stage_trains_takes_no_part(self):
        """`watched` would be best at the first look, and move the common best: no schedule sets its training."""
        curves = {"a": bump(6), "b": bump(14), "watched": [0.9 - 0.02 * i for i in range(21)]}
        found = headroom(history_of(curves, ("a", "b")))
        assert found == room_of({t: curves[t] for t in "ab"})
        assert headroom(history_of(curves, ("a", "b", "watched"))).value > found.value
        assert headroom(history_of(curves, ("a",))) == "only `a` is trained and scored"

    def test_a_task_that_left_or_came_later_takes_part(self):
        curves = {"a": bump(6), "b": bump(14)}
        history = history_of(curves, ("a",))
        history.took(NewStage("m20", ("b",)))
        assert set(headroom(history).tasks) == {"a", "b"}

    def test_an_undefined_score_leaves_its_look_out_and_no_more(self):
        curves = {"a": bump(6), "b": bump(14)}
        curves["a"][6] = NAN
        found = room_of(curves)
        assert found.tasks["a"].at.moment in ("m5", "m7")
        assert found.common.moment == "m10"


class TestBranches:
    def history(self, second, follows):
        """Six looks rising for `a`, then a stage that goes on from the end, or from m2 after a roll-back."""
        history = History.start([("a", 8), ("b", 8)])
        history.took(NewStage(None, ("a", "b")))
        for i in range(6):
            history.tick(i, i / 4, 0)
            history.evaluated(f"m{i}", {"a": Score(0.1 * i, 10), "b": Score(0.6 - 0.1 * i, 10)})
        if not follows:
            history.took(RollBack("m2", "b"))
        history.took(NewStage("m5" if follows else "m2", ("a",) if not follows else ("a", "b")))
        for i, value in enumerate(second, start=1):
            history.tick(history.stage.update + i, i / 4, 0)
            history.evaluated(f"n{i}", {"a": Score(value, 10), "b": Score(0.6, 10)})
        return history

    def test_a_stage_that_goes_on_is_the_same_branch_and_its_start_counts_once(self):
        (line,) = branches(self.history([0.6, 0.7], follows=True))
        assert [e.snapshot_id for e in line] == ["m0", "m1", "m2", "m3", "m4", "m5", "n1", "n2"]

    def test_a_stage_that_goes_back_is_another_with_its_start(self):
        found = branches(self.history([0.6, 0.7], follows=False))
        assert [[e.snapshot_id for e in line] for line in found] == [
            ["m0", "m1", "m2", "m3", "m4", "m5"], ["m2", "n1", "n2"],
        ]  # fmt: skip

    def test_looks_are_smoothed_with_their_own_branch_only(self):
        found = headroom(self.history([0.9, 0.9], follows=False))
        # m2, n1, n2 of `a`: (0.2 + 0.9 + 0.9) / 3 at each of the three, and 0.6 · 2 + 0.4 of `b`
        assert found.tasks["a"].own_best == pytest.approx(2.0 / 3)
        assert found.common.moment == "m2"
        assert (found.common.stage, found.common.epochs) == (1, 0.0)

    def test_records_without_items_say_the_same_without_an_interval(self):
        history = self.history([0.9, 0.9], follows=False)
        lines = [
            (e.snapshot_id, e.stage, e.epochs, {t: s.value for t, s in e.scores.items()})
            for e in history.evaluations
            if not (e.stage == 1 and e.snapshot_id == "m2")  # files have an evaluation once
        ]
        found, whole = of_records(lines, {0: None, 1: "m2"}), headroom(history)
        assert found.value == pytest.approx(whole.value, abs=1e-12)
        assert found.tasks["a"].own_best == pytest.approx(whole.tasks["a"].own_best, abs=1e-12)
        assert found.common.moment == whole.common.moment
        assert found.interval is None
        assert all(task.error is None for task in found.tasks.values())
        gap = [("x", 0, 0.0, {"a": None, "b": 0.5}), *lines]
        assert of_records(gap, {0: None, 1: "m2"}).common.moment == "m2"


class TestInterval:
    def test_by_hand(self):
        """Two tasks of four items; `a` loses item 0 for good at look 5 of 10, `b` gains as much and more."""
        a = [[1.0, 1.0, 0.0, 0.0]] * 5 + [[0.0, 1.0, 0.0, 0.0]] * 5
        b = [[0.0, 0.0, 0.0, 0.0]] * 5 + [[1.0, 1.0, 0.0, 0.0]] * 5
        curves = {"a": a, "b": b}
        found = room_of(curves, Score.of)
        assert (found.common.moment, found.tasks["a"].at.moment) == ("m7", "m0")
        assert found.value == pytest.approx(0.25 / 2)
        # second differences of a: −0.25, +0.25 and six zeros; three looks against five
        wobble = math.sqrt(2 * 0.25**2 / 8 / 6)
        items = math.sqrt((0.75**2 + 3 * 0.25**2) / 3 / 4)
        assert found.tasks["a"].error == pytest.approx(
            max(items, wobble * math.sqrt(1 / 3 + 1 / 5)), abs=1e-12
        )
        assert found.tasks["a"].error == pytest.approx(0.25, abs=1e-12)
        assert found.tasks["b"].error == 0.0, "at its own best"
        # 0.6 · 8 degrees of freedom of `a`, which is the whole error
        assert found.interval == pytest.approx(0.25 / 2 * student_quantile(0.025, 4.8), rel=1e-9)

    def test_it_is_not_below_the_wobble(self):
        """Items that move as one: their differences have no spread, and the curve wobbles all the same."""
        r = random.Random(0)
        curves = {t: [x + r.gauss(0.0, 0.05) for x in bump(at)] for t, at in (("a", 6), ("b", 14))}
        found = room_of(curves, lambda value: Score.of([value] * 10))
        assert 0.01 < found.tasks["a"].error < 0.06
        smooth = room_of({"a": bump(6), "b": bump(14)}, lambda value: Score.of([value] * 10))
        assert smooth.tasks["a"].error < 0.002

    def test_degrees_of_freedom_are_those_of_the_tasks_that_make_the_error(self):
        found = room_of({"a": bump(6), "b": bump(14)}, lambda value: Score.of([value] * 10))
        error = found.tasks["a"].error
        assert found.tasks["b"].error == pytest.approx(error)
        freedom = 2 * 0.6 * 19  # equal errors: those of both
        assert found.interval == pytest.approx(
            student_quantile(0.025, freedom) * error * math.sqrt(2) / 2, rel=1e-6
        )

    def test_windows_that_share_looks_cancel(self):
        base = {"a": bump(9, steep=0.01), "b": bump(11, steep=0.01)}
        wide = {"a": bump(6, steep=0.01), "b": bump(14, steep=0.01)}
        near, far = (room_of(c, lambda value: Score.of([value] * 10)) for c in (base, wide))
        wobble = math.sqrt(0.02**2 / 6)
        assert near.tasks["a"].error == pytest.approx(wobble * math.sqrt(2 / 25), rel=1e-6)  # one look apart
        assert far.tasks["a"].error == pytest.approx(wobble * math.sqrt(8 / 25), rel=1e-6)  # four apart

    @pytest.mark.parametrize("score", [lambda v: Score(v, 10), lambda v: Score.of([v])])
    def test_without_items_or_with_one_there_is_none(self, score):
        found = room_of({"a": bump(6), "b": bump(14)}, score)
        assert found.interval is None
        assert found.value == pytest.approx(0.032)

    def test_curves_that_never_move_are_sure(self):
        found = room_of({"a": [0.5] * 9, "b": [0.5] * 9}, lambda value: Score.of([value] * 10))
        assert (found.value, found.interval, found.by_chance) == (0.0, 0.0, 0.0)

    def test_coverage_where_there_is_something_to_win(self):
        def peaks(task, x):
            return 0.7 - 0.4 * (x - task / 3) ** 2

        truth = room_of({f"t{t}": [peaks(t, i / 24) for i in range(25)] for t in range(4)}).value
        found = [noisy(random.Random(seed), 4, peaks) for seed in range(60)]
        inside = [abs(f.value - truth) <= f.interval for f in found]
        assert fmean(inside) >= 0.90
        assert truth < fmean(f.value for f in found) < truth + 0.02
        assert fmean(f.interval for f in found) < truth, "and it says something"

    def test_at_most_holds_on_flat_curves(self):
        found = [noisy(random.Random(seed), 4, lambda t, x: 0.5) for seed in range(60)]
        assert all(f.value >= 0.0 for f in found)
        assert fmean(f.value - f.by_chance - f.interval <= 0 for f in found) >= 0.95
        assert 0.005 < fmean(f.by_chance for f in found) < fmean(f.value for f in found) < 0.04

    def test_by_chance_is_what_flat_curves_that_only_wobble_show(self):
        r = random.Random(0)
        for tasks, length in ((2, 13), (4, 25), (10, 41)):
            found = [
                room_of({f"t{t}": [r.gauss(0.5, 0.02) for _ in range(length)] for t in range(tasks)})
                for _ in range(100)
            ]
            shown, said = fmean(f.value for f in found), fmean(f.by_chance for f in found)
            assert shown == pytest.approx(said, rel=0.35), (tasks, length)


def test_it_is_strict_json():
    found = room_of({"a": bump(6), "b": bump(14)}).values()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found) == {"value", "interval", "by_chance", "common", "tasks"}
    assert found["common"] == {"moment": "m10", "stage": 0, "epochs": 2.5}


def test_items_are_read_in_two_windows_of_a_task_and_nowhere_else():
    read = []

    class Counted(tuple):
        def __iter__(self):
            read.append(1)
            return super().__iter__()

    r = random.Random(0)
    curves = {f"t{k}": [r.random() for _ in range(100)] for k in range(5)}
    room_of(curves, lambda value: Score(value, 3, Counted([value] * 3)))
    assert 0 < len(read) <= 5 * 2 * WINDOW
