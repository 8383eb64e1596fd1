"""Checkpoints: the closed list of state on disk, across runs. Whole generations only, no pickle, every byte
accounted for.

frozen snapshot ──thread──▶ .writing-gen-n/ shards, values, hf/, MANIFEST ──rename──▶ gen-n/ ──▶ LATEST ──▶
prune LATEST's branch ──▶ newest whole generation ──verify all──▶ live tensors
"""

from repsft_fast.checkpoint.background import BackgroundWriter, Outcome
from repsft_fast.checkpoint.manifest import (
    Manifest,
    folder_name,
    generations,
    move_latest,
    number_of,
    read_latest,
    read_manifest,
)
from repsft_fast.checkpoint.pieces import Piece
from repsft_fast.checkpoint.reader import (
    ForeignCheckpoint,
    Generation,
    Resumed,
    candidates,
    load,
    newest,
    resume,
    values_of,
    verify,
)
from repsft_fast.checkpoint.retention import clean, prune
from repsft_fast.checkpoint.writer import next_generation, save
from repsft_fast.files import crash_point, set_crash_hook

__all__ = [
    "BackgroundWriter",
    "ForeignCheckpoint",
    "Generation",
    "Manifest",
    "Outcome",
    "Piece",
    "Resumed",
    "candidates",
    "clean",
    "crash_point",
    "folder_name",
    "generations",
    "load",
    "move_latest",
    "newest",
    "next_generation",
    "number_of",
    "prune",
    "read_latest",
    "read_manifest",
    "resume",
    "save",
    "set_crash_hook",
    "values_of",
    "verify",
]
