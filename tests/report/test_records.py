"""Damage in a run's files costs what is damaged, is counted and said, and is never an error of the
picture."""

import errno
import json
import os
import time
import types

import pytest

from repsft_fast import metrics
from repsft_fast.errors import RepsftError
from repsft_fast.metrics import JsonLines
from repsft_fast.report import mixture_picture, picture, records, timeline
from repsft_fast.report.records import LONGEST_LINE, read_json, read_metrics, setting

UPDATE = {"kind": "update", "update": 1, "epoch": 0.5, "loss": 2.0, "token_accuracy": 0.1}
LINE = json.dumps(UPDATE).encode()
DAMAGED = [
    b'{"kind": "upd', b"\0" * 4096, b"\xff\xfe" + LINE, b"[1]", b"3", b"null", b'"text"', LINE + LINE, LINE + b" x", LINE[1:],
    b'{"loss": NaN}', b'{"loss": -Infinity}', b"[" * 100_000, b'{"a":' * 100_000, b'{"update": ' + b"9" * 5000 + b"}",
    b"\xef\xbb\xbf" + LINE, b"{" + b" " * LONGEST_LINE + b"}",
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_costs_that_line_and_is_said(tmp_path, damage):
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([LINE, damage, b"", LINE, LINE[:-5]]))
    found = read_metrics(tmp_path)
    assert found.records == [UPDATE, UPDATE]
    assert found.words == "line 2 of metrics.jsonl cannot be read and is left out"


@pytest.mark.parametrize("begins", [LINE + b"\n", b""])
def test_a_hole_of_twenty_gigabytes_is_not_read(tmp_path, monkeypatch, begins):
    monkeypatch.setattr(records, "MOST_BYTES", 1 << 20)
    (tmp_path / "metrics.jsonl").write_bytes(begins)
    os.truncate(tmp_path / "metrics.jsonl", 20 * 10**9)
    begun = time.monotonic()
    found = read_metrics(tmp_path)
    assert time.monotonic() - begun < 2
    assert found.records == [UPDATE] * bool(begins)
    assert found.words.endswith(
        f"metrics.jsonl is too large: its last {20 * 10**9 - LONGEST_LINE - len(begins)} bytes are left out"
    )


def test_several_are_counted_and_the_first_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([LINE, *DAMAGED[:5], LINE, b""]))
    assert (
        read_metrics(tmp_path).words
        == "5 lines of metrics.jsonl (the first: line 2) cannot be read and are left out"
    )


@pytest.mark.parametrize("kind", ["pipe", "folder", "endless", "missing"])
@pytest.mark.parametrize("draw", [picture.draw, timeline.write, mixture_picture.draw])
def test_what_is_no_file_is_said_at_once(tmp_path, kind, draw):
    path = tmp_path / "metrics.jsonl"
    made = {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "endless": lambda: path.symlink_to("/dev/zero"),
    }
    made.get(kind, lambda: None)()
    started = time.monotonic()
    with pytest.raises(RepsftError, match=r"metrics\.jsonl: cannot be read"):
        draw(tmp_path)
    assert time.monotonic() - started < 2


def test_settings_and_results_that_are_no_files_are_none(tmp_path):
    os.mkfifo(tmp_path / "run.yaml")
    assert setting(tmp_path, "stop", "token_accuracy") is None
    (tmp_path / "twice.json").write_text('{"a": {"b": 1, "b": 2}}')
    with pytest.raises(ValueError, match="it has b twice"):
        read_json(tmp_path / "twice.json")


def test_the_picture_says_what_is_left_out(tmp_path, drawn):
    (tmp_path / "metrics.jsonl").write_bytes(LINE + b"\n{\n" + LINE + b"\n")
    picture.draw(tmp_path)
    assert drawn[0].get_supxlabel() == "line 2 of metrics.jsonl cannot be read and is left out"
    (tmp_path / "metrics.jsonl").write_bytes(LINE + b"\n")
    picture.draw(tmp_path)
    assert drawn[1].get_supxlabel() == ""


def test_what_the_user_set_for_matplotlib_does_not_break_it(tmp_path, drawn):
    import matplotlib

    (tmp_path / "metrics.jsonl").write_bytes(LINE + b"\n")
    with matplotlib.rc_context({"text.usetex": True, "savefig.format": "pdf", "figure.facecolor": "black"}):
        assert picture.draw(tmp_path).read_bytes()[:4] == b"\x89PNG"
        assert matplotlib.rcParams["text.usetex"] is True


