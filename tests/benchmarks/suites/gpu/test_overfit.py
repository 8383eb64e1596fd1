"""Part M: a record of every run and of the pairs; a pair is begun whole or not at all; what is met and what
is not."""

import math

import pytest

from benchmarks.suites.gpu import goals, overfit, overfit_tasks
from benchmarks.suites.gpu.session import LEFT_OUT, RECORDS, append_line, read_lines
from repsft_fast.config import Config
from tests.benchmarks.suites.gpu.toys import fail_check, fed, session_at


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("M")
    overfit.run(session_at(folder, "M"))
    return folder


def runs(folder):
    return [record for record in read_lines(folder / RECORDS) if record["op"] == overfit.OP]


class TestPart:
    def test_every_goal_is_fed(self, rehearsed):
        unfed = {name for name, value in fed(overfit.GOALS, rehearsed).items() if value is None}
        # Head-room of a model that learns nothing has no lower bound above 0 to hold the gain against.
        assert unfed <= {"  mean / a third of head-room's lower bound"}
        assert read_lines(rehearsed / LEFT_OUT) == []

    def test_pairs_lie_side_by_side_and_say_what_was_scored(self, rehearsed):
        made = runs(rehearsed)
        assert [(r["arm"], r["shape"]["seed"]) for r in made] == [
            (arm, seed) for seed in (0, 1) for arm in overfit.PAIR
        ]
        for record in made:
            assert record["tasks"] == sorted(overfit_tasks.TASKS)
            assert record["updates"] == len(record["rounds_ms"]) == 6, "two epochs of 48 rows, 16 each"
            assert {len(line) for line in record["curve"]} == {3 + 4}
            assert all(0 <= value <= 1 for value in record["test_exact_match"])
            assert all(5 < value < 8 for value in record["test_nll"]), "about ln 512"
            assert record["whole_s"] > record["seconds"] > 0
            assert record["train_flops"] > 0 < record["evaluation_flops"]
            assert all(record[name] >= 0 for name in ("headroom", "headroom_interval", "headroom_by_chance"))

    def test_what_comes_too_late_is_a_whole_pair(self, tmp_path, monkeypatch):
        monkeypatch.setattr(overfit, "run_arm", lambda *of: pytest.fail("begun"))
        overfit.run(session_at(tmp_path, "M", left_s=8))
        assert [line["what"] for line in read_lines(tmp_path / LEFT_OUT)] == [
            "sft and msft tested, seed 0",
            "sft and msft tested, seed 1",
        ]

    def test_what_a_run_took_is_what_the_next_needs(self, tmp_path, monkeypatch):
        begun = []
        monkeypatch.setattr(overfit, "run_arm", lambda s, arm, seed, folder: begun.append(seed) or 100.0)
        overfit.run(session_at(tmp_path, "M", left_s=150))
        assert begun == [0, 0], "220 s for the second pair"

    def test_a_red_update_measures_nothing_and_says_so(self, tmp_path):
        fail_check(tmp_path, "train step")
        overfit.run(session_at(tmp_path, "M"))
        assert read_lines(tmp_path / RECORDS) == []
        assert len(read_lines(tmp_path / LEFT_OUT)) == 1


class TestSettings:
    @pytest.mark.parametrize("arm", overfit.ARMS)
    def test_every_arm_is_a_run_of_24_epochs_by_the_defaults(self, arm, tmp_path):
        session = session_at(tmp_path, "M")
        session.rehearsal = False
        mixture = Config.of("smollm2", overfit.settings(session, arm, 0, tmp_path)).mixture
        stages = mixture.max_stages if "max_stages" in overfit.ARMS[arm] else 1
        assert mixture.compute_budget * stages == 24
        assert (mixture.alpha, mixture.z, mixture.metric) == (0.1, None, "exact_match")
        assert mixture.evaluations_per_epoch == 4

    def test_pairs_of_the_verdict_come_first(self):
        listed = overfit.groups(False)
        assert listed[:3] == [(overfit.PAIR, seed) for seed in overfit.SEEDS]
        assert {arm for group, _ in listed for arm in group} == set(overfit.ARMS)


