"""The row: what one microbatch is on the device, and the one constant that marks an untrained target.

A row is a packed sequence of at most T tokens. A segment is one sample inside it. Positions restart in every
segment, and the padding at the end is a segment of its own, so no document sees another (law 1).
"""

from dataclasses import dataclass

from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Row:
    """One packed row. Everything the step needs is here, so the step never asks the host for a number."""

    tokens: Tensor  # [1, T] int64
    positions: Tensor  # [1, T] int64, restarting at 0 in every segment
    targets: Tensor  # [T] int64, already shifted; IGNORE_INDEX = not trained on
    weights: Tensor  # [T] fp32, already divided by the update's one denominator; 0 where not trained
    trained_positions: Tensor  # [N'] int64, the positions whose target is trained, ascending
    position_tasks: Tensor  # [N'] int64, task id of every trained position
    position_segments: Tensor  # [N'] int64, segment (0 … S-1) of every trained position
    cu_seqlens: Tensor  # [S'+1] int32, segment borders; padded with T so that its length takes few values
    # S real segments, then one for the padding where there is any; host, sums to T
    segment_lengths: tuple[int, ...]
    max_seqlen: int  # bound on the longest segment, host, rounded up so that it takes few values
    samples: tuple[int, ...]  # [S] sample ids of the real segments, host
    real_tokens: int  # tokens that are not padding, host
    # guessed share of the trained positions that loss.skip_below keeps, host; any guess is exact
    kept_share: float = 1.0
    sample_ids: Tensor | None = None  # [S] int64, `samples` on the device; None where nobody put them there
    # targets and weights have one place more, [T+1], which stands for a hidden state of zeros and weighs
    # nothing: entries of trained_positions that are padding point there (training.static_row)
    spare: bool = False

    @property
    def num_segments(self) -> int:
        return len(self.samples)
