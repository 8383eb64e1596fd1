"""Where rank 0 listens: on the one interface that MASTER_ADDR names, not on all that the machine has.

What listens there is the store and the meeting. gloo and NCCL listen on interfaces of their own choice
(`interfaces`), and torchrun's agent keeps its store on all. A name that is the loopback on its own host (a
line `127.0.1.1 node001` in /etc/hosts is common) is another address to the other hosts, which no one here can
know: then all interfaces, and it is said.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from contextlib import suppress

from repsft_fast.distributed.launch import LaunchError, on_one_host, say
from repsft_fast.errors import describe

LISTEN = "REPSFT_LISTEN"  # an address of this host in MASTER_ADDR's place; 0.0.0.0 or :: for all
_ALL = ("0.0.0.0", "::")
_BACKLOG = 4096  # the kernel's limit cuts it


class NotKnownYet(Exception):
    """A name that does not resolve; in some clusters it will in a moment."""


def of_the_store(host: str, port: int) -> tuple[socket.socket, str]:
    """(a listening socket at MASTER_ADDR, the address that leads there from here). Rank 0's, which keeps the
    store.

    LaunchError for an address that is not this host's; NotKnownYet for a name; OSError EADDRINUSE for a port
    that is taken.
    """
    asked = os.environ.get(LISTEN) or host
    found = addresses(asked)
    if not os.environ.get(LISTEN) and _hidden_behind_loopback(host, found):
        say(
            f"rank 0 listens on all interfaces: {host} is {found[0]} on its own host, where no other reaches"
            f" it; to listen on one, give MASTER_ADDR, or {LISTEN} here, as the number that others reach"
        )
        return _all(port), host
    for address in found:
        if address in _ALL:
            return _all(port), host
        try:
            return _bound(address, port), address
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    raise _not_ours(asked, found)


def _not_ours(asked: str, found: list[str]) -> LaunchError:
    name = LISTEN if os.environ.get(LISTEN) else "MASTER_ADDR"
    wrong = f"is no address of this host ({socket.gethostname()}), where rank 0 runs"
    got = asked if asked in found else f"{asked} ({', '.join(found)})"
    todo = (
        "name rank 0's host; where it is reached by an address it does not have itself, export"
        f" {LISTEN}=0.0.0.0 on it"
    )
    return LaunchError(describe(name, wrong, got=got, todo=todo))


def of_the_meeting(host: str, port: int) -> tuple[socket.socket, list[str]]:
    """(a listening socket at a port of the kernel's choice, the addresses at which others may find it)."""
    asked = os.environ.get(LISTEN) or host
    with suppress(OSError, NotKnownYet):
        found = addresses(asked)
        if not _hidden_behind_loopback(host, found) or os.environ.get(LISTEN):
            for address in found:
                if address in _ALL:
                    break
                with suppress(OSError):
                    return _bound(address, 0), [address]
            if os.environ.get(LISTEN) and not any(address in _ALL for address in found):
                raise _not_ours(asked, found)
            way = _way_to(host, port)  # torchrun's agent keeps the store, and its host may be another
            if way is not None and not loopback(way) and not os.environ.get(LISTEN):
                return _bound(way, 0), [way]
    more = [socket.gethostname(), _way_to(host, port)]
    return _all(0), [host, *(address for address in more if address and not address.startswith("127."))]


def addresses(host: str) -> list[str]:
    """What a name stands for here, version 4 first. NotKnownYet where it stands for nothing."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise NotKnownYet(f"{host} is not known here") from error
    numbers = [str(entry[4][0]) for entry in sorted(found, key=lambda entry: entry[0] != socket.AF_INET)]
    return list(dict.fromkeys(numbers))


def loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _hidden_behind_loopback(host: str, found: list[str]) -> bool:
    meant = loopback(host) or host.lower().rstrip(".").split(".")[0] in ("localhost", "ip6-localhost")
    return not meant and all(map(loopback, found)) and not on_one_host()


def _bound(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=_BACKLOG)


def _all(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:  # a kernel may know IPv6 and a container forbid it
            return socket.create_server(
                ("", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True
            )
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
    return socket.create_server(("", port), backlog=_BACKLOG)


def _way_to(host: str, port: int) -> str | None:
    """This host's address on the way to another; a datagram socket that is connected sends nothing."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError, UnicodeError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))
            return str(probe.getsockname()[0])
    return None
