"""The checksum of csrc_triton.state_hash over host memory, block after block while it is read.

    h(x) = M2 · Σ_i half(w_i + i·GOLDEN)  +  mix(nbytes ^ SALT)      (mod 2^64),   mix(w) = M2 · half(w)

The same number, since a product is distributive: one multiplication for the whole sum instead of one a word.
numpy and not torch, because its unsigned words shift logically without a mask and its calls cost less.

A chunk is as large as this for two threads' sake: every operation gives the interpreter's lock back and asks
for it again, and threads with small operations wait for it most of the time.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csrc_triton.state_hash import GOLDEN, MULTIPLY_1, MULTIPLY_2, SALT, SHIFT_1, SHIFT_2, checksums, mix_int

CHUNK_WORDS = 1 << 16
_ALL = (1 << 64) - 1
_kept = threading.local()  # buffers: fresh memory means page faults


class HostChecksum:
    """Used like hashlib's: update(block) again and again, then hexdigest()."""

    def __init__(self) -> None:
        self._sum, self._bytes = 0, 0

    def update(self, block: np.ndarray[Any, np.dtype[np.uint8]]) -> None:  # [bytes] uint8, contiguous
        """Adds the next bytes. Raises ValueError after a block that was no whole number of 64-bit words."""
        if self._bytes % 8:
            raise ValueError("the block before this one ended in the middle of a word")
        whole = len(block) // 8 * 8
        self._add(block[:whole].view(np.uint64), self._bytes // 8)
        if whole < len(block):
            rest = np.zeros(8, np.uint8)
            rest[: len(block) - whole] = block[whole:]
            self._add(rest.view(np.uint64), (self._bytes + whole) // 8)
        self._bytes += len(block)

    def hexdigest(self) -> str:
        return f"{self.digest():016x}"

    def digest(self) -> int:  # unsigned
        return (self._sum * MULTIPLY_2 + mix_int(self._bytes ^ SALT)) & _ALL

    def _add(self, words: np.ndarray[Any, np.dtype[np.uint64]], first: int) -> None:
        steps, word, scratch = _buffers()
        for start in range(0, len(words), CHUNK_WORDS):
            chunk = words[start : start + CHUNK_WORDS]
            a, b = word[: len(chunk)], scratch[: len(chunk)]
            np.add(chunk, steps[: len(chunk)], out=a)
            np.add(a, np.uint64((first + start) * GOLDEN & _ALL), out=a)
            np.right_shift(a, np.uint64(SHIFT_1), out=b)
            np.bitwise_xor(a, b, out=a)
            np.multiply(a, np.uint64(MULTIPLY_1 & _ALL), out=a)
            np.right_shift(a, np.uint64(SHIFT_2), out=b)
            np.bitwise_xor(a, b, out=a)
            self._sum += int(np.add.reduce(a))


def _buffers() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(i·GOLDEN, two of scratch) [CHUNK_WORDS] uint64, this thread's own."""
    if not hasattr(_kept, "buffers"):
        steps = np.arange(CHUNK_WORDS, dtype=np.uint64) * np.uint64(GOLDEN & _ALL)
        _kept.buffers = (steps, np.empty_like(steps), np.empty_like(steps))
    return _kept.buffers


def host_checksums(tensors: Sequence[Tensor]) -> list[int]:
    """What csrc_triton.state_hash.checksums gives, which tensors on a device are handed on to: unsigned, by
    row-major bytes."""
    found = [_of(t) if t.device.type == "cpu" else None for t in tensors]
    others = iter(checksums([t for t in tensors if t.device.type != "cpu"]))
    return [next(others) if one is None else one for one in found]


def _of(tensor: Tensor) -> int:
    made = HostChecksum()
    made.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return made.digest()
