"""Capturing a function's GPU work once and replaying it: CUDA graphs behind two small types.

`torch.compile(mode="reduce-overhead")` and inductor's own switch capture too, and give silently wrong
gradients where several backward passes add into one gradient (github.com/pytorch/pytorch, issue 96693):
what they hand out is overwritten by the next replay. Here every address that lives longer than a replay is
the caller's.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch

from repsft_fast.errors import ConfigError, describe

WARM_UPS = 3  # of an eager pass on the side stream, as torch asks; what is compiled or tried is done in them
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
INDUCTOR = "TORCHINDUCTOR_CUDAGRAPHS"


class Captured(Protocol):
    """outputs: what the function returned; its tensors stay where they are, and hold the results of the last
    replay until any capture of the same `Capture` is replayed."""

    outputs: Any

    def replay(self) -> None:
        """Do again, on the current stream, what the device did in the capture."""
        ...


class Capture(Protocol):
    """Captures that share one pool of memory, so that the largest decides what all of them take."""

    def __call__(self, function: Callable[[], Any]) -> Captured:
        """Warm up, then capture. Raises whatever the function raises, and RuntimeError for what cannot be
        captured."""
        ...


class CudaCapture:
    """CUDA graphs on one device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Any]) -> CudaCaptured:
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                function()
        here.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # A collection in the middle could free what another graph or a stream holds, which a capture forbids.
        collects = gc.isenabled()
        gc.disable()
        try:
            # thread_local: the thread that plans and sends the next rows may allocate meanwhile
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                outputs = function()
        finally:
            if collects:
                gc.enable()
        return CudaCaptured(graph, outputs)


class CudaCaptured:
    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Any):
        self.graph, self.outputs = graph, outputs

    def replay(self) -> None:
        self.graph.replay()


def allocator_conflict() -> str | None:
    """What of the allocator's settings graphs cannot be had with, in words."""
    for name in ALLOCATOR:
        asked = os.environ.get(name, "")
        if "expandable_segments:true" in asked.replace(" ", "").lower():
            return f"{name} asks for expandable_segments, which graphs' memory cannot come from: unset it"
    return None


def refuse_inductor_graphs(compiled: bool) -> None:
    """ConfigError where inductor would capture compiled layers by itself: their gradients would be wrong, and
    nothing would say so."""
    inductor = sys.modules.get("torch._inductor.config")  # not imported for this: that takes a second
    asked = os.environ.get(INDUCTOR) == "1" if inductor is None else bool(inductor.triton.cudagraphs)
    if compiled and asked:
        wrong = (
            "makes inductor capture compiled layers, whose gradients are then wrong without a word as soon"
            " as an update has two rows (pytorch issue 96693)"
        )
        raise ConfigError(describe(INDUCTOR, wrong, todo="unset it, or set model.compile: false"))
