"""Who has come, and who is gone: every rank holds a connection to rank 0 open for as long as the run lives.

A connection that ends without a good-bye is a rank that is gone. The kernel closes it with the process, at once; probes find a
host that is gone, or cut off, after 25 s. There are no heartbeats: a rank that computes, reads or waits for a disk for minutes
is alive. Rank 0 hears of every end first and tells all others, so all know the same name, on whatever node it ran.

A message between ranks that is under way when one dies fails by itself with gloo. What does not (NCCL, a group being formed) is
ended from here: `END_S` after the news the process says why and exits with 1, unless it is `at_ease` and needs nobody.
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

from repsft_fast.distributed.handshake import HELLO_S, LINE_LIMIT_BYTES, introduce, proves, question
from repsft_fast.errors import describe

END_S = 30.0  # from the news to the end of a rank that still waits; with the probes' 25 s less than a minute
FORMING_S = 10.0  # the same while the group is formed: there is nothing to lose yet
_PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 25_000}  # seconds, the last ms
_WORDS = 4000  # characters of a reason
_STRANGERS = 64  # connections beside the ranks' own that may be about to say who they are
REFUSED = "refused"  # the code of a loss before the run: the launch itself is wrong
_SEND_S, _PAUSE_S = 5.0, 0.05


@dataclass(frozen=True)
class Loss:
    """A rank that left before the run's end. words: why, as it said itself; empty when it died without a word."""

    rank: int
    words: str = ""
    code: str | None = None  # of the result, as in "out_of_memory"

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.words}" if self.words else f"rank {self.rank} is gone"


class Watch:
    """One rank's end of it. The thread of it never touches the device and never waits for the main one.

    facts   what every rank said of itself when it came, by rank; complete once `met` is set
    loss    the first rank that was lost, the same on all ranks
    """

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self.facts: dict[int, dict[str, Any]] = {}
        self.loss: Loss | None = None
        self.left = self.told = False
        self.met, self._news, self._over = threading.Event(), threading.Event(), threading.Event()
        self._callbacks: list[Callable[[Loss], None]] = []
        self._last_words: Callable[[Loss], None] | None = None
        self._patience_s, self._ends_at = FORMING_S, float("inf")
        self._lock = threading.RLock()
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._buffers: dict[socket.socket, bytes] = {}
        self._thread = threading.Thread(target=self._run, name="watch of the ranks", daemon=True)

    # For the main thread ---------------------------------------------------------------------------------------------

    def missing(self) -> list[int]:
        """Ranks that have not come; on others than rank 0 meaningful once `met` is set."""
        with self._lock:
            return [rank for rank in range(self.size) if rank not in self.facts]

    def wait_for_news(self, seconds: float) -> Loss | None:
        """The loss, as soon as it is known; None when none is within so many seconds."""
        self._news.wait(seconds)
        return self.loss

    def formed(self) -> None:
        """The group stands: from now on a rank has END_S to end by itself."""
        self._patience_s = END_S

    def at_ease(self) -> None:
        """What this rank does from here on needs no other rank, or fails by itself: it is not ended from here."""
        self._patience_s = self._ends_at = float("inf")

    def hurry(self) -> None:
        """The opposite: it ends within END_S, whatever it waits for."""
        self._patience_s, self._ends_at = END_S, time.monotonic() + END_S
        self._stir()

    def when_dead(self, callback: Callable[[Loss], None]) -> None:
        """Called by the watch's thread when a lost rank's process has ended: what has not come from it will not."""
        self._callbacks.append(callback)

    def last_words(self, callback: Callable[[Loss], None]) -> None:
        """Called by the watch's thread just before it ends the process."""
        self._last_words = callback

    def tell(self, words: str, code: str | None = None) -> None:
        """This rank will leave: the others hear why, and wait for it no longer. The first reason counts."""
        if self.told:
            return
        self.told = True
        self._say_that(Loss(self.rank, words[:_WORDS], code))

    def leave(self) -> None:
        """Good-bye. Without `tell` before, it is a good end and nobody's loss."""
        raise NotImplementedError

    def _say_that(self, loss: Loss) -> None:
        raise NotImplementedError

    # For the thread --------------------------------------------------------------------------------------------------

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

    def _lost(self, loss: Loss) -> bool:
        """True for the first loss."""
        with self._lock:
            if self.loss is not None or self.left:
                return False
            self.loss = loss
        self._ends_at = time.monotonic() + self._patience_s
        self._news.set()
        return True

    def _dead(self, loss: Loss) -> None:
        for callback in self._callbacks:
            with suppress(Exception):  # whatever befalls it, the others must be told and this rank must end
                callback(loss)

    def _end(self) -> None:
        loss = self.loss or Loss(self.rank, "it did not end by itself")
        print(f"error (rank {self.rank})\n  {loss}; go on with --resume", file=sys.stderr, flush=True)
        if self._last_words is not None:
            with suppress(Exception):
                self._last_words(loss)
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
        """Close this process's copies of the connections and say nothing: also what a forked child does with them."""
        for connection in (*self._buffers, self._wake, self._woken):
            connection.close()
        self._selector.close()


