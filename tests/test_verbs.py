"""inspect, doctor, demo: what they print."""

import pytest

from repsft_fast import verbs
from repsft_fast.cli import main
from repsft_fast.config import Config
from repsft_fast.trackers import PACKAGES
from tests import runs


def test_inspect_marks_what_is_trained_and_counts(tmp_path, capsys):
    deep = tmp_path / "a-folder-whose-name-alone-is-as-wide-as-the-terminal-and-a-little-more-than-that"
    deep.mkdir()
    settings = runs.settings(deep, samples=9, tasks=3)
    verbs.inspect(Config.of(settings), show=2)
    printed = capsys.readouterr().out
    assert f"{deep}/train.jsonl:1  task task0  18 positions" in printed
    assert printed.count("«") == printed.count("»") == 2
    assert "dropped: nothing" in printed
    for name in ("task0", "task1", "task2"):
        assert any(line.split()[:2] == [name, "3"] for line in printed.splitlines())


def test_inspect_says_what_was_dropped_and_why(tmp_path, capsys):
    settings = runs.settings(tmp_path, samples=9, data__max_tokens=12)
    verbs.inspect(Config.of(settings), show=0)
    assert "× over-long" in capsys.readouterr().out


def test_inspect_says_each_warning_once(tmp_path, capsys):
    settings = runs.settings(tmp_path, samples=9)
    settings["data"]["validation"] = settings["data"]["train"]
    verbs.inspect(Config.of(settings), show=0)
    assert capsys.readouterr().out.count("9 of 9 validation samples are also in train") == 1


def test_doctor_names_the_versions_here(capsys):
    import torch

    assert main(["doctor"]) == 0
    assert torch.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("choice", ["bnb_adamw8bit", "torchao_adamw8bit", "flash2", "flash4", *PACKAGES])
def test_doctor_knows_the_package_of_a_choice(choice, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    verbs.doctor()
    assert any(choice in line.partition(": ")[2] for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("answer", "verdict"), [("So 3.\nThe answer is \\boxed{1,000}.", "right"), ("\\boxed{999}", "wrong, expected 1000")]
)
def test_answers_are_judged_by_value(answer, verdict, capsys):
    verbs.show_answers(
        [{"task": "t", "seen": True, "prompt": "p", "reference": "The answer is \\boxed{1000}.", "answer": answer}]
    )
    assert verdict in capsys.readouterr().out