class TestDifferences:
    def record(self, arm, seed, exact, nll=1.0, room=0.3):
        return {
            "op": overfit.OP, "implementation": arm, "arm": arm, "shape": {"seed": seed}, "whole_s": 2.0,
            "dtype": "float32", "test_exact_match": [exact, 0.5], "test_nll": [nll, 1.0],
            "headroom": room, "headroom_by_chance": 0.01, "left": ["larger in stage 1, epoch 2.0"],
        }  # fmt: skip

    def verdicts(self, tmp_path, gains, rooms, losses=None):
        """{goal: what the table says} of pairs with these gains in exact match and these head-rooms."""
        session = session_at(tmp_path, "M")
        for seed, (gain, room) in enumerate(zip(gains, rooms, strict=True)):
            loss = losses[seed] if losses else 1.0
            made = (
                self.record("sft", seed, 0.2, room=room),
                self.record("msft tested", seed, 0.2 + gain, loss, room=9.0),
            )
            for record in made:
                append_line(tmp_path / RECORDS, {**record, "run": "r"})
        overfit.pair_up(session)
        read = fed(overfit.GOALS, tmp_path)
        return read, {goal.name.strip(): goal.verdict(read[goal.name]) for goal in overfit.GOALS}

    BOUND, LOWER = "lower bound over seeds", "lower end of its interval"
    THIRD, LOSS = "mean / a third of head-room's lower bound", "upper end of its interval"

    def test_a_gain_above_its_noise_and_a_third_of_head_room_is_met(self, tmp_path):
        read, said = self.verdicts(tmp_path, [0.2, 0.22, 0.24], [0.28, 0.3, 0.32], [0.5, 0.6, 0.7])
        half = 4.302653 / math.sqrt(3)  # Student's quantile of two degrees of freedom
        assert read[f"  {self.LOWER}"] == pytest.approx(0.11 - half * 0.01, abs=1e-6), (
            "of two tasks one moved"
        )
        assert read[f"  {self.BOUND}"] == pytest.approx(0.3 - half * 0.02, abs=1e-6)
        assert read[f"  {self.THIRD}"] == pytest.approx(0.11 / ((0.3 - half * 0.02) / 3), abs=1e-5)
        assert read[f"  {self.LOSS}"] == pytest.approx(-0.2 + half * 0.05, abs=1e-6)
        assert {said[name] for name in (self.BOUND, self.LOWER, self.THIRD, self.LOSS)} == {"met"}
        assert read["  of it by chance"] == 0.01

    def test_an_exact_zero_is_a_miss(self, tmp_path):
        _, said = self.verdicts(tmp_path, [0.0, 0.0, 0.0], [0.0, 0.0, 0.0])
        assert said[self.LOWER] == said[self.LOSS] == said[self.BOUND] == "MISSED"
        assert said[self.THIRD] == "open", "nothing to be held against"

    def test_a_sure_gain_below_a_third_is_a_miss(self, tmp_path):
        _, said = self.verdicts(tmp_path, [0.02, 0.022, 0.024], [0.28, 0.3, 0.32])
        assert (said[self.LOWER], said[self.THIRD]) == ("met", "MISSED")

    def test_head_room_that_is_not_sure_is_a_miss_and_nothing_is_held_against_it(self, tmp_path):
        _, said = self.verdicts(tmp_path, [0.2, 0.22, 0.24], [0.0, 0.02, 0.2])
        assert (said[self.LOWER], said[self.BOUND], said[self.THIRD]) == ("met", "MISSED", "open")

    def test_one_pair_has_no_interval_and_meets_nothing(self, tmp_path):
        read, said = self.verdicts(tmp_path, [0.2], [0.3])
        assert {said[name] for name in (self.BOUND, self.LOWER, self.THIRD, self.LOSS)} == {"open"}
        assert read["msft tested − sft, test exact match"] == pytest.approx(0.1)
        assert said["pairs of runs"] == "MISSED"

    def test_they_are_msft_less_sft_of_seeds_that_have_both(self):
        made = [
            self.record("sft", 0, 0.2), self.record("msft tested", 0, 0.4),
            self.record("msft tested", 2, 0.9), self.record("msft paper", 1, 0.9),
            self.record("sft", 1, 0.6), self.record("msft tested", 1, 0.5, nll=3.0),
        ]  # fmt: skip
        found = overfit.pairs(made)
        assert overfit.differences(found, "test_exact_match") == pytest.approx([0.1, -0.05])
        assert overfit.differences(found, "test_nll") == pytest.approx([0.0, 1.0])

    def test_without_records_every_goal_is_open(self):
        assert {goal.read(goals.Found([])) for goal in overfit.GOALS} == {None}