class Hub(Watch):
    """Rank 0's end: listens, counts who has come, passes on who is gone.

    Anybody may connect. Who has not proved within HELLO_S to be of the launch is dropped, the oldest first where there are too
    many, so that strangers cost a bounded number of connections and bytes; a rank that was dropped with them comes again.
    """

    def __init__(self, size: int, facts: dict[str, Any], token: str, listens: socket.socket):
        super().__init__(0, size)
        self.facts[0] = facts
        self._token = token
        self._ranks: dict[socket.socket, int] = {}
        self._asked: dict[socket.socket, tuple[str, float]] = {}  # who has not answered: the question, until when; oldest first
        self._went: set[int] = set()
        self._listens = listens
        self.port: int = self._listens.getsockname()[1]
        self._listens.setblocking(False)  # a caller may be gone again before it is taken
        self._selector.register(self._listens, selectors.EVENT_READ)
        self._thread.start()

    def _say_that(self, loss: Loss) -> None:
        self._to_all({"loss": asdict(loss)})

    def leave(self) -> None:
        with self._lock:
            self.left = True
            self._to_all({"bye": True})
        self._close()

    def abandon(self) -> None:
        self._listens.close()
        super().abandon()

    def _next_look(self) -> float:
        """Drops who was asked too long ago; the oldest comes first."""
        now = time.monotonic()
        for connection, (_, until) in list(self._asked.items()):
            if until > now and len(self._asked) <= self.size + _STRANGERS:
                return min(until, self._ends_at)
            self._forget(connection)
        return self._ends_at

    def _ready(self, connection: socket.socket) -> None:
        if connection is self._listens:
            self._ask()
        elif connection is self._woken or connection in self._buffers:  # it may have been dropped meanwhile
            super()._ready(connection)
            if len(self._buffers.get(connection, b"")) > LINE_LIMIT_BYTES:
                self._hung_up(connection)

    def _ask(self) -> None:
        try:
            connection = self._listens.accept()[0]
        except BlockingIOError:
            return
        except OSError:  # no descriptor is left, which may pass
            time.sleep(_PAUSE_S)
            return
        with suppress(OSError):
            self._take_up(connection)
            self._asked[connection] = (question(), time.monotonic() + HELLO_S)
            _send(connection, {"question": self._asked[connection][0]})

    def _forget(self, connection: socket.socket) -> None:
        self._asked.pop(connection, None)
        super()._forget(connection)

    def _heard(self, connection: socket.socket, message: dict[str, Any]) -> None:
        rank = self._ranks.get(connection)
        if rank is None:
            self._came(connection, message)
        elif isinstance(message.get("loss"), dict):
            code = message["loss"].get("code")
            self._told(Loss(rank, str(message["loss"].get("words"))[:_WORDS], code if isinstance(code, str) else None))
        elif "bye" in message:
            self._went.add(rank)

    def _came(self, connection: socket.socket, message: dict[str, Any]) -> None:
        asked, _ = self._asked.get(connection, ("", 0.0))
        if not asked:
            return  # a second line of a connection that is closed
        if not proves(self._token, asked, message):
            todo = "start all ranks with the same, and give each launch on a node its own MASTER_PORT"
            _send(connection, {"refused": describe("REPSFT_SECRET", "is not that of rank 0, or of another launch", todo=todo)})
            self._forget(connection)
            return
        rank, size, facts = message["rank"], message["size"], message["facts"]
        with self._lock:
            if wrong := self._unfit(rank, size):
                _send(connection, {"refused": wrong})
                self._forget(connection)
                if not self.met.is_set():  # one rank has come twice, so another never will
                    self._told(Loss(0, wrong, REFUSED))
                return
            del self._asked[connection]
            self._ranks[connection], self.facts[rank] = rank, facts
            _send(connection, {"welcome": True})
            if self.loss is not None:
                _send(connection, {"loss": asdict(self.loss)})
            elif len(self.facts) == self.size:
                self._to_all({"all": [self.facts[number] for number in range(self.size)]})
                self.met.set()

    def _unfit(self, rank: int, size: int) -> str | None:
        """Why a process of this launch is none of its ranks, in words; None where it is."""
        if size != self.size:
            wrong = f"is {size} on rank {rank} and {self.size} on rank 0"
            return describe("WORLD_SIZE", wrong, todo="start all ranks with the same number of them")
        if not 0 <= rank < size:
            return describe("RANK", "is not one of the ranks", expected=f"0 to {size - 1}", got=rank)
        if rank in self.facts:
            wrong = f"two processes say that they are rank {rank}"
            return describe("RANK", wrong, todo="give each its own, and each launch on a node its own MASTER_PORT")
        return None

    def _hung_up(self, connection: socket.socket) -> None:
        rank = self._ranks.pop(connection, None)
        super()._hung_up(connection)
        if rank is None or self.left:
            return
        if rank not in self._went:
            self._told(Loss(rank))
        elif self.loss is None or self.loss.rank != rank:
            return
        assert self.loss is not None
        self._to_all({"dead": asdict(self.loss)})
        self._dead(self.loss)

    def _told(self, loss: Loss) -> None:
        if self._lost(loss):
            self._to_all({"loss": asdict(loss)})

    def _to_all(self, message: dict[str, Any]) -> None:
        with self._lock:
            for connection in list(self._ranks):
                _send(connection, message)


