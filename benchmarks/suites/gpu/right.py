"""Part B: what must be right before a figure of it may be kept. The tests marked `gpu`, each naming what it
proves.

A red test takes out the operation and dtype it names and nothing else; a test that did not run takes out
nothing, and the table says how many those were.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.harness.checkout import ROOT
from benchmarks.suites.gpu.session import CHECKS, Session, die_with_parent, read_lines

TESTS = "tests/gpu"


def run(session: Session) -> None:
    """pytest in a process of its own: an illegal access there must not end what comes later."""
    checks = session.out / CHECKS
    # of an earlier session in this folder: what counts is the code as it is now
    checks.unlink(missing_ok=True)
    # On a CPU the same bodies run where they can: in Triton's interpreter or on plain tensors.
    which = "gpu" if session.device == "cuda" else "not gpu"
    command = [
        sys.executable,
        "-m",
        "pytest",
        TESTS,
        "-m",
        which,
        "-q",
        "-p",
        "no:cacheprovider",
        "--timeout",
        "30",
    ]

    # The tests write a line each as they end, so that a limit or a crash leaves what was seen before.
    environment = {**os.environ, "REPSFT_CHECKS": str(checks)}
    try:
        ended = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            timeout=max(1.0, session.left_s - 2),
            preexec_fn=die_with_parent,
        ).returncode
    except subprocess.TimeoutExpired:
        ended = None
        session.leave_out("the rest of the checks", "their time was over")
    seen = read_lines(checks)
    outcomes = [line["outcome"] for line in seen]
    print(
        f"  {outcomes.count('passed')} passed, {outcomes.count('failed')} failed, {len(outcomes)} reported",
        flush=True,
    )
    for line in seen:
        if line["outcome"] == "failed":
            print(f"  RED {line['test']}: {line['words']}", flush=True)
    # Nothing red is not yet right: pytest may have found no tests, or died.
    if not seen or ended not in (0, 1, None):
        session.leave_out(
            "checks",
            f"pytest ended with {ended} and reported {len(seen)} tests: nothing is known to be right",
        )


def red(out: Path) -> frozenset[tuple[str, str]]:
    """(operation, dtype) of every failed check in this folder."""
    failed = [line for line in read_lines(out / CHECKS) if line["outcome"] == "failed"]
    return frozenset((operation, dtype) for line in failed for operation, dtype in line["proves"])
