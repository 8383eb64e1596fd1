"""safetensors files, written and read in ranges.

    8 bytes little-endian n │ n bytes of JSON {name: {dtype, shape, data_offsets: [start, stop]}} │ data

Our own few lines instead of the library's writer, because a shard is streamed from the device in chunks,
synced, and can be killed in its middle by a test; the library reads what is written here, which a test
asserts. Nothing is memory-mapped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repsft_fast.checkpoint.files import parse_json, read_exactly
from repsft_fast.checkpoint.hostsum import HostChecksum
from repsft_fast.checkpoint.seconds import SaveSeconds
from repsft_fast.errors import CheckpointError, describe
from repsft_fast.files import write_file

HEADER_LIMIT_BYTES = 100_000_000  # the format's own limit
CHUNK_BYTES = 1 << 25
READ_BLOCK_BYTES = 1 << 20  # a whole number of words; still in the cache when it is summed
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Stretch:
    """Where a tensor's bytes lie in a shard file."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # from the beginning of the file
    nbytes: int


def _raw(tensor: Tensor) -> Tensor:  # any -> [bytes] uint8
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def write_shard(
    path: Path, tensors: Mapping[str, Tensor], what: str, seconds: SaveSeconds | None = None
) -> int:
    """Writes and syncs one file; returns its bytes. Needs host memory for one chunk. Raises OSError,
    CheckpointError."""
    # The header comes first in the file, so that every place in it must be known.
    seconds = seconds or SaveSeconds()
    header, offset = {}, 0
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                describe(f"state {name}", "has a dtype safetensors does not know", got=tensor.dtype)
            )
        nbytes = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    # Drawn by the writer one after the other: one chunk stands on the host.
    def chunks() -> Iterator[Any]:
        yield len(text).to_bytes(8, "little") + text
        for tensor in tensors.values():
            with seconds.of("copy"):
                raw = _raw(tensor)
            for start in range(0, raw.numel(), CHUNK_BYTES):
                with seconds.of("copy"):
                    data = raw[start : start + CHUNK_BYTES].cpu().numpy().data
                yield data

    return write_file(path, chunks(), what, seconds.of)


def read_header(fd: int, where: str) -> dict[str, Stretch]:
    """What a shard file says it holds. Raises CheckpointError unless every claim fits the file, without gaps
    or overlaps."""
    # The length is the first thing a hostile file would lie about: nothing is read by it unchecked.
    size = os.fstat(fd).st_size
    head = bytearray(8)
    if size < 8:
        raise CheckpointError(describe(where, "is truncated", expected="at least 8 bytes", got=size))
    read_exactly(fd, memoryview(head), 0, where)
    length = int.from_bytes(head, "little")
    if length > min(HEADER_LIMIT_BYTES, size - 8):
        if head[:1] == b"\x80" or head[:2] == b"PK":
            raise CheckpointError(
                describe(where, "is a pickle or zip archive, which is never read", expected="safetensors")
            )
        raise CheckpointError(
            describe(where, "has an impossible header length", expected=f"at most {size - 8}", got=length)
        )
    text = bytearray(length)
    read_exactly(fd, memoryview(text), 8, where)
    entries = parse_json(bytes(text), f"{where} (header)")
    if not isinstance(entries, dict):
        raise CheckpointError(describe(where, "has a header that is no table"))
    entries.pop("__metadata__", None)
    found = {
        name: _stretch(entry, 8 + length, f"{where} (header of {name})") for name, entry in entries.items()
    }
    # Two tensors in the same bytes, or bytes of none, are no file of ours.
    at = 8 + length
    for name, stretch in sorted(found.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if stretch.start != at:
            raise CheckpointError(
                describe(where, f"has a gap or overlap before {name}", expected=at, got=stretch.start)
            )
        at += stretch.nbytes
    if at != size:
        raise CheckpointError(
            describe(
                where, "has another size than its header says", expected=f"{at:,} bytes", got=f"{size:,}"
            )
        )
    return found


def _stretch(entry: Any, base: int, where: str) -> Stretch:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = (
            len(shape) <= 16
            and all(type(n) is int and 0 <= n < 1 << 48 for n in (*shape, start, stop))
            and dtype in DTYPES
        )
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize if whole else -1
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(describe(where, "is malformed", got=repr(entry))) from error
    if not whole or nbytes != stop - start:
        raise CheckpointError(describe(where, "contradicts itself", got=repr(entry)))
    return Stretch(dtype, shape, base + start, nbytes)


def read_summed(fd: int, stretch: Stretch, where: str, into: Tensor | None = None) -> str:
    """The checksum of one tensor's bytes, block after block while they are in the cache, and the bytes in
    `into`.

    into    host memory, contiguous, of the stretch's size; None: they are looked at and not kept
    """
    summed = HostChecksum()
    # a view, never a copy: it is written to
    kept = None if into is None else into.view(-1).view(torch.uint8).numpy()
    passing = np.empty(min(stretch.nbytes, READ_BLOCK_BYTES) if kept is None else 0, np.uint8)
    for start in range(0, stretch.nbytes, READ_BLOCK_BYTES):
        stop = min(start + READ_BLOCK_BYTES, stretch.nbytes)
        block = passing[: stop - start] if kept is None else kept[start:stop]
        read_exactly(fd, block.data, stretch.start + start, where)
        summed.update(block)
    return summed.hexdigest()
