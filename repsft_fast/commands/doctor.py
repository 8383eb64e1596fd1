"""`repsft doctor`: what this machine has, every setting on a page, what models hold per GPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil

from rich.table import Column, Table
from rich.text import Text

from repsft_fast.config import reference
from repsft_fast.report import visible
from repsft_fast.report.format import size

_PACKAGES = (
    ("torch", "torch", "everything"),
    ("triton", "triton", "our kernels on a GPU"),
    ("transformers", "transformers", "models, tokenizers"),
    ("datasets", "datasets", "parquet, arrow, hub sources"),
    ("peft", "peft", "model.lora"),
    ("liger-kernel", "liger_kernel", "model.layer_kernels on a GPU"),
    ("flash-attn", "flash_attn", "model.attention: flash2 (optional)"),
    ("flash-attn-4", "flash_attn.cute", "model.attention: flash4 (optional)"),
    ("bitsandbytes", "bitsandbytes", "optim.name: bnb_adamw8bit (optional)"),
    ("torchao", "torchao", "optim.name: torchao_adamw8bit (optional)"),
    ("reasoning-gym", "reasoning_gym", "generated data (demo)"),
    ("gguf", "gguf", "model.gguf_file"),
    ("wandb", "wandb", "log.trackers: wandb (optional)"),
    ("trackio", "trackio", "log.trackers: trackio (optional)"),
    ("tensorboard", "tensorboard", "log.trackers: tensorboard (optional)"),
    ("math-verify", "math_verify", "comparing answers as expressions (optional)"),
    ("lm-eval", "lm_eval", "repsft eval: tasks of layout lm_eval (optional)"),
    ("vllm", "vllm", "evaluate.engine: vllm (optional, untried)"),
)


def doctor() -> None:
    """What this machine has, what will be used, what is missing and how to get it."""
    import torch

    console = visible.console()
    table = Table("what", Column("here", no_wrap=True), "used for", box=None, header_style="dim")
    table.add_row("Python", platform.python_version(), "")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            table.add_row(
                f"GPU {index}", f"{facts.name}, {size(facts.total_memory)}", "training in bf16, fused kernels"
            )
    else:
        table.add_row("GPU", "none", f"training on the CPU in fp32, {torch.get_num_threads()} threads")
    for package, module, purpose in _PACKAGES:
        found = _importable(module)
        version = _version(package) if found else f"missing: pip install {package}"
        table.add_row(package, Text(version, style="" if found else "yellow"), purpose)
    compiler = shutil.which("cc") or shutil.which("gcc")
    table.add_row("C compiler", compiler or Text("missing", style="yellow"), "Triton on a GPU, torch.compile")
    console.print(table)


def settings_page() -> None:
    """Every setting as a page of markdown: docs/settings.md."""
    print(reference.settings_page(), end="")


def plan_sizes(models: str | None, gpus: str) -> None:
    """What models hold per GPU and how long a row fits. models: with commas; None = `known_models`."""
    from repsft_fast.sizing import page

    chosen = list(page.MODELS) if models is None else [name.strip() for name in models.split(",")]
    print(page.page(chosen, page.gpu_counts(gpus)), end="")


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a module inside a package that is not here
        return False


def _version(package: str) -> str:
    if package == "torch":  # with its build: +cpu, +cu130
        import torch

        return str(torch.__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "present"
