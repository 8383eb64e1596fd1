"""`repsft compare`: what it prints, in every form, and what it refuses."""

import json

import pytest
from rich.console import Console

from repsft_fast.cli import main
from repsft_fast.commands import compare
from repsft_fast.errors import ConfigError
from tests.helpers.finished_runs import write_run


@pytest.fixture
def runs(tmp_path):
    """Two arms of three seeds: msft is better by 0.1, 0.1 and 0.1."""
    for seed in (1, 2, 3):
        write_run(tmp_path / f"sft{seed}", seed, 0.5 + 0.1 * seed)
        write_run(tmp_path / f"z-msft{seed}", seed, 0.6 + 0.1 * seed, policy="msft")
    return tmp_path


def test_the_table_has_a_line_per_arm(runs, capsys):
    assert main(["compare", str(runs)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [part.strip() for part in printed[0].split("  ") if part.strip()] == [
        "arm", "seeds", "test exact match", "minus the baseline", "tokens", "FLOPs gross", "FLOPs net",
    ]  # fmt: skip
    assert printed[1].split() == [
        "mixture.policy=sft",
        "3",
        "0.700",
        "±",
        "0.248",
        "2,000",
        "9.0e+09",
        "4.0e+09",
    ]
    assert printed[2].split()[:8] == [
        "mixture.policy=msft",
        "3",
        "0.800",
        "±",
        "0.248",
        "+0.100",
        "±",
        "0.000",
    ]
    assert "baseline: mixture.policy=sft" in printed


def test_markdown_and_json(runs, capsys):
    given = [str(runs), "--baseline", "msft", "--names", "plain|sft,msft"]
    assert main(["compare", *given, "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "|---|---|---|---|---|---|---|"
    assert lines[3].startswith("| plain\\|sft | 3 | 0.700 ± 0.248 | -0.100 ± 0.000 |")
    assert main(["compare", *given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["baseline"], found["metric"], found["rows"], found["pool"]) == (
        "msft",
        "exact_match",
        "test",
        "items",
    )
    assert [arm["arm"] for arm in found["arms"]] == ["msft", "plain|sft"]
    assert found["arms"][1]["difference"]["mean"] == pytest.approx(-0.1)
    assert [run["seed"] for run in found["arms"][0]["runs"]] == [1, 2, 3]


def test_a_narrow_terminal_gets_letters_and_then_lines(runs):
    scored, lines = compare.compared([str(runs)])
    table = compare.cells(lines, scored)
    wide = max(map(len, compare._plain(table, None)))
    assert compare._plain(table, wide) == compare._plain(table, None)
    letters = compare._plain(table, wide - 1)
    assert letters[1].startswith("A")
    assert "B  mixture.policy=msft" in letters
    narrow = compare._plain(table, 30)
    assert narrow[0] == "mixture.policy=sft"
    assert "  test exact match: 0.700 ± 0.248" in narrow
    assert "  minus the baseline: –" in narrow


def test_names_are_data(runs, tmp_path, capsys):
    write_run(tmp_path / "zz", 1, policy="[b]x\x1b[31m\u202e")
    assert main(["compare", str(tmp_path), "--baseline", "[b]x"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("mixture.policy=[b]x\\x1b[31m\\u202e") == 2  # its line, and the baseline's name
    assert "\x1b" not in printed
    assert "\u202e" not in printed


def test_every_problem_is_told_at_once(runs, capsys):
    write_run(runs / "late", 4, code="error")
    assert main(["compare", str(runs), str(runs / "nowhere")]) == 2
    printed = capsys.readouterr()
    assert "nowhere: there is no such folder" in printed.err
    assert "late: is no finished run" in printed.err
    assert printed.out == ""


def test_a_run_named_twice_counts_once(runs, tmp_path_factory):
    linked = tmp_path_factory.mktemp("links") / "again"
    linked.symlink_to(runs / "sft1")
    _, lines = compare.compared([str(runs), str(runs / "sft1"), str(linked)])
    assert [len(line.arm.runs) for line in lines] == [3, 3]


def test_differences_over_fewer_seeds_say_so(runs):
    write_run(runs / "more", 4, 0.9, policy="msft")
    scored, lines = compare.compared([str(runs)], baseline="sft")
    assert [row[3] for row in compare.cells(lines, scored)[1:]] == ["", "+0.100 ± 0.000 (3 seeds)"]


def test_a_terminal_decides_the_form_by_its_width(runs, capsys, monkeypatch):
    for terminal, first in ((True, "mixture.policy=sft"), (False, "arm")):
        console = Console(width=30, force_terminal=terminal, color_system=None)
        monkeypatch.setattr(compare.visible, "console", lambda console=console: console)
        assert main(["compare", str(runs)]) == 0
        assert capsys.readouterr().out.split()[0] == first


def test_other_measures_are_refused_until_one_is_asked_for(runs):
    write_run(runs / "loss", 1, 0.5, policy="ies", metric="nll")
    with pytest.raises(
        ConfigError, match=r"decided by another measure .*expected test nll, got test exact match"
    ):
        compare.compared([str(runs / "loss"), str(runs / "sft1")])
    scored, lines = compare.compared([str(runs)], metric="exact_match")
    assert (scored.words, len(lines)) == ("test exact match", 3)


def test_options_that_cannot_be_used(runs, capsys):
    assert main(["compare", str(runs), "--metric", "bleu", "--pool", "x", "--json", "--markdown"]) == 2
    printed = capsys.readouterr().err
    for said in (
        "--metric: cannot be used, expected one of exact_match",
        "--pool: cannot",
        "cannot stand beside",
    ):
        assert said in printed


def test_one_seed_and_validation_rows_are_said(tmp_path, capsys):
    write_run(tmp_path / "a", 1, None)
    assert main(["compare", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "one seed an arm" in printed
    assert "the validation rows also chose the result" in printed
    assert "minus the baseline" not in printed


def test_letters_go_on_after_z():
    assert [compare._letters(n) for n in (0, 25, 26, 51, 52)] == ["A", "Z", "AA", "AZ", "BA"]
