"""Optimizers by name behind one interface: `step(lr, found_inf, clip)`, state that snapshots and checkpoints
can name."""

from repsft_fast.optim.base import Optimizer, local, materialise, reset, state_bytes, state_tensors
from repsft_fast.optim.build import NAMES, OPTIMIZERS, build_optimizer

__all__ = [
    "NAMES",
    "OPTIMIZERS",
    "Optimizer",
    "build_optimizer",
    "local",
    "materialise",
    "reset",
    "state_bytes",
    "state_tensors",
]
