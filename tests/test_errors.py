"""The wording of errors: in one line, whatever they quote, with what comes near to a wrong word."""

import os
import socket
import stat

import pytest

from repsft_fast.errors import LONGEST, QUOTED, describe, did_you_mean, kind_of_file, open_plain, spelled


def test_every_part_stands_in_its_place():
    said = describe("batch.samples", "is too small", expected="at least 1", got=0, todo="raise it")
    assert said == "batch.samples: is too small, expected at least 1, got 0; raise it"
    assert describe("a.jsonl:3", "is empty") == "a.jsonl:3: is empty"


def test_what_is_quoted_is_cut():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert describe("a", "b", got="x" * 201) == f"a: b, got {'x' * QUOTED}… (201 characters)"
    assert describe("x" * 5_001, "b").startswith("x" * LONGEST + "… (5001 characters): b")
    assert describe("a", "b", got=deep) == "a: b, got a list nested too deep to show"


@pytest.mark.parametrize(("cutoff", "near"), [(0.6, "samples"), (0.99, None)])
def test_the_nearest_word_is_meant_where_one_is_near(cutoff, near):
    assert did_you_mean("sampels", ["tokens", "samples"], cutoff=cutoff) == near
    assert did_you_mean("zzz", ["tokens", "samples"]) is None


def test_names_of_others_are_one_line():
    assert spelled("a\nb\x1b[2J ü") == "a\\nb\\x1b[2J ü"


def test_kinds_of_files_have_names(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    found = [kind_of_file(os.stat(tmp_path / name).st_mode) for name in (".", "file", "pipe")]
    assert found == ["a folder", "a file", "a named pipe"]
    with socket.socket() as one:
        assert kind_of_file(os.fstat(one.fileno()).st_mode) == "a socket"
    assert kind_of_file(stat.S_IFCHR) == kind_of_file(stat.S_IFBLK) == "a device"


@pytest.mark.parametrize(
    ("name", "said"), [(".", "Is a directory"), ("pipe", "a named pipe, which may never")]
)
def test_what_is_no_plain_file_is_not_opened(tmp_path, name, said):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=said):
        open_plain(tmp_path / name)
