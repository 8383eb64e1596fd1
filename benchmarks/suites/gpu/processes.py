"""The processes in which parts C and D measure: one a point, so that none is patched, filled or ended by what
another did.

python -m benchmarks.suites.gpu.processes MODEL_TYPE FILE     imports, waits for jobs on its input,
answers on the
                                                       open file
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.harness.checkout import ROOT
from benchmarks.suites.gpu import training
from benchmarks.suites.gpu.session import Session, die_with_parent


class Worker:
    """A process that measures points. Started early, it imports while others measure and touches the device
    when told to."""

    def __init__(self, model_type: str):
        reads, writes = os.pipe()
        self._answers = reads
        command = [sys.executable, "-m", "benchmarks.suites.gpu.processes", model_type, str(writes)]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            pass_fds=(writes,),
            preexec_fn=die_with_parent,
            text=True,
        )
        os.close(writes)

    def measure(self, session: Session, wanted: training.Point, limit_s: float) -> bool:
        """Have a point measured. What is missing when this returns False is named as left out, and the
        process is gone."""
        what = f"the rest of {training.what_of(wanted)}"
        if self._answers < 0:
            session.leave_out(what, "the process that measures has ended")
            return False
        assert self.process.stdin is not None
        with suppress(OSError):  # it is dead: no answer will come
            job = {"session": _plain(session, limit_s), "point": dataclasses.asdict(wanted)}
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        ready, _, _ = select.select([self._answers], [], [], max(0.0, limit_s))
        if ready and os.read(self._answers, 1):
            return True
        if ready:  # the other end is closed: it is about to be gone
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        code = self.process.poll()
        self.close()
        why = (
            f"its share of {limit_s:.0f} s was over"
            if code is None
            else f"its process ended with {code}; the log says why"
        )
        session.leave_out(what, why)
        return False

    def close(self) -> None:
        """End it, however it stands; its memory on the device is free when this returns."""
        if self.process.returncode is None:
            self.process.kill()
            self.process.wait()
        if self._answers >= 0:
            os.close(self._answers)
            self._answers = -1
        if self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.close()


@contextmanager
def workers(session: Session, model_types: list[str]) -> Iterator[list[Worker]]:
    """A process for every point, importing at once; in a rehearsal one for all of them, since imports are
    most of its time."""
    made: list[Worker] = []
    try:
        for kind in model_types[:1] if session.rehearsal else model_types:
            made.append(Worker(kind))
        yield made * len(model_types) if session.rehearsal else made
    finally:
        for worker in made:
            worker.close()


def _plain(session: Session, limit_s: float) -> dict[str, Any]:
    """A session for another process on this machine, whose monotonic clock is the same."""
    fields = {f.name: getattr(session, f.name) for f in dataclasses.fields(session)}
    ends = min(session.ends, time.monotonic() + limit_s)
    as_json = {"out": str(session.out), "red": sorted(session.red), "environment": dict(session.environment)}
    return fields | as_json | {"ends": ends}


def main(model_type: str, answers: int) -> None:
    """The process: imports, then one point after another, each answered by a byte when it is measured or
    named as left out."""
    die_with_parent()
    os.set_inheritable(answers, False)
    for module in ("repsft_fast.training.trainer", f"transformers.models.{model_type}.modeling_{model_type}"):
        importlib.import_module(module)
    for line in sys.stdin:
        job = json.loads(line)
        given = job["session"]
        red = frozenset((operation, dtype) for operation, dtype in given["red"])
        session, wanted = (
            Session(**{**given, "out": Path(given["out"]), "red": red}),
            training.Point(**job["point"]),
        )
        with session.attempt(training.what_of(wanted)):
            training.measure(session, wanted)
        sys.stdout.flush()
        os.write(answers, b".")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
