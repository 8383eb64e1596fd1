"""The command line's small verbs: demo, inspect, doctor, bench. `train` is the trainer's own."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import itertools
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from repsft_fast.config import Config
from repsft_fast.data.inspect import TokenView
from repsft_fast.errors import ConfigError, describe
from repsft_fast.report.result import RunResult
from repsft_fast.report.words import count, size

BAR = 40


def demo(folder: str) -> RunResult | None:
    """Make the tokenizer, train the small model until it has memorised its data, show its answers to held-out prompts."""
    from repsft_fast.demo import prepare
    from repsft_fast.training.trainer import train

    target = Path(folder)
    tokenizer = prepare(target.parent / f"{target.name}-tokenizer")
    result = train(Config.of("demo", {"run.folder": folder, "tokenizer.path": str(tokenizer)}))
    if result is not None:
        show_answers(result.more.get("answers", []))
        print(
            "\nSmall, from random weights: it keeps most of what it has seen and guesses the rest."
            " A pretrained one learns from it:"
        )
        print("  repsft train --config smollm2")
    return result


def show_answers(answers: list[dict[str, Any]]) -> None:
    """Prompts, the model's greedy answer and the reference, marked right or wrong; trained ones first, then held-out ones."""
    console = Console(highlight=False)
    for seen, prompts in itertools.groupby(answers, key=lambda answer: answer["seen"]):
        console.print(Text(f"\n{'Trained on' if seen else 'Never seen'}", style="bold"))
        _show_answers(console, list(prompts))


def _show_answers(console: Console, answers: list[dict[str, Any]]) -> None:
    from repsft_fast.evaluate.answers import final_answer, same_answer

    for answer in answers:
        reference = final_answer(answer["reference"]) or ""
        right = same_answer(final_answer(answer["answer"]), reference)
        console.print(Text(f"\n{answer['task']}: {_short(answer['prompt'], 300)}", style="dim"))
        console.print(Text("  " + _short(answer["answer"], 400).replace("\n", "\n  ")))
        verdict = "right" if right else f"wrong, expected {reference}"
        console.print(Text(f"  {'✓' if right else '✗'} {verdict}", style="green" if right else "red"))


def inspect(config: Config, *, show: int = 3) -> None:
    """Print samples as the model sees them (trained tokens highlighted), lengths, and what was dropped and why."""
    from repsft_fast.data.inspect import summarise, view
    from repsft_fast.data.sample import Loaded
    from repsft_fast.training.parts import build_tokenizer, load_samples, vocabulary_of

    console = Console(highlight=False)
    tokenizer = build_tokenizer(config)
    splits, account = load_samples(config, tokenizer, vocabulary_of(config, tokenizer))
    loaded = Loaded(splits.train, account.dropped, account.warnings)
    for sample in loaded.samples[:show]:
        seen = view(sample, tokenizer)
        console.print(
            Text(f"{seen.source}  task {seen.task}  {seen.positions} positions, {seen.trained} trained", style="bold"),
            soft_wrap=True,  # a path that is broken in two cannot be clicked or copied
        )
        text = Text()
        for token in seen.tokens:
            text.append(token.text.replace("\n", "⏎\n"), style="black on green" if token.trained else "dim")
        console.print(text if console.is_terminal else marked(seen.tokens), "\n")
    figures = summarise(loaded)
    table = Table("task", "samples", "positions", "trained", box=None, header_style="dim")
    for name, task in figures.tasks.items():
        table.add_row(name, count(task.samples), count(task.positions), count(task.trained))
    console.print(table)
    positions = figures.positions
    console.print(
        "\nlengths in positions: " + ", ".join(f"{name} {positions[name]}" for name in ("min", "median", "p95", "max"))
    )
    highest = max((n for _, _, n in figures.histogram), default=1)
    for first, last, n in figures.histogram:
        console.print(f"  {first:>6} – {last:<6} {'█' * max(round(BAR * n / highest), 1 if n else 0):<{BAR}} {n}")
    dropped = ", ".join(f"{n} × {reason}" for reason, n in figures.dropped.items()) or "nothing"
    console.print(f"\ndropped: {dropped}")
    if figures.duplicates:
        console.print(f"{figures.duplicates} samples are, token for token, an earlier one again")
    for warning in figures.warnings:
        console.print(Text(warning, style="yellow"))


def marked(tokens: Sequence[TokenView]) -> str:
    """The sample without colours: what is trained stands between « and »."""
    spans = itertools.groupby(tokens, key=lambda token: token.trained)
    texts = [("".join(token.text for token in span), trained) for trained, span in spans]
    return "".join(f"«{text}»" if trained else text for text, trained in texts)


def doctor() -> None:
    """What this machine has, what will be used, what is missing and how to get it."""
    import torch

    console = Console(highlight=False)
    table = Table("what", Column("here", no_wrap=True), "used for", box=None, header_style="dim")
    table.add_row("Python", platform.python_version(), "")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            table.add_row(f"GPU {index}", f"{facts.name}, {size(facts.total_memory)}", "training in bf16, fused kernels")
    else:
        table.add_row("GPU", "none", f"training on the CPU in fp32, {torch.get_num_threads()} threads")
    for package, module, purpose in _PACKAGES:
        found = _importable(module)
        version = _version(package) if found else f"missing: pip install {package}"
        table.add_row(package, Text(version, style="" if found else "yellow"), purpose)
    compiler = shutil.which("cc") or shutil.which("gcc")
    table.add_row("C compiler", compiler or Text("missing", style="yellow"), "Triton on a GPU, torch.compile")
    console.print(table)


def plan_sizes(models: str | None, gpus: str) -> None:
    """What models hold per GPU and how long a row fits. models: with commas; None = `known_models`."""
    from repsft_fast.training import size_page

    chosen = list(size_page.MODELS) if models is None else [name.strip() for name in models.split(",")]
    print(size_page.page(chosen, size_page.gpu_counts(gpus)), end="")


def bench(arguments: Sequence[str]) -> int:
    """The benchmarks' own command line. They measure this source tree and are not installed with the package."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "benchmarks" / "commands.py").exists():
        wrong = "the benchmarks are not part of the installed package"
        raise ConfigError(describe("bench", wrong, expected=f"{checkout}/benchmarks", todo="run it from a checkout"))
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    return importlib.import_module("benchmarks.commands").main(list(arguments))


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
)


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


def _short(text: str, limit: int) -> str:
    text = text.strip()
    return text if len(text) <= limit else text[:limit] + " …"
