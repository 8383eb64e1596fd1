"""A run small enough for milliseconds and real in every part: packed rows, several an update, sharded in
bf16, 8-bit moments.

Its vocabulary of 1,000 takes a variant of the row kernel that other tests compile too; its heads are of a
size that flash attention takes.
"""

from pathlib import Path
from typing import Any

import torch

from repsft_fast.config import Config
from repsft_fast.data.plan import Update
from repsft_fast.distributed import local
from repsft_fast.training.build import build
from repsft_fast.training.parts import Parts
from repsft_fast.training.snapshots import closed_list
from repsft_fast.training.step import train_step
from tests.helpers import runs

MODEL = runs.MODEL | {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
SETTINGS = {
    "model__config": MODEL,
    "model__compute_dtype": "bfloat16",  # the default on a GPU; on a CPU it takes the same way through FSDP2
    "model__layer_kernels": "none",  # liger would change transformers' functions for the tests that follow
    "model__compile": False,
    "batch__samples": 12,
    "batch__row_tokens": 64,  # two or three rows an update
    "budget__epochs": 100,
    "stop__token_accuracy": None,
    "optim__lr": 1e-3,
}


def settings_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """Deterministic unless told otherwise; `changes` as in `runs.settings`."""
    return runs.settings(folder, samples=48, **SETTINGS | changes)


def parts_of(folder: Path, **changes: Any) -> Parts:
    return build(Config.of(settings_of(folder, **changes)))


def updates_of(parts: Parts) -> list[Update]:
    return list(parts.plan.epoch(0, 0))


def steps(parts: Parts, count: int) -> None:
    """`count` updates from where the run stands, epoch after epoch."""
    for _ in range(count):
        epoch = parts.plan.epoch(0, parts.progress.epoch)
        update = epoch[parts.progress.update]
        train_step(parts, update)
        parts.step_done(update, len(epoch))
        if parts.progress.update == len(epoch):
            parts.progress.next_epoch()


def losses(parts: Parts) -> list[float]:
    return [record.loss for record in parts.ledger.read()]


def state_of(parts: Parts) -> str:
    """The hash of everything mutable of the run."""
    return closed_list(parts).hash()


def gradients_of(parts: Parts) -> dict[str, torch.Tensor]:
    """Copies, in float64 on the CPU."""
    return {name: local(p.grad).detach().double().cpu() for name, p in parts.optimizer.names.items()}
