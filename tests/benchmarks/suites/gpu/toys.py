"""A part's session at toy size on a CPU, and what its goals read from the records it has left."""

import time

from benchmarks.harness import machine
from benchmarks.suites.gpu import right
from benchmarks.suites.gpu.goals import Found
from benchmarks.suites.gpu.session import CHECKS, RECORDS, Session, append_line, read_lines


def session_at(folder, part, *, left_s=120.0):
    return Session(
        part, folder, "cpu", True, time.monotonic() + left_s, {**machine.environment("cpu"), "run": "r"},
        {"bytes_per_s": 1e9, "flops_per_s": 1e9}, right.red(folder),
    )  # fmt: skip


def fail_check(folder, operation, dtype="any"):
    """The check that proves this operation in this dtype is red."""
    line = {"test": "a", "proves": [[operation, dtype]], "outcome": "failed", "words": "off"}
    append_line(folder / CHECKS, line)


def fed(goals, folder):
    """{goal: what it reads, None where nothing was measured for it}."""
    found = Found(read_lines(folder / RECORDS))
    return {goal.name: goal.read(found) for goal in goals}
