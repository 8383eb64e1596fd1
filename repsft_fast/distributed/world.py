"""Who a process is among the ranks of a launch, and what joins it to them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from repsft_fast.distributed.watch import Watch


@dataclass(eq=False)
class Links:
    """Of one launch, filled when it has begun (`lifecycle`); both None again once this rank has left, and in
    a forked child."""

    control: dist.ProcessGroup | None = None  # gloo, for messages between hosts; None = the default group
    watch: Watch | None = None


@dataclass(frozen=True)
class World:
    """links: None alone, or in a group that somebody else has made."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    links: Links | None = field(default=None, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """The one rank that prints and writes."""
        return self.rank == 0

    @property
    def control(self) -> dist.ProcessGroup | None:
        """The group of messages between hosts; None = the default group."""
        return self.links.control if self.links is not None else None

    @property
    def watch(self) -> Watch | None:
        """Who is gone; None where nobody can tell."""
        return self.links.watch if self.links is not None else None
