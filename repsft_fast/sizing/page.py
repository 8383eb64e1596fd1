"""`repsft doctor --plan`: what models hold on 1, 8, 64 GPUs and how long a row fits, as a page of
markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from repsft_fast.errors import ConfigError, describe, did_you_mean
from repsft_fast.models.layers import CHECKPOINT_EVERY
from repsft_fast.models.load import config_of, load_model
from repsft_fast.ops.row_pass import CHUNK_SHARE, ONE_CHUNK_SHARE
from repsft_fast.optim import NAMES, OPTIMIZERS
from repsft_fast.report.format import count, size
from repsft_fast.sizing.known_models import MODELS
from repsft_fast.sizing.model_size import RESERVED, ModelSize
from repsft_fast.sizing.rehearsal import Saved, saved_per_token

GPU_COUNTS = (1, 8, 64)
WAYS = {"adamw": "float32", "adamw8bit": "bfloat16"}  # optimizer and how its weights are held, for the rows
MEMORIES = {"80 GB": 80 * 10**9, "141 GB": 141 * 10**9}
CHECKPOINTING = ("none", *reversed(CHECKPOINT_EVERY))  # none, selective, full
NOTES = f"""\
Full fine-tuning, computed in bf16; bytes of the GPU that holds most; a GiB is 2³⁰ bytes. Weights are fp32 \
in the first table
and beside adamw in the second; beside adamw8bit they and the gradients are bf16, rounded stochastically. A \
rank holds
⌈rows / GPUs⌉ rows of every parameter. A snapshot is weights, moments and counts, as many bytes on the \
device as in pinned host
memory; a checkpoint is one generation on disk over all GPUs, the state to resume from and the model folder \
(both: adamw).

Gathered: c · (root + 3 layers), on one GPU c · all; in flight: (c + 4) · max(root, 2 layers), with c = 2 \
bytes and parameters
counted. One GPU that computes in the type the weights are held in (adamw8bit) gathers nothing.
Head: 4 · H · V for its gradient; beside it come the row's logits, c · V a token, where they are at most \
1/{ONE_CHUNK_SHARE} of
what the state leaves free, else a chunk of 1/{CHUNK_SHARE} of the GPU's memory.
A token of a row: S for every layer that keeps its activations, c · H for one that is recomputed (full: all \
of them; selective:
every second), S once more while it is, the rest of the model, and 3 · c · H in the head. S is counted on \
the real module. For
Llama's plain layers it is 16 H + 4 A·D + 4 A_kv·D + 8 I + 4 A + 8 bytes; Liger's layers keep less, and \
longer rows fit.
Longest row: ({100 - 100 * RESERVED:.0f} % of the memory − state − gathered, in flight − head) / bytes of a \
token, in steps of
128, with no snapshot on the device; {100 * RESERVED:.0f} % are assumed taken by CUDA, NCCL and \
fragmentation. –: none fits.
"""


@dataclass(frozen=True)
class Sized:
    name: str
    sizes: dict[str, ModelSize]  # by the type the weights are held in
    saved: Saved

    @property
    def fp32(self) -> ModelSize:
        return self.sizes["float32"]


def sized(reference: str) -> Sized:
    """A model by name (SmolLM2-135M …), by config.json or its folder, or by hub id. ModelError,
    ConfigError."""
    known = {name.lower(): name for name in MODELS}
    name = known.get(reference.rsplit("/", 1)[-1].lower())
    near = did_you_mean(reference, MODELS)
    if name is None and near is not None and "/" not in reference:
        raise ConfigError(
            describe(
                "--models", "no model is known by this name", got=reference, todo=f"did you mean {near}?"
            )
        )
    config = config_of(MODELS[name] if name is not None else reference)
    options: dict[str, Any] = {"device": "meta", "compute_dtype": "bfloat16", "layer_kernels": "none"}
    sizes = {held: ModelSize.of(load_model(config, param_dtype=held, **options)) for held in WAYS.values()}
    return Sized(name or reference, sizes, saved_per_token(config))


def gpu_counts(text: str) -> tuple[int, ...]:
    """`1,8,64` as numbers. ConfigError."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise ConfigError(
            describe("--gpus", "is not a list of numbers", expected="for example 1,8,64", got=text)
        )
    return found


def page(references: Sequence[str] = tuple(MODELS), gpus: Sequence[int] = GPU_COUNTS) -> str:
    """The two tables and what their columns mean."""
    models = [sized(reference) for reference in references]
    state = [_state_line(model, ranks) for model in models for ranks in gpus]
    rows = [_row_line(model, ranks, optimizer) for model in models for ranks in gpus for optimizer in WAYS]
    state_head = [
        "model",
        "GPUs",
        "weights",
        "gradients",
        *(f"moments {name}" for name in NAMES),
        "snapshot",
        "checkpoint",
    ]
    token = [f"token, {choice}" for choice in CHECKPOINTING]
    longest = [f"row {memory}, {choice}" for memory in MEMORIES for choice in CHECKPOINTING]
    row_head = ["model", "GPUs", "optimizer", "gathered, in flight", "head", *token, *longest]
    return (
        f"State, per GPU\n\n{_table(state_head, state)}\nRows, per GPU\n\n{_table(row_head, rows)}\n{NOTES}"
    )


def _state_line(model: Sized, ranks: int) -> list[str]:
    held = model.fp32.held("adamw", ranks)
    moments = [
        "–" if ranks > 1 and not OPTIMIZERS[name].shardable else size(model.fp32.held(name, ranks).moments)
        for name in NAMES
    ]  # whose blocks run over the flat shard: they run on one rank only
    state = [
        size(held.weights),
        size(held.gradients),
        *moments,
        size(held.snapshot),
        size(model.fp32.checkpoint("adamw")),
    ]
    return [f"{model.name} ({count(model.fp32.count)})", str(ranks), *state]


def _row_line(model: Sized, ranks: int, optimizer: str) -> list[str]:
    shape = model.sizes[WAYS[optimizer]]
    token = [size(shape.row(model.saved, choice)) for choice in CHECKPOINTING]
    longest = [
        shape.longest_row(memory, optimizer, ranks, model.saved, choice)
        for memory in MEMORIES.values()
        for choice in CHECKPOINTING
    ]
    shown = [f"{tokens:,}" if tokens else "–" for tokens in longest]
    return [
        model.name,
        str(ranks),
        optimizer,
        size(shape.passing(ranks)),
        size(shape.head(0)),
        *token,
        *shown,
    ]


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, rule, *lines])
