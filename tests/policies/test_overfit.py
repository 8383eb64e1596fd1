"""Rule "tested": what it takes for a fall to be one, and what is said of it beforehand."""

import math
import random

import pytest

from repsft_fast.policies import Continue, History, Msft, MsftSettings, NewStage, RollBack, Score, overfit
from repsft_fast.policies.overfit import Bound, bound, looks, looks_seen, smallest_fall, wobble_of
from repsft_fast.policies.student import normal_quantile, student_quantile
from tests.helpers.policies_simulation import Curve, curves, simulate
from tests.policies.test_msft import NAN, binary, table

FLAT = [0.9] * 9


def decide(line: list[float], n: int = 300, **settings):
    history = table({"a": line, "b": [0.5] * len(line)}, n)
    return Msft(
        MsftSettings(compute_budget=99.0, max_stages=2) if not settings else MsftSettings(**settings)
    ).decide(history, history.active)


class TestWobble:
    def test_by_hand(self):
        """Second differences 3, -3 and -1 of the first line, 2 of the second: (9 + 9 + 1 + 4) / 4 / 6."""
        branches = [[0.0, -1.0, 1.0, 0.0, -2.0], [0.0, 0.0, 2.0]]
        wobble, count = wobble_of(branches)
        assert (wobble, count) == (pytest.approx(math.sqrt(23 / 4 / 6), rel=1e-15), 4)

    def test_a_straight_trend_is_none_and_few_looks_tell_nothing(self):
        assert wobble_of([[0.25, 0.5, 0.75, 1.0]]) == (0.0, 2)
        assert wobble_of([[0.1, 0.9], [0.5]]) == (0.0, 0)
        assert wobble_of([]) == (0.0, 0)

    def test_an_undefined_look_breaks_the_row(self):
        assert wobble_of([[0.0, 1.0, NAN, 0.0, 0.0, 1.0]]) == (pytest.approx(math.sqrt(1 / 6)), 1)

    def test_the_steepest_step_since_the_peak_is_left_out(self):
        line = [0.0, 0.0, 0.0, 0.0, -4.0, -4.0, -5.0]
        assert wobble_of([line])[1] == 5
        # the step to -4 lies in two second differences; what is left: 0, 0, -1
        assert wobble_of([line], since=3) == (pytest.approx(math.sqrt(1 / 3 / 6)), 3)
        assert wobble_of([line], since=1)[1] == 4, "the last step has one neighbour; -4 lies before the peak"
        assert wobble_of([[0.0, -9.0, 0.0], line], since=3)[1] == 4, "of the last branch alone"

    def test_of_equal_steps_the_first_is_left_out(self):
        """Second differences 0, -1, 0: the first step to fall lies in the last two, the other in one."""
        assert wobble_of([[0.0, 0.0, 0.0, -1.0, -2.0]], since=2) == (0.0, 1)

    def test_it_estimates_the_wobble_of_a_curve(self):
        rng = random.Random(3)
        line = [0.001 * k + rng.gauss(0, 0.02) for k in range(4000)]
        assert wobble_of([line])[0] == pytest.approx(0.02, rel=0.03)


class TestLooks:
    def history(self) -> History:
        """Stage 0 at m0, m1, m2; on from there: m3; back to m1 without b: m4, whose a is no number."""
        history = table({"a": [0.1, 0.2, 0.3], "b": [0.5, 0.5, 0.5]})
        history.took(NewStage("m2", ("a", "b")))
        self.look(history, 3, 0.4)
        history.took(RollBack("m1", "b"))
        history.took(NewStage("m1", ("a",)))
        self.look(history, 4, NAN)
        return history

    @staticmethod
    def look(history: History, number: int, value: float) -> None:
        history.tick(history.position.update + 1, 0.25, 0)
        history.evaluated(f"m{number}", {"a": binary(value, 10), "b": binary(0.5, 10)})

    def test_a_stage_that_follows_goes_on_and_one_that_goes_back_begins_a_branch(self):
        first, second = looks(self.history(), "a")
        assert first == [0.1, 0.2, 0.3, 0.4]
        assert second[0] == 0.2
        assert math.isnan(second[1])

    def test_a_stages_start_and_an_undefined_score_are_no_look(self):
        assert looks_seen(self.history(), "a") == 4
        assert looks_seen(self.history(), "b") == 5