STAGE = {
    "kind": "stage",
    "update": 0,
    "stage": 0,
    "epoch": 0.0,
    "active": ["a", "b"],
    "start": None,
    "weights": None,
}
EVALUATION = {
    "kind": "evaluation", "update": 1, "stage": 0, "epoch": 0.5, "done": 1, "moment": "0.0", "pooled": 0.5,
    "scores": {"a": 0.5, "b": 0.5}, "errors": {"a": 0.1, "b": None},
}  # fmt: skip
ROLL_BACK = {"kind": "roll_back", "update": 2, "stage": 0, "epoch": 0.5, "done": 2, "to": "0.0", "drop": "a"}
ODD = [
    {**EVALUATION, "moment": ["0.1"]}, {**EVALUATION, "stage": None}, {**EVALUATION, "stage": "0"}, {**EVALUATION, "epoch": {}},
    {**EVALUATION, "done": None}, {**EVALUATION, "pooled": "x"}, {**EVALUATION, "scores": None}, {**EVALUATION, "scores": [1]},
    {**EVALUATION, "scores": {"a": "x"}}, {**EVALUATION, "errors": 3}, {**EVALUATION, "epoch": 10**400},
    {**STAGE, "stage": []}, {**STAGE, "active": None}, {**STAGE, "active": [1]}, {**STAGE, "start": 1},
    {**STAGE, "weights": [1]},
    {**ROLL_BACK, "to": None}, {**ROLL_BACK, "drop": ["a"]}, {**ROLL_BACK, "done": "2"}, {"kind": ["stage"]}, {"stage": 1},
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_a_mixtures_record_of_another_shape_is_left_out_and_counted(tmp_path, odd):
    lines = [STAGE, EVALUATION, odd, {**EVALUATION, "moment": "0.1", "epoch": 1.0, "done": 2}, ROLL_BACK]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = timeline.build(tmp_path)
    assert found["left_out"] == "line 3 of metrics.jsonl cannot be read and is left out"
    assert [e["moment"] for e in found["evaluations"]] == ["0.0", "0.1"]


def test_a_mixtures_picture_says_it_too_and_bears_any_result(tmp_path, drawn):
    lines = [STAGE, EVALUATION, {**EVALUATION, "moment": "0.1", "epoch": 1.0, "done": 2}, ODD[0], ROLL_BACK]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = {"moment": [1], "account": {"tokens": {"trained": 3, "discarded": "x"}}, "test": {"loss": 1e999}}
    (tmp_path / "result.json").write_text(json.dumps({"reason": ["\ud800"], "seconds": "x", "more": more}))
    assert mixture_picture.draw(tmp_path).exists()
    assert drawn[0].get_supxlabel() == "line 4 of metrics.jsonl cannot be read and is left out"
    assert json.loads(timeline.write(tmp_path).read_text())["result"]["test"] == {"loss": None}


def test_stages_that_lead_round_in_a_ring_end():
    stages = [{"stage": 0, "start": "1.0"}, {"stage": 1, "start": "0.0"}]
    evaluations = [{"stage": 0, "moment": "0.0"}, {"stage": 1, "moment": "1.0"}]
    assert timeline.kept_moments(evaluations, stages) == {"0.0", "1.0"}


def test_a_file_of_another_name_is_not_written_through(tmp_path):
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / ".run.png.part").symlink_to("theirs")
    picture.write_whole(tmp_path / "run.png", b"ours")
    assert (tmp_path / "theirs").read_bytes() == b"theirs"
    assert (tmp_path / "run.png").read_bytes() == b"ours"


