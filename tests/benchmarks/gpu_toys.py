"""A part's session at toy size on a CPU, and what its goals read from the records it has left."""

import time

from benchmarks import harness
from benchmarks.gpu import right
from benchmarks.gpu.goals import Found
from benchmarks.gpu.session import RECORDS, Session, read_lines


def session_at(folder, part, *, left_s=120.0):
    return Session(
        part, folder, "cpu", True, time.monotonic() + left_s, {**harness.environment("cpu"), "run": "r"},
        {"bytes_per_s": 1e9, "flops_per_s": 1e9}, right.red(folder),
    )  # fmt: skip


def fed(goals, folder):
    """{goal: what it reads, None where nothing was measured for it}."""
    found = Found(read_lines(folder / RECORDS))
    return {goal.name: goal.read(found) for goal in goals}
