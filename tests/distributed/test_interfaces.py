"""Ranks on a machine with no network but its loopback, or without that: named to gloo and NCCL, or refused in
words."""

import ctypes
import fcntl
import os
import socket
import struct

import pytest
import torch

from repsft_fast.distributed import World, interfaces
from repsft_fast.distributed.interfaces import VARIABLES, name_loopback, talking, up
from repsft_fast.distributed.lifecycle import start_alone
from repsft_fast.errors import ConfigError
from tests.helpers import ranks

LOOPBACK = {"lo": True}


@pytest.mark.parametrize(
    ("found", "given", "expected"),
    [
        (LOOPBACK, {}, {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}),
        (
            {"lo0": True},
            {"GLOO_SOCKET_IFNAME": ""},
            {"GLOO_SOCKET_IFNAME": "lo0", "NCCL_SOCKET_IFNAME": "lo0"},
        ),
        (LOOPBACK, {"NCCL_SOCKET_IFNAME": "ib0"}, {"NCCL_SOCKET_IFNAME": "ib0"}),
        (LOOPBACK, {"GLOO_SOCKET_IFNAME": "eth1"}, {"GLOO_SOCKET_IFNAME": "eth1"}),
        ({"lo": True, "eth0": False}, {}, {}),
        ({}, {}, {}),
        (None, {}, {}),
    ],
)
def test_the_loopback_is_named_where_it_is_all_and_nobody_has_named_another(found, given, expected):
    name_loopback(found, given)
    assert given == expected


def test_interfaces_of_this_machine():
    """Those the system lists, and the loopback among them by its own name."""
    found = up()
    assert found, "a test between ranks would not get far"
    assert found.keys() <= {name for _, name in socket.if_nameindex()}
    assert [name for name, loops in found.items() if loops] == [
        name for name in found if name.startswith("lo")
    ]


@pytest.mark.parametrize(
    ("found", "error"), [({}, ConfigError), (LOOPBACK, RuntimeError), (None, RuntimeError)]
)
def test_an_error_of_gloo_is_told_in_words_only_where_it_is_the_networks(found, error, monkeypatch):
    monkeypatch.setattr(interfaces, "up", lambda: found)
    monkeypatch.setattr(interfaces.os, "environ", {})
    with pytest.raises(error) as raised, talking():
        raise RuntimeError("Unable to find interface for: [127.0.0.1]")
    assert (type(raised.value) is ConfigError) == (error is ConfigError)


CLONE_NEWUSER, CLONE_NEWNET, SIOCSIFFLAGS, IFF_UP = 0x10000000, 0x40000000, 0x8914, 0x1


def set_flags(interface, flags):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", interface, flags))


def in_a_closed_machine(world):
    """In a network of its own: the words while its loopback is down, what is named and summed when it is up;
    or forbidden."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) and libc.unshare(CLONE_NEWUSER | CLONE_NEWNET):
        return None
    for name in VARIABLES:
        os.environ.pop(name, None)
    alone = World(0, 1, 0, torch.device("cpu"))
    try:
        start_alone(alone)
        words = "a group was made without an interface"
    except ConfigError as error:
        words = str(error)
    set_flags(b"lo", IFF_UP)
    start_alone(alone)
    ones = torch.ones(3)
    torch.distributed.all_reduce(ones)
    seen = [up()]
    set_flags(b"lo", 0)  # it keeps its address
    return words, [*seen, up()], [os.environ[name] for name in VARIABLES], ones.tolist()


def test_a_group_of_one_in_a_network_of_its_own():
    (found,) = ranks.run_ranks(in_a_closed_machine, size=1)
    if found is None:
        pytest.skip("this system lets nobody make a network namespace")
    words, seen, named, summed = found
    assert words.startswith(
        "network: no interface is up, not even the loopback, expected lo; bring the loopback up (ip link"
    )
    assert seen == [LOOPBACK, {}]
    assert named == ["lo", "lo"]
    assert summed == [1.0] * 3
