"""Whether several ranks keep the weights that they gathered for a row until the last row of its update:
decided when a run begins or goes on, by what fits, for all ranks alike.

Kept, an update of R rows gathers every layer once in place of 2 R times, for c bytes more of every parameter.
What is computed is the same bit for bit, so that a resumption, perhaps on other GPUs, decides anew.
"""

from __future__ import annotations

import torch

from repsft_fast.config import Config
from repsft_fast.distributed import World, broadcast_from_main, keep_gathered, min_over_hosts
from repsft_fast.memory.model_size import RESERVED
from repsft_fast.report.format import size
from repsft_fast.training.parts import Parts
from repsft_fast.training.policy import device_snapshot_bytes
from repsft_fast.training.sizes import fullest, shards_of


def decide(parts: Parts, room: int | None = None) -> str | None:
    """Decide and do it; what to say about it. All ranks call it, once everything else is there. room: bytes
    of this rank's GPU that are free or hold the run already; None: what it has, if there is one."""
    config, world = parts.config, parts.world
    room = room_bytes(world.device) if room is None else room
    if world.size == 1:
        return None
    asked = config.distributed.keep_gathered
    if isinstance(asked, bool):
        keep_gathered(parts.model, asked)
        return None
    (room_everywhere,) = min_over_hosts(world, -1 if room is None else room)
    stay, why = broadcast_from_main(world, list(_decided(parts, config, world, room_everywhere)))
    keep_gathered(parts.model, stay)
    return why


def _decided(parts: Parts, config: Config, world: World, room: int) -> tuple[bool, str | None]:
    if room < 0:
        return False, None  # ranks on CPUs share their memory
    sizes = parts.sizes
    chunk = parts.model.loss_settings.chunk_bytes
    peak = (
        fullest(config, sizes, world.size, parts.row_tokens, chunk_bytes=chunk, kept=True)
        if sizes is not None
        else None
    )
    snapshots = 0
    if sizes is not None:
        shards, tasks = shards_of(config, world.size), parts.num_tasks
        snapshots = device_snapshot_bytes(config, sizes.model, tasks=tasks, shards=shards, room=room)
    usable = int((room - snapshots) * (1 - RESERVED))
    if peak is None:
        why = sizes.why if sizes is not None else "no table of sizes"
        return False, f"gathered weights are dropped after every row: {why}"
    if peak.total > usable:
        return False, (
            f"gathered weights are dropped after every row: keeping them would take {size(peak.total)} of"
            f" {size(usable)}"
        )
    return True, (
        f"gathered weights stay from row to row of an update: {size(peak.total)} of {size(usable)} with them"
    )


def room_bytes(device: torch.device) -> int | None:
    """What is free on a GPU and what this process holds there; None on a CPU."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
