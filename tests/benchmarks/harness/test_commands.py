"""The verbs of `repsft bench`: what they refuse, what they catch."""

import json
import shutil

import pytest
import torch

from benchmarks.harness import cases, checkout, commands, gate


@pytest.fixture
def one_case(monkeypatch):
    monkeypatch.setattr(cases, "CASES", {"statistics per task": cases.CASES["statistics per task"]})
    monkeypatch.setattr(cases, "RATIOS", {})
    monkeypatch.setattr(commands.lowering, "counted", lambda: {"compiled layer": {"kernels": 37}})


def test_the_gate_command_catches_one_more_operation(one_case, tmp_path, monkeypatch, capsys):
    path = tmp_path / "baseline.json"
    assert commands.run_gate(baseline=path, aot=False) == 1  # no baseline: not passed
    assert "--update" in capsys.readouterr().err
    monkeypatch.setattr(commands.gate, "compare_ratios", lambda *_: gate.Report(judged=1))
    assert commands.run_gate(update=True, baseline=path, aot=False) == 0
    assert commands.run_gate(baseline=path, aot=False) == 0
    build = cases.CASES["statistics per task"].build

    def with_one_more():
        call, x = build(), torch.ones(3)
        return lambda: (call(), x + x)

    monkeypatch.setitem(cases.CASES, "statistics per task", cases.Case(with_one_more))
    assert commands.run_gate(baseline=path, aot=False) == 1
    assert "operations: SLOWER" in capsys.readouterr().out


def test_two_trees_are_compared_side_by_side(one_case, tmp_path):
    """The same tree twice, the second with a planted half more work: caught."""
    for name in ("a", "b"):
        shutil.copytree(checkout.ROOT / "benchmarks", tmp_path / name / "benchmarks")
        for package in ("repsft_fast", "csrc_triton"):
            shutil.copytree(checkout.ROOT / package, tmp_path / name / package)
    planted = tmp_path / "b" / "repsft_fast" / "stats.py"
    text = planted.read_text()
    assert "table.index_add_(0, segments, columns)" in text
    slow = "[torch.stack(lines, dim=1) for _ in range(60)]\n        table.index_add_(0, segments, columns)"
    planted.write_text(text.replace("table.index_add_(0, segments, columns)", slow))
    report = commands.compare_folders(tmp_path / "a", tmp_path / "b", rounds=10)
    assert "SLOWER" in str(report)
    assert not report.passed


def test_compare_refuses_a_mixture_and_bad_files(tmp_path, capsys):
    assert commands.main(["compare", "a.jsonl", "HEAD"]) == 2
    empty = tmp_path / "a.jsonl"
    empty.write_text("")
    assert commands.main(["compare", str(empty), str(empty)]) == 2
    assert commands.main(["compare", str(tmp_path / "none.jsonl"), str(empty)]) == 2
    assert commands.main(["compare", "no-such-revision", "HEAD"]) == 2
    assert "not a revision" in capsys.readouterr().err


def test_the_committed_counts_hold():
    """The exact part of `repsft bench gate`: operations, syncs and peak bytes. The ahead-of-time table has
    its own test."""
    known = json.loads(commands.BASELINE.read_text())["counted"]
    version = ".".join(torch.__version__.split(".")[:2])
    if version not in known:  # another torch counts otherwise: what must hold anywhere is that nothing waits
        known = {version: {name: {"syncs": 0} for name in cases.CASES}}
    counted = {name: cases.counted(case) for name, case in cases.CASES.items()}
    # a compiled layer's are tests/benchmarks/harness/test_lowering.py's
    wanted = {name: known[version][name] for name in known[version] if not name.startswith("compiled layer")}
    report = gate.compare_exact(
        wanted, {name: {k: counted[name][k] for k in wanted.get(name, counted[name])} for name in counted}
    )
    assert report.passed, str(report)
