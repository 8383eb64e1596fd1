"""`dry_run`: what it prints, in each form that settings are given in, and that it leaves nothing behind."""

import pytest
import yaml

from repsft_fast import dry_run
from repsft_fast.config import Config
from repsft_fast.errors import ConfigError, DataError
from tests.helpers import runs
from tests.helpers.architectures import VOCABULARY
from tests.models.test_vocabulary import larger_tokenizer


def told(capsys) -> dict[str, str]:
    """The lines below the settings, by their first word."""
    lines = capsys.readouterr().out.splitlines()
    below = lines[next(n for n, line in enumerate(lines) if line.startswith("samples ")) :]
    return dict(line.split(maxsplit=1) for line in below)


def test_prints_settings_and_plan_and_trains_nothing(tmp_path, capsys):
    assert dry_run(runs.settings(tmp_path)) is None
    printed = capsys.readouterr().out
    for word in ("updates", "18 (budget.epochs: 3)", "utilisation", "row_tokens: 64", "memory"):
        assert word in printed
    assert not (tmp_path / "run").exists()


def test_the_figures_stand_in_their_order(tmp_path, capsys):
    dry_run(runs.settings(tmp_path, tasks=2))
    lines = told(capsys)
    names = ["samples", "read", "dropped", "updates", "rows", "utilisation", "memory"]
    assert [name for name in lines if name != "note"] == names
    assert lines["samples"] == "24 in 2 task(s)"
    assert lines["dropped"] == "nothing"


@pytest.mark.parametrize("form", ["dict", "file", "Config"])
def test_settings_in_every_form_and_what_goes_over_them(form, tmp_path, capsys):
    settings = runs.settings(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    given = {"dict": settings, "file": file, "Config": Config.of(settings)}[form]
    dry_run(given, {"budget.epochs": 5})
    assert told(capsys)["updates"].startswith("30 (budget.epochs: 5)")


def test_ranks_that_are_not_here(tmp_path, capsys):
    dry_run(runs.settings(tmp_path), ranks=2)
    lines = told(capsys)
    assert "on 2 rank(s)" in lines["rows"]
    assert lines["rehearsed"].startswith("2 ranks, one copy of the weights; rank 0 holds weights ")
    assert "all_gather" in lines["messages"]
    with pytest.raises(ConfigError, match="--world: is not a number of GPUs"):
        dry_run(runs.settings(tmp_path), ranks=0)


def test_a_vocabulary_that_grows_is_sized_as_grown(tmp_path, capsys):
    dry_run(larger_tokenizer(tmp_path, {"resize_vocabulary": True}), ranks=2)
    grown = told(capsys)
    assert f"[{VOCABULARY + 2}, " in grown["uneven"]
    settings = larger_tokenizer(tmp_path / "as it is", {})
    settings["data"] = runs.settings(tmp_path / "ids")["data"]  # without the new tokens
    dry_run(settings, ranks=2)
    plain = told(capsys)
    assert f"[{VOCABULARY}, " in plain["uneven"]
    for name in ("memory", "rehearsed"):
        assert plain[name] != grown[name], "more rows, more bytes"


def test_what_a_run_would_refuse_is_refused(tmp_path):
    settings = runs.settings(tmp_path)
    (tmp_path / "train.jsonl").write_text("{")
    with pytest.raises(DataError):
        dry_run(settings)
