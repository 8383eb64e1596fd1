"""The GPU session: parts in order, whole lines whatever kills it, red checks that take out what they name, a table last."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import gpu_records, harness, records
from benchmarks.gpu import facts, goals, right, session
from benchmarks.gpu.session import CHECKS, LEFT_OUT, RECORDS, Session, append_line, read_lines

COMMAND = [sys.executable, "-m", "benchmarks.gpu_records", "--rehearse"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def made(tmp_path, **settings):
    environment = {**harness.environment("cpu"), "run": "r"}
    ends = time.monotonic() + settings.pop("left_s", 60)
    return Session("F", tmp_path, "cpu", True, ends, environment, {"bytes_per_s": 1e9, "flops_per_s": 1e9}, **settings)


class TestParts:
    def test_the_order_is_the_list_and_the_first_always_comes(self):
        assert [part.letter for part in gpu_records.chosen(None)] == list("ABCDEFGHI")
        assert [part.letter for part in gpu_records.chosen("e, C")] == list("ACE")
        assert [part.letter for part in gpu_records.chosen("P")] == list("AP")

    @pytest.mark.parametrize(
        ("letters", "words"), [("C,X", "X is not a part"), ("P,C", "P runs alone"), (",", "names no part")]
    )
    def test_what_cannot_be_chosen_is_said(self, letters, words, capsys, tmp_path):
        with pytest.raises(ValueError, match=words):
            gpu_records.chosen(letters)
        assert gpu_records.main(["--rehearse", "--parts", letters, "--out", str(tmp_path)]) == 2
        assert words in capsys.readouterr().err

    def test_where_nothing_can_be_written_nothing_is_begun(self, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        for out in (tmp_path / "file", tmp_path / "file" / "inside"):
            assert gpu_records.main(["--rehearse", "--out", str(out)]) == 2
            assert "--out: nothing can be written there" in capsys.readouterr().err

    def test_every_part_has_a_module_with_goals_and_its_limit_holds_its_plan(self):
        for part in gpu_records.PARTS:
            assert part.least_s <= part.seconds <= part.limit_s
            assert part.letter in "AB" or part.goals, part.letter
        assert sum(part.seconds for part in gpu_records.PARTS if part.letter not in gpu_records.ALONE) < 480 - 30

    def test_without_a_gpu_only_a_rehearsal_runs(self, capsys):
        assert gpu_records.main(["--deadline", "1"]) == 2
        assert "--rehearse" in capsys.readouterr().err


class TestCommit:
    """A record says which code was measured."""

    def test_neither_git_nor_a_given_commit_is_refused(self, monkeypatch, capsys):
        monkeypatch.setattr(harness, "_git", lambda *_: "")
        monkeypatch.delenv("COMMIT", raising=False)
        with pytest.raises(harness.NoCommit, match="COMMIT"):
            harness.code()
        assert gpu_records.main(["--rehearse"]) == 2
        assert "no git history" in capsys.readouterr().err

    def test_a_given_commit_stands_in_a_copied_tree_and_nobody_claims_it_is_clean(self, monkeypatch):
        monkeypatch.setattr(harness, "_git", lambda *_: "")
        monkeypatch.setenv("COMMIT", COMMIT)
        assert harness.code() == {"commit": COMMIT, "dirty": None, "source": harness.source_digest()}

    @pytest.mark.parametrize("given", ["", "main", COMMIT[:39], COMMIT.replace("a", "g")])
    def test_what_is_no_commit_is_refused_in_a_record_and_from_outside(self, given, monkeypatch, tmp_path):
        record = made(tmp_path).environment | {"commit": given}
        with pytest.raises(records.BadRecord, match="commit"):
            records.make(record, op="x", implementation="y", shape={}, dtype="f", times_ms=[1.0], peak_bytes=0)
        monkeypatch.setattr(harness, "_git", lambda *_: "")
        monkeypatch.setenv("COMMIT", given)
        with pytest.raises(harness.NoCommit):
            harness.code()

    def test_two_different_answers_are_refused(self, monkeypatch):
        monkeypatch.setattr(harness, "_git", lambda *words: "f" * 40 if words[0] == "rev-parse" else "")
        monkeypatch.setenv("COMMIT", COMMIT)
        with pytest.raises(harness.NoCommit, match="this checkout is at"):
            harness.code()

    def test_the_source_digest_is_of_names_and_contents(self, tmp_path):
        (tmp_path / "benchmarks").mkdir()
        (tmp_path / "benchmarks" / "a.py").write_text("1")
        first = harness.source_digest(tmp_path)
        (tmp_path / "benchmarks" / "a.py").rename(tmp_path / "benchmarks" / "b.py")
        second = harness.source_digest(tmp_path)
        (tmp_path / "benchmarks" / "b.py").write_text("2")
        assert len({first, second, harness.source_digest(tmp_path)}) == 3


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
        at = made(tmp_path)
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
        made(tmp_path).measure("op", calls, {"N": 1}, dtype="float32", budget_s=1.0, more={"b": {"note": "twice"}})
        first, second = read_lines(tmp_path / RECORDS)
        assert (first["implementation"], second["implementation"], second["note"]) == ("a", "b", "twice")
        assert second["against"] == "a"
        assert second["ratio"][0] > 1.2


class TestPoints:
    """What goes wrong in one point is named, and the next is measured."""

    def test_an_error_is_named_and_the_part_goes_on(self, tmp_path):
        at = made(tmp_path)
        with at.attempt("the first"):
            raise ValueError("what it says\nand more")
        (line,) = read_lines(tmp_path / LEFT_OUT)
        assert (line["what"], line["why"], line["part"]) == ("the first", "ValueError: what it says", "F")

    def test_a_lost_device_ends_the_part(self, tmp_path):
        with pytest.raises(RuntimeError), made(tmp_path).attempt("x"):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def test_what_does_not_fit_is_named(self, tmp_path):
        at = made(tmp_path, left_s=5)
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
        at = made(tmp_path, red=right.red(tmp_path))
        assert at.red == {("head", "float16"), ("snapshot", "any")}
        assert at.blocked("head in fp16", ("row kernel", "float16"), ("head", "float16"))
        assert at.blocked("a snapshot", ("snapshot", "bfloat16"))
        assert not at.blocked("head in bf16", ("head", "bfloat16"))
        assert not at.blocked("hash", ("state hash", "any"))
        assert [line["why"] for line in read_lines(tmp_path / LEFT_OUT)] == [
            "the check of head in float16 is red",
            "the check of snapshot in bfloat16 is red",
        ]


class TestTable:
    def record(self, implementation, p50, **shape):
        return {"op": "head", "implementation": implementation, "p50_ms": p50, "shape": shape, "mfu": 0.4}

    def test_records_are_found_by_shape_and_field_and_the_newest_counts(self):
        found = goals.Found([self.record("a", 5.0, N=1), self.record("a", 4.0, N=1), self.record("b", 2.0, N=1)])
        assert found.ratio("head", "a", "b", N=1) == 2.0
        assert found.p50("head", "a", N=2) is None
        assert found.value("head", "b", "mfu", N=1) == 0.4
        assert found.value("head", "b", "none") is None
        assert found.ratio("head", "a", "c") is None

    def test_met_missed_open_and_measured_are_told_apart(self):
        found = goals.Found([self.record("a", 4.0), self.record("b", 2.0)])
        card = goals.Card("NVIDIA H100 80GB HBM3", {"bytes_per_s": 3e12, "flops_per_s": 8e14})

        def ratio(found):
            return found.ratio("head", "a", "b")

        asked = [
            ("F", goals.Goal("met", ratio, most=2.0)),
            ("F", goals.Goal("missed", ratio, least=2.5, predicted=lambda card: card.of_kind(H100=3.0))),
            ("F", goals.Goal("open", lambda found: None, most=1.0, predicted=lambda card: card.bytes_ms(3e9))),
            ("F", goals.Goal("known", ratio, predicted=lambda card: card.of_kind(H200=9.0))),
        ]
        head, *lines = goals.table(asked, found, card)
        assert "predicted" in head
        assert [line.split()[-1] for line in lines] == ["met", "MISSED", "open", "measured"]
        assert lines[1].split()[-3:-1] == ["2", "3"]
        assert lines[2].split()[-3:-1] == ["-", "1"]
        assert lines[3].split()[-2] == "-"  # nothing was predicted for this card

    def test_a_summary_is_made_of_files_alone_and_names_what_is_missing(self, tmp_path):
        at = made(tmp_path)
        at.record("row kernel", "all statistics", [3.0], {"N": 8192}, dtype="bfloat16")
        at.leave_out("head", "no such peer")
        append_line(tmp_path / CHECKS, {"test": "a", "proves": [["head", "float16"]], "outcome": "failed", "words": "off"})
        text = gpu_records.summary(gpu_records.chosen("G"), tmp_path, "r", rehearse=False, seconds=1.0)
        assert "row kernel 8,192 × 128,256, ms" in text
        assert "red checks: head in float16" in text
        assert "F head: no such peer" in text
        assert "0 records" in gpu_records.summary(gpu_records.chosen("G"), tmp_path, "another", rehearse=False, seconds=1.0)


class TestDriver:
    """Parts as processes, with a stand-in for their work."""

    @pytest.fixture
    def stand_in(self, monkeypatch, tmp_path):
        """`stand_in({letter: python code})`: parts that run this code, and the driver over them."""

        def drive(code, *, deadline=60.0, limit=20.0):
            real = subprocess.Popen

            def instead(command, **settings):
                letter = command[command.index("--part") + 1]
                return real([sys.executable, "-c", code[letter]], **settings)

            monkeypatch.setattr(gpu_records.subprocess, "Popen", instead)
            parts = [gpu_records.Part(letter, f"part {letter}", "facts", 1, limit, 0) for letter in code]
            return gpu_records.drive(parts, tmp_path, deadline, rehearse=True, threads=1)

        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        yield drive
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def test_a_part_that_fails_is_named_and_the_next_runs(self, stand_in, tmp_path, capfd):
        assert stand_in({"C": "print('c', flush=True); raise SystemExit(3)", "D": "print('d ran')"}) == 1
        out = capfd.readouterr().out
        assert "ended with 3" in out
        assert "d ran" in out
        assert "c\n" in (tmp_path / gpu_records.LOG).read_text()
        assert (tmp_path / gpu_records.SUMMARY).read_text() in out

    def test_a_part_is_ended_at_its_limit_with_all_it_started(self, stand_in, tmp_path, capfd):
        mark = tmp_path / "still here"
        child = f"import time; time.sleep(4); open({str(mark)!r}, 'w')"
        slow = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
        began = time.monotonic()
        assert stand_in({"C": slow, "D": "print('d ran')"}, limit=1.5) == 0
        assert time.monotonic() - began < 10
        out = capfd.readouterr().out
        assert "its time was over" in out
        assert "d ran" in out
        time.sleep(3.5)
        assert not mark.exists()

    def test_the_deadline_names_what_was_not_begun(self, stand_in, tmp_path):
        assert stand_in({"C": "pass", "D": "pass"}, deadline=gpu_records.TABLE_S - 1) == 0
        assert [line["part"] for line in read_lines(tmp_path / LEFT_OUT)] == ["C", "D"]

    def test_a_signal_still_prints_the_table(self, stand_in, capfd):
        code = f"import os, signal, time; os.kill({os.getpid()}, signal.SIGTERM); time.sleep(30)"
        assert stand_in({"C": code, "D": "print('never')"}) == 143
        out = capfd.readouterr().out
        assert "goal" in out
        assert "never" not in out


def whole(folder):
    """Every line of every file parses; every record is one that can be true. Returns how many records there are."""
    for name in (RECORDS, LEFT_OUT, CHECKS):
        path = folder / name
        text = path.read_bytes() if path.exists() else b""
        for line in text.split(b"\n")[:-1]:
            json.loads(line)
        assert text == b"" or text.endswith(b"\n") or name == CHECKS, f"{name} is torn"
    facts.ceilings_of(folder)
    return [records.check(line) for line in read_lines(folder / RECORDS)]


def killed_rehearsal(folder, parts, threads, after_s):
    """A rehearsal, killed with SIGKILL after so many seconds beyond its first record."""
    command = [*COMMAND, "--parts", parts, "--threads", str(threads), "--out", str(folder)]
    driver = subprocess.Popen(command, cwd=harness.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while not (folder / RECORDS).exists() and driver.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(after_s)
    finally:
        driver.kill()
        driver.wait()
    before = len(whole(folder))
    time.sleep(1.0)
    found = whole(folder)
    assert len(found) <= before + 1, "a part goes on although the session was killed"
    return found


@pytest.mark.parametrize("threads", [1, 2])
def test_a_session_killed_at_any_second_leaves_whole_records(threads, tmp_path):
    assert killed_rehearsal(tmp_path, "F", threads, random.uniform(0.0, 2.0))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(12))
def test_a_whole_rehearsal_killed_at_random_seconds_leaves_whole_records(number, tmp_path):
    killed_rehearsal(tmp_path, ",".join("ABCDEFGHI"), 1 + number % 2, random.uniform(0.0, 60.0))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_whole_rehearsal_runs_every_part_and_feeds_every_goal_it_can(threads, tmp_path):
    command = [*COMMAND, "--deadline", "800", "--threads", str(threads), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout[-4000:]
    found = whole(tmp_path)
    assert {record["part"] for record in found} >= set("CDFGHI")
    assert all(record["rehearsal"] for record in found)
    assert right.red(tmp_path) == frozenset()


def test_die_with_parent_is_of_this_system():
    code = "from benchmarks.gpu.session import die_with_parent; die_with_parent(); print('fine')"
    assert "fine" in subprocess.run([sys.executable, "-c", code], cwd=harness.ROOT, capture_output=True, text=True).stdout
    assert session._DIE_WITH_PARENT == 1
