"""Compiled layers get their graphs before the first update: for every shape a row can have, forward and
backward, and those of evaluations. What is compiled then is not compiled in the loop (law 8).

Nothing of the run moves: random streams, gradients, counts, weights and moments are what they were. A layer
that cannot be compiled, or computes something else compiled, is tried once more with every kernel in a launch
of its own, where the compiler was told otherwise; then it leaves all layers of all ranks plain, once and for
the run (`training.compiled`), also where `model.compile: true` asked for it. Rows of many lengths, which
only `true` compiles for, are compiled for as they come; one of them is tried here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from repsft_fast.config import Config
from repsft_fast.data.row_lengths import RowLengths
from repsft_fast.distributed import decoder_layers, raise_together
from repsft_fast.errors import ModelError, TrainingError, describe
from repsft_fast.models.compiled import CompiledLayers, Shape, compiled_layers
from repsft_fast.row import Row
from repsft_fast.training.parts import Parts
from repsft_fast.training.samples import cache_folder
from repsft_fast.training.step import OutOfMemory

_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
TRAINED = 8  # positions of a row here that reach the head; it is not what is warmed
_MANY = (
    "layers stay plain: rows take many lengths, and each would be compiled for; batch.row_lengths: auto and"
    " batch.bucket_tokens: auto compile them, and so does model.compile: true"
)


def warm_up(parts: Parts, say: Callable[[str], None]) -> float:
    """Make the graphs that are missing for the rows of today's plan. All ranks call it; where layers are
    plain it does nothing. Returns seconds, and says what came of it.

    OutOfMemory where there is no room for a row of training, torch.OutOfMemoryError for one of an evaluation;
    nothing has changed then.
    """
    layers = compiled_layers(parts.model)
    if layers is None or not layers.on or layers.warm is None:
        return 0.0
    wanted, many = shapes_of(parts), False
    if wanted is None and parts.config.model.compile is True:
        wanted, many = [_one_of_many(parts)], True
    if wanted is None:
        layers.on = False
        say(_MANY)
        return 0.0
    missing = [shape for shape in wanted if shape not in layers.warm]
    if not missing:
        return 0.0
    began = time.perf_counter()
    keep_graphs(parts.config)
    layers.stack.allowed = parts.world.size == 1 and parts.config.model.activation_checkpointing == "none"
    lengths = ", ".join(f"{n:,}" for n in sorted({shape[0] for shape in missing}))
    say(f"compiling the layers for rows of {lengths} tokens" + (", and others as they come" if many else ""))
    with _undisturbed(parts):
        reason, first = _make(parts, layers, missing), not layers.warm
        # graphs of the run's own must stay what they are
        if reason and first and layers.separate():
            say(f"compiling the layers failed, so every kernel gets a launch of its own: {reason}")
            reason = _make(parts, layers, missing)
    seconds = time.perf_counter() - began
    if reason:
        layers.on, layers.failed, layers.warm = False, True, set()
        say(f"compiling the layers failed after {seconds:.1f} s, so they stay plain for this run: {reason}")
    else:
        layers.warm = None if many else {*layers.warm, *missing}
        apart = sorted({layers.stack.why[shape] for shape in missing if shape in layers.stack.why})
        one_by_one = f"; rows pass them one by one ({'; '.join(apart)})" if apart else ""
        say(
            f"layers compiled in {seconds:.1f} s, {len(missing)} shape(s); graphs are kept in"
            f" {kept_in()}{one_by_one}"
        )
    return seconds


def _one_of_many(parts: Parts) -> Shape:
    """The shape of this rank's first row, of the many that come; by it one sees whether layers can be
    compiled at all."""
    update = parts.plan.epoch(0, 0).update(0)
    row = parts.row(update, update.ranks[parts.world.rank][0])
    return row.targets.numel(), len(row.cu_seqlens), row.max_seqlen, True, True


def shapes_of(parts: Parts) -> list[Shape] | None:
    """What rows of training and evaluation come as, the longest first; None: many lengths.

    A graph that serves all lengths is made for the first that comes, and rounds by what was chosen for it: a
    resumption must begin with the same one. So the shapes the run began with are here, whatever rows are now.
    """
    if parts.plan.row_lengths is None:
        return None
    found = _trained(parts.row_lengths) | _trained(parts.plan.row_lengths)
    for scorer in (parts.validation, parts.probe):
        # of every rank's rows: they pass together, as many times
        for slots, segments, longest in scorer.shapes if scorer is not None else ():
            found.add((slots, segments + 1, longest, False, False))
    return sorted(found, reverse=True)


def _trained(shapes: RowLengths | None) -> set[Shape]:
    if shapes is None:
        return set()
    return {(n, shapes.segments + 1, shapes.max_seqlen(n), True, True) for n in shapes.lengths}


def _make(parts: Parts, layers: CompiledLayers, shapes: list[Shape]) -> str:
    """Compile for these; why that failed on the first rank it failed on, or nothing. Takes out of `shapes`
    those of longer rows, of before they were halved, that there is no room for."""
    model, device = parts.model, parts.world.device
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    vocabulary = min(end.weight.shape[0] for end in ends)
    reached = any(p.requires_grad for p in model.get_input_embeddings().parameters())
    past = _trained(parts.row_lengths) - _trained(parts.plan.row_lengths)
    if parts.world.size > 1:  # the others do not know what has room here
        past = set()
    for shape in [*shapes]:
        length, borders, longest, training, _ = shape
        model.train(training)
        with layers.warming(reached=reached) as warming, torch.no_grad():
            full = _no_room(model, partial(row_of, length, borders, longest, vocabulary, device))
        if full is None and warming.out_of_memory:
            full = torch.OutOfMemoryError("no room for the compiled layers beside plain ones")
        if full is not None and shape in past:
            shapes.remove(shape)
            continue
        if full is not None:
            raise OutOfMemory(full, torn=False) if training else full
        # Every rank is told, and goes on or stops here alike.
        try:
            with raise_together(parts.world):
                if warming.error is not None:
                    raise ModelError(_first_words(warming.error))
        except ModelError as told:
            return str(told)
        if training:
            with torch.no_grad():
                row = row_of(length, borders, longest, vocabulary, device)
                layers.stack.rehearse(shape, model, partial(model.loss, row))
    return ""


def _no_room(model: Any, row: Callable[[], Row]) -> torch.OutOfMemoryError | None:
    """What a forward pass ran out of memory with, if it did, without the frames that hold what it had
    made."""
    try:
        model.loss(row())
    except torch.OutOfMemoryError as error:
        return error.with_traceback(None)
    return None


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


def compiler_failed(parts: Parts, error: Exception) -> TrainingError | None:
    """What an error of the loop is where the compiler met a row that it cannot compile for, which only rows
    of many lengths can be; None: it is another."""
    layers, by = compiled_layers(parts.model), type(error).__module__
    if layers is None or layers.warm is not None or not by.startswith(("torch._dynamo", "torch._inductor")):
        return None
    wrong = f"a row of another length could not be compiled for ({_first_words(error)}); nothing was changed"
    todo = "set model.compile: false and --resume, or begin in another folder with batch.row_lengths: auto"
    return TrainingError(describe("model.compile", wrong, todo=todo))


def _first_words(error: BaseException) -> str:
    error = getattr(error, "inner_exception", None) or error  # what the compiler wraps
    line = next((line for line in str(error).splitlines() if line.strip()), "no words")
    return f"{type(error).__name__}: {line.strip()[:300]}"
