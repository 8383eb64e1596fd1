"""How ranks find each other: a store at MASTER_ADDR:MASTER_PORT says where rank 0 listens, and every rank goes there.

Nodes may start minutes apart, so a rank that nobody has seen is waited for, aloud. A rank that had come and is gone is known
at once (`watch`): the waiting ends with its name. All of this comes before the first message of a process group.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from repsft_fast.distributed.watch import Hub, Loss, Member, Watch, connect
from repsft_fast.errors import ConfigError, TrainingError, describe

MEETING_TIMEOUT_S = 600.0  # for the last rank to come
SPEAK_EVERY_S = 15.0  # what is waited for
_LOOK_S = 0.1
_TRY_S = 5.0  # a connection


def meet(
    rank: int, size: int, facts: dict[str, Any], *, timeout_s: float, store_timeout_s: float
) -> tuple[dist.Store, dict[int, dict[str, Any]], Watch]:
    """(a store all ranks share, what each said of itself, the watch over them), once all have come.

    facts: JSON, told to all. timeout_s: for all to come; store_timeout_s: of the store's own operations, for its later users.
    Environment: MASTER_ADDR and MASTER_PORT, where rank 0 (or torchrun's agent) keeps the store.
    TrainingError naming the ranks that have not come, or the one that came and is gone; ConfigError for an address that cannot
    be used.
    """
    wait = _Wait(rank, timeout_s)
    host, port = _address()
    store = _store(host, port, rank, size, store_timeout_s, wait)
    key = f"repsft/meeting/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    watch: Hub | Member
    if rank == 0:
        token = secrets.token_hex(16)
        watch = Hub(size, facts, token)
        store.set(key, f"{token} {watch.port} {' '.join(_own_addresses(host, port))}")
    else:
        watch = _member(store, key, host, rank, size, facts, wait)
    while not watch.met.wait(_LOOK_S):
        if watch.loss is not None:
            raise _given_up(watch, watch.loss)
        if rank == 0:
            missing = ", ".join(map(str, watch.missing()))
            if wait.over(f"rank {missing} to come"):
                words = f"rank {missing} has not come within {timeout_s:g} s"
                todo = "read its output, and whether its node was started"
                watch.tell(describe("start", words, todo=todo))
                watch.leave()
                raise TrainingError(describe("start", words, todo=todo))
    return store, watch.facts, watch


def _given_up(watch: Watch, loss: Loss) -> TrainingError:
    watch.leave()
    todo = "read its output, then start again"
    return TrainingError(str(loss) if loss.words else describe("start", f"rank {loss.rank} had come and is gone", todo=todo))


class _Wait:
    """The clock of one meeting; from time to time it says what is waited for."""

    def __init__(self, rank: int, limit_s: float):
        self.rank, self.limit_s, self.began = rank, limit_s, time.monotonic()
        self._next_words = SPEAK_EVERY_S

    def over(self, what: str) -> bool:
        waited = time.monotonic() - self.began
        if waited >= self._next_words:
            self._next_words = waited + SPEAK_EVERY_S
            words = f"rank {self.rank} waits for {what}: {waited:.0f} s of {self.limit_s:g} s"
            print(words, file=sys.stderr, flush=True)
        return waited >= self.limit_s


def _address() -> tuple[str, int]:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            todo = "launch with torchrun, or export it"
            raise ConfigError(describe(name, "is not set", expected="the address of rank 0", todo=todo))
    text = os.environ["MASTER_PORT"]
    if not text.isdecimal() or not 0 < int(text) < 1 << 16:
        raise ConfigError(describe("MASTER_PORT", "is not a port", expected="1 to 65535", got=text))
    return os.environ["MASTER_ADDR"], int(text)


def _store(host: str, port: int, rank: int, size: int, timeout_s: float, wait: _Wait) -> dist.Store:
    """Rank 0 keeps it, except under torchrun, whose agent does; the others wait for it quietly."""
    keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    while not keeps:
        found = connect([host], port, _TRY_S)
        if found is not None:
            found.close()
            break
        if wait.over(f"rank 0 at {host}:{port}"):
            wrong = f"rank 0 has not come to {host}:{port} within {wait.limit_s:g} s"
            raise TrainingError(describe("start", wrong, todo="read its output; MASTER_ADDR must name its node"))
        time.sleep(_LOOK_S)
    options: dict[str, Any] = {"wait_for_workers": False, "multi_tenant": True, "timeout": timedelta(seconds=timeout_s)}
    try:
        return dist.TCPStore(host, port, size, keeps, **options)
    except (dist.DistError, RuntimeError, ValueError) as error:
        if not keeps:
            raise TrainingError(describe("start", "rank 0 had come and is gone", got=_first_line(error))) from error
        todo = "choose another MASTER_PORT; MASTER_ADDR must name this node"
        raise ConfigError(describe("MASTER_PORT", "cannot be used", got=_first_line(error), todo=todo)) from error


def _member(store: dist.Store, key: str, host: str, rank: int, size: int, facts: dict[str, Any], wait: _Wait) -> Member:
    """This rank's connection to rank 0."""
    tried = "its address"
    while True:
        try:
            if store.check([key]):
                token, port, *addresses = store.get(key).decode().split()
                tried = f"{', '.join([host, *addresses])}, port {port}"
                connection = connect([host, *addresses], int(port), _TRY_S)
                if connection is not None:
                    return Member(rank, size, facts, token, connection)
        except (dist.DistError, RuntimeError) as error:  # the store's keeper has ended
            todo = "read its output, then start again"
            wrong = "rank 0 had come and is gone"
            raise TrainingError(describe("start", wrong, got=_first_line(error), todo=todo)) from error
        if wait.over(f"rank 0 ({tried})"):
            wrong = f"rank 0 could not be reached within {wait.limit_s:g} s"
            raise TrainingError(describe("start", wrong, got=tried, todo="let nodes connect to each other's ports"))
        time.sleep(_LOOK_S)


def _own_addresses(host: str, port: int) -> list[str]:
    """Where others may find this host besides MASTER_ADDR, which under torchrun can be another's."""
    found = [socket.gethostname()]
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing: it asks which way the master lies
        found.append(probe.getsockname()[0])
    return [address for address in found if not address.startswith("127.")]  # of this host only


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