class Member(Watch):
    """Another rank's end: one connection, to rank 0."""

    def __init__(self, rank: int, size: int, facts: dict[str, Any], token: str, connection: socket.socket):
        """LaunchError where rank 0 refuses this one; OSError where the connection ends first, which may be tried again."""
        introduce(connection, token, rank, size, facts)
        super().__init__(rank, size)
        self._connection = connection
        self._take_up(connection)
        self._thread.start()

    def _say_that(self, loss: Loss) -> None:
        _send(self._connection, {"loss": asdict(loss)})

    def leave(self) -> None:
        with self._lock:
            self.left = True
        _send(self._connection, {"bye": True})
        self._close()

    def _heard(self, connection: socket.socket, message: dict[str, Any]) -> None:
        if "all" in message:
            self.facts = dict(enumerate(message["all"]))
            self.met.set()
        elif "loss" in message and message["loss"]["rank"] != self.rank:
            self._lost(Loss(**message["loss"]))
        elif "dead" in message:
            self._dead(Loss(**message["dead"]))
        elif "bye" in message:
            with self._lock:
                self.left = True  # the run is over: nobody is lost any more

    def _hung_up(self, connection: socket.socket) -> None:
        super()._hung_up(connection)
        if not self.left:
            self._lost(Loss(0))
            assert self.loss is not None
            self._dead(self.loss)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Best effort: who does not hear it has gone, and that is heard elsewhere."""
    with suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
