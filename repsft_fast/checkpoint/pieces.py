"""What a rank holds of a tensor: a range of rows of the whole, so that any number of ranks can read what
another wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from repsft_fast.errors import CheckpointError, describe


@dataclass(frozen=True)
class Piece:
    """Rows start … start + len(local) - 1 of a tensor of `shape`; all of it when unsharded."""

    local: Tensor  # [rows, ...]
    shape: tuple[int, ...]  # of the whole tensor
    start: int = 0
    writes: bool = True  # False on ranks that hold a replica another rank writes

    @property
    def rows(self) -> int:
        return self.local.shape[0] if self.shape else 1


def piece_of(name: str, tensor: Tensor | Piece, rank: int = 0) -> Piece:
    """The piece behind a tensor, a DTensor or a Piece. Plain tensors are the same on every rank, and rank 0
    writes them.

    Raises CheckpointError for DTensors that are not sharded in even or torch.chunk fashion along rows, or
    pending a sum.
    """
    if isinstance(tensor, Piece):
        return tensor
    if not hasattr(tensor, "placements"):
        return Piece(tensor.detach(), tuple(tensor.shape), 0, rank == 0)
    return _piece_of_dtensor(name, tensor)


def _piece_of_dtensor(name: str, tensor: Any) -> Piece:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    placements = tensor.placements
    if not all(p in (Replicate(), Shard(0)) for p in placements):
        raise CheckpointError(
            describe(
                f"state {name}", "is not sharded by rows", expected="Shard(0) or Replicate()", got=placements
            )
        )
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, placements)
    coordinate = tensor.device_mesh.get_coordinate()
    writes = all(c == 0 for c, p in zip(coordinate, placements) if p == Replicate())
    return Piece(tensor.to_local().detach(), tuple(tensor.shape), int(offset[0]) if offset else 0, writes)
