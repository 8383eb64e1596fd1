"""Expressions judged in processes: as math-verify would, within a deadline, and none is left behind."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from repsft_fast.errors import TrainingError
from repsft_fast.evaluate import judging
from repsft_fast.evaluate.judging import Judge

ROOT = Path(__file__).resolve().parents[2]
EXPRESSION = (r"2\sqrt{2}", r"\sqrt{8}")
HANGS = ("9^{9^{9^9}}", "7")


@pytest.fixture
def needs_math_verify():
    pytest.importorskip("math_verify")


def pids(judge):
    return [worker._process.pid for worker in judge._workers]


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_text_and_numbers_need_no_process(monkeypatch):
    monkeypatch.setattr(judging.subprocess, "Popen", None)
    with Judge() as judge:
        pairs = [("1/2", "0.5"), (None, "7"), ("", "7"), ("4", "7"), ("Paris", "Paris"), ("step 1", "pets 1")]
        assert judge(pairs) == ["right", "wrong", "wrong", "wrong", "right", "wrong"]
        assert judge([]) == []


# (reference, answer): what math-verify itself says of the strings is the oracle.
TYPICAL = [
    ("1/3", "0.333333"), ("1/3", "0.33"), (r"\frac{x}{2}", r"\frac{2x}{4}"), (r"\frac12x", "x/2"), (r"-\frac{7}{3}", r"\frac{-7}{3}"), (r"50\%x", "x/2"),
    ("(1,2)", "(1, 2)"), ("[0,1]", "[0, 1]"), ("[0,1]", "(0,1)"), ("(0,1]", "[0,1)"), (r"(-\infty,3)", r"(-\infty, 3)"),
    (r"(-\infty,0)\cup(1,\infty)", r"(1,\infty)\cup(-\infty,0)"), (r"\{1,2,3\}", r"\{3,2,1\}"), (r"\{1,2,3\}", "1,2,3"), (r"\{1,2\}", r"\{1,2,3\}"),
    ("1,2", "2,1"), ("3,-3", r"\pm 3"), (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"), ("5", "x=5"), ("x=5", "5"), ("x=5", "y=5"), ("y=2x+3", "y-2x=3"),
    ("y=2x+3", "2x+3"), ("x+1", "1+x"), ("(x+1)^2", "x^2+2x+1"), ("(x+1)^2", "x^2+1"), (r"2\sqrt{2}", r"\sqrt{8}"), (r"\sqrt{3}/3", r"\frac{1}{\sqrt{3}}"),
    (r"\pi/2", r"\frac{\pi}{2}"), (r"2\pi", r"2\pi\text{ cm}"), (r"\text{even}", r"\text{odd}"), ("2^{10}", "1024"), ("p-q", "-q+p"), ("6-5i", "-5i+6"),
    ("x<3", "3>x"), ("1<x<2", "(1,2)"), ("(1,2)", "1<x<2"), (r"x\ge 2", r"[2,\infty)"), ("11", "1011_2"), (r"3.0\times 10^8", "300000000"),
    (r"\log_2 8", "3"), ("1", r"\sin^2 x+\cos^2 x"), (r"\frac{\sqrt{2}}{2}", "0.707107"), ("(3,4)", "(4,3)"), (r"\left(\frac12,1\right)", "(0.5,1)"),
    ("x^2", "x^3"), ("5!", "120"), (r"\binom{5}{2}", "10"), ("|x|", r"\left|x\right|"), ("12", r"3\cdot 4"), ("3:2", "3/2"),
]  # fmt: skip


def test_it_judges_as_math_verify_does(needs_math_verify, monkeypatch):
    from math_verify import parse, verify

    monkeypatch.setattr(logging.getLogger("math_verify"), "disabled", True)
    for module in ("parser", "grader"):
        monkeypatch.setattr(logging.getLogger(f"math_verify.{module}"), "disabled", True)
    expected = []
    for pair in TYPICAL:
        reference, answer = (parse(f"${text}$", parsing_timeout=None) for text in pair)
        expected.append("right" if verify(reference, answer, timeout_seconds=None) else "wrong")
    assert {"right", "wrong"} == set(expected)
    with Judge(seconds=30) as judge:
        assert judge([(answer, reference) for reference, answer in TYPICAL]) == expected
        assert judge.undecided == []


def test_a_deadline_is_kept_and_others_are_judged_meanwhile(needs_math_verify):
    began = time.monotonic()
    with Judge(processes=2, seconds=2.0) as judge:
        pairs = [HANGS, EXPRESSION, ("99999999999!", "7"), ("x+1", "1+x"), HANGS, ("1", "1")]
        assert judge(pairs) == ["undecided", "right", "undecided", "right", "undecided", "right"]
        assert [(u.got, u.why) for u in judge.undecided] == [
            (HANGS[0], "not decided within 2 s"),
            ("99999999999!", "not decided within 2 s"),
        ]
        assert judge([HANGS]) == ["undecided"]  # known
        assert len(judge.undecided) == 2
        assert judge([("y+2", "2+y")]) == ["right"]
        left = pids(judge)
        assert os.getsid(0) not in map(os.getsid, left)  # a keyboard's interrupt is not theirs
    assert all(map(is_gone, left))
    assert time.monotonic() - began < 30


def test_an_interrupted_pair_is_no_verdict_on_the_next(needs_math_verify, monkeypatch):
    with Judge(processes=1, seconds=20.0) as judge:
        assert judge([("x+1", "1+x")]) == ["right"]
        with monkeypatch.context() as patch:
            patch.setattr(judging.connection, "wait", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                judge([("x+2", "2+x")])
        assert judge._workers == []
        assert judge([("x+2", "3+x")]) == ["wrong"]


def test_what_nobody_can_read_is_never_right(needs_math_verify):
    texts = ["{" * 450 + "1" + "}" * 450, r"\frac{" * 30, "(" * 400 + "1" + ")" * 400, "1e999999999+1"]
    with Judge(processes=2, seconds=1.0) as judge:
        assert "right" not in judge([(text, "12") for text in texts] + [("12+x-x", text) for text in texts])


def stand_in(monkeypatch, tmp_path, body):
    """A worker of our own making."""
    file = tmp_path / "worker.py"
    file.write_text(body)
    monkeypatch.setattr(judging, "_WORKER", file)


def test_a_process_that_dies_or_has_no_memory_decides_nothing(needs_math_verify, monkeypatch, tmp_path):
    stand_in(
        monkeypatch,
        tmp_path,
        "import os, sys\nprint('ready', flush=True)\nfor line in sys.stdin:\n"
        "    if 'x' in line: os.abort()\n    print('memory' if 'y' in line else 'right', flush=True)\n",
    )
    with Judge(processes=1) as judge:
        assert judge([("x+1", "2+a"), ("y+1", "2+a"), ("z+1", "2+a")]) == ["undecided", "undecided", "right"]
        assert [u.why for u in judge.undecided] == ["its process died", "memory ran out"]


GREEDY = """
LatexExtractionConfig = list
def parse(text, configs, parsing_timeout): return text
def verify(reference, answer, timeout_seconds):
    held = []
    try:
        while "x" in answer or "y" in answer: held.append(bytearray(1 << 20))
    except MemoryError:
        if "x" in answer: raise
    return "y" not in answer and "w" not in answer
