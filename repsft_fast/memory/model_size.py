"""How many bytes a run holds, from shapes alone. Pure arithmetic; nothing here allocates or asks a device.

Per rank, R ranks share one copy of the parameters (FSDP2: rows ⌈d0 / R⌉ of every tensor, the last rank's
padded); c = bytes of the compute type:

    weights    alone: c an element; R ranks: Σ ⌈d0 / R⌉ · rest · bytes held
    masters    alone, of every weight that is held in another type than it is computed in: bytes held an
               element (4: fp32); R ranks cast what they gather, so none
    gradients  of what is trained, bytes held an element: as its master, or as the weight where it has none
    moments    adamw 2 × gradients; sgd 1 ×; the 8-bit ones 2 bytes an element and a scale for every 256
    gathered   R ranks: c · (root + 3 layers): embedding, final norm and head for the whole row, and beside
               them this layer, the next one and the flat buffer it arrives in; kept from row to row: c · all
               and one layer for the buffer
    in flight  R ranks: full gradients of one group, in the compute type and again in the reduction's fp32:
               the root or two layers; alone: one matrix, in the compute type and again in its gradient's
    head       the head's gradient [V, H], one chunk of logits (of all of them where `training.chunks`
               decides so), and three [N', H] of the trained positions

    row of T   T · (S · kept layers + H · c · checkpointed layers + rest), S = bytes one layer saves for a
               token (`activations.saved_per_token` counts them on the real module); one layer more where a
               checkpointed layer is recomputed before anything was freed

The fullest moment of an update (`peak`) is one of three: the head, before anything was freed; the backward
pass of the first layer that it comes to; its end, where the gradients of tied embeddings meet. The gradients
of the rows before are there then, unless the update has one row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch

from repsft_fast.distributed import decoder_layers
from repsft_fast.models.layers import CHECKPOINT_EVERY
from repsft_fast.ops.row_pass import CACHE_BLOCK_BYTES, ONE_CHUNK_SHARE, gpu_chunk_bytes
from repsft_fast.optim import OPTIMIZERS
from repsft_fast.snapshot.slots import ALIGN_BYTES
from repsft_fast.stats import K

REDUCED_BYTES = 4  # gradients are reduced over ranks in fp32
SPIKES = (128 * 2 * 8, 8)  # bytes of what updates are judged by (`training.spikes.WINDOW`)
CHECKPOINTING = ("none", *reversed(CHECKPOINT_EVERY))  # none, selective, full
RESERVED = 0.08  # of a GPU's memory, assumed taken by the CUDA context, NCCL's buffers and fragmentation


@dataclass(frozen=True)
class ParameterShape:
    name: str
    shape: tuple[int, ...]
    held_bytes: int  # of one element
    trained: bool
    layer: int | None  # None: of the root (embedding, final norm, head)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def on_a_rank(self, ranks: int) -> tuple[int, ...]:
        """Shape of the largest part; every rank allocates as much."""
        return (-(-self.shape[0] // ranks), *self.shape[1:]) if self.shape else ()


@dataclass(frozen=True)
class Held:
    """Bytes on one rank, the one that holds most."""

    weights: int
    masters: int
    gradients: int
    moments: int
    snapshot: int  # one copy of the closed list: what is trained, moments, counts

    @property
    def state(self) -> int:
        return self.weights + self.masters + self.gradients + self.moments


@dataclass(frozen=True)
class Peak:
    """Bytes on one rank at the fullest moment of an update, by what holds them."""

    weights: int
    masters: int
    gradients: int  # of the rows before; those of this row are in `passing` and `head`
    moments: int
    activations: int
    head: int  # its gradient, a chunk of logits, [N', H]
    passing: int  # gathered, in flight

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


class Activations(Protocol):
    """What the backward pass keeps of the forward pass, for every token of a row."""

    @property
    def layer(self) -> float: ...  # one decoder layer, nothing recomputed
    @property
    def rest(self) -> float: ...  # before, between and after the layers
    @property
    def passing(self) -> float: ...  # what the backward pass of one layer holds beside them


@dataclass(frozen=True)
class ModelSize:
    parameters: tuple[ParameterShape, ...]  # tied ones once
    layers: int
    hidden: int
    vocabulary: int
    compute_bytes: int
    tied: bool = False  # the embedding is the head
    head_trained: bool = True

    @staticmethod
    def of(model: Any) -> ModelSize:
        """Read from a causal LM of `models.load_model`, on the meta device or any other, before it is
        sharded."""
        place = {id(p): n for n, layer in enumerate(decoder_layers(model)) for p in layer.parameters()}
        parameters = tuple(
            ParameterShape(name, tuple(p.shape), p.element_size(), p.requires_grad, place.get(id(p)))
            for name, p in model.named_parameters()
        )
        shape = model.config.get_text_config()
        compute: torch.dtype = model.compute_dtype
        head = model.get_output_embeddings().weight
        return ModelSize(
            parameters,
            shape.num_hidden_layers,
            shape.hidden_size,
            head.shape[0],
            compute.itemsize,
            tied=head is model.get_input_embeddings().weight,
            head_trained=head.requires_grad,
        )

    @property
    def count(self) -> int:
        return sum(p.elements for p in self.parameters)

    @property
    def trained(self) -> list[ParameterShape]:
        return [p for p in self.parameters if p.trained]

    def uneven(self, ranks: int) -> list[tuple[ParameterShape, int]]:
        """Parameters whose rows do not divide by the ranks, each with the ranks that hold nothing of it."""
        found = []
        for p in self.parameters:
            if p.shape and p.shape[0] % ranks:
                found.append((p, ranks - -(-p.shape[0] // p.on_a_rank(ranks)[0])))
        return found

    def held(self, optimizer: str, ranks: int = 1, *, tasks: int = 1, momentum: bool = True) -> Held:
        """State between two updates, and the gradients. tasks: rows of the ledger's table; momentum: whether
        sgd keeps one."""
        local = {p.name: math.prod(p.on_a_rank(ranks)) for p in self.parameters}
        trained = [local[p.name] * p.held_bytes for p in self.trained]
        weights = sum(
            local[p.name] * (p.held_bytes if ranks > 1 else self.compute_bytes) for p in self.parameters
        )
        moments = list(self._moments(optimizer, ranks, momentum))
        return Held(
            weights=weights,
            masters=0
            if ranks > 1
            else sum(
                local[p.name] * p.held_bytes for p in self.parameters if p.held_bytes != self.compute_bytes
            ),
            gradients=sum(trained),
            moments=sum(moments),
            snapshot=sum(_aligned(n) for n in [*trained, *moments, tasks * K * 8, *SPIKES]),
        )

    def _moments(self, optimizer: str, ranks: int, momentum: bool) -> Iterator[int]:
        """Bytes of every state tensor of the optimizer on a rank."""
        kind = OPTIMIZERS[optimizer]
        counts = kind.step_count_bytes(len(self.trained))
        if counts:
            yield counts
        for p in self.trained:
            yield from kind.moment_bytes(p.shape, p.on_a_rank(ranks), p.held_bytes, momentum=momentum)

    def checkpoint(self, optimizer: str, *, tasks: int = 1) -> int:
        """Bytes of one generation on disk, all ranks: state to resume from, and the model folder beside
        it."""
        trained = sum(p.elements * p.held_bytes for p in self.trained)
        return 2 * trained + sum(self._moments(optimizer, 1, True)) + tasks * K * 8 + sum(SPIKES)

    def groups(self) -> tuple[int, int]:
        """Parameters of the root and of the largest layer: what FSDP2 gathers at once."""
        found: Counter[int | None] = Counter()
        for p in self.parameters:
            found[p.layer] += p.elements
        root = found.pop(None, 0)
        return root, max(found.values())

    def passing(self, ranks: int = 1, *, kept: bool = False) -> int:
        """Bytes gathered and in flight inside a row, beside activations and head. kept: the ranks keep what
        they gathered from row to row."""
        if ranks == 1:
            matrices = [p.elements for p in self.trained if p.layer is not None]
            gradient = max((p.held_bytes for p in self.trained), default=0)
            return (self.compute_bytes + gradient) * max(matrices, default=0)
        root, layer = self.groups()
        share = max((p.trained for p in self.parameters if p.layer is None), default=False)
        in_flight = (self.compute_bytes + REDUCED_BYTES) * max(root * share, 2 * layer)
        gathered = self.count + layer if kept else root + 3 * layer
        return self.compute_bytes * gathered + in_flight

    def chunk(self, tokens: int, memory_bytes: int, free_bytes: int) -> int:
        """Bytes of one chunk of logits of a row that is trained whole, on a device of which the state leaves
        so much free."""
        row_bytes = self.vocabulary * self.compute_bytes
        limits = {"total_bytes": memory_bytes, "room_bytes": free_bytes}
        return min(tokens * row_bytes, gpu_chunk_bytes(tokens, self.vocabulary, self.compute_bytes, **limits))

    def head(self, chunk_bytes: int, *, chunks: bool = True) -> int:
        """Bytes the head holds whatever the row: its gradient and one chunk of logits. chunks: there are
        several, whose gradients are added in fp32, before they become what the weight's are."""
        if not self.head_trained:
            return chunk_bytes
        wanted = max((p.held_bytes for p in self.trained if p.layer is None), default=REDUCED_BYTES)
        each = REDUCED_BYTES + wanted if chunks and wanted < REDUCED_BYTES else wanted
        return self.hidden * self.vocabulary * each + chunk_bytes

    def row(self, saved: Activations, checkpointing: str = "none") -> float:
        """Bytes kept for one token of a row when the head is reached: activations under this choice, and the
        head's three [N', H] where all are trained."""
        return self._layers(saved, checkpointing)[0] + 3 * self.hidden * self.compute_bytes

    def _layers(self, saved: Activations, checkpointing: str) -> tuple[float, float]:
        """Bytes for one token of what all layers and the rest keep, and of the most there is while one of
        them is recomputed and gone back through."""
        layers, most = 0.0, 0.0
        for keeps in kept_layers(self.layers, checkpointing):
            layers += saved.layer if keeps else self.hidden * self.compute_bytes
            most = max(most, layers + (0.0 if keeps else saved.layer))
        return layers + saved.rest, most + saved.rest + saved.passing

    def peak(
        self,
        optimizer: str,
        tokens: int,
        saved: Activations,
        checkpointing: str = "none",
        *,
        ranks: int = 1,
        kept: bool = False,
        trained: int | None = None,
        rows: int = 2,
        chunk_bytes: int | None = None,
        momentum: bool = True,
        held: Held | None = None,
    ) -> Peak:
        """The fullest moment of an update of `rows` rows of so many tokens.

        trained: positions of a row that carry loss; None = all. chunk_bytes: of logits held at once; None =
        all of them. kept: as of `passing`. held: of `held`, where it is known. For plain layers; liger's and
        compiled ones hold less.
        """
        held = held or self.held(optimizer, ranks, momentum=momentum)
        positions = tokens if trained is None else trained
        logits = positions * self.vocabulary * self.compute_bytes
        chunk = logits if chunk_bytes is None else min(logits, chunk_bytes)
        head = self.head(0, chunks=chunk < logits)
        layers, gone_through = (int(each * tokens) for each in self._layers(saved, checkpointing))
        in_flight = self.passing(ranks, kept=kept)
        before = held.gradients if rows > 1 else 0
        # (gradients, activations, head, passing) at each of the three
        of_head = 3 * positions * self.hidden * self.compute_bytes + head + chunk
        waiting = head if self.tied or rows == 1 else 0  # until the embedding's comes, or as the gradient
        table = self.head(0, chunks=False) if self.tied else 0
        moments = [
            (before, layers, of_head, 0 if ranks == 1 else in_flight),
            (before, gone_through, waiting, in_flight),
            (held.gradients, 0, (2 + (rows > 1)) * table, 0 if ranks == 1 else in_flight),
        ]
        gradients, activations, of_head, passing = max(moments, key=sum)
        return Peak(held.weights, held.masters, gradients, held.moments, activations, of_head, passing)

    def longest_row(
        self,
        memory_bytes: int,
        optimizer: str,
        ranks: int,
        saved: Activations,
        checkpointing: str = "none",
        bucket: int = 128,
        *,
        kept: bool = False,
    ) -> int:
        """Tokens of the longest row that fits beside the state on a device of this size, trained whole, a
        multiple of `bucket`; 0: none."""
        usable = int(memory_bytes * (1 - RESERVED))
        held = self.held(optimizer, ranks)
        free = usable - held.state

        def fits(tokens: int) -> bool:
            chunk = self.chunk(tokens, memory_bytes, free)
            of: dict[str, Any] = {"ranks": ranks, "kept": kept, "chunk_bytes": chunk, "held": held}
            return self.peak(optimizer, tokens, saved, checkpointing, **of).total <= usable

        def longest(low: int, high: int) -> int:
            """Of (low, high], in buckets, where more tokens never take less."""
            while low < high:
                middle = -(-(low + high) // 2)
                low, high = (middle, high) if fits(middle * bucket) else (low, middle - 1)
            return low

        # All logits at once up to a length, and chunks of a fixed size past it, which take less.
        logits = self.vocabulary * self.compute_bytes
        at_once = free / ONE_CHUNK_SHARE / logits - max(1, CACHE_BLOCK_BYTES // logits)
        border = max(0, int(at_once) // bucket)
        most = max(border, int(max(free, 0) / self.row(saved, checkpointing)) // bucket + 1)
        chunked = longest(border, most)
        return bucket * (chunked if chunked > border else longest(0, border))


def kept_layers(layers: int, checkpointing: str) -> Sequence[bool]:
    """For every layer whether it keeps its activations (True) or only its input, as `models.layers` chooses
    them."""
    every = CHECKPOINT_EVERY.get(checkpointing)
    return [every is None or n % every != 0 for n in range(layers)]


def _aligned(size: int) -> int:
    return -(-size // ALIGN_BYTES) * ALIGN_BYTES
