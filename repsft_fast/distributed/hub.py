"""Rank 0's end of the watch: who has come and proved to be of the launch, and the news of who is gone to all
others."""

from __future__ import annotations

import selectors
import socket
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from repsft_fast.distributed.handshake import HELLO_S, LINE_LIMIT_BYTES, proves, question
from repsft_fast.distributed.watch import REASON_LIMIT, REFUSED, LostRank, Watch, send
from repsft_fast.errors import describe

_STRANGERS = 64  # connections beside the ranks' own that may be about to say who they are
_PAUSE_S = 0.05


class Hub(Watch):
    """Rank 0's end: listens, counts who has come, passes on who is gone.

    Anybody may connect. Who has not proved within HELLO_S to be of the launch is dropped, the oldest first
    where there are too many, so that strangers cost a bounded number of connections and bytes; a rank that
    was dropped with them comes again.
    """

    def __init__(self, size: int, facts: dict[str, Any], token: str, listens: socket.socket):
        super().__init__(0, size)
        self.facts[0] = facts
        self._token = token
        self._ranks: dict[socket.socket, int] = {}
        # who has not answered: the question, until when; oldest first
        self._asked: dict[socket.socket, tuple[str, float]] = {}
        self._went: set[int] = set()
        self._listens = listens
        self.port: int = self._listens.getsockname()[1]
        self._listens.setblocking(False)  # a caller may be gone again before it is taken
        self._selector.register(self._listens, selectors.EVENT_READ)
        self._thread.start()

    def _say_that(self, lost: LostRank) -> None:
        self._to_all({"loss": asdict(lost)})

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
            send(connection, {"question": self._asked[connection][0]})

    def _forget(self, connection: socket.socket) -> None:
        self._asked.pop(connection, None)
        super()._forget(connection)

    def _heard(self, connection: socket.socket, message: dict[str, Any]) -> None:
        rank = self._ranks.get(connection)
        if rank is None:
            self._came(connection, message)
        elif isinstance(message.get("loss"), dict):
            code = message["loss"].get("code")
            self._told(
                LostRank(
                    rank,
                    str(message["loss"].get("words"))[:REASON_LIMIT],
                    code if isinstance(code, str) else None,
                )
            )
        elif "bye" in message:
            self._went.add(rank)

    def _came(self, connection: socket.socket, message: dict[str, Any]) -> None:
        asked, _ = self._asked.get(connection, ("", 0.0))
        if not asked:
            return  # a second line of a connection that is closed
        if not proves(self._token, asked, message):
            todo = "start all ranks with the same, and give each launch on a node its own MASTER_PORT"
            send(
                connection,
                {
                    "refused": describe(
                        "REPSFT_SECRET", "is not that of rank 0, or of another launch", todo=todo
                    )
                },
            )
            self._forget(connection)
            return
        rank, size, facts = message["rank"], message["size"], message["facts"]
        with self._lock:
            if wrong := self._unfit(rank, size):
                send(connection, {"refused": wrong})
                self._forget(connection)
                if not self.met.is_set():  # one rank has come twice, so another never will
                    self._told(LostRank(0, wrong, REFUSED))
                return
            del self._asked[connection]
            self._ranks[connection], self.facts[rank] = rank, facts
            send(connection, {"welcome": True})
            if self.lost is not None:
                send(connection, {"loss": asdict(self.lost)})
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
            return describe(
                "RANK", wrong, todo="give each its own, and each launch on a node its own MASTER_PORT"
            )
        return None

    def _hung_up(self, connection: socket.socket) -> None:
        rank = self._ranks.pop(connection, None)
        super()._hung_up(connection)
        if rank is None or self.left:
            return
        if rank not in self._went:
            self._told(LostRank(rank))
        elif self.lost is None or self.lost.rank != rank:
            return
        assert self.lost is not None
        self._to_all({"dead": asdict(self.lost)})
        self._dead(self.lost)

    def _told(self, lost: LostRank) -> None:
        if self._note(lost):
            self._to_all({"loss": asdict(lost)})

    def _to_all(self, message: dict[str, Any]) -> None:
        with self._lock:
            for connection in list(self._ranks):
                send(connection, message)