"""


def test_memory_is_limited(monkeypatch, tmp_path):
    """Also where math-verify goes on after a MemoryError and says that the two differ."""
    (tmp_path / "math_verify.py").write_text(GREEDY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "math_verify", raising=False)
    with Judge(processes=1, seconds=60, memory_bytes=200 << 20) as judge:
        pairs = [(f"{name}+1", "2+a") for name in "xyzw"]
        assert judge(pairs) == ["undecided", "undecided", "right", "wrong"]
        assert [u.why for u in judge.undecided] == ["memory ran out"] * 2


def test_one_that_died_meanwhile_is_replaced(needs_math_verify):
    with Judge(processes=1) as judge:
        assert judge([("x+1", "1+x")]) == ["right"]
        (pid,) = pids(judge)
        os.kill(pid, signal.SIGKILL)
        while not is_gone(pid):
            time.sleep(0.01)
        assert judge([("x+2", "2+x")]) == ["right"]


def test_one_that_does_not_start_is_an_error(needs_math_verify, monkeypatch, tmp_path):
    stand_in(
        monkeypatch, tmp_path, "print('math-verify cannot be imported (ImportError: sympy)', flush=True)\n"
    )
    with (
        Judge() as judge,
        pytest.raises(TrainingError, match=r"did not start \(math-verify cannot .* sympy\)\); "),
    ):
        judge([EXPRESSION])
    stand_in(monkeypatch, tmp_path, "")
    with Judge() as judge, pytest.raises(TrainingError, match=r"did not start \(it ended\)"):
        judge([EXPRESSION])
    stand_in(monkeypatch, tmp_path, "import time\ntime.sleep(100)")
    monkeypatch.setattr(judging, "START_SECONDS", 0.3)
    with Judge() as judge, pytest.raises(TrainingError, match=r"did not start \(not within 0.3 s\)"):
        judge([EXPRESSION])
    assert judge._workers == []


def test_without_math_verify_it_says_so_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    said = []
    with Judge(note=said.append) as judge:
        assert judge([("1/2", "0.5")]) == ["right"]
        assert said == []
        assert judge([EXPRESSION, ("x+1", "1+x")]) == ["wrong", "wrong"]
        assert judge([("x+2", "2+x")]) == ["wrong"]
        assert judge.undecided == []
    assert said == ["math-verify is not installed: answers are compared as text and numbers only"]


def test_in_a_thread(needs_math_verify):
    found = []

    def work():
        with Judge(processes=1, seconds=2.0) as judge:
            found.extend(judge([HANGS, EXPRESSION]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert found == ["undecided", "right"]


PARENT = """
import sys, threading, _thread, signal, os
from repsft_fast.evaluate.judging import Judge
judge = Judge(processes=2, seconds=1.0)
judge([("x+1", "1+x"), ("x+2", "2+x")])
print(*[w._process.pid for w in judge._workers], flush=True)
assert "torch" not in sys.modules
judge([("9^{9^{9^9}}", "7"), ("9^{9^{9^8}}", "7")])
"""


@pytest.mark.parametrize(("number", "within"), [(signal.SIGINT, 2), (signal.SIGKILL, 40)])
def test_no_process_outlives_its_parent(needs_math_verify, number, within):
    """After an interrupt at once; where nobody could end them, once the pair's time is over."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    time.sleep(0.3)
    assert len(workers) == 2
    assert not any(map(is_gone, workers))
    os.kill(parent.pid, number)
    _, said = parent.communicate(timeout=30)
    assert parent.returncode in (-number, 1)
    assert ("KeyboardInterrupt" in said) == (number == signal.SIGINT)
    until = time.monotonic() + within
    while not all(map(is_gone, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert all(map(is_gone, workers))


def test_one_that_nobody_closes_is_closed():
    judge = Judge()
    if judge([EXPRESSION]) == ["right"]:
        left = pids(judge)
        assert left
        del judge
        assert all(map(is_gone, left))


@pytest.mark.parametrize("wrong", [{"processes": 0}, {"seconds": 0}])
def test_it_needs_a_process_and_time(wrong):
    with pytest.raises(ValueError, match="needs a process and time, expected processes ≥ 1"):
        Judge(**wrong)