class TestWriting:
    """metrics.jsonl itself: lines whole and in order, whatever the disk does."""

    def lines(self, folder):
        return [json.loads(line)["n"] for line in (folder / "m").read_bytes().split(b"\n") if line]

    def failing_from(self, monkeypatch, least, most, error=errno.ENOSPC):
        """os.write that takes three bytes and then fails, from its `least`-th call to its `most`-th."""
        calls = []

        def write(file, data):
            calls.append(1)
            if least < len(calls) <= most:
                raise OSError(error, os.strerror(error))
            return os.write(file, data[:3]) if len(calls) == least else os.write(file, data)

        names = {name: getattr(os, name) for name in dir(os) if not name.startswith("__")}
        monkeypatch.setattr(metrics, "os", types.SimpleNamespace(**{**names, "write": write}))

    @pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.ESTALE])
    def test_a_line_cut_short_goes_on_where_it_was_cut(self, tmp_path, monkeypatch, error):
        told = []
        self.failing_from(monkeypatch, 3, 6, error)
        one = JsonLines(tmp_path / "m", told.append)
        for n in range(6):
            one.write({"n": n})
            assert one.missing == (
                "" if n < 2 or n > 4 else f"{n - 1} lines of metrics.jsonl could not be written"
            )
        one.close()
        if error == errno.ESTALE:  # opened again: what was cut is a line of its own, and no other is lost
            content = (tmp_path / "m").read_bytes().replace(b'{"n\n', b"")
            (tmp_path / "m").write_bytes(content)
        assert self.lines(tmp_path) == list(range(6))
        assert len(set(told)) == 1
        assert os.strerror(error) in told[0]

    def test_what_waits_is_bounded_and_counted(self, tmp_path, monkeypatch):
        monkeypatch.setattr(JsonLines, "MOST_WAITING_BYTES", 100)
        self.failing_from(monkeypatch, 1, 50)
        one = JsonLines(tmp_path / "m")
        for n in range(20):
            one.write({"n": n})
        assert one.missing == "20 lines of metrics.jsonl could not be written"
        assert len(one._waiting) == 11
        self.failing_from(monkeypatch, 10**9, 0)
        one.close()
        assert self.lines(tmp_path) == list(range(11))
        assert one.missing == "9 lines of metrics.jsonl could not be written"

    def test_a_line_that_a_kill_cut_short_takes_no_other_with_it(self, tmp_path):
        (tmp_path / "m").write_bytes(b'{"n": 0}\n{"n": 1')
        one = JsonLines(tmp_path / "m")
        one.write({"n": 2})
        one.close()
        assert (tmp_path / "m").read_bytes() == b'{"n": 0}\n{"n": 1\n{"n": 2}\n'

    @pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder", "device"])
    def test_nothing_is_written_through_what_is_no_file(self, tmp_path, kind):
        (tmp_path / "theirs").write_text("theirs")
        path = tmp_path / "m"
        {
            "link": lambda: path.symlink_to("theirs"),
            "dangling": lambda: path.symlink_to("new"),
            "pipe": lambda: os.mkfifo(path),
            "folder": path.mkdir,
            "device": lambda: path.symlink_to("/dev/null"),
        }[kind]()
        told = []
        one = JsonLines(path, told.append)
        one.write({"n": 0})
        one.close()
        assert told[0].startswith("metrics.jsonl: cannot be written (")
        assert one.missing
        assert (tmp_path / "theirs").read_text() == "theirs"
        assert not (tmp_path / "new").exists()

    def test_a_line_after_the_end_is_written_too(self, tmp_path):
        one = JsonLines(tmp_path / "m")
        one.close()
        one.write({"n": 0})
        one.close()
        assert self.lines(tmp_path) == [0]
        assert one._file is None

    def test_one_that_was_replaced_is_said(self, tmp_path):
        told = []
        one = JsonLines(tmp_path / "m", told.append)
        one.write({"n": 0})
        (tmp_path / "m").rename(tmp_path / "before")
        (tmp_path / "m").write_text("theirs")
        one.write({"n": 1})
        one.close()
        assert "was replaced" in told[0]
        assert (tmp_path / "m").read_text() == "theirs"

    @pytest.mark.parametrize("left", [0, 5])
    def test_one_that_was_cut_short_is_said_once(self, tmp_path, left):
        told = []
        one = JsonLines(tmp_path / "m", told.append)
        one.write({"n": 0})
        one.write({"n": 1})
        os.truncate(tmp_path / "m", left)
        one.write({"n": 2})
        one.write({"n": 3})
        assert len(told) == 1
        assert "was cut short" in told[0]
        assert (tmp_path / "m").read_bytes().splitlines()[-2:] == [b'{"n": 2}', b'{"n": 3}']
        os.truncate(tmp_path / "m", 0)
        one.close()
        assert len(told) == 2

    def test_values_without_json_cost_themselves(self, tmp_path):
        import numpy as np

        told = []
        one = JsonLines(tmp_path / "m", told.append)
        one.write(
            {"n": np.float64(1.5), "nan": float("nan"), "deep": [{1: np.float32("inf")}], "path": tmp_path}
        )
        one.close()
        assert json.loads((tmp_path / "m").read_text()) == {
            "n": 1.5,
            "nan": None,
            "deep": [{"1": None}],
            "path": str(tmp_path),
        }
        assert len(told) == 1
