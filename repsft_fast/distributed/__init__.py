"""Ranks: which one this is (launch, world), how they meet and part (lifecycle; listening, handshake,
meeting), who is gone (watch, hub; lost), what they tell each other (collectives), the model over them
(sharding, reset, pace)."""

from repsft_fast.distributed.collectives import (
    DEFAULT_TIMEOUT_S,
    all_max,
    all_sum,
    barrier,
    broadcast_from_main,
    gather_everywhere,
    max_over_hosts,
    min_over_hosts,
    raise_together,
    same_everywhere,
)
from repsft_fast.distributed.interfaces import of_the_wire
from repsft_fast.distributed.launch import LaunchError, rank_from_environment
from repsft_fast.distributed.lifecycle import abort_launch, alone, lifecycle
from repsft_fast.distributed.lost import (
    LostRank,
    before_exit,
    disarm,
    error_naming,
    lost_rank,
    on_rank_death,
)
from repsft_fast.distributed.pace import Pace
from repsft_fast.distributed.reset import unfinished
from repsft_fast.distributed.sharding import (
    abort_pass,
    begin_row,
    check_groups,
    copies,
    decoder_layers,
    full_state,
    full_tensor,
    gathered_stay,
    grad_norm,
    held_parameters,
    keep_gathered,
    local,
    mesh_of,
    present_gradients,
    reshard,
    shard,
)
from repsft_fast.distributed.world import Links, World

__all__ = [
    "DEFAULT_TIMEOUT_S",
    "LaunchError",
    "Links",
    "LostRank",
    "Pace",
    "World",
    "abort_launch",
    "abort_pass",
    "all_max",
    "all_sum",
    "alone",
    "barrier",
    "before_exit",
    "begin_row",
    "broadcast_from_main",
    "check_groups",
    "copies",
    "decoder_layers",
    "disarm",
    "error_naming",
    "full_state",
    "full_tensor",
    "gather_everywhere",
    "gathered_stay",
    "grad_norm",
    "held_parameters",
    "keep_gathered",
    "lifecycle",
    "local",
    "lost_rank",
    "max_over_hosts",
    "mesh_of",
    "min_over_hosts",
    "of_the_wire",
    "on_rank_death",
    "present_gradients",
    "raise_together",
    "rank_from_environment",
    "reshard",
    "same_everywhere",
    "shard",
    "unfinished",
]
