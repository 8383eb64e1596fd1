"""Steps that all ranks of a sharded model take together: what rank 0 found is what all go on with, and what
fails on one fails on all.

Ranks gather every layer together (FSDP2), so all must make the same forward calls: a token that rounding
makes another one on another rank would end a reply there alone, and the others would wait for ever. Hence one
small sum a step, which on a GPU waits for the device no more than reading the token does.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from repsft_fast.distributed import Pace, all_sum
from repsft_fast.errors import ModelError, describe


class Lockstep:
    """Used as a context around all steps. A model that is not sharded is asked alone: ranks that hold all of
    it may ask for different things."""

    def __init__(self, model: nn.Module):
        self._pace = Pace(model)
        self._ranks = dist.get_world_size() if isinstance(model, FSDPModule) else 1
        self.main = self._ranks == 1 or dist.get_rank() == 0
        self.device = next(model.parameters()).device
        self._failed: BaseException | None = None

    def __enter__(self) -> Lockstep:
        self._pace.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pace.__exit__(kind, error, trace)

    def __call__(self, size: int, compute: Callable[[], Tensor]) -> list[float]:
        """The `size` float64 numbers that `compute` gives on rank 0. It makes at most one forward call, and
        what an earlier one of this step was.

        Raises what it raised; where it raised on another rank alone, torch.OutOfMemoryError for want of
        memory there and ModelError for all else.
        """
        if self._ranks == 1:
            return compute().tolist()
        told = torch.zeros(size + 2, dtype=torch.float64, device=self.device)
        problem: Exception | None = None
        try:
            found = compute()
            if self.main:
                told[:size] = found
        # as new: the error holds on to the frames it came from, and they to what lies in memory
        except torch.OutOfMemoryError as error:
            problem = torch.OutOfMemoryError(str(error) or "no words")
        except Exception as error:
            problem = error
        if problem is not None:
            told[size + isinstance(problem, torch.OutOfMemoryError)] = 1
            self._pace.finish_row()
        values = all_sum(told).tolist()
        self._pace.begin_row()
        if problem is None and any(values[size:]):
            problem = self._of_another(*map(int, values[size:]))
        if problem is not None:
            self._failed = problem
            raise problem
        return values[:size]

    def unmet(self, error: BaseException) -> bool:
        """Whether the others do not know of `error` yet."""
        return self._ranks > 1 and error is not self._failed

    def _of_another(self, failed: int, full: int) -> Exception:
        if full:
            return torch.OutOfMemoryError(f"memory ran out on {full} of {self._ranks} ranks")
        wrong = f"a step of generation failed on {failed} of {self._ranks} ranks"
        return ModelError(describe("model", wrong, todo="read the other ranks' output"))


def raising(error: Any) -> Callable[[], Tensor]:
    """A computation that failed."""

    def compute() -> Tensor:
        raise error

    return compute
