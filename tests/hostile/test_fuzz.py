"""The fuzzer: it finds what escapes, keeps the bytes, is the same for a seed; and from our doors nothing
escapes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile import fuzz_atheris
from tests.hostile.byte_doors import DOORS, corpus

ROOT = Path(__file__).resolve().parents[2]
RUNS = {"rows": 300, "settings": 150, "manifest": 100}


@pytest.mark.parametrize("door", DOORS)
def test_a_few_hundred_inputs_let_nothing_escape(door, tmp_path):
    (tmp_path / "door").mkdir()
    made = DOORS[door](tmp_path / "door")
    assert fuzz_atheris.search(made, corpus(door, tmp_path), seed=1, runs=RUNS[door]) == (RUNS[door], None)


@pytest.mark.parametrize("door", DOORS)
def test_what_is_good_is_read_and_not_refused(door, tmp_path):
    """A fuzzer that starts from bytes which are refused at the first look tests nothing."""
    made = DOORS[door](tmp_path)
    first, *_, last = corpus(door, tmp_path)
    if door == "manifest":
        assert made.as_manifest(first) == []
        assert made.as_header(last) == []
    else:
        found = made.read(first, "rows.jsonl") if door == "rows" else made.read(first)
        assert not isinstance(found, Exception), found


def test_an_escape_is_found_and_its_bytes_are_kept(tmp_path, monkeypatch, capfd):
    def door(data):
        if b"[[" in data:
            raise KeyError("role")

    tried, found = fuzz_atheris.search(door, [b"good"], seed=3, runs=10_000)
    assert found is not None
    assert b"[[" in found
    assert fuzz_atheris.search(door, [b"good"], seed=3, runs=10_000) == (tried, found)
    monkeypatch.setattr(fuzz_atheris.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(DOORS, "rows", lambda folder: door)
    assert fuzz_atheris.main(["rows", "--seconds", "20", "--findings", str(tmp_path)]) == 1
    (kept,) = tmp_path.iterdir()
    assert b"[[" in kept.read_bytes()
    said = capfd.readouterr()
    assert "pip install atheris" in said.out
    assert str(kept) in said.out
    assert "KeyError: 'role'" in said.err


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("door", DOORS)
def test_a_minute_at_every_door(door, tmp_path):
    command = [
        sys.executable,
        "-m",
        "tests.hostile.fuzz_atheris",
        door,
        "--seconds",
        "60",
        "--findings",
        str(tmp_path),
    ]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-5000:]
    assert list(tmp_path.iterdir()) == []
