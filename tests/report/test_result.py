"""result.json: whole or not there, and read back as it was."""

import json
import os
import time
from pathlib import Path
from typing import get_args

import pytest

from repsft_fast.errors import RepsftError
from repsft_fast.report import result
from repsft_fast.report.result import Code, RunResult


def some(folder, **changes):
    values = {
        "code": "token_accuracy", "reason": "97.2 % ≥ 97 %", "folder": str(folder), "updates": 480, "epochs": 16.0,
        "token_accuracy": 0.972, "seconds": 1.5, "tokens": 10**6, "trained_tokens": 10**5, "seed": 42,
        "tasks": {"a": {"loss": 0.1}}, "versions": {"torch": "2"}, "more": {"answers": ["x"]},
    }  # fmt: skip
    return RunResult(**{**values, **changes})


def test_is_read_back_as_it_was(tmp_path):
    one = some(tmp_path)
    path = result.write(one)
    assert path == tmp_path / "result.json"
    assert result.read(tmp_path) == one
    assert json.loads(path.read_text())["success"] is True
    assert "≥" in path.read_text(encoding="utf-8")


def test_every_ending_has_its_exit_code():
    codes = {code: some("f", code=code).exit_code for code in get_args(Code)}
    assert {code for code, exit_code in codes.items() if exit_code == 0} == {
        "token_accuracy",
        "plateau",
        "budget",
        "policy",
    }
    assert (codes["interrupted"], codes["terminated"]) == (130, 143)
    assert codes["nonfinite"] == codes["error"] == 1
    assert some("f", code="interrupted").success is False


def test_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path):
    result.write(some(tmp_path, updates=1))
    result.write(some(tmp_path, updates=2))
    assert result.read(tmp_path).updates == 2
    assert os.listdir(tmp_path) == ["result.json"]


@pytest.mark.parametrize("breaks", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_one_and_no_rubbish(tmp_path, monkeypatch, breaks):
    result.write(some(tmp_path, updates=1))

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, breaks, fail)
    with pytest.raises(OSError, match="disk full"):
        result.write(some(tmp_path, updates=2))
    assert os.listdir(tmp_path) == ["result.json"]
    assert result.read(tmp_path).updates == 1


def test_a_number_that_is_none_costs_that_number_and_its_place_is_named(tmp_path):
    one = some(tmp_path, loss=float("nan"), more={"test": [1.5, float("inf")], "odd": {1: Path("x")}})
    values = json.loads(result.write(one).read_text())
    assert values["loss"] is None
    assert values["more"] == {"test": [1.5, None], "odd": {"1": "x"}, "not_finite": ["loss", "more.test[1]"]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'{"code": "nonsense"}',
        b'{"code": "budget"}',
        b"\xff",
        b'{"code": []}',
        b"\0" * 99,
        b'{"a":' * 100_000,
        b'{"code": "error", "code": "budget"}',
        b'{"code": "budget"}{}',
    ],
)
def test_a_damaged_one_is_named(tmp_path, content):
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(RepsftError, match=r"result\.json"):
        result.read(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"updates": "3"},
        {"updates": True},
        {"seconds": None},
        {"more": []},
        {"tasks": 1},
        {"reason": None},
        {"loss": "x"},
    ],
)
def test_one_with_values_of_other_kinds_is_named(tmp_path, changes):
    path = result.write(some(tmp_path))
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(RepsftError, match=f"{next(iter(changes))} is not what a run writes there"):
        result.read(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "endless", "huge"])
def test_what_is_no_small_file_is_said_at_once(tmp_path, kind):
    path = tmp_path / "result.json"
    {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "endless": lambda: path.symlink_to("/dev/zero"),
        "huge": lambda: (path.touch(), os.truncate(path, 1 << 33)),
    }[kind]()
    started = time.monotonic()
    with pytest.raises(RepsftError, match=r"result\.json: cannot be read"):
        result.read(tmp_path)
    assert time.monotonic() - started < 2


def test_a_folder_whose_name_is_no_text_is_written_and_read(tmp_path):
    folder = tmp_path / os.fsdecode(b"run\xff")
    folder.mkdir()
    result.write(some(folder))
    assert result.read(folder) == some(folder)


def test_none_is_named(tmp_path):
    with pytest.raises(RepsftError, match="run's folder"):
        result.read(tmp_path)


def test_fields_of_a_newer_version_do_no_harm(tmp_path):
    path = result.write(some(tmp_path))
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 1}))
    assert result.read(tmp_path) == some(tmp_path)
