"""Part M: a record of every run and of the pairs; a pair is begun whole or not at all."""

import pytest

from benchmarks.suites.gpu import goals, overfit, overfit_tasks
from benchmarks.suites.gpu.session import LEFT_OUT, RECORDS, read_lines
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
        assert [name for name, value in fed(overfit.GOALS, rehearsed).items() if value is None] == []
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
    def record(self, arm, seed, exact, nll=1.0):
        return {
            "op": overfit.OP, "implementation": arm, "arm": arm, "shape": {"seed": seed}, "whole_s": 2.0,
            "dtype": "float32", "test_exact_match": [exact, 0.5], "test_nll": [nll, 1.0],
        }  # fmt: skip

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
