"""The GPU session: parts in order, whole lines whatever kills it, red checks that take out what they name, a
table last."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import gpu_records
from benchmarks.harness import checkout, records
from benchmarks.suites.gpu import facts, right
from benchmarks.suites.gpu.session import CHECKS, LEFT_OUT, RECORDS, read_lines
from tests.benchmarks.suites.gpu.toys import fail_check, session_at

COMMAND = [sys.executable, "-m", "benchmarks.gpu_records", "--rehearse"]


class TestParts:
    def test_the_order_is_the_list_and_the_first_always_comes(self):
        assert [part.letter for part in gpu_records.chosen(None)] == list("ABCDEFGHIJ")
        assert [part.letter for part in gpu_records.chosen("e, C")] == list("ACE")
        assert [part.letter for part in gpu_records.chosen("P")] == list("AP")
        assert [part.letter for part in gpu_records.chosen("A,M")] == list("AM")

    @pytest.mark.parametrize(
        ("letters", "words"),
        [
            ("C,X", "X is not a part"),
            ("P,C", "P runs alone"),
            ("M,C", "M runs alone"),
            ("M,P", "M, P runs alone"),
            (",", "names no part"),
        ],
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
        assert (
            sum(part.seconds for part in gpu_records.PARTS if part.letter not in gpu_records.ALONE) < 480 - 30
        )

    def test_without_a_gpu_only_a_rehearsal_runs(self, capsys):
        assert gpu_records.main(["--deadline", "1"]) == 2
        assert "--rehearse" in capsys.readouterr().err


class TestSummary:
    def test_a_summary_is_made_of_files_alone_and_names_what_is_missing(self, tmp_path):
        at = session_at(tmp_path, "F")
        at.record("row kernel", "all statistics", [3.0], {"N": 8192}, dtype="bfloat16")
        at.leave_out("head", "no such peer")
        fail_check(tmp_path, "head", "float16")
        text = gpu_records.summary(gpu_records.chosen("G"), tmp_path, "r", rehearse=False, seconds=1.0)
        assert "row kernel 8,192 × 128,256, ms" in text
        assert "red checks: head in float16" in text
        assert "F head: no such peer" in text
        assert "0 records" in gpu_records.summary(
            gpu_records.chosen("G"), tmp_path, "another", rehearse=False, seconds=1.0
        )


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
        slow = (
            f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]);"
            " time.sleep(60)"
        )
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
    """Every line of every file parses; every record is one that can be true. Returns how many records there
    are."""
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
    driver = subprocess.Popen(
        command, cwd=checkout.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
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
    killed_rehearsal(tmp_path, ",".join("ABCDEFGHIJ"), 1 + number % 2, random.uniform(0.0, 60.0))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_whole_rehearsal_runs_every_part_and_feeds_every_goal_it_can(threads, tmp_path):
    command = [*COMMAND, "--deadline", "800", "--threads", str(threads), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=checkout.ROOT, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout[-4000:]
    found = whole(tmp_path)
    assert {record["part"] for record in found} >= set("CDFGHI")
    assert all(record["rehearsal"] for record in found)
    assert right.red(tmp_path) == frozenset()
