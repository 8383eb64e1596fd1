"""result.json: whole or not there, and read back as it was."""

import json
import os
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
    assert {code for code, exit_code in codes.items() if exit_code == 0} == {"token_accuracy", "plateau", "budget", "policy"}
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

    monkeypatch.setattr(result.os, breaks, fail)
    with pytest.raises(OSError, match="disk full"):
        result.write(some(tmp_path, updates=2))
    assert os.listdir(tmp_path) == ["result.json"]
    assert result.read(tmp_path).updates == 1


def test_nan_is_refused_before_anything_is_touched(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        result.write(some(tmp_path, loss=float("nan")))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b'{"code": "nonsense"}', b'{"code": "budget"}', b"\xff", b'{"code": []}']
)
def test_a_damaged_one_is_named(tmp_path, content):
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(RepsftError, match=r"result\.json"):
        result.read(tmp_path)


def test_none_is_named(tmp_path):
    with pytest.raises(RepsftError, match="run's folder"):
        result.read(tmp_path)


def test_fields_of_a_newer_version_do_no_harm(tmp_path):
    path = result.write(some(tmp_path))
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 1}))
    assert result.read(tmp_path) == some(tmp_path)
