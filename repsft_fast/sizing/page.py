"""`repsft doctor --plan`: what models hold on 1, 8, 64 GPUs and how long a row fits, as a page of
markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from repsft_fast.errors import ConfigError, describe, did_you_mean
from repsft_fast.memory.activations import Saved, saved_per_token
from repsft_fast.memory.model_size import CHECKPOINTING, RESERVED, ModelSize
from repsft_fast.models.load import config_of, load_model
from repsft_fast.ops.row_pass import CHUNK_SHARE, ONE_CHUNK_SHARE
from repsft_fast.optim import NAMES, OPTIMIZERS
from repsft_fast.report.format import count, size
from repsft_fast.sizing.known_models import MODELS
from repsft_fast.training.row_tokens import LONGEST

GPU_COUNTS = (1, 8, 64)
WAYS = {"adamw": "float32", "adamw8bit": "bfloat16"}  # optimizer and how its weights are held, for the rows
MEMORIES = {"80 GB": 80 * 10**9, "141 GB": 141 * 10**9}
GPUS = {f"{gigabytes} GB": gigabytes * 10**9 for gigabytes in (24, 48, 80, 141)}  # one of these
GOOD_ROW, LEAST_ROW = 8_192, 2_048  # tokens: what a GPU is kept busy by; below, a row is not worth its pass
LORA = {"rank": 16}
NOTES = f"""\
Full fine-tuning, computed in bf16; bytes of the GPU that holds most; a GiB is 2³⁰ bytes.

- What is trained is fp32 in the first table and beside adamw in the second: on one GPU as masters beside bf16
  weights, on several as the weights. Beside adamw8bit weights and gradients are bf16, rounded stochastically.
- A rank holds ⌈rows / GPUs⌉ rows of every parameter. A snapshot is what is trained, moments and counts, as
  many bytes on the device as in pinned host memory; a checkpoint is one generation on disk over all GPUs, the
  state to resume from and the model folder (both: adamw).
- Gathered, on several GPUs: c · (root + 3 layers), or c · (all + 1 layer) where they stay from row to row
  (kept: where there is room); in flight: (c + 4) · max(root, 2 layers), with c = 2 bytes and parameters
  counted. One GPU gathers nothing; the largest matrix of a layer passes in bf16 and as its gradient.
- Head: its gradient [V, H]; beside it come the row's logits, c · V a token, where they are at most
  1/{ONE_CHUNK_SHARE} of what the state leaves free, else a chunk of 1/{CHUNK_SHARE} of the GPU's memory.
- A token of a row: S for every layer that keeps its activations, c · H for one that is recomputed (full: all
  of them; selective: every second), the rest of the model, and 3 · c · H in the head. While a layer is gone
  back through: S once more if it is recomputed, and what its backward pass needs beside it. S is counted on
  the real module: for Llama's plain layers 16 H + 4 A·D + 4 A_kv·D + 8 I + 4 A + 8 bytes. Liger's and
  compiled layers keep less, and longer rows fit.
- Longest row: in steps of 128, the longest whose fullest moment takes {100 - 100 * RESERVED:.0f} % of the
  memory, trained whole, with the gradients of other rows beside it and no snapshot on the device;
  {100 * RESERVED:.0f} % are assumed taken by CUDA, NCCL and fragmentation. –: none fits.
- One GPU: batch.row_tokens (at most {LONGEST:,}, as auto proposes) and model.activation_checkpointing, the
  least that allows rows of {GOOD_ROW:,}; rows from {LEAST_ROW:,} on with full. adamw: fp32 masters (the
  defaults); adamw8bit: with model.param_dtype: bfloat16; lora: model.lora.rank: {LORA["rank"]} with adamw.
  model.compile stays as it is: the figures are those of plain layers, which hold most.
"""


@dataclass(frozen=True)
class Sized:
    name: str
    sizes: dict[str, ModelSize]  # by the type the weights are held in
    saved: Saved
    adapters: tuple[ModelSize, Saved] | None = None  # the same with LoRA

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
    adapters = ModelSize.of(load_model(config, lora=LORA, **options)), saved_per_token(config, lora=LORA)
    return Sized(name or reference, sizes, saved_per_token(config), adapters)


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
    """The tables and what their columns mean."""
    models = [sized(reference) for reference in references]
    state = [_state_line(model, ranks) for model in models for ranks in gpus]
    rows = [_row_line(model, ranks, optimizer) for model in models for ranks in gpus for optimizer in WAYS]
    state_head = [
        "model",
        "GPUs",
        "weights",
        "masters",
        "gradients",
        *(f"moments {name}" for name in NAMES),
        "snapshot",
        "checkpoint",
    ]
    token = [f"token, {choice}" for choice in CHECKPOINTING]
    longest = [f"row {memory}, {choice}" for memory in MEMORIES for choice in CHECKPOINTING]
    row_head = ["model", "GPUs", "optimizer", "gathered, in flight", "kept", "head", *token, *longest]
    alone = [_settings_line(model, way) for model in models for way in ("adamw", "adamw8bit", "lora")]
    tables = {
        "State, per GPU": _table(state_head, state),
        "Rows, per GPU": _table(row_head, rows),
        "Settings, one GPU": _table(["model", "trained", *GPUS], alone),
    }
    return "".join(f"{title}\n\n{table}\n" for title, table in tables.items()) + NOTES


def _settings_line(model: Sized, way: str) -> list[str]:
    """For every GPU the row and the checkpointing that are proposed."""
    if way == "lora":
        assert model.adapters is not None
        (shape, saved), optimizer = model.adapters, "adamw"
    else:
        shape, saved, optimizer = model.sizes[WAYS[way]], model.saved, way
    cells = []
    for memory in GPUS.values():
        longest = {c: shape.longest_row(memory, optimizer, 1, saved, c) for c in CHECKPOINTING}
        chosen = next((c for c in CHECKPOINTING if longest[c] >= GOOD_ROW), CHECKPOINTING[-1])
        row = min(longest[chosen], LONGEST)
        cells.append(f"{row:,}, {chosen}" if row >= LEAST_ROW else "–")
    return [model.name, way, *cells]


def _state_line(model: Sized, ranks: int) -> list[str]:
    held = model.fp32.held("adamw", ranks)
    moments = [
        "–" if ranks > 1 and not OPTIMIZERS[name].shardable else size(model.fp32.held(name, ranks).moments)
        for name in NAMES
    ]  # whose blocks run over the flat shard: they run on one rank only
    state = [
        size(held.weights),
        size(held.masters) if held.masters else "–",
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
        size(shape.passing(ranks, kept=True)) if ranks > 1 else "–",
        size(shape.head(0)),
        *token,
        *shown,
    ]


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, rule, *lines])
