"""SIGTERM and SIGINT: the first asks the run to end after this update, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

CODES: dict[int, str] = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}  # of the result


class Signals:
    """Listens while the loop runs. Outside the main thread Python gives no handlers, and the signals keep their own way.

    received   the first signal that came, or 0
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._came) for number in CODES}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _came(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)  # what is whole on the disk stays whole; nothing else is touched any more
        self.received = number
