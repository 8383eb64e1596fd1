"""What a person sees while a model answers: how many replies are there, how fast tokens come, how long it may
take."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from repsft_fast.evaluate.asked import Generation, Request
from repsft_fast.report import visible
from repsft_fast.report.format import count, duration

EVERY_S = 30.0  # between lines where there is no terminal
REDRAW_S = 0.2
SURE = 10  # replies from which on the time left is guessed


class Progress:
    """One line on standard error, redrawn on a terminal; plain lines elsewhere. `told` is called with every
    reply."""

    def __init__(self, enabled: bool = True):
        self._console = visible.console(sys.stderr)
        self._enabled = enabled
        self._status: Any = None
        self._what, self._wanted = "", 0
        self._replies = self._tokens = self._ended = 0
        self._began = self._shown = 0.0

    def __enter__(self) -> Progress:
        if self._enabled and self._console.is_terminal:
            self._status = self._console.status("")
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def begin(self, what: str, wanted: int) -> None:
        """A task begins. wanted: replies to it, those that are in its file already included."""
        self._what, self._wanted = visible.one_line(what), wanted
        self._replies = self._tokens = self._ended = 0
        self._began = self._shown = time.monotonic()
        if self._status is not None:
            self._status.update(self._what)

    def told(self, request: Request, reply: Generation) -> None:
        self._replies += 1
        self._tokens += len(reply.ids)
        self._ended += reply.finished
        now = time.monotonic()
        if not self._enabled or now - self._shown < (EVERY_S if self._status is None else REDRAW_S):
            return
        self._shown = now
        if self._status is not None:
            self._status.update(self.line(now))
        else:
            visible.show(self._console, self.line(now))

    def line(self, now: float) -> str:
        """gsm  132/200 replies  120 ended  14.2k tokens  220 tok/s  ≤ 1:20"""
        seconds = max(now - self._began, 1e-9)
        left = (self._wanted - self._replies) * seconds / max(self._replies, 1)
        facts = [
            self._what,
            f"{self._replies:,}/{self._wanted:,} replies",
            f"{self._ended:,} ended",
            f"{count(self._tokens)} tokens",
            f"{count(self._tokens / seconds)} tok/s",
        ]
        if self._replies >= SURE:
            facts.append(f"about {duration(left)} left")
        return "  ".join(facts)
