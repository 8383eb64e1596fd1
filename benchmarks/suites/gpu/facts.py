"""Part A: what this machine is and what it reaches. Every floor of the session comes from these ceilings."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import timing
from benchmarks.harness.machine import ceilings
from benchmarks.suites.gpu.session import FACTS, Session

PACKAGES = {  # module → distribution
    "numpy": "numpy", "transformers": "transformers", "liger_kernel": "liger-kernel", "trl": "trl",
    "peft": "peft",
    "datasets": "datasets", "gguf": "gguf", "torchao": "torchao", "bitsandbytes": "bitsandbytes",
    "cut_cross_entropy": "cut-cross-entropy", "quack": "quack-kernels", "unsloth_zoo": "unsloth_zoo",
    "flash_attn": "flash-attn", "flash_attn_interface": "flash-attn-3", "flash_attn.cute": "flash-attn-4",
    "deepspeed": "deepspeed", "pydantic": "pydantic",
}  # fmt: skip


def run(session: Session) -> None:
    facts: dict[str, Any] = {"machine": machine(session.device), "packages": packages(), "ceilings": {}}
    write(session.out / FACTS, facts)
    for name, what in facts["machine"].items():
        print(f"  {name:24s} {what}")
    absent = [name for name, version in facts["packages"].items() if version is None]
    print(f"  not importable here: {', '.join(absent) or 'nothing'}", flush=True)
    for measure in (_copy_and_products, _host_copies, _disk):
        with session.attempt(measure.__name__.strip("_").replace("_", " ")):
            facts["ceilings"] |= measure(session)
            write(session.out / FACTS, facts)


def write(path: Path, facts: dict[str, Any]) -> None:
    """Whole or not at all."""
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(facts, indent=1, sort_keys=True))
    os.replace(beside, path)


def ceilings_of(out: Path) -> dict[str, float]:
    """What part A measured, for the other parts; empty where it was not run."""
    path = out / FACTS
    return json.loads(path.read_text())["ceilings"] if path.exists() else {}


def machine(device: str) -> dict[str, Any]:
    interfaces = Path("/sys/class/net")
    found: dict[str, Any] = {
        "python": platform.python_version(), "kernel": platform.release(), "cpus": os.cpu_count(),
        "torch": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads(),
        "memory_bytes": _host_memory(),
        "interfaces": sorted(os.listdir(interfaces)) if interfaces.is_dir() else [],
    }  # fmt: skip
    if device != "cuda":
        return found
    properties = torch.cuda.get_device_properties(0)
    found |= {
        "gpu": properties.name, "gpus": torch.cuda.device_count(),
        "capability": list(torch.cuda.get_device_capability(0)),
        "gpu_memory_bytes": properties.total_memory, "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size, "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
        "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip
    query = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,driver_version,pstate"
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
        found |= dict(zip(query.split(","), answer.stdout.splitlines()[0].split(", ")))
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        found["nvidia-smi"] = f"no answer ({type(error).__name__})"
    return found


def packages() -> dict[str, str | None]:
    """Version of every optional package that can be found, None of the others. Nothing is imported."""
    found: dict[str, str | None] = {}
    for module, distribution in PACKAGES.items():
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):  # a parent package is missing or broken
            spec = None
        try:
            found[module] = importlib.metadata.version(distribution) if spec is not None else None
        except importlib.metadata.PackageNotFoundError:
            found[module] = "without metadata"
    return found


def _copy_and_products(session: Session) -> dict[str, float]:
    """A large copy on the device and a large product in each dtype that is trained with."""
    cuda = session.device == "cuda"
    dtypes = (torch.bfloat16, torch.float32) if cuda else (torch.float32,)
    made: dict[str, float] = {}
    for dtype in dtypes:
        name = str(dtype).split(".")[-1]
        reached = ceilings(session.device, dtype, small=session.rehearsal)
        made |= {f"flops_per_s_{name}": reached["flops_per_s"]}
        made.setdefault("bytes_per_s", reached["bytes_per_s"])
        # of bf16 on a GPU, which is what is trained in
        made.setdefault("flops_per_s", reached["flops_per_s"])
        print(
            f"  copy {reached['bytes_per_s'] / 1e9:.1f} GB/s, product in {name}"
            f" {reached['flops_per_s'] / 1e12:.2f} TFLOP/s"
        )
    return made


def _host_copies(session: Session) -> dict[str, float]:
    """Pinned host memory to the device and back, bytes a second one way."""
    if session.device != "cuda":
        return {}
    size = 1 << 30
    there = torch.empty(size, dtype=torch.uint8, device="cuda")
    here = torch.ones(size, dtype=torch.uint8).pin_memory()
    times = timing.interleave(
        {
            "up": lambda: there.copy_(here, non_blocking=True),
            "down": lambda: here.copy_(there, non_blocking=True),
        },
        device="cuda",
        rounds=3,
        cold=False,
    )
    made = {f"{way}_bytes_per_s": size / (timing.quantile(times[way], 0.5) / 1e3) for way in ("up", "down")}
    print(
        f"  host to device {made['up_bytes_per_s'] / 1e9:.1f} GB/s, back {made['down_bytes_per_s'] / 1e9:.1f}"
        " GB/s"
    )
    return made


def _disk(session: Session) -> dict[str, float]:
    """Sequential writing with one fsync at its end, as `dd conv=fsync` does it, where checkpoints of the
    other parts go."""
    size = (1 << 22) if session.rehearsal else (1 << 31)
    folder = session.out / "disk"
    folder.mkdir(exist_ok=True)
    block = os.urandom(1 << 20) * 4
    try:
        if shutil.disk_usage(folder).free < 2 * size:
            session.leave_out("disk ceiling", f"less than {2 * size:,} bytes are free at the output folder")
            return {}
        began = time.perf_counter()
        with (folder / "ceiling").open("wb", buffering=0) as file:
            for _ in range(max(1, size // len(block))):
                file.write(block)
            written = time.perf_counter()
            os.fsync(file.fileno())
        ended = time.perf_counter()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    size = max(1, size // len(block)) * len(block)
    made = {"disk_bytes_per_s": size / (ended - began), "disk_write_bytes_per_s": size / (written - began)}
    print(
        f"  disk {made['disk_bytes_per_s'] / 1e9:.2f} GB/s with fsync,"
        f" {made['disk_write_bytes_per_s'] / 1e9:.2f} without"
    )
    return made


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
