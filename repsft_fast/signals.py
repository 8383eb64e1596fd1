"""Signals that ask a run to end: it ends after this update, with all it has saved.

SIGINT and SIGTERM come from people, launchers and batch systems. SIGHUP (a terminal that closes), SIGUSR1,
SIGUSR2 (warnings of Slurm, LSF and Grid Engine before the time is up) and SIGXCPU (processor time) would end
a process that does not listen, with nothing saved. The exit code is the shell's for the signal, 128 + its
number, as for a process that was ended by it.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

CODES: dict[int, str] = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}  # of the result
CODES |= {
    getattr(signal, n): "terminated"
    for n in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, n)
}
# the second of these ends the process at once; of the others any number may come
ASKED = (signal.SIGTERM, signal.SIGINT)
# a launcher passes on what the batch system has sent to all alike: within this it is one request
SAME_S = 2.0


class Signals:
    """Listens while the loop runs. Outside the main thread Python gives no handlers, and the signals keep
    their own way.

    received   the first signal that came, or 0

    What is ignored at the start stays ignored (nohup, a shell's background). A warning for which the program
    has a handler of its own is the program's. Afterwards all is as it was.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}
        self._asked_at: float | None = None
        self._process = os.getpid()
        self._ends: tuple[socket.socket, socket.socket] | None = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            taken = _caught_outside_python()
            for number in CODES:
                before = signal.getsignal(number)
                free = before is signal.SIG_DFL and number not in taken
                if free or (number in ASKED and before not in (signal.SIG_IGN, None)):
                    self._before[number] = signal.signal(number, self._came)
            self._listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if self._ends is not None:
            signal.set_wakeup_fd(-1)
            self._ends[0].close()  # which ends the thread

    def _came(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked child is not the run: it ends, as if it had no handler
            os._exit(128 + number)
        self.received = self.received or number
        if self._ends is None:
            self._asked(number)

    def _asked(self, number: int) -> None:
        if number in ASKED and number in self._before:
            now = time.monotonic()
            if self._asked_at is not None and now - self._asked_at >= SAME_S:
                # what is whole on the disk stays whole; nothing else is touched any more
                os._exit(128 + number)
            self._asked_at = self._asked_at or now

    def _listen(self) -> None:
        """A thread hears the second one: the main thread runs handlers between its own steps, and a message
        between ranks whose other end is silent is a step of minutes."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        before = signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
        if before != -1:  # an event loop's; then the handlers must do
            signal.set_wakeup_fd(before, warn_on_full_buffer=False)
            ours.close()
            theirs.close()
            return
        self._ends = (ours, theirs)
        threading.Thread(target=self._hear, args=(theirs,), name="signals", daemon=True).start()

    def _hear(self, end: socket.socket) -> None:
        with end:
            while numbers := end.recv(64):
                for number in numbers:
                    self._asked(number)


def _caught_outside_python() -> set[int]:
    """Signals with a handler that Python does not know of (faulthandler.register, a library in C); none where
    none can say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    except (OSError, ValueError, StopIteration):
        return set()
    return {
        number
        for number in CODES
        if caught >> (number - 1) & 1 and signal.getsignal(number) is signal.SIG_DFL
    }


def _be_silent_in_a_fork() -> None:
    """What a child is sent must not be heard by its parent, with which it shares the way there."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_be_silent_in_a_fork)
