"""How a rank shows rank 0 that it is of this launch: it answers a question with a keyed digest (HMAC-SHA256,
RFC 2104).

The key is rank 0's token, which travels through the store, and REPSFT_SECRET where the environment has one,
which travels nowhere. The store asks nobody for a password: without a secret, who can read it can come as a
rank (docs/cluster.md).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import socket
from typing import Any

from repsft_fast.distributed.launch import LaunchError

SECRET = "REPSFT_SECRET"
HELLO_S = 10.0  # from the connection to the proof
LINE_LIMIT_BYTES = 1 << 16  # of what a rank says; what rank 0 says grows with the ranks


def question() -> str:
    return secrets.token_hex(16)


def proof(token: str, asked: str, rank: int, size: int) -> str:
    key = f"{token} {os.environ.get(SECRET, '')}".encode()
    return hmac.new(key, f"{asked} {rank} {size}".encode(), hashlib.sha256).hexdigest()


def proves(token: str, asked: str, message: dict[str, Any]) -> bool:
    """Whether this answers the question: of some rank of some number of ranks, which may still be wrong."""
    said, rank, size = (message.get(name) for name in ("proof", "rank", "size"))
    if not isinstance(said, str) or not said.isascii() or type(rank) is not int or type(size) is not int:
        return False
    return isinstance(message.get("facts"), dict) and hmac.compare_digest(
        said, proof(token, asked, rank, size)
    )


def introduce(connection: socket.socket, token: str, rank: int, size: int, facts: dict[str, Any]) -> None:
    """A rank's side, until rank 0 has said that it is welcome. LaunchError in rank 0's words; OSError: try
    again."""
    connection.settimeout(HELLO_S)
    asked = str(_line(connection).get("question"))
    hello = {"rank": rank, "size": size, "proof": proof(token, asked, rank, size), "facts": facts}
    connection.sendall(json.dumps(hello).encode() + b"\n")
    answer = _line(connection)
    if "refused" in answer:
        raise LaunchError(str(answer["refused"]))
    if "welcome" not in answer:
        raise OSError("no answer of rank 0's")


def _line(connection: socket.socket) -> dict[str, Any]:
    """One line and no byte more: what follows is for the watch."""
    data = b""
    while not data.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(data) > LINE_LIMIT_BYTES:
            raise OSError("it ended within a line")
        data += byte
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise OSError("not rank 0's line")
    return found
