"""The gated cases count the same twice and wait for nothing."""

from benchmarks.harness import cases


def test_counted_figures_repeat():
    for name in ("head", "head, half masked", "batch assembly"):
        assert cases.counted(cases.CASES[name]) == cases.counted(cases.CASES[name])


def test_no_case_waits_for_the_device():
    for name, case in cases.CASES.items():
        assert cases.counted(case)["syncs"] == 0, name
