"""How many bytes a run holds, from shapes alone. Pure arithmetic; nothing here allocates or asks a device.

Per rank, R ranks share one copy of the parameters (FSDP2: rows ⌈d0 / R⌉ of every tensor, the last rank's
padded):

    weights    Σ ⌈d0 / R⌉ · rest · bytes held        gradients: the same for what is trained
    moments    adamw 2 × weights; sgd 1 ×; the 8-bit ones 2 bytes an element and a scale for every 256
    gathered   in the compute type: the root (embedding, final norm, head) for the whole row, three layers
               beside it (this one, the next one and the flat buffer it arrives in); on one rank all that is
               held in another type, for the whole update
    in flight  full gradients of one group, in the compute type and again in the reduction's fp32: the root or
               two layers
    head       the head's gradient [V, H] fp32, one chunk of logits (of all of them where `training.chunks`
               decides so), and three [N', H] of the trained positions

    row of T   T · (S · kept layers + H · c · checkpointed layers + rest), S = bytes one layer saves for a
               token (`rehearsal.saved_bytes` counts them on the real module), c = bytes of the compute type;
               one layer more where a checkpointed layer is recomputed before anything was freed
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from repsft_fast.distributed import decoder_layers
from repsft_fast.models.layers import CHECKPOINT_EVERY
from repsft_fast.ops.row_pass import CACHE_BLOCK_BYTES, ONE_CHUNK_SHARE, gpu_chunk_bytes
from repsft_fast.optim import OPTIMIZERS
from repsft_fast.snapshot.slots import ALIGN_BYTES
from repsft_fast.stats import K
from repsft_fast.training.spikes import WINDOW

REDUCED_BYTES = 4  # gradients are reduced over ranks in fp32
SPIKES = (WINDOW * 2 * 8, 8)  # bytes of what updates are judged by
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
    gradients: int
    moments: int
    snapshot: int  # one copy of the closed list: trained weights, moments, counts

    @property
    def state(self) -> int:
        return self.weights + self.gradients + self.moments


class Activations(Protocol):
    """What the backward pass keeps of the forward pass, for every token of a row."""

    @property
    def layer(self) -> float: ...  # one decoder layer, nothing recomputed
    @property
    def rest(self) -> float: ...  # before, between and after the layers


@dataclass(frozen=True)
class ModelSize:
    parameters: tuple[ParameterShape, ...]  # tied ones once
    layers: int
    hidden: int
    vocabulary: int
    compute_bytes: int

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
        return ModelSize(
            parameters, shape.num_hidden_layers, shape.hidden_size, shape.vocab_size, compute.itemsize
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
        """State between two updates. tasks: rows of the ledger's table; momentum: whether sgd keeps one."""
        weights = [math.prod(p.on_a_rank(ranks)) * p.held_bytes for p in self.parameters]
        trained = [math.prod(p.on_a_rank(ranks)) * p.held_bytes for p in self.trained]
        moments = list(self._moments(optimizer, ranks, momentum))
        return Held(
            weights=sum(weights),
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
        layers = [sum(p.elements for p in self.parameters if p.layer == n) for n in range(self.layers)]
        return sum(p.elements for p in self.parameters if p.layer is None), max(layers)

    def passing(self, ranks: int = 1) -> int:
        """Bytes gathered and in flight inside a row, beside activations and head. One rank that computes in
        the type in which its trained weights are held gathers nothing (`distributed.shard`)."""
        if ranks == 1 and all(p.held_bytes == self.compute_bytes for p in self.trained):
            return 0
        root, layer = self.groups()
        share = max((p.trained for p in self.parameters if p.layer is None), default=False)
        in_flight = (self.compute_bytes + REDUCED_BYTES) * max(root * share, 2 * layer)
        gathered = root + 3 * layer
        if ranks == 1:
            gathered = sum(
                p.elements for p in self.parameters if p.trained or p.held_bytes != self.compute_bytes
            )
        return self.compute_bytes * gathered + in_flight

    def chunk(self, tokens: int, memory_bytes: int, free_bytes: int) -> int:
        """Bytes of one chunk of logits of a row that is trained whole, on a device of which the state leaves
        so much free."""
        row_bytes = self.vocabulary * self.compute_bytes
        limits = {"total_bytes": memory_bytes, "room_bytes": free_bytes}
        return min(tokens * row_bytes, gpu_chunk_bytes(tokens, self.vocabulary, self.compute_bytes, **limits))

    def head(self, chunk_bytes: int) -> int:
        """Bytes the head holds whatever the row: its gradient and one chunk of logits."""
        return self.hidden * self.vocabulary * REDUCED_BYTES + chunk_bytes

    def row(self, saved: Activations, checkpointing: str = "none") -> float:
        """Bytes for one token of a row: activations under this choice, and the head's three [N', H] where all
        are trained."""
        kept = kept_layers(self.layers, checkpointing)
        input_bytes = self.hidden * self.compute_bytes
        layers, most = 0.0, 0.0
        for keeps in kept:
            layers += saved.layer if keeps else input_bytes
            most = max(most, layers + (0.0 if keeps else saved.layer))
        return most + saved.rest + 3 * input_bytes

    def longest_row(
        self,
        memory_bytes: int,
        optimizer: str,
        ranks: int,
        saved: Activations,
        checkpointing: str = "none",
        bucket: int = 128,
    ) -> int:
        """Tokens of the longest row that fits beside the state on a device of this size, a multiple of
        `bucket`; 0: none."""
        free = int(memory_bytes * (1 - RESERVED)) - self.held(optimizer, ranks).state
        room = free - self.passing(ranks) - self.head(0)
        token, logits = self.row(saved, checkpointing), self.vocabulary * self.compute_bytes
        # Logits in chunks of a fixed size, or at once: which of the two it is changes with the row, and with
        # it what is left.
        chunked = (room - self.chunk(2**40, memory_bytes, free)) / token
        at_once = min(
            room / (token + logits), free / ONE_CHUNK_SHARE / logits - max(1, CACHE_BLOCK_BYTES // logits)
        )
        lengths = [max(0, int(tokens) // bucket * bucket) for tokens in (chunked, at_once)]
        return max((n for n in lengths if n * token + self.chunk(n, memory_bytes, free) <= room), default=0)


def kept_layers(layers: int, checkpointing: str) -> Sequence[bool]:
    """For every layer whether it keeps its activations (True) or only its input, as `models.layers` chooses
    them."""
    every = CHECKPOINT_EVERY.get(checkpointing)
    return [every is None or n % every != 0 for n in range(layers)]


def _aligned(size: int) -> int:
    return -(-size // ALIGN_BYTES) * ALIGN_BYTES