class TestBound:
    def test_both_errors_add(self):
        """10 of 100 items lost: fall 0.1 less 0.01, item error sqrt(10)/100; wobble 0.02 between two looks: 0.0283."""
        peak, now = binary(0.9, 100), binary(0.8, 100)
        item, whole = math.sqrt(10) / 100, math.sqrt(2) * 0.02
        z = math.sqrt(0.09**2 - (2 * whole) ** 2) / item
        assert Bound(z * 0.999, 2.0, 0.02).exceeded(peak, now)
        assert not Bound(z * 1.001, 2.0, 0.02).exceeded(peak, now)
        assert not Bound(0.0, math.inf, 0.0).exceeded(peak, now), "nothing is known of the wobble"
        assert not Bound(1.0, 1.0, 0.0).exceeded(now, peak), "a rise"

    def test_its_quantiles(self):
        history = table({"a": [0.5, 0.52, 0.5, 0.51, 0.5], "b": [0.5] * 5, "dark": [NAN] * 5})
        found = bound(history, "a", 0.1, 40)
        p = 0.1 / (
            2 * 2 * 2 * 40
        )  # two errors, a peak that was chosen; `dark` has no score and is not compared
        assert found.z == normal_quantile(p)
        assert found.t == student_quantile(p, 0.6 * 3)
        assert found.wobble == wobble_of(looks(history, "a"))[0]
        assert bound(history, "a", 0.1, 40, z=1.5) == Bound(1.5, 1.5, found.wobble)
        assert bound(history, "a", 0.1, 40, since=2).t == student_quantile(p, 0.6 * 2)

    def test_looks_of_the_run(self):
        assert MsftSettings(compute_budget=3, evaluations_per_epoch=4, max_stages=10).looks == 120
        assert MsftSettings(compute_budget=0.25, evaluations_per_epoch=4, max_stages=1).looks == 1


class TestFallsThatAreSeen:
    """Case P3 and its kin, at the defaults."""

    @pytest.mark.parametrize("before", [[0.9] * 9, [0.85, 0.87, 0.89, *[0.9] * 6]])
    def test_a_sudden_one_of_a_task_that_was_good_from_the_start(self, before):
        assert decide([*before, 0.5]) == Continue(), "patience"
        assert decide([*before, 0.5, 0.5]) == RollBack("m8", "a")

    def test_a_slow_one(self):
        fall = [0.9] * 6 + [0.9 - 0.02 * k for k in range(1, 12)]
        seen = [k for k in range(8, len(fall) + 1) if isinstance(decide(fall[:k]), RollBack)]
        assert seen
        assert seen[0] <= 14, "after eight looks of the fall at most"

    def test_one_that_only_ever_fell(self):
        assert decide([0.9 - 0.05 * k for k in range(10)]) == RollBack("m0", "a")

    def test_few_rows_see_none(self):
        assert decide([*FLAT, 0.7, 0.7], n=300) == RollBack("m8", "a")
        assert decide([*FLAT, 0.7, 0.7], n=40) == Continue()

    def test_a_task_that_wobbles_as_much_stays(self):
        wobbling = [0.9, 0.8, 0.9, 0.8, 0.9, 0.8, 0.9, 0.8, 0.9, 0.7, 0.7]
        assert decide(wobbling, n=1000) == Continue()
        assert decide([*FLAT, 0.7, 0.7], n=1000) == RollBack("m8", "a")


