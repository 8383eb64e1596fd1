"""Compiled layers get their graphs before the first update: for every shape a row can have, forward and
backward, and those of evaluations. What is compiled then is not compiled in the loop (law 8).

Nothing of the run moves: random streams, gradients, counts, weights and moments are what they were. A layer
that cannot be compiled, or computes something else compiled, leaves all layers of all ranks plain, once and
for the run (`training.compiled`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from repsft_fast.config import Config
from repsft_fast.distributed import decoder_layers, raise_together
from repsft_fast.errors import ModelError
from repsft_fast.models.compiled import CompiledLayers, Shape, compiled_layers
from repsft_fast.row import Row
from repsft_fast.training.parts import Parts
from repsft_fast.training.samples import cache_folder

_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
TRAINED = 8  # positions of a row here that reach the head; it is not what is warmed
_MANY = (
    "layers stay plain: rows take many lengths, and each would be compiled for; batch.row_lengths: auto and"
    " batch.bucket_tokens: auto compile them, and so does model.compile: true"
)


def warm_up(parts: Parts, say: Callable[[str], None]) -> float:
    """Make the graphs that are missing for the rows of today's plan. All ranks call it; where layers are
    plain it does nothing. Returns seconds, and says what came of it."""
    layers = compiled_layers(parts.model)
    if layers is None or not layers.on:
        return 0.0
    wanted = shapes_of(parts)
    if wanted is None:  # by what comes, as asked
        layers.warm = None if parts.config.model.compile is True else set()
        layers.on = layers.warm is None
        if not layers.on:
            say(_MANY)
        return 0.0
    missing = [shape for shape in wanted if shape not in (layers.warm or ())]
    if not missing:
        return 0.0
    began = time.perf_counter()
    keep_graphs(parts.config)
    lengths = sorted({shape[0] for shape in missing})
    say(f"compiling the layers for rows of {', '.join(f'{n:,}' for n in lengths)} tokens")
    with _undisturbed(parts):
        reason = _make(parts, layers, missing)
    seconds = time.perf_counter() - began
    if reason:
        layers.on, layers.warm = False, set()
        say(f"compiling the layers failed after {seconds:.1f} s, so they stay plain for this run: {reason}")
    else:
        layers.warm = {*(layers.warm or ()), *missing}
        say(f"layers compiled in {seconds:.1f} s, {len(missing)} shape(s); graphs are kept in {kept_in()}")
    return seconds


def shapes_of(parts: Parts) -> list[Shape] | None:
    """What rows of training and evaluation come as, the longest first; None: many lengths."""
    shapes = parts.plan.row_lengths
    if shapes is None:
        return None
    found: set[Shape] = {
        (length, shapes.segments + 1, shapes.max_seqlen(length), True, True) for length in shapes.lengths
    }
    for scorer in (parts.validation, parts.probe):
        for row in scorer.planned if scorer is not None else ():
            if row.segments is not None and row.max_seqlen is not None:
                found.add((row.padded_tokens, row.segments + 1, row.max_seqlen, False, False))
    return sorted(found, reverse=True)


def _make(parts: Parts, layers: CompiledLayers, shapes: Iterable[Shape]) -> str:
    """Compile for these; why that failed on the first rank it failed on, or nothing."""
    model, device = parts.model, parts.world.device
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    vocabulary = min(end.weight.shape[0] for end in ends)
    reached = any(p.requires_grad for p in model.get_input_embeddings().parameters())
    for shape in shapes:
        length, borders, longest, training, _ = shape
        model.train(training)
        with layers.warming(reached=reached) as warming, torch.no_grad():
            model.loss(row_of(length, borders, longest, vocabulary, device))
        # Every rank is told, and goes on or stops here alike.
        try:
            with raise_together(parts.world):
                if warming.error is not None:
                    raise ModelError(_first_words(warming.error))
        except ModelError as told:
            return str(told)
    return ""


def row_of(length: int, borders: int, longest: int, vocabulary: int, device: torch.device) -> Row:
    """A row of a shape, filled with documents as long as they may be. borders: length of `cu_seqlens`."""
    ends = [*range(longest, length, longest), length]
    starts = [0, *ends]
    borders_padded = starts + [length] * (borders - len(starts))
    positions = torch.arange(length) % longest
    tokens = torch.arange(length) % vocabulary
    trained = torch.arange(min(TRAINED, length))
    return Row(
        tokens=tokens[None].to(device),
        positions=positions[None].to(device),
        targets=tokens.to(device),
        weights=torch.full((length,), 1.0 / length, device=device),
        trained_positions=trained.to(device),
        position_tasks=torch.zeros_like(trained).to(device),
        position_segments=torch.zeros_like(trained).to(device),
        cu_seqlens=torch.tensor(borders_padded, dtype=torch.int32, device=device),
        segment_lengths=tuple(b - a for a, b in pairwise(starts)),
        max_seqlen=longest,
        samples=tuple(range(len(ends))),
        real_tokens=length,
    )


@contextmanager
def _undisturbed(parts: Parts) -> Iterator[None]:
    """Mode, random streams and checkpointing of activations are put back; the last would stand around every
    layer and recompute it where graphs are made."""
    model, device = parts.model, parts.world.device
    was_training = model.training
    checkpointed: list[Any] = [
        x for x in decoder_layers(model) if getattr(x, "gradient_checkpointing", False)
    ]
    for layer in checkpointed:
        layer.gradient_checkpointing = False
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for layer in checkpointed:
            layer.gradient_checkpointing = True
        model.train(was_training)


def keep_graphs(config: Config) -> None:
    """Let compiled graphs outlive the process, beside tokenised data, unless the user says where; and in
    deterministic mode choose kernels without timing them, which no two processes do alike."""
    if config.run.deterministic:
        inductor: Any = torch._inductor.config
        inductor.deterministic = True
    # torch writes its own choice there, a folder that is gone when the machine starts anew.
    if os.environ.get(_FOLDER) not in (None, default_cache_dir()):
        return
    folder = cache_folder(config) / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    os.environ[_FOLDER] = str(folder)


def kept_in() -> str:
    return os.environ.get(_FOLDER) or default_cache_dir()


def _first_words(error: BaseException) -> str:
    error = getattr(error, "inner_exception", None) or error  # what the compiler wraps
    line = next((line for line in str(error).splitlines() if line.strip()), "no words")
    return f"{type(error).__name__}: {line.strip()[:300]}"
