"""The network interface that gloo and NCCL talk through, on a machine that has none but its loopback, or not
even that.

A group of one rank sends nothing and still listens somewhere. Left to themselves both look for the machine's
name and for other interfaces first, and take the loopback last; where nothing else is up it is named to them.
That is right for several ranks too: a machine that reaches no other holds them all.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from repsft_fast.errors import ConfigError, describe

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_SIOCGIFFLAGS, _SIOCGIFADDR = 0x8913, 0x8915  # Linux, netdevice(7)
_IFF_UP, _IFF_LOOPBACK = 0x1, 0x8


@contextmanager
def talking() -> Iterator[None]:
    """A process group is made inside. ConfigError in place of gloo's own where no interface is up at all."""
    found = up()
    name_loopback(found, os.environ)
    try:
        yield
    except RuntimeError as error:
        if found is None or found:
            raise
        todo = (
            "bring the loopback up (ip link set lo up, where the machine or container is set up), or hold the"
            " weights in the type that is computed in (model.param_dtype, model.compute_dtype), which needs"
            " no group on one device"
        )
        raise ConfigError(
            describe("network", "no interface is up, not even the loopback", expected="lo", todo=todo)
        ) from error


def name_loopback(found: Mapping[str, bool] | None, environment: MutableMapping[str, str]) -> None:
    """Set both variables to the loopback where it is all there is (`found`, of `up`) and the user has set
    neither."""
    if found and all(found.values()) and not any(environment.get(name) for name in VARIABLES):
        environment.update(dict.fromkeys(VARIABLES, next(iter(found))))


def up() -> dict[str, bool] | None:
    """Interfaces that are up and have an address, each with whether it is a loopback; None where that cannot
    be asked.

    Asked of the kernel for this process's own network namespace; /sys may show another's.
    """
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            found = {}
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                (flags,) = struct.unpack("16xH238x", fcntl.ioctl(probe, _SIOCGIFFLAGS, request))
                if flags & _IFF_UP and (name in _with_ipv6() or _has_ipv4(probe, request)):
                    found[name] = bool(flags & _IFF_LOOPBACK)
            return found
    except (ImportError, OSError):
        return None


def _has_ipv4(probe: socket.socket, request: bytes) -> bool:
    import fcntl

    try:
        fcntl.ioctl(probe, _SIOCGIFADDR, request)
    except OSError:
        return False
    return True


def _with_ipv6() -> set[str]:
    """Names of interfaces with an address of version 6: the last word of every line."""
    try:
        return {line.split()[-1] for line in Path("/proc/net/if_inet6").read_text().splitlines() if line}
    except OSError:
        return set()


def of_the_wire(error: BaseException) -> bool:
    """Whether an error is of messages between ranks: a rank that is gone or silent, not something this one
    did."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    text = str(error).partition("\n")[0].lower()
    return isinstance(error, RuntimeError) and any(
        word in text for word in ("gloo", "connection", "nccl", "timed out")
    )