class TestFlatCurves:
    """Noise alone: the share of whole runs in which anybody leaves. The tables have more worlds and runs."""

    @pytest.mark.parametrize(("tasks", "wobble"), [(2, 0.0), (10, 0.0), (2, 0.02)])
    def test_hardly_anybody_leaves(self, tasks, wobble):
        runs, left = 60, 0
        for seed in range(runs):
            world = curves({f"t{k}": Curve(0.5, 0.5, 1.0, 0.0) for k in range(tasks)}, 100, seed)
            rng, plain = random.Random(seed), world.score
            shifts: dict[tuple, float] = {}

            def score(task, state, plain=plain, rng=rng, shifts=shifts):
                at = shifts.setdefault((task, *sorted(state.items())), rng.gauss(0, wobble))
                found = plain(task, state)
                turned = 0.0 if at < 0 else 1.0
                return Score.of(turned if rng.random() < 2 * abs(at) else item for item in found.items)

            world.score = score
            run = simulate(Msft(MsftSettings(compute_budget=1.0, max_stages=5)), world)
            left += any(isinstance(decision, RollBack) for decision in run.log)
        assert left <= 6 + 2 * math.sqrt(6 * 0.9), "a tenth and two standard errors"


class TestSaidAtTheStart:
    def test_the_smallest_fall_is_the_smallest_that_the_bound_lets_through(self):
        for n in (10, 40, 100, 300, 1000):
            for z in (1.0, 2.33, 3.5, 4.2):
                seen = [
                    k
                    for k in range(1, n + 1)
                    if Bound(z, 0.0, 0.0).exceeded(binary(1.0, n), binary(1 - k / n, n))
                ]
                assert smallest_fall(n, z) == pytest.approx(seen[0] / n) if seen else smallest_fall(n, z) > 1

    def test_rows_needed_are_the_fewest(self):
        for fall in (0.02, 0.05, 0.2):
            for z in (1.5, 2.33, 3.9):
                rows = overfit.rows_needed(fall, z)
                assert smallest_fall(rows, z) <= fall < smallest_fall(rows - 1, z)

    def test_forty_rows(self):
        """Case P6."""
        rows = {f"t{k}": 40 for k in range(10)}
        first, second = Msft(MsftSettings()).at_start(rows, True)
        assert first == (
            "with 40 validation rows a fall below 42 points cannot be seen (z = 3.84); one of 5 needs about 340 rows"
        )
        assert second == "nobody leaves before look 8 at a task: that is in stage 1, at 0.75 epochs"

    def test_unlike_rows_a_loss_and_none(self):
        (first, _) = Msft(MsftSettings()).at_start({"a": 40, "b": 5000, "dark": 0}, True)
        assert first.startswith("with 40 validation rows (`a`; the most is 5,000) a fall below")
        (first, _) = Msft(MsftSettings()).at_start({"a": 400}, False)
        assert (
            first
            == "with 400 validation rows a mean fall below 0.16 standard deviations of the rows' changes cannot be seen (z = 3.23)"
        )
        assert (
            Msft(MsftSettings())
            .at_start({"a": 1}, True)[0]
            .startswith("with 1 validation row no fall can be seen")
        )
        assert len(Msft(MsftSettings()).at_start({"dark": 0}, True)) == 1
        assert len(Msft(MsftSettings(z=0.0)).at_start({"a": 40}, True)) == 1, "any fall counts"

    def test_when_nobody_can_ever_leave(self):
        found = Msft(MsftSettings(max_stages=2)).at_start({"a": 500}, True)[-1]
        assert found.startswith("nobody can leave: it takes 8 looks at a task before the last stage")
        long = Msft(MsftSettings(compute_budget=3.0)).at_start({"a": 500}, True)
        assert len(long) == 1, "within the first stage there is nothing to say"

    @pytest.mark.parametrize("settings", [{"rule": "paper"}, {"exclude_on": "saturation"}])
    def test_other_rules_say_nothing(self, settings):
        assert Msft(MsftSettings(**settings)).at_start({"a": 40}, True) == []
