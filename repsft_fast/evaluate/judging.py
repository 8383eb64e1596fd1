"""Verdicts on answers: as text, as numbers, and as mathematical expressions in processes of their own.

An expression of a model's can take any time and any memory (9^{9^{9^9}}), and math-verify's own time limit is
a signal, which only the main thread may use. So expressions are compared in worker processes, each under a
deadline that this process keeps: one that exceeds it is killed and replaced.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Literal

from repsft_fast.errors import TrainingError, describe
from repsft_fast.evaluate.equality import as_expressions, same_by_text

Verdict = Literal["right", "wrong", "undecided"]

SECONDS, MEMORY_BYTES = 5.0, 1 << 30  # for one pair; of address space, of one process
START_SECONDS = 120.0
_WORKER = Path(__file__).with_name("judge_worker.py")


@dataclass(frozen=True)
class Undecided:
    """A pair that nobody could judge."""

    got: str
    reference: str
    why: str


class Judge:
    """Judges answers. Its processes start with the first pair of expressions and end with it.

    with Judge(processes=4) as judge:
        verdicts = judge([("1/2", "0.5"), (None, "7")])    # ["right", "wrong"]

    Not for two threads at once; any one thread will do. Verdicts are kept: a pair is judged once. Without
    math-verify pairs are compared as text and numbers, which `note` is told once.
    """

    def __init__(
        self,
        *,
        processes: int = 2,
        seconds: float = SECONDS,
        memory_bytes: int = MEMORY_BYTES,
        note: Callable[[str], None] = lambda text: None,
    ):
        if processes < 1 or seconds <= 0:
            wrong = "needs a process and time"
            raise ValueError(describe("Judge", wrong, expected="processes ≥ 1 and seconds > 0",
                                      got=(processes, seconds)))  # fmt: skip
        self.undecided: list[Undecided] = []
        self._processes, self._seconds, self._memory = processes, seconds, memory_bytes
        self._note: Callable[[str], None] | None = note
        self._known: dict[tuple[str, str], Verdict] = {}
        self._workers: list[_Worker] = []
        # also where nobody closes it
        self._end = weakref.finalize(self, _end_all, self._workers)

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends its processes. Another pair would start them again."""
        _end_all(self._workers)

    def __call__(self, pairs: Sequence[tuple[str | None, str]]) -> list[Verdict]:
        """pairs: (what was answered, the reference); None: no answer. [len(pairs)] verdicts.

        Undecided: the deadline passed, memory ran out or the process died; listed in `undecided`.
        Raises TrainingError where math-verify is there and its processes do not start.
        """
        found = {pair: self._by_text(*pair) for pair in dict.fromkeys(pairs)}
        open_pairs = [(got, reference) for (got, reference), verdict in found.items() if verdict is None]
        self._verify([(got or "", reference) for got, reference in open_pairs])
        return [found[pair] or self._known[pair[0] or "", pair[1]] for pair in pairs]

    def _by_text(self, got: str | None, reference: str) -> Verdict | None:
        same = same_by_text(got, reference)
        if same is None:
            if as_expressions(got or "", reference) is not None:
                return self._known.get((got or "", reference))
            same = False
        return "right" if same else "wrong"

    def _verify(self, pairs: list[tuple[str, str]]) -> None:
        """Each pair to a worker that is free, until all are known."""
        if not pairs:
            return
        if importlib.util.find_spec("math_verify") is None:
            if self._note:
                self._note("math-verify is not installed: answers are compared as text and numbers only")
                self._note = None
            self._known.update((pair, "wrong") for pair in pairs)
            return
        todo = pairs[::-1]
        try:
            for worker in [worker for worker in self._workers if not worker.alive]:
                self._workers.remove(worker)
                worker.end()
            while todo or any(worker.pair for worker in self._workers):
                while len(self._workers) < min(self._processes, len(todo)):
                    self._workers.append(_Worker(self._seconds, self._memory))
                for worker in [w for w in self._workers if w.ready and not w.pair][: len(todo)]:
                    worker.give(todo.pop())
                self._hear()
        except BaseException:  # an interrupt too: a worker that is left with a pair would answer to the next
            self.close()
            raise

    def _hear(self) -> None:
        """Waits for a word or for the nearest deadline."""
        awaited = {worker.output: worker for worker in self._workers if worker.pair or not worker.ready}
        pause = min(worker.deadline for worker in awaited.values()) - time.monotonic()
        heard = connection.wait(list(awaited), max(0.0, pause))
        for output, worker in awaited.items():
            word = worker.word() if output in heard else None
            if word is None and time.monotonic() < worker.deadline:
                continue
            if worker.pair is None:
                worker.begun(word)
            elif word in ("right", "wrong"):
                self._known[worker.pair] = "right" if word == "right" else "wrong"
                worker.pair = None
            else:
                self._workers.remove(worker)
                worker.end()
                why = {None: f"not decided within {self._seconds:g} s", "memory": "memory ran out"}
                self.undecided.append(Undecided(*worker.pair, why.get(word, "its process died")))
                self._known[worker.pair] = "undecided"


class _Worker:
    """A process that compares one pair at a time."""

    def __init__(self, seconds: float, memory_bytes: int):
        # -P: the folder of the file is no place to import from. A session of its own: an interrupt from the
        # keyboard is for us, and we end it.
        command = [sys.executable, "-P", str(_WORKER), str(seconds), str(memory_bytes)]
        self._process = subprocess.Popen(
            command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self.output = self._process.stdin, self._process.stdout.fileno()
        self._seconds, self._heard = seconds, b""
        self.ready = False
        self.pair: tuple[str, str] | None = None
        self.deadline = time.monotonic() + START_SECONDS

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def give(self, pair: tuple[str, str]) -> None:
        """(what was answered, the reference)"""
        self.pair, self.deadline = pair, time.monotonic() + self._seconds
        with contextlib.suppress(BrokenPipeError):  # it died; its output says so next
            self._input.write(json.dumps(as_expressions(*pair)).encode() + b"\n")

    def word(self) -> str | None:
        """A line of its output; "" at its end, None while there is none."""
        read = os.read(self.output, 4096)
        self._heard += read
        if b"\n" not in self._heard:
            return None if read else ""
        line, _, self._heard = self._heard.partition(b"\n")
        return line.decode()

    def begun(self, word: str | None) -> None:
        """Takes its first word."""
        if word != "ready":
            cause = word or (f"not within {START_SECONDS:g} s" if word is None else "it ended")
            wrong = f"a process to judge in did not start ({cause})"
            todo = "install math-verify anew, or remove it: answers are then compared as text and numbers"
            raise TrainingError(describe("math-verify", wrong, todo=todo))
        self.ready = True

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()  # and its pipes are closed


def _end_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().end()
