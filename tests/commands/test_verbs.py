"""inspect, doctor, demo: what they print."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from repsft_fast.cli import main
from repsft_fast.commands import demo, doctor, export, inspect
from repsft_fast.config import Config
from repsft_fast.data.sample import Loaded
from repsft_fast.errors import ConfigError
from repsft_fast.report import visible
from repsft_fast.rundir.folder import HoldsARun
from repsft_fast.trackers import PACKAGES
from tests.helpers import runs
from tests.helpers.chat_tokenizers import byte_level


def test_inspect_marks_what_is_trained_and_counts(tmp_path, capsys):
    deep = tmp_path / "a-folder-whose-name-alone-is-as-wide-as-the-terminal-and-a-little-more-than-that"
    deep.mkdir()
    settings = runs.settings(deep, samples=9, tasks=3)
    inspect.inspect(Config.of(settings), show=2)
    printed = capsys.readouterr().out
    assert f"{deep}/train.jsonl:1  task task0  18 positions" in printed
    assert printed.count("«") == printed.count("»") == 2
    assert "dropped: nothing" in printed
    for name in ("task0", "task1", "task2"):
        assert any(line.split()[:2] == [name, "3"] for line in printed.splitlines())


HOSTILE = "[INST] hi [/INST] [/b] :smile: \x1b[31m\x07\u202e\u200b «$x$» \t."
SPELLED = "[INST] hi [/INST] [/b] :smile: \\x1b[31m\\x07\\u202e\\u200b \\xab$x$\\xbb ⇥."


def hostile_settings(folder, **changes):
    """Rows, a task, a file and a prompt that a terminal or a markup language would take for its own."""
    name = "[INST]:smile:[b].jsonl"
    rows = [
        {"prompt": f"{n} [b]q[/b]\n", "completion": HOSTILE, "task": f"[/INST] :smile: \x1b[3{n}m"}
        for n in range(3)
    ]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    byte_level().save_pretrained(folder / "tokenizer")
    return runs.settings(
        folder,
        data__train=str(folder / name),
        data__task_column="task",
        tokenizer__path=str(folder / "tokenizer"),
        batch__row_tokens=256,
        **changes,
    ) | {"model": {"config": runs.MODEL | {"vocab_size": 300}}}


def printed_by_inspect(settings, terminal, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm-256color")
    inspect.inspect(Config.of(settings), show=3)
    return capsys.readouterr().out


def test_inspect_shows_data_as_data_on_a_terminal_and_piped(tmp_path, monkeypatch, capsys):
    settings = hostile_settings(tmp_path)
    with monkeypatch.context() as patch:
        piped = printed_by_inspect(settings, False, patch, capsys)
    with monkeypatch.context() as patch:
        coloured = printed_by_inspect(settings, True, patch, capsys)
    assert "\x1b[" not in piped
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == piped
    assert piped.count(f"«{SPELLED}<|im_end|>»") == 3
    assert piped.count("«") == piped.count("»") == 3
    assert "[b]q[/b]⏎\n«" in piped
    assert f"{tmp_path}/[INST]:smile:[b].jsonl:1  task [/INST] :smile: \\x1b[30m  " in piped
    assert sum(line.startswith("[/INST] :smile: \\x1b[3") for line in piped.splitlines()) == 3, (
        "the table of tasks"
    )
    for character in ("\x07", "\u202e", "\u200b", "\t"):
        assert character not in coloured


def test_inspect_prints_to_a_stream_that_knows_ascii_only(tmp_path, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    inspect.inspect(Config.of(hostile_settings(tmp_path)), show=1)
    sys.stdout.flush()
    assert b"\\u23ce" in raw.getvalue()


def test_an_error_quotes_data_and_a_terminal_does_not_obey(tmp_path, capsys):
    path = tmp_path / "[red]x[b]\x1b[31m.jsonl"
    byte_level().save_pretrained(tmp_path / "tokenizer")
    flags = {
        "data.train": json.dumps(str(path)),
        "tokenizer.path": tmp_path / "tokenizer",
        "model.path": "x",
        "run.folder": tmp_path / "run",
        "budget.epochs": 1,
    }
    arguments = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    path.write_text("{")
    assert main(["inspect", *arguments]) == 2
    printed = capsys.readouterr().err
    assert "[red]x[b]\\x1b[31m.jsonl" in printed
    assert "\x1b[31m" not in printed


def test_inspect_names_what_ends_the_trained_turns_and_where_none_does(tmp_path, capsys):
    settings = hostile_settings(tmp_path)
    inspect.inspect(Config.of(settings), show=0)
    assert "trained turns end with <|im_end|> (3×)" in capsys.readouterr().out
    byte_level(None, eos=None).save_pretrained(tmp_path / "tokenizer")
    inspect.inspect(Config.of(settings), show=0)
    assert "3 of 3 samples end without an end-of-turn token" in capsys.readouterr().out
    inspect.inspect(Config.of(runs.settings(tmp_path / "ids", samples=9)), show=0)
    assert "cannot be known without a tokenizer" in capsys.readouterr().out


def test_inspect_names_what_was_read(tmp_path, capsys):
    account = Loaded(
        [], files={"a[/b].jsonl": 3}, columns_used={"messages": 3}, columns_unused={":smile:": 2}
    )
    inspect._show_account(visible.console(), account)
    assert capsys.readouterr().out.splitlines() == [
        "read: a[/b].jsonl (3 rows)",
        "columns used: messages (3 rows)",
        "columns not used: :smile: (2 rows)",
    ]


def test_inspect_says_what_was_dropped_and_why(tmp_path, capsys):
    settings = runs.settings(tmp_path, samples=9, data__max_tokens=12)
    inspect.inspect(Config.of(settings), show=0)
    assert "× over-long" in capsys.readouterr().out


def test_inspect_says_each_warning_once(tmp_path, capsys):
    settings = runs.settings(tmp_path, samples=9)
    again = shutil.copy(settings["data"]["train"], tmp_path / "again.jsonl")
    settings["data"]["validation"] = str(again)
    inspect.inspect(Config.of(settings), show=0)
    assert capsys.readouterr().out.count("9 of 9 validation samples are also in train") == 1


def test_doctor_names_the_versions_here(capsys):
    import torch

    assert main(["doctor"]) == 0
    assert torch.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("choice", ["bnb_adamw8bit", "torchao_adamw8bit", "flash2", "flash4", *PACKAGES])
def test_doctor_knows_the_package_of_a_choice(choice, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    doctor.doctor()
    assert any(choice in line.partition(": ")[2] for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [("So 3.\nThe answer is \\boxed{1,000}.", "right"), ("\\boxed{999}", "wrong, expected 1000")],
)
def test_answers_are_judged_by_value(answer, verdict, capsys):
    demo.show_answers(
        [
            {
                "task": "t",
                "seen": True,
                "prompt": "p",
                "reference": "The answer is \\boxed{1000}.",
                "answer": answer,
            }
        ]
    )
    assert verdict in capsys.readouterr().out


def test_answers_are_shown_as_data(capsys):
    hostile = {
        "task": "[/b]:smile:\n",
        "seen": True,
        "prompt": "[INST]\x1b[2J",
        "reference": "\\boxed{[/b]}",
        "answer": "[/x]\ra",
    }
    demo.show_answers([hostile])
    printed = capsys.readouterr().out
    assert "[/b]:smile:⏎: [INST]\\x1b[2J" in printed
    assert "[/x]\\x0da" in printed
    assert "\x1b" not in printed


def test_demo_in_a_used_folder_gives_advice_that_it_can_follow(tmp_path, monkeypatch, capsys):
    """It has no --resume."""

    def refuse(config):
        raise HoldsARun(
            "run.folder: holds another run; choose another folder, or continue that run with --resume"
        )

    monkeypatch.setattr(demo, "prepare", lambda folder: folder)
    monkeypatch.setattr(demo, "train", refuse)
    assert main(["demo", "--folder", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "holds another run" in told
    assert "give a new one: --folder" in told
    assert "--resume" not in told


class TestExport:
    def call(self, monkeypatch, **changes):
        """The arguments that reach the writer."""
        calls = []

        def write(run, **given):
            calls.append((run, given))
            out = Path("out\x1b[2J")
            return export.Exported(out, 12, 1200, "the best validation", [f"a note\non {out}"])

        monkeypatch.setattr(export, "export_model", write)
        export.export(
            "run", **{"to": None, "generation": None, "merge": None, "dtype": None, "base": None, **changes}
        )
        return calls[0]

    def test_says_what_was_written_as_data(self, monkeypatch, capsys):
        self.call(monkeypatch)
        lines = capsys.readouterr().out.splitlines()
        assert lines == [
            "a note⏎on out\\x1b[2J",
            "the model of update 1,200 (the best validation), from checkpoint 12: out\\x1b[2J",
        ]

    @pytest.mark.parametrize(("given", "merge"), [("true", True), ("false", False), (None, None)])
    def test_merge_is_yes_no_or_as_the_run_says(self, given, merge, monkeypatch):
        assert self.call(monkeypatch, merge=given, dtype="float16")[1]["merge"] is merge

    def test_every_wrong_option_is_told(self, monkeypatch):
        with pytest.raises(ConfigError) as told:
            self.call(monkeypatch, merge="yes", dtype="fp8")
        assert [problem.partition(":")[0] for problem in told.value.problems] == ["--merge", "--dtype"]
