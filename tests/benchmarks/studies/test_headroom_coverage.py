"""The table of head-room on simulated runs: its truth, its arithmetic, the same again from its seed."""

import random
from statistics import fmean

import pytest

from benchmarks.studies import headroom_coverage as study
from repsft_fast.policies.headroom import Headroom, Moment


def test_the_truth_is_that_of_the_curves():
    flat, peaks = study.CURVES.values()
    assert study.truth(4, flat) == 0.0
    # Best for all in the middle, a half and a sixth of the run from the tasks' own; smoothing moves it little.
    assert study.truth(4, peaks) == pytest.approx(0.4 * (1 / 4 + 1 / 36) / 2, abs=2e-3)
    assert study.truth(8, peaks) == pytest.approx(study.truth(4, peaks))


def test_a_run_is_the_curve_its_rows_and_its_wobble():
    flat, _ = study.CURVES.values()
    still, moved = (
        fmean(study.noisy(random.Random(n), 2, flat, wobble=w).by_chance for n in range(5))
        for w in (0.0, 0.1)
    )
    assert moved > 2 * still
    few, many = (
        fmean(study.noisy(random.Random(n), 2, flat, wobble=0.0, rows=r).value for n in range(5))
        for r in (10, 1000)
    )
    assert few > 3 * many


def test_cells_are_means_and_shares_of_the_runs(monkeypatch):
    rooms = iter([(0.0, 0.01, 0.01), (0.04, 0.01, 0.03), (0.02, 0.01, 0.01), (0.02, 0.01, 0.03)])

    def one(r, tasks, curve):
        value, half, chance = next(rooms)
        return Headroom(value, half, chance, Moment("m0", 0, 0.0), {})

    monkeypatch.setattr(study, "noisy", one)
    monkeypatch.setattr(study, "truth", lambda tasks, curve: 0.01)
    cells = study.line("flat", 4, 4)
    assert cells == ["flat", "4", "1.0", "2.0", "2.0", "1.0", "0.75", "1.00", "1.00"]
    rooms = iter([(0.0, 0.002, 0.001), (0.04, 0.01, 0.01), (0.02, 0.01, 0.0), (0.012, 0.01, 0.0)])
    assert study.line("flat", 4, 4)[6:] == ["0.50", "0.75", "0.75"]


def test_the_table_is_the_same_again(capsys):
    study.main(["--runs", "2"])
    printed = capsys.readouterr().out
    assert printed.strip() == study.table(2)
    assert [line.split("|")[1:3] for line in printed.splitlines()[2:]] == [
        [f" {name} ", f" {tasks} "] for name in study.CURVES for tasks in (4, 8)
    ]
