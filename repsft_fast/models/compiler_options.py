"""What the compiler of decoder layers is told beside the function: kernels that need nothing of each other
share a launch.

By itself torch's compiler adds up the gradient of a norm's weight inside the norm's own backward kernel
(`mix_order_reduction`) and leaves the last sum of each and its cast to torch: 8 launches for the four norms
of a Qwen3 layer. Without that, and with independent kernels in one launch (`combo_kernels`), the layer is 34
launches instead of 44 or 45; bytes and counts stand in csrc_triton/README.md. Every part of a shared launch
keeps blocks of its own (`combo_kernel_per_subkernel_blocks`): with one size for all, a sum along rows would
be read with the blocks of a sum across them. No option captures anything, and none is timed while graphs are
made (`benchmark_combo_kernel`).

Deterministic runs keep the compiler's own choice. The warps of a shared launch are chosen by timing on the
GPU, past the filter that leaves one choice to a reduction there (`_handle_combo_kernel_per_subkernel_blocks`
in torch 2.11, `_combo_sequential_autotune` in 2.13), and warps decide in which order a sum is added.

Options are part of what a cached graph is found by. No GPU has run them: where they fail at the warm-up, the
layers are compiled without (`CompiledLayers.separate`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

TOGETHER: Mapping[str, Any] = {
    "combo_kernels": True,
    "combo_kernel_per_subkernel_blocks": True,
    "benchmark_combo_kernel": False,
    "triton.mix_order_reduction": False,
}


def compiler_options() -> dict[str, Any] | None:
    """`options` of `torch.compile` for the layers of this process; None: the compiler's own. Asked when a
    layer is prepared, after `run.deterministic` has been set."""
    if not torch.cuda.is_available() or torch.are_deterministic_algorithms_enabled():
        return None
    return known(TOGETHER)


def known(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The options where this torch has all of them. One alone could cost more than none: `torch.compile`
    raises RuntimeError for a name that it does not know, and shared launches without blocks of their own read
    more."""
    there = set(torch._inductor.list_options())
    return dict(options) if there.issuperset(options) else None
