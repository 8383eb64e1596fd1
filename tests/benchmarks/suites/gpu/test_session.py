"""One part's session: whole lines whatever kills it, points that fail by name."""

import subprocess
import sys

import pytest

from benchmarks.harness import checkout, records
from benchmarks.suites.gpu import session
from benchmarks.suites.gpu.session import CHECKS, LEFT_OUT, RECORDS, append_line, read_lines
from tests.benchmarks.suites.gpu.toys import session_at


class TestLines:
    def test_what_a_killed_writer_left_torn_is_cut_off_and_not_read(self, tmp_path):
        path = tmp_path / "lines.jsonl"
        append_line(path, {"a": 1})
        with path.open("a") as file:
            file.write('{"a": 2, "b"')
        assert read_lines(path) == [{"a": 1}]
        append_line(path, {"a": 3})
        assert read_lines(path) == [{"a": 1}, {"a": 3}]

    def test_lines_of_another_run_are_not_this_one_s(self, tmp_path):
        path = tmp_path / "lines.jsonl"
        append_line(path, {"run": "r", "a": 1})
        append_line(path, {"run": "s", "a": 2})
        assert [line["a"] for line in read_lines(path, "s")] == [2]
        assert read_lines(tmp_path / "none.jsonl") == []

    def test_a_record_is_whole_checked_and_on_disk_at_once(self, tmp_path, capsys):
        at = session_at(tmp_path, "F")
        at.record("op", "ours", [2.0, 1.0, 3.0], {"N": 4}, dtype="float32", flops=10**6, mfu=0.5)
        (record,) = records.read(tmp_path / RECORDS)
        assert (record["p50_ms"], record["part"], record["rehearsal"], record["mfu"]) == (2.0, "F", True, 0.5)
        assert record["share_of_flops_per_s"] == pytest.approx(10**6 / 2e-3 / 1e9)
        assert "ours" in capsys.readouterr().out
        with pytest.raises(records.BadRecord, match="not a measurement"):
            at.record("op", "ours", [0.0], {}, dtype="float32")
        assert len(records.read(tmp_path / RECORDS)) == 1

    def test_measured_calls_leave_a_record_each_with_their_verdict(self, tmp_path):
        calls = {"a": lambda: sum(range(2000)), "b": lambda: sum(range(4000))}
        session_at(tmp_path, "F").measure(
            "op", calls, {"N": 1}, dtype="float32", budget_s=1.0, more={"b": {"note": "twice"}}
        )
        first, second = read_lines(tmp_path / RECORDS)
        assert (first["implementation"], second["implementation"], second["note"]) == ("a", "b", "twice")
        assert second["against"] == "a"
        assert second["ratio"][0] > 1.2


class TestPoints:
    """What goes wrong in one point is named, and the next is measured."""

    def test_an_error_is_named_and_the_part_goes_on(self, tmp_path):
        at = session_at(tmp_path, "F")
        with at.attempt("the first"):
            raise ValueError("what it says\nand more")
        (line,) = read_lines(tmp_path / LEFT_OUT)
        assert (line["what"], line["why"], line["part"]) == ("the first", "ValueError: what it says", "F")

    def test_a_lost_device_ends_the_part(self, tmp_path):
        with pytest.raises(RuntimeError), session_at(tmp_path, "F").attempt("x"):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def test_what_does_not_fit_is_named(self, tmp_path):
        at = session_at(tmp_path, "F", left_s=5)
        assert at.late("large", 20)
        assert not at.late("small", 1)
        (line,) = read_lines(tmp_path / LEFT_OUT)
        assert line["what"] == "large"
        assert "needs about 20 s" in line["why"]

    def test_a_red_check_takes_out_the_operation_and_dtype_it_names_and_nothing_else(self, tmp_path):
        checks = [
            {"test": "a", "proves": [["head", "float16"]], "outcome": "failed", "words": "off"},
            {"test": "b", "proves": [["head", "bfloat16"]], "outcome": "passed", "words": ""},
            {"test": "c", "proves": [["snapshot", "any"]], "outcome": "failed", "words": "off"},
            {"test": "d", "proves": [["state hash", "any"]], "outcome": "not run", "words": "after c"},
        ]
        for line in checks:
            append_line(tmp_path / CHECKS, line)
        at = session_at(tmp_path, "F")
        assert at.red == {("head", "float16"), ("snapshot", "any")}
        assert at.blocked("head in fp16", ("row kernel", "float16"), ("head", "float16"))
        assert at.blocked("a snapshot", ("snapshot", "bfloat16"))
        assert not at.blocked("head in bf16", ("head", "bfloat16"))
        assert not at.blocked("hash", ("state hash", "any"))
        assert [line["why"] for line in read_lines(tmp_path / LEFT_OUT)] == [
            "the check of head in float16 is red",
            "the check of snapshot in bfloat16 is red",
        ]


def test_die_with_parent_is_of_this_system():
    code = "from benchmarks.suites.gpu.session import die_with_parent; die_with_parent(); print('fine')"
    assert (
        "fine"
        in subprocess.run(
            [sys.executable, "-c", code], cwd=checkout.ROOT, capture_output=True, text=True
        ).stdout
    )
    assert session._DIE_WITH_PARENT == 1
