"""What is measured on, and what it reaches: `ceilings` times a copy and a matrix product on this machine, and
shares are of those, not of a datasheet."""

from __future__ import annotations

import functools
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.checkout import code
from benchmarks.harness.timing import Call, interleave, quantile


@functools.cache
def environment(device: str = "cpu") -> dict[str, Any]:
    """The fields every record of this process shares. NoCommit where neither git nor COMMIT says which code
    this is."""
    return {**code(), **machine(device)}


def machine(device: str = "cpu") -> dict[str, Any]:
    """What is measured on."""
    import triton

    place = torch.device(device)
    cuda = place.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(place) if cuda else _cpu_model(),
        "device_class": place.type,
        "driver": _driver() if cuda else platform.release(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def ceilings(device: torch.device | str, dtype: torch.dtype, *, small: bool = False) -> dict[str, float]:
    """What this machine reaches: `bytes_per_s` of a large copy (read + write), `flops_per_s` of a large
    matrix product."""
    device = torch.device(device)
    cuda = device.type == "cuda" and not small
    elements, side = (1 << 30, 8192) if cuda else (1 << 23, 384) if small else (1 << 26, 1024)
    source = torch.empty(elements, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    calls: dict[str, Call] = {"copy": lambda: target.copy_(source), "gemm": lambda: torch.mm(a, b, out=out)}
    times = interleave(calls, device=device, rounds=5 if small else 15)
    return {
        "bytes_per_s": 2 * elements / (quantile(times["copy"], 0.2) / 1e3),
        "flops_per_s": 2 * side**3 / (quantile(times["gemm"], 0.2) / 1e3),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x{len(names)}" if names else platform.machine()


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return (
            subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
        )
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""
