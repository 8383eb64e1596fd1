"""Page-locked memory that rows travel from, used again and again.

Memory is page-locked by the driver, which takes it tens of microseconds to milliseconds and may wait for the
device. So a buffer goes round: it is taken, written, copied from, and given back with an event that the
device reaches when the copy is done. Until then nobody gets it. Where all are on their way another one is
made; the host waits for a copy only when MOST of them are.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST = 64  # buffers on their way at once: so many rows the host may be ahead of the device
LEAST_BYTES = 1 << 16  # sizes are powers of two from here on, so that rows of all lengths share a few


@dataclass(frozen=True)
class Staged:
    """Page-locked bytes, and the event behind the last copy from them."""

    memory: Tensor  # [n] uint8 on the host
    copied: Any  # torch.cuda.Event


class Staging:
    """The buffers of one store. Threads may share them: one that is taken belongs to who took it."""

    def __init__(self) -> None:
        self._given_back: deque[Staged] = deque()  # the oldest first
        self.made = 0  # buffers page-locked so far

    def take(self, nbytes: int) -> Staged:
        """A buffer of at least so many bytes, undefined, that no copy reads any more."""
        try:
            staged = self._given_back.popleft()
        except IndexError:
            return self._make(nbytes)
        if not staged.copied.query():
            if len(self._given_back) + 1 < MOST:
                self._given_back.appendleft(staged)
                return self._make(nbytes)
            staged.copied.synchronize()
        # One that is too small is let go: rows are as large as the one that is asked for.
        return staged if staged.memory.numel() >= nbytes else self._make(nbytes)

    def give_back(self, staged: Staged, stream: Any) -> None:
        """stream: torch.cuda.Stream that the copy from the buffer was put on, just before."""
        staged.copied.record(stream)
        self._given_back.append(staged)

    def _make(self, nbytes: int) -> Staged:
        self.made += 1
        size = max(1 << (nbytes - 1).bit_length(), LEAST_BYTES)
        return Staged(torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())
