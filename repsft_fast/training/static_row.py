"""A row at fixed addresses, of fixed shapes: what a captured pass reads, whatever row it is replayed for.

Rows of one padded length differ in two more shapes: N', the trained positions, and S', the borders. Both are
filled up to a capacity. A trained position that is padding points to the spare place T (`Row.spare`): a
hidden state of zeros, weight 0, the spare task and the spare segment, so that it adds exactly nothing to
loss, gradients and sums. A border that is padding is T: an empty segment.

What the host knows of a row is baked into a capture, so of a static row it knows only what every row that
fits it has in common: no segment lengths (an attention that loops over them raises), no samples, and a
bound on the longest segment, which changes no result as long as it is one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repsft_fast.row import Row

ALIGNMENT = 128  # bytes, as in the store's staging buffer: kernels are not specialised twice
_WORD = torch.int32  # every section is made of whole words, so that one copy takes them all


@dataclass(frozen=True, order=True)
class Shape:
    """T: a padded row's length; trained: capacity for N'."""

    length: int
    trained: int


class StaticRow:
    """One set of buffers in one piece of memory. `row` is what `model.loss` is given; `take` fills it.

    borders: capacity of cu_seqlens; longest: bound on a segment; spare_task: the id that padding counts for.
    """

    def __init__(self, shape: Shape, *, borders: int, longest: int, spare_task: int, device: torch.device):
        self.shape, self.borders, self.longest = shape, borders, longest
        length, trained = shape.length, shape.trained
        # what padding is, and so what a row without samples is
        sections: dict[str, tuple[int, torch.dtype, int]] = {
            "tokens": (length, torch.int64, 0),
            "positions": (length, torch.int64, 0),
            "targets": (length + 1, torch.int64, 0),
            "weights": (length + 1, torch.float32, 0),
            "trained_positions": (trained, torch.int64, length),
            "position_tasks": (trained, torch.int64, spare_task),
            "position_segments": (trained, torch.int64, borders),
            "cu_seqlens": (borders, torch.int32, length),
        }
        places, words = {}, 0
        step = ALIGNMENT // _WORD.itemsize
        for name, (count, dtype, _) in sections.items():
            stop = words + count * dtype.itemsize // _WORD.itemsize
            places[name] = slice(words, stop)
            words = -(-stop // step) * step
        self._memory = torch.zeros(words, dtype=_WORD, device=device)
        self._words = {name: self._memory[place] for name, place in places.items()}
        fields = {}
        for name, (_, dtype, padding) in sections.items():
            fields[name] = self._words[name].view(dtype)
            fields[name].fill_(padding)
        fields["cu_seqlens"][0] = 0
        self._blank = self._memory.clone()
        self.row = Row(
            tokens=fields["tokens"].unsqueeze(0),
            positions=fields["positions"].unsqueeze(0),
            targets=fields["targets"],
            weights=fields["weights"],
            trained_positions=fields["trained_positions"],
            position_tasks=fields["position_tasks"],
            position_segments=fields["position_segments"],
            cu_seqlens=fields["cu_seqlens"],
            segment_lengths=(),
            max_seqlen=longest,
            samples=(),
            real_tokens=length,
            spare=True,
        )

    def fits(self, row: Row) -> bool:
        """Borders that do not end with the row do not fit: the plain pass refuses them (`ops.attention`)."""
        return (
            row.targets.numel() == sum(row.segment_lengths) == self.shape.length
            and row.trained_positions.numel() <= self.shape.trained
            and row.cu_seqlens.numel() <= self.borders
            and row.max_seqlen <= self.longest
        )

    def take(self, row: Row) -> None:
        """Become `row`, which `fits`. Two copies: the blank over everything, so that nothing of the row
        before is left, then what the row has. Nothing is asked of the device."""
        self._memory.copy_(self._blank)
        sources = [getattr(row, name).view(-1).view(_WORD) for name in self._words]
        targets = [w[: s.numel()] for w, s in zip(self._words.values(), sources, strict=True)]
        torch._foreach_copy_(targets, sources)

    def clear(self) -> None:
        """Become a row without samples."""
        self._memory.copy_(self._blank)

    def tensors(self) -> list[Tensor]:
        return [self._memory]
