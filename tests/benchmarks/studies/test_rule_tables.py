"""The arithmetic and the page of the tested rule's tables."""

import numpy as np
import pytest

from benchmarks.harness import records
from benchmarks.studies import rule_pages, rule_tables
from benchmarks.studies.rule_paths import NEVER


def few(monkeypatch, paths=20):
    """Two rows' worth of paths, so that a pass takes no time."""
    for name, value in {"BATCH": paths, "FLAT_PATHS": paths, "FALL_PATHS": paths, "STAGES": 3}.items():
        monkeypatch.setattr(rule_tables, name, value)
    monkeypatch.setattr(rule_tables, "LOOKS", (4,))
    monkeypatch.setattr(rule_tables, "ROWS", (10, 30))
    rule_tables.left_at.cache_clear()


def test_somebody_of_several():
    assert rule_tables.somebody(0.25, 1, 3000) == (pytest.approx(0.25), pytest.approx((0.1875 / 3000) ** 0.5))
    value, error = rule_tables.somebody(0.01, 20, 3000)
    assert value == pytest.approx(1 - 0.99**20)
    slope = (rule_tables.somebody(0.0101, 20, 3000)[0] - value) / 1e-4
    assert error == pytest.approx(slope * (0.0099 / 3000) ** 0.5, rel=2e-3)
    assert rule_tables.somebody(0.0, 20, 3000)[1] > 0.005, "nobody left of 3000: not known to be never"


def test_curves_turn_after_a_third_of_the_run():
    falls = rule_tables.curve_of("falls 0.05", "exact match, passing", 12)
    assert falls[[0, 40, 44, 120]] == pytest.approx([0.6, 0.6, 0.55, -0.4])
    sudden = rule_tables.curve_of("sudden", "exact match, passing", 12)
    assert (sudden[40], sudden[41], sudden[-1]) == pytest.approx((0.9, 0.5, 0.5))
    rises = rule_tables.curve_of("rises, falls 0.05", "nll, passing", 4)
    assert rises[[0, 2, 4, 13, 17]] == pytest.approx([-0.4, -0.2, 0.0, 0.0, -0.05])
    assert rule_tables.curve_of("flat", "nll, passing", 4).any() == 0
    assert rule_tables.curve_of("flat 0.9", "exact match, passing", 4)[7] == 0.9
    with pytest.raises(ValueError, match="no such curve"):
        rule_tables.curve_of("up", "nll", 4)


def test_what_is_seen_counts_only_the_first_to_leave(monkeypatch):
    """Four paths that fall: before the turn (13), at 14 and 20, never; of the flat ones a quarter leaves by 16."""
    few(monkeypatch)
    monkeypatch.setattr(rule_tables, "STAGES", 10)
    flat = np.full((5, 4, 4), NEVER)
    flat[..., 0] = 16
    falls = np.full((5, 4, 4), NEVER)
    falls[..., :3] = [10, 14, 20]
    monkeypatch.setattr(
        rule_tables, "left_at", lambda world, curve, *rest: flat if curve == "flat" else falls
    )
    line = next(
        x for x in rule_tables.seen("w, x", "falls 0.05", 10) if (x["tasks"], x["wobble"]) == (5, 0.01)
    )
    assert line["first"] == pytest.approx((1 + 0.75**4) / 4, abs=1e-4)
    assert (line["after"], line["early"]) == (17.0 - 13, 0.25)
    noise = next(x for x in rule_tables.noise("w", "flat", 10) if x["tasks"] == 2)
    assert (noise["run"], noise["stage"]) == (pytest.approx(1 - 0.75**2), 0.0)


def test_passes_are_made_once_and_the_page_shows_them(monkeypatch, tmp_path, capsys):
    few(monkeypatch)
    path = tmp_path / "rule.jsonl"
    rule_tables.main([], path)
    made = records.read(path)
    assert len(made) == len(rule_tables.passes()) == 4 * 2 + 2 + 2 + 4 * 2 * 5
    rule_tables.main([], path)
    assert len(records.read(path)) == len(made)
    capsys.readouterr()
    rule_tables.main(["--table"], path)
    page = capsys.readouterr().out
    for world in rule_tables.WORLDS:
        parts = 2 if world in rule_tables.MAIN else 1  # what noise alone does; what is seen
        assert page.count(f"### {world}\n") == parts
    assert "| 20 tasks |" in page
    assert "(!)" not in page
    with pytest.raises(SystemExit, match="expected nothing or --table, got x"):
        rule_tables.main(["x"], path)


def test_a_cell_above_the_limit_is_marked():
    line = {"run": 0.121, "run_error": 0.01, "stage": 0.0}
    assert rule_pages.noise_cell(line) == "0.121 / 0.000 (!)"
    assert rule_pages.noise_cell(line | {"run": 0.119}) == "0.119 / 0.000"
