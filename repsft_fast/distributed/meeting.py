"""How ranks find each other: a store at MASTER_ADDR:MASTER_PORT says where rank 0 listens, and every rank
goes there.

Nodes may start minutes apart, so a rank that nobody has seen is waited for, aloud. A rank that had come and
is gone is known at once (`watch`): the waiting ends with its name. All of this comes before the first message
of a process group.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from repsft_fast.distributed import listening
from repsft_fast.distributed.hub import Hub
from repsft_fast.distributed.launch import LaunchError, say
from repsft_fast.distributed.listening import NotKnownYet
from repsft_fast.distributed.watch import REFUSED, LostRank, Member, Watch
from repsft_fast.errors import ConfigError, TrainingError, describe, spelled

MEETING_TIMEOUT_S = 600.0  # for the last rank to come
SPEAK_EVERY_S = 15.0  # what is waited for
NAME_S = 30.0  # for the name of rank 0's own host to be known on it
_LOOK_S = 0.1
_TRY_S = 5.0  # a connection


def meet(
    rank: int, size: int, facts: dict[str, Any], *, timeout_s: float, store_timeout_s: float
) -> tuple[dist.Store, dict[int, dict[str, Any]], Watch]:
    """(a store all ranks share, what each said of itself, the watch over them), once all have come.

    facts: JSON, told to all. timeout_s: for all to come; store_timeout_s: of the store's own operations, for
    its later users. Environment: MASTER_ADDR and MASTER_PORT, where rank 0 (or torchrun's agent) keeps the
    store. TrainingError naming the ranks that have not come, or the one that came and is gone; ConfigError
    for an address that cannot be used.
    """
    wait = _Wait(rank, timeout_s)
    host, port = _address()
    store = _store(host, port, rank, size, store_timeout_s, wait)
    # A launcher that starts all ranks again keeps the store: every start has a name of its own in it.
    key = f"repsft/meeting/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    watch: Hub | Member
    if rank == 0:
        token = secrets.token_hex(16)
        listens, addresses = listening.of_the_meeting(host, port)
        watch = Hub(size, facts, token, listens)
        store.set(key, f"{token} {watch.port} {' '.join(addresses)}")
    else:
        watch = _member(store, key, host, rank, size, facts, wait)
    # Nobody waits longer than for the one who is missing, and hears who that is.
    while not watch.met.wait(_LOOK_S):
        if watch.lost is not None:
            raise _given_up(watch, watch.lost)
        if rank == 0:
            missing = _some(watch.missing())
            if wait.over(f"rank {missing} to come to {', '.join(addresses)}"):
                words = f"rank {missing} has not come within {timeout_s:g} s"
                todo = (
                    "read its output, whether its node was started and whether it can reach"
                    f" {', '.join(addresses)}"
                )
                watch.tell(describe("start", words, todo=todo))
                watch.leave()
                raise TrainingError(describe("start", words, todo=todo))
    return store, watch.facts, watch


def _given_up(watch: Watch, lost: LostRank) -> TrainingError | ConfigError:
    watch.leave()
    if lost.code == REFUSED:  # a second process of one rank: all that had come hear it
        return ConfigError(lost.words)
    todo = "read its output, then start again"
    return TrainingError(
        str(lost) if lost.words else describe("start", f"rank {lost.rank} had come and is gone", todo=todo)
    )


def _some(ranks: list[int], most: int = 16) -> str:
    return ", ".join(map(str, ranks[:most])) + (f" and {len(ranks) - most} more" if len(ranks) > most else "")


class _Wait:
    """The clock of one meeting; from time to time it says what is waited for."""

    def __init__(self, rank: int, limit_s: float):
        self.rank, self.limit_s, self.began = rank, limit_s, time.monotonic()
        self._next_words = SPEAK_EVERY_S

    def over(self, what: str) -> bool:
        waited = time.monotonic() - self.began
        if waited >= self._next_words:
            self._next_words = waited + SPEAK_EVERY_S
            say(f"rank {self.rank} waits for {what}: {waited:.0f} s of {self.limit_s:g} s")
        return waited >= self.limit_s


def _address() -> tuple[str, int]:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name, "").strip():
            todo = "launch with torchrun, or export it; to train with one process export WORLD_SIZE=1"
            raise LaunchError(describe(name, "is not set", expected="the address of rank 0", todo=todo))
    text = os.environ["MASTER_PORT"].strip()
    if not (text.isascii() and text.isdecimal() and len(text) < 6 and 0 < int(text) < 1 << 16):
        raise LaunchError(describe("MASTER_PORT", "is not a port", expected="1 to 65535", got=text))
    host = os.environ["MASTER_ADDR"].strip()
    if not _can_be_a_host(host):
        expected = "a host's name or number, without a scheme or a port"
        todo = "name rank 0's node as the others reach it; one name, not a list"
        raise LaunchError(
            describe("MASTER_ADDR", "cannot be a host", expected=expected, got=spelled(host), todo=todo)
        )
    return host, int(text)


def _can_be_a_host(host: str) -> bool:
    """False for what no resolver can ever know: `http://x`, `host:29500`, `node[1-4]`, `node..x`, a label
    over 63 letters."""
    try:
        if ":" in host:
            return bool(ipaddress.IPv6Address(host))
        host.encode("idna")
    except ValueError:  # a UnicodeError is one
        return False
    return len(host) < 255 and re.fullmatch(r"[\w.-]+", host) is not None


def _store(host: str, port: int, rank: int, size: int, timeout_s: float, wait: _Wait) -> dist.Store:
    """Rank 0 keeps it, except under torchrun, whose agent does; the others wait for it quietly."""
    options: dict[str, Any] = {
        "wait_for_workers": False,
        "multi_tenant": True,
        "timeout": timedelta(seconds=timeout_s),
    }
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return _kept_store(host, port, size, options, wait)
    while (found := _connect([host], port, _TRY_S)) is None:
        known = "" if _is_known(host) else ", a name that is not known here"
        if wait.over(f"rank 0 at {host}:{port}{known}"):
            wrong = f"rank 0 has not come to {host}:{port} within {wait.limit_s:g} s"
            raise TrainingError(
                describe("start", wrong + known, todo="read its output; MASTER_ADDR must name its node")
            )
        time.sleep(_LOOK_S)
    address = found.getpeername()[0]  # of those the name stands for the one that answers
    found.close()
    try:
        return _client(address, port, size, options, wait)
    except (dist.DistError, RuntimeError, ValueError) as error:
        if isinstance(error, TrainingError):
            raise
        raise TrainingError(
            describe("start", "rank 0 had come and is gone", got=_first_line(error))
        ) from error


def _client(address: str, port: int, size: int, options: dict[str, Any], wait: _Wait) -> dist.Store:
    """A member's end of the store. torch waits without end for the first answer: in a thread, so that this
    one can speak."""
    made: list[dist.Store | BaseException] = []
    done = threading.Event()

    def make() -> None:
        try:
            made.append(dist.TCPStore(address, port, size, False, **options))
        except BaseException as error:
            made.append(error)
        done.set()

    threading.Thread(target=make, name="repsft-store", daemon=True).start()
    while not done.wait(_LOOK_S):
        if wait.over(f"an answer from {address}, port {port}, where something listens and says nothing"):
            wrong = (
                f"what listens at {address}, port {port}, has not answered within {wait.limit_s:g} s and may"
                " not be rank 0"
            )
            raise TrainingError(
                describe("start", wrong, todo="look at what listens there, or choose another MASTER_PORT")
            )
    if isinstance(made[0], BaseException):
        raise made[0]
    return made[0]


def _kept_store(host: str, port: int, size: int, options: dict[str, Any], wait: _Wait) -> dist.Store:
    """The store of rank 0, on a socket of ours: torch's own listens on all interfaces."""
    while True:
        try:
            listens, address = listening.of_the_store(host, port)
            return dist.TCPStore(address, port, size, True, master_listen_fd=listens.detach(), **options)
        except NotKnownYet as error:
            wait.over(f"{error} (MASTER_ADDR)")
            if time.monotonic() - wait.began > min(NAME_S, wait.limit_s):
                todo = "name rank 0's node, which is this one"
                raise LaunchError(describe("MASTER_ADDR", "is not known here", got=host, todo=todo)) from None
            time.sleep(_LOOK_S)
        except LaunchError:
            raise
        except (OSError, dist.DistError, RuntimeError, ValueError) as error:
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            if taken and (own := _of_this_process(host, port, size, options)) is not None:
                return own
            wrong = "is taken by another process" if taken else "cannot be used"
            todo = "choose another MASTER_PORT, and give every process its own RANK: one alone may be rank 0"
            raise LaunchError(
                describe("MASTER_PORT", wrong, got=f"{port} ({_first_line(error)})", todo=todo)
            ) from error


def _of_this_process(host: str, port: int, size: int, options: dict[str, Any]) -> dist.Store | None:
    """The store of an earlier run in this process, which may still be held by somebody."""
    try:
        return dist.TCPStore(host, port, size, True, **options)
    except (dist.DistError, RuntimeError, ValueError):
        return None


def _is_known(host: str) -> bool:
    try:
        return bool(listening.addresses(host))
    except NotKnownYet:
        return False


def _member(
    store: dist.Store, key: str, host: str, rank: int, size: int, facts: dict[str, Any], wait: _Wait
) -> Member:
    """This rank's connection to rank 0."""
    tried = "its address"
    while True:
        try:
            if store.check([key]):
                token, port, *addresses = store.get(key).decode().split()
                tried = f"{', '.join(addresses or [host])}, port {port}"
                connection = _connect(addresses or [host], int(port), _TRY_S)
                if connection is not None:
                    member = _introduced(rank, size, facts, token, connection)
                    if member is not None:
                        return member
        except (dist.DistError, RuntimeError) as error:  # the store's keeper has ended
            todo = "read its output, then start again"
            wrong = "rank 0 had come and is gone"
            raise TrainingError(describe("start", wrong, got=_first_line(error), todo=todo)) from error
        if wait.over(f"rank 0 ({tried})"):
            wrong = f"rank 0 could not be reached within {wait.limit_s:g} s"
            raise TrainingError(
                describe("start", wrong, got=tried, todo="let nodes connect to each other's ports")
            )
        time.sleep(_LOOK_S)


def _connect(addresses: Sequence[str], port: int, seconds: float) -> socket.socket | None:
    """A connection to the first of a host's addresses that takes one; None when none does."""
    for address in addresses:
        with suppress(OSError, UnicodeError):
            return socket.create_connection((address, port), timeout=seconds)
    return None


def _introduced(
    rank: int, size: int, facts: dict[str, Any], token: str, connection: socket.socket
) -> Member | None:
    """None where the connection ended before rank 0 had answered: strangers crowd it, or this is an older
    launch's port."""
    try:
        return Member(rank, size, facts, token, connection)
    except BaseException as error:
        connection.close()
        if isinstance(error, OSError):
            return None
        raise


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
