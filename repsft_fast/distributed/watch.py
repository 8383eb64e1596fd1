"""Who has come, and who is gone: every rank holds a connection to rank 0 open for as long as the run lives.

A connection that ends without a good-bye is a rank that is gone. The kernel closes it with the process, at
once; probes find a host that is gone, or cut off, after 25 s. There are no heartbeats: a rank that computes,
reads or waits for a disk for minutes is alive. Rank 0 hears of every end first and tells all others, so all
know the same name, on whatever node it ran.

A message between ranks that is under way when one dies fails by itself with gloo. What does not (NCCL, a
group being formed) is ended from here: `END_S` after the news the process says why and exits with 1, unless
it is `disarm`ed and needs nobody.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from repsft_fast.distributed.handshake import introduce

END_S = 30.0  # from the news to the end of a rank that still waits; with the probes' 25 s less than a minute
FORMING_S = 10.0  # the same while the group is formed: there is nothing to lose yet
# seconds, the last ms
_PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 25_000}
REASON_LIMIT = 4000  # characters
REFUSED = "refused"  # the code of a loss before the run: the launch itself is wrong
_SEND_S = 5.0


@dataclass(frozen=True)
class LostRank:
    """A rank that left before the run's end. words: why, as it said itself; empty when it died without a
    word."""

    rank: int
    words: str = ""
    code: str | None = None  # of the result, as in "out_of_memory"

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.words}" if self.words else f"rank {self.rank} is gone"


class Watch:
    """One rank's end of it. The thread of it never touches the device and never waits for the main one.

    facts   what every rank said of itself when it came, by rank; complete once `met` is set
    lost    the first rank that is gone, the same on all ranks
    """

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self.facts: dict[int, dict[str, Any]] = {}
        self.lost: LostRank | None = None
        self.left = self.told = False
        self.met, self._news, self._over = threading.Event(), threading.Event(), threading.Event()
        self._callbacks: list[Callable[[LostRank], None]] = []
        self._before_exit: Callable[[LostRank], None] | None = None
        self._patience_s, self._ends_at = FORMING_S, float("inf")
        self._lock = threading.RLock()
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._buffers: dict[socket.socket, bytes] = {}
        self._thread = threading.Thread(target=self._run, name="watch of the ranks", daemon=True)

    # For the main thread ----------------------------------------------------------------------------------

    def missing(self) -> list[int]:
        """Ranks that have not come; on others than rank 0 meaningful once `met` is set."""
        with self._lock:
            return [rank for rank in range(self.size) if rank not in self.facts]

    def wait_for_news(self, seconds: float) -> LostRank | None:
        """The loss, as soon as it is known; None when none is within so many seconds."""
        self._news.wait(seconds)
        return self.lost

    def formed(self) -> None:
        """The group stands: from now on a rank has END_S to end by itself."""
        self._patience_s = END_S

    def disarm(self) -> None:
        """What this rank does from here on needs no other rank, or fails by itself: it is not ended from
        here."""
        self._patience_s = self._ends_at = float("inf")

    def arm(self) -> None:
        """The opposite: it ends within END_S, whatever it waits for."""
        self._patience_s, self._ends_at = END_S, time.monotonic() + END_S
        self._stir()

    def on_rank_death(self, callback: Callable[[LostRank], None]) -> None:
        """Called by the watch's thread when a lost rank's process has ended: what has not come from it will
        not."""
        self._callbacks.append(callback)

    def before_exit(self, callback: Callable[[LostRank], None]) -> None:
        """Called by the watch's thread just before it ends the process."""
        self._before_exit = callback

    def tell(self, words: str, code: str | None = None) -> None:
        """This rank will leave: the others hear why, and wait for it no longer. The first reason counts."""
        if self.told:
            return
        self.told = True
        self._say_that(LostRank(self.rank, words[:REASON_LIMIT], code))

    def leave(self) -> None:
        """Good-bye. Without `tell` before, it is a good end and nobody's loss."""
        raise NotImplementedError

    def _say_that(self, lost: LostRank) -> None:
        raise NotImplementedError

    # For the thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._over.is_set():
            next_look = self._next_look()
            timeout = None if next_look == float("inf") else max(0.0, next_look - time.monotonic())
            for key, _ in self._selector.select(timeout):
                self._ready(key.fileobj)  # type: ignore[arg-type]
            if time.monotonic() >= self._ends_at and not self._over.is_set():
                self._end()

    def _next_look(self) -> float:
        return self._ends_at

    def _ready(self, connection: socket.socket) -> None:
        if connection is self._woken:
            self._woken.recv(64)
            return
        try:
            data = connection.recv(1 << 16)
        except OSError:
            data = b""
        lines = (self._buffers.get(connection, b"") + data).split(b"\n")
        self._buffers[connection] = lines.pop()
        for line in lines:
            self._heard(connection, _parsed(line))
        if not data:
            self._hung_up(connection)

    def _heard(self, connection: socket.socket, message: dict[str, Any]) -> None:
        raise NotImplementedError

    def _hung_up(self, connection: socket.socket) -> None:
        self._forget(connection)

    def _note(self, lost: LostRank) -> bool:
        """True for the first that is lost."""
        with self._lock:
            if self.lost is not None or self.left:
                return False
            self.lost = lost
        self._ends_at = time.monotonic() + self._patience_s
        self._news.set()
        return True

    def _dead(self, lost: LostRank) -> None:
        for callback in self._callbacks:
            with suppress(Exception):  # whatever befalls it, the others must be told and this rank must end
                callback(lost)

    def _end(self) -> None:
        lost = self.lost or LostRank(self.rank, "it did not end by itself")
        print(f"error (rank {self.rank})\n  {lost}; go on with --resume", file=sys.stderr, flush=True)
        if self._before_exit is not None:
            with suppress(Exception):
                self._before_exit(lost)
        os._exit(1)

    def _take_up(self, connection: socket.socket) -> None:
        connection.settimeout(_SEND_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _PROBES.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._buffers[connection] = b""
        self._selector.register(connection, selectors.EVENT_READ)

    def _forget(self, connection: socket.socket) -> None:
        self._buffers.pop(connection, None)
        with suppress(KeyError, ValueError):
            self._selector.unregister(connection)
        connection.close()

    def _stir(self) -> None:
        with suppress(OSError):
            self._wake.send(b".")

    def _close(self) -> None:
        self._over.set()
        self._stir()
        if threading.current_thread() is not self._thread and self._thread.is_alive():
            self._thread.join(_SEND_S)
        self.abandon()

    def abandon(self) -> None:
        """Close this process's copies of the connections and say nothing: also what a forked child does with
        them."""
        for connection in (*self._buffers, self._wake, self._woken):
            connection.close()
        self._selector.close()


class Member(Watch):
    """Another rank's end: one connection, to rank 0."""

    def __init__(self, rank: int, size: int, facts: dict[str, Any], token: str, connection: socket.socket):
        """LaunchError where rank 0 refuses this one; OSError where the connection ends first, which may be
        tried again."""
        introduce(connection, token, rank, size, facts)
        super().__init__(rank, size)
        self._connection = connection
        self._take_up(connection)
        self._thread.start()

    def _say_that(self, lost: LostRank) -> None:
        send(self._connection, {"loss": asdict(lost)})

    def leave(self) -> None:
        with self._lock:
            self.left = True
        send(self._connection, {"bye": True})
        self._close()

    def _heard(self, connection: socket.socket, message: dict[str, Any]) -> None:
        if "all" in message:
            self.facts = dict(enumerate(message["all"]))
            self.met.set()
        elif "loss" in message and message["loss"]["rank"] != self.rank:
            self._note(LostRank(**message["loss"]))
        elif "dead" in message:
            self._dead(LostRank(**message["dead"]))
        elif "bye" in message:
            with self._lock:
                self.left = True  # the run is over: nobody is lost any more

    def _hung_up(self, connection: socket.socket) -> None:
        super()._hung_up(connection)
        if not self.left:
            self._note(LostRank(0))
            assert self.lost is not None
            self._dead(self.lost)


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Best effort: who does not hear it has gone, and that is heard elsewhere."""
    with suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
