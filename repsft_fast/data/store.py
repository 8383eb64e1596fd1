"""The resident token store: every sample's tokens in one flat array, and the assembly of rows from it.

Tokens never change during a run, so they are laid out once. A row is then put together in one staging buffer
by a few numpy calls (no work per sample in Python), moved by one copy, and cut into views. With the tokens in
device memory the buffer carries where to gather from; with the tokens in host memory it carries the tokens
themselves. Nothing is asked of the device, so a row costs no host sync.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from repsft_fast.data.plan import AVERAGES, PlannedRow, SampleIndex
from repsft_fast.data.sample import Sample
from repsft_fast.data.staging import Staging
from repsft_fast.errors import DataError, describe
from repsft_fast.row import IGNORE_INDEX, Row

# bytes; views of the buffer keep the alignment of fresh tensors, so kernels are not specialised twice
ALIGNMENT = 128
CU_SEQLENS_STEP = 8
SHORTEST_BOUND = 128
TOKEN_SECTIONS = {True: ("source",), False: ("tokens", "targets")}  # by whether the device gathers
NUMPY_DTYPES = {torch.int64: np.int64, torch.int32: np.int32, torch.float32: np.float32}


class TokenStore:
    """Tokens of all samples, in device memory, or in host memory where they would exceed
    `device_limit_bytes`.

    What a row needs of the host travels from pinned memory; where pinning is refused, from plain memory
    (`notes` says so). On the CPU there is one memory and nothing to pin. Never written after construction, so
    threads may share it.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        device: torch.device | str,
        device_limit_bytes: int | None = None,
        *,
        task_names: Sequence[str] | None = None,
    ):
        """device_limit_bytes: None = no limit. task_names: every task at its id, so that several stores
        agree; None = numbered as they first appear.

        Raises DataError naming the sample's source: no position, unequal lengths, ids outside int32, unusable
        weight, unknown task.
        """
        self.device = torch.device(device)
        self.notes: list[str] = []
        _check_samples(samples)
        ids = _flatten([sample.ids for sample in samples], np.int32)
        trained = _flatten([sample.trained for sample in samples], np.bool_)
        counts = np.array([len(sample.ids) for sample in samples], dtype=np.int64)
        ends = np.cumsum(counts)
        is_input, is_target = np.ones(len(ids), dtype=bool), np.ones(len(ids), dtype=bool)
        is_input[ends - 1] = False  # nothing follows the last token
        is_target[ends - counts] = False  # nothing predicts the first
        trained = trained[is_target]

        self._tokens = ids[is_input]  # [N] int32
        # [N] int32, cast on assembly
        self._targets = np.where(trained, ids[is_target], np.int32(IGNORE_INDEX))
        lengths = counts - 1
        self._offsets = np.cumsum(lengths) - lengths  # [M] int64, where a sample begins in them
        positions = np.arange(len(self._tokens)) - np.repeat(self._offsets, lengths)
        self._trained_positions = positions[trained]  # [N'] int64, within the sample, ascending
        trained_counts = np.add.reduceat(trained, self._offsets, dtype=np.int64)
        self._trained_offsets = np.cumsum(trained_counts) - trained_counts  # [M] int64
        self.sources = tuple(sample.source for sample in samples)
        names, tasks = _number_tasks(samples, task_names)
        weights = np.array([sample.weight for sample in samples], dtype=np.float64)
        self.index = SampleIndex(lengths, trained_counts, tasks, weights, names)

        fits = device_limit_bytes is None or self.nbytes <= device_limit_bytes
        self._resident = self._upload() if self.device.type != "cpu" and fits else None
        self._pinned = self._can_pin()
        self._staging = Staging() if self._pinned else None

    @property
    def nbytes(self) -> int:
        """Bytes of tokens and targets: what the device holds when the store is resident there."""
        return self._tokens.nbytes + self._targets.nbytes

    @property
    def padding_token(self) -> int:
        """What fills a row behind its samples: the first token of the first sample, a token the model is
        trained on anyway.

        Never the tokenizer's own padding token or 0: `nn.Embedding(padding_idx=...)` makes that embedding
        zero, and a norm without epsilon then has no finite gradient (Gemma 3n), which a weight of zero turns
        into NaN and not into zero.
        """
        return int(self._tokens[0])

    @property
    def tier(self) -> str:
        """Where the tokens live: "device", "pinned" (host, rows travel from pinned memory) or "host"."""
        if self._resident is not None:
            return "device"
        return "pinned" if self._pinned else "host"

    def check_vocabulary(self, vocab_size: int) -> None:
        """DataError naming the first sample with a token id the model has no embedding for."""
        for flat in (self._tokens, self._targets):
            if flat.max() >= vocab_size:
                at = int(np.argmax(flat >= vocab_size))
                sample = int(np.searchsorted(self._offsets, at, side="right")) - 1
                where = self.sources[sample] or f"sample {sample}"
                todo = (
                    "use the tokenizer of this model, or give it rows for new tokens with"
                    " model.resize_vocabulary: true"
                )
                raise DataError(
                    describe(
                        where,
                        "has a token id past the vocabulary",
                        expected=f"below {vocab_size}",
                        got=int(flat[at]),
                        todo=todo,
                    )
                )

    def last_reply(self, sample: int) -> tuple[list[int], list[int]]:
        """(prompt, reply) as token ids: the last unbroken stretch of trained tokens and everything before
        it."""
        start, length = int(self._offsets[sample]), int(self.index.lengths[sample])
        tokens, targets = self._tokens[start : start + length], self._targets[start : start + length]
        trained = np.flatnonzero(targets != IGNORE_INDEX)
        end = int(trained[-1])
        breaks = np.flatnonzero(np.diff(trained) > 1)
        first = int(trained[breaks[-1] + 1]) if len(breaks) else int(trained[0])
        return tokens[: first + 1].tolist(), targets[first : end + 1].tolist()

    def token_weights(
        self, samples: np.ndarray, *, denominator: float, average: str, scale: float = 1.0
    ) -> np.ndarray:
        """[S] float64, the weight of each trained token of each sample: scale · weight / denominator [/
        trained positions].

        It knows nothing of rows or ranks, so no split of an update changes it (law 2). Zero when nothing is
        trained.
        """
        if average not in AVERAGES:
            raise ValueError(describe("average", "is not known", expected=" or ".join(AVERAGES), got=average))
        if denominator == 0.0:
            return np.zeros(len(samples))
        weights = self.index.weights[samples] / denominator * scale
        return weights / np.maximum(self.index.trained[samples], 1) if average == "sample" else weights

    def row(self, planned: PlannedRow, *, denominator: float, average: str, scale: float = 1.0) -> Row:
        """The planned row on the device: one host-to-device copy, and two gathers where the tokens are
        resident.

        No host sync from pinned memory. Where pinning is refused the copy may wait for what is queued on the
        device.

        denominator: of the whole update (`Update.denominator`). scale: factor on every weight, e.g. the world
        size where gradients are averaged over ranks. A row without samples is padding only: no trained rows,
        exactly zero contribution.
        """
        ids, lengths = planned.samples, self.index.lengths[planned.samples]
        real, slots = planned.real_tokens, planned.padded_tokens
        num_trained = int(self.index.trained[ids].sum())
        longest = max(int(lengths.max(initial=0)), slots - real)
        borders = len(ids) + (1 if slots > real else 0)  # without the leading 0
        # Few different lengths of cu_seqlens and bounds: kernels are specialised on both.
        segments, max_seqlen = planned.segments, planned.max_seqlen
        if segments is None:
            segments = -(-borders // CU_SEQLENS_STEP) * CU_SEQLENS_STEP
        if max_seqlen is None:
            max_seqlen = max(1 << (longest - 1).bit_length(), SHORTEST_BOUND)
        if borders > segments or longest > max_seqlen:
            wrong = f"has {borders} segments, the longest of {longest}, and was planned for {segments}"
            raise ValueError(describe("row", wrong, expected=f"at most {max_seqlen} positions each"))
        num_borders = 1 + segments

        # One buffer, so that the whole row travels in one copy.
        section = _Sections(slots, num_trained, num_borders, len(ids), gather=self._resident is not None)
        staged = self._staging.take(section.nbytes) if self._staging is not None else None
        buffer = torch.empty(section.nbytes, dtype=torch.uint8) if staged is None else staged.memory
        host = section.arrays(buffer.numpy())
        host["sample_ids"][:] = ids
        self._write_tokens(host, planned)
        weights = self.token_weights(ids, denominator=denominator, average=average, scale=scale)
        self._write_trained(host, planned, weights)

        moved = buffer
        if self.device.type != "cpu":
            moved = buffer[: section.nbytes].to(self.device, non_blocking=True)
        if self._staging is not None and staged is not None:
            self._staging.give_back(staged, torch.cuda.current_stream(self.device))
        parts = section.tensors(moved)
        if self._resident is not None:
            tokens, targets = (flat.index_select(0, parts["source"]).long() for flat in self._resident)
        else:
            tokens, targets = parts["tokens"], parts["targets"]
        return Row(
            tokens=tokens.unsqueeze(0),
            positions=parts["positions"].unsqueeze(0),
            targets=targets,
            weights=parts["weights"],
            trained_positions=parts["trained_positions"],
            position_tasks=parts["position_tasks"],
            position_segments=parts["position_segments"],
            cu_seqlens=parts["cu_seqlens"],
            segment_lengths=(*lengths.tolist(), slots - real) if slots > real else tuple(lengths.tolist()),
            max_seqlen=max_seqlen,
            samples=tuple(ids.tolist()),
            real_tokens=real,
            sample_ids=parts["sample_ids"],
        )

    def _write_tokens(self, host: dict[str, np.ndarray], planned: PlannedRow) -> None:
        """The row's tokens and targets (or where the device gathers them from), positions and borders."""
        ids, lengths = planned.samples, self.index.lengths[planned.samples]
        real, slots = planned.real_tokens, planned.padded_tokens
        starts = np.cumsum(lengths) - lengths
        within = np.arange(real) - np.repeat(starts, lengths)
        source = within + np.repeat(self._offsets[ids], lengths)
        if self._resident is not None:
            host["source"][:real] = source
            host["source"][real:] = len(self._tokens)  # padding stands behind the last token
        else:
            host["tokens"][:real] = self._tokens[source]
            host["tokens"][real:] = self.padding_token
            host["targets"][:real] = self._targets[source]
            host["targets"][real:] = IGNORE_INDEX
        host["positions"][:real] = within
        # Not 0, 1, 2 …: padding longer than every sample would run past the positions a model has embeddings
        # for, and choose the frequencies of a RoPE that follows the largest position of its row.
        host["positions"][real:] = 0
        # Borders past the last are empty segments.
        host["cu_seqlens"][: len(ids)] = starts
        host["cu_seqlens"][len(ids)] = real
        host["cu_seqlens"][len(ids) + 1 :] = slots

    def _write_trained(self, host: dict[str, np.ndarray], planned: PlannedRow, weights: np.ndarray) -> None:
        """Which positions are trained, whose they are, and their weights (given per sample)."""
        ids, lengths = planned.samples, self.index.lengths[planned.samples]
        starts = np.cumsum(lengths) - lengths
        trained = self.index.trained[ids]
        num_trained = int(trained.sum())
        segments = np.repeat(np.arange(len(ids)), trained)
        first = np.cumsum(trained) - trained
        nth = np.arange(num_trained) - first[segments]
        trained_positions = (
            self._trained_positions[self._trained_offsets[ids][segments] + nth] + starts[segments]
        )
        host["trained_positions"][:] = trained_positions
        host["position_segments"][:] = segments
        host["position_tasks"][:] = self.index.tasks[ids][segments]
        host["weights"][:] = 0.0
        host["weights"][trained_positions] = weights[segments]

    def _upload(self) -> tuple[Tensor, Tensor]:
        """Tokens and targets on the device, [N+1] int32 each, the padding slot behind the last."""
        padded = (
            np.append(self._tokens, np.int32(self.padding_token)),
            np.append(self._targets, np.int32(IGNORE_INDEX)),
        )
        tokens, targets = (torch.from_numpy(flat).to(self.device) for flat in padded)
        return tokens, targets

    def _can_pin(self) -> bool:
        """Whether rows can travel from pinned memory. A refusal costs a wait a row, not correctness."""
        if self.device.type != "cuda":
            return False
        try:
            torch.empty(1, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            self.notes.append(
                f"pinned host memory was refused ({str(error).splitlines()[0]}): "
                "rows are copied from plain memory, and each may wait for the device"
            )
            return False
        return True


class _Sections:
    """Layout of the staging buffer of one row: the row's arrays one after the other, each aligned."""

    def __init__(self, slots: int, num_trained: int, num_borders: int, samples: int, *, gather: bool):
        sizes: dict[str, tuple[int, torch.dtype]] = dict.fromkeys(
            TOKEN_SECTIONS[gather], (slots, torch.int64)
        )
        sizes |= {
            "positions": (slots, torch.int64),
            "weights": (slots, torch.float32),
            "trained_positions": (num_trained, torch.int64),
            "position_tasks": (num_trained, torch.int64),
            "position_segments": (num_trained, torch.int64),
            "cu_seqlens": (num_borders, torch.int32),
            "sample_ids": (samples, torch.int64),
        }
        self.nbytes = 0
        self._spans: list[tuple[str, int, int, torch.dtype]] = []
        for name, (count, dtype) in sizes.items():
            end = self.nbytes + count * dtype.itemsize
            self._spans.append((name, self.nbytes, end, dtype))
            self.nbytes = -(-end // ALIGNMENT) * ALIGNMENT

    def arrays(self, buffer: np.ndarray) -> dict[str, np.ndarray]:
        return {name: buffer[start:end].view(NUMPY_DTYPES[dtype]) for name, start, end, dtype in self._spans}

    def tensors(self, buffer: Tensor) -> dict[str, Tensor]:
        return {name: buffer[start:end].view(dtype) for name, start, end, dtype in self._spans}


def _flatten(lists: list[list], dtype: type) -> np.ndarray:
    return np.fromiter(itertools.chain.from_iterable(lists), dtype=dtype, count=sum(map(len, lists)))


def _check_samples(samples: Sequence[Sample]) -> None:
    if not samples:
        raise DataError(
            describe("data", "has no samples", expected="at least 1", got=0, todo="check the sources")
        )
    for i, sample in enumerate(samples):
        where = sample.source or f"sample {i}"
        n = len(sample.ids)
        if n < 2:
            raise DataError(
                describe(
                    where, "has no position to train", expected="at least 2 tokens", got=n, todo="drop it"
                )
            )
        if len(sample.trained) != n:
            raise DataError(
                describe(where, "has unequal ids and trained", expected=f"{n} flags", got=len(sample.trained))
            )
        if sample.trained[0]:
            raise DataError(
                describe(where, "trains its first token, which nothing predicts", expected="False", got=True)
            )
        # int32 halves the memory of the store, and no vocabulary is larger.
        low, high = min(sample.ids), max(sample.ids)
        if low < 0 or high > np.iinfo(np.int32).max:
            raise DataError(
                describe(
                    where, "has an impossible token id", expected="0 … 2³¹-1", got=low if low < 0 else high
                )
            )
        if not 0 <= sample.weight < float("inf"):
            raise DataError(
                describe(
                    where, "has no usable weight", expected="a finite number, at least 0", got=sample.weight
                )
            )


def _number_tasks(
    samples: Sequence[Sample], task_names: Sequence[str] | None
) -> tuple[tuple[str, ...], np.ndarray]:
    names = (
        tuple(dict.fromkeys(sample.task for sample in samples)) if task_names is None else tuple(task_names)
    )
    number = {name: i for i, name in enumerate(names)}
    for i, sample in enumerate(samples):
        if sample.task not in number:
            where = sample.source or f"sample {i}"
            raise DataError(
                describe(where, "has an unknown task", expected=", ".join(names), got=sample.task)
            )
    return names, np.array([number[sample.task] for sample in samples], dtype=np.int32)
