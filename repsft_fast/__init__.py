"""Fast, exact fine-tuning on little data, many times over, and on mixtures of tasks.

from repsft_fast import train
result = train("run.yaml", {"optim.lr": 2e-5})

from repsft_fast import dry_run
dry_run("run.yaml", {"optim.lr": 2e-5})    # prints what that run would do

from repsft_fast import linear_cross_entropy, TokenStats    # the fused head in anybody's loop
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["Config", "TokenStats", "dry_run", "linear_cross_entropy", "train"]

# Loaded on first use: `repsft --help` and `import repsft_fast` must not wait for torch.
_HOMES = {
    "Config": "repsft_fast.config",
    "TokenStats": "repsft_fast.stats",
    "dry_run": "repsft_fast.sizing.dry_run",
    "linear_cross_entropy": "repsft_fast.ops.linear_cross_entropy",
    "train": "repsft_fast.training.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'repsft_fast' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
