"""Where the seconds of a save go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass


@dataclass
class SaveSeconds:
    """Seconds of the saving thread, by a monotonic clock. No second is in two of them, and some are in
    none."""

    copy: float = 0.0  # bytes from a device, or from between strides, to contiguous host memory
    hash: float = 0.0  # checksums
    look: float = 0.0  # for numbers that are not finite
    write: float = 0.0  # to files, which may be the page cache
    fsync: float = 0.0  # until they are durable
    model: float = 0.0  # the model's own folder for from_pretrained, its checksums and fsync apart
    wait: float = 0.0  # for the parts of other ranks

    @contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """What runs inside counts as `kind`. Not to be nested."""
        began = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, kind, getattr(self, kind) + time.perf_counter() - began)

    def named(self) -> dict[str, float]:
        """{copy_seconds: …}, as metrics.jsonl says it."""
        return {f"{kind}_seconds": seconds for kind, seconds in asdict(self).items()}
