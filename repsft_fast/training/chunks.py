"""Into how many chunks the head's logits go: decided once for a run, because their number decides how sums
are rounded.

A run's first process decides: what loss.chunk_bytes says; else, on a GPU, by the memory that weights, moments
and gradients leave free (`ops.row_pass.gpu_chunk_bytes`, for the longest row there can be); else, on a CPU,
None: by shape, the same at any time. The value stands in run.yaml and in every checkpoint, and a resumption
takes it from there, whatever is free then (`training.decided`). Halved rows after memory ran out keep it:
they are held by it too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from repsft_fast.config import Config
from repsft_fast.distributed import World, local, min_over_hosts
from repsft_fast.ops.row_pass import gpu_chunk_bytes, logits_dtype
from repsft_fast.report.format import size
from repsft_fast.training.parts import Parts
from repsft_fast.training.samples import rows_asked

NAME, SETTING = "chunk_bytes", "loss.chunk_bytes"


def decide(config: Config, world: World, model: Any) -> int | None:
    """Bytes of logits held at once, the same on every rank; None: by shape. All ranks call it, once the
    optimizer is there."""
    if config.loss.chunk_bytes is not None:
        return int(config.loss.chunk_bytes)
    if world.device.type != "cuda":
        return None
    total, room = min_over_hosts(
        world, torch.cuda.get_device_properties(world.device).total_memory, room_bytes(world.device, model)
    )
    itemsize = logits_dtype(world.device, model.compute_dtype).itemsize
    vocabulary = model.get_output_embeddings().weight.shape[0]
    return gpu_chunk_bytes(rows_asked(config), vocabulary, itemsize, total_bytes=total, room_bytes=room)


def room_bytes(device: torch.device, model: Any) -> int:
    """Memory of the GPU that is free, in the allocator's pool or not, less the gradients that are still to
    come."""
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    trained = [p for p in model.parameters() if p.requires_grad and p.grad is None]
    return max(0, free - sum(local(p).numel() * (p.grad_dtype or p.dtype).itemsize for p in trained))


def set_chunk_bytes(model: Any, chunk_bytes: int | None) -> None:
    model.loss_settings = replace(model.loss_settings, chunk_bytes=chunk_bytes)


# As an item of `training.decided` -------------------------------------------------------------------------


def now(parts: Parts) -> int | None:
    """What this run uses."""
    chunk_bytes: int | None = parts.model.loss_settings.chunk_bytes
    return chunk_bytes


def use(parts: Parts, value: int | None) -> None:
    set_chunk_bytes(parts.model, value)


def words(value: int | None) -> str:
    return "by shape" if value is None else f"{value:,} bytes ({size(value)})"


def before(parts: Parts) -> None:
    """1/64 of a GPU's memory, or what loss.chunk_bytes said then, which nobody wrote down."""


def written(value: int | None) -> int | None:
    return value
