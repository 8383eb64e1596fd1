"""The processes that updates are timed in: answers, limits, deaths."""

import sys
import time

import pytest

from benchmarks.suites.gpu import processes, step, training
from benchmarks.suites.gpu.session import LEFT_OUT, RECORDS, append_line, read_lines
from tests.benchmarks.suites.gpu.toys import session_at


class TestWorker:
    """The protocol, with small processes in place of trainers."""

    def worker(self, monkeypatch, body):
        real = processes.subprocess.Popen
        code = f"import os, sys, time\nanswers = int(sys.argv[1])\nfor line in sys.stdin:\n    {body}\n"

        def start(command, **settings):
            return real([sys.executable, "-S", "-c", code, command[-1]], **settings)

        monkeypatch.setattr(processes.subprocess, "Popen", start)
        return processes.Worker("qwen3")

    def measured(self, tmp_path, worker, limit_s):
        point = training.point("x", step.MODEL, "plain", 8192, toy=True)
        try:
            return worker.measure(session_at(tmp_path, "C"), point, limit_s)
        finally:
            worker.close()
            assert worker.process.returncode is not None

    def test_an_answer_is_waited_for(self, tmp_path, monkeypatch):
        worker = self.worker(monkeypatch, "os.write(answers, b'.')")
        assert self.measured(tmp_path, worker, 30)
        assert read_lines(tmp_path / LEFT_OUT) == []

    def test_one_that_outlives_its_share_is_ended_and_named(self, tmp_path, monkeypatch):
        began = time.monotonic()
        assert not self.measured(tmp_path, self.worker(monkeypatch, "time.sleep(100)"), 0.5)
        assert time.monotonic() - began < 10
        (line,) = read_lines(tmp_path / LEFT_OUT)
        assert line["what"] == "the rest of an update of x, layers plain"
        assert "its share" in line["why"]

    def test_one_that_dies_is_named_with_its_code_and_stays_dead(self, tmp_path, monkeypatch):
        worker = self.worker(monkeypatch, "os._exit(7)")
        assert not self.measured(tmp_path, worker, 30)
        assert not self.measured(tmp_path, worker, 30)
        whys = [line["why"] for line in read_lines(tmp_path / LEFT_OUT)]
        assert "ended with 7" in whys[0]
        assert whys[1] == "the process that measures has ended"

    def test_a_real_process_measures_one_point_after_another(self, tmp_path):
        session = session_at(tmp_path, "C")
        with processes.workers(session, ["qwen3", "qwen3"]) as (first, second):
            assert first is second, "in a rehearsal"
            for variant in ("plain", "liger"):
                point = training.point("x", step.MODEL, variant, 8192, toy=True, kernels=False)
                assert first.measure(session, point, 90)
        assert first.process.returncode is not None
        made = [(record["op"], record["implementation"]) for record in read_lines(tmp_path / RECORDS)]
        assert made == [(op, v) for v in ("plain", "liger") for op in ("update", "host of an update")]
        assert read_lines(tmp_path / LEFT_OUT) == []

    def test_a_session_reaches_the_process_whole(self, tmp_path):
        session = session_at(tmp_path, "C", left_s=50)
        append_line(tmp_path / LEFT_OUT, {"run": "r", "part": "C", "what": "a", "why": "b"})
        session.red = frozenset({("head", "bfloat16")})
        given = processes._plain(session, limit_s=20)
        assert given["ends"] == pytest.approx(time.monotonic() + 20, abs=1)
        assert given["red"] == [("head", "bfloat16")]
        assert given["out"] == str(tmp_path)
        assert set(given) == set(vars(session))
