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
from typing import Any, cast

from rich.table import Column, Table
from rich.text import Text

from repsft_fast.config import Config
from repsft_fast.data.inspect import TokenView
from repsft_fast.errors import ConfigError, describe
from repsft_fast.report import visible
from repsft_fast.report.result import RunResult
from repsft_fast.report.words import count, size

BAR = 40


def demo(folder: str) -> RunResult | None:
    """Make the tokenizer, train the small model until it has memorised its data, show its answers to held-out prompts."""
    from repsft_fast.demo import prepare
    from repsft_fast.training.trainer import train

    target = Path(Config.of("demo", {"run.folder": folder}).run.folder)  # ~ and variables filled in
    tokenizer = prepare(target.parent / f"{target.name}-tokenizer")
    try:
        result = train(Config.of("demo", {"run.folder": folder, "tokenizer.path": str(tokenizer)}))
    except ConfigError as error:
        if "--resume" not in str(error):
            raise
        todo = "give a new one: --folder"  # the demo has no --resume
        raise ConfigError(describe("--folder", "holds another run", got=folder, todo=todo)) from error
    if result is not None:
        show_answers(result.more.get("answers", []))
        print(
            "\nSmall, from random weights: it keeps most of what it has seen and guesses the rest."
            " A pretrained one learns from it:"
        )
        print("  repsft train --config smollm2")
    return result


def export(run: str, *, to: str | None, generation: int | None, merge: str | None, dtype: str | None, base: str | None) -> None:
    """Write a run's model from a checkpoint and say what was written: of which update, and where."""
    problems = []
    if merge not in (None, "true", "false"):
        problems.append(describe("--merge", "cannot be used", expected="true or false", got=merge))
    if dtype not in (None, "auto", "float32", "bfloat16", "float16"):
        problems.append(describe("--dtype", "cannot be used", expected="auto, float32, bfloat16 or float16", got=dtype))
    if problems:
        raise ConfigError(problems)
    from repsft_fast.training.exporting import export as write
    from repsft_fast.training.trainer import quiet_libraries

    quiet_libraries()
    merged = None if merge is None else merge == "true"
    done = write(run, to=to, generation=generation, merge=merged, dtype=cast(Any, dtype), base=base)
    console = visible.console()
    for note in done.notes:
        visible.show(console, visible.one_line(note), "yellow")
    words = f"the model of update {done.update:,} ({done.which}), from checkpoint {done.generation}: {done.folder}"
    visible.show(console, visible.one_line(words))


def show_answers(answers: list[dict[str, Any]]) -> None:
    """Prompts, the model's greedy answer and the reference, marked right or wrong; trained ones first, then held-out ones."""
    console = visible.console()
    for seen, prompts in itertools.groupby(answers, key=lambda answer: answer["seen"]):
        visible.show(console, f"\n{'Trained on' if seen else 'Never seen'}", "bold")
        _show_answers(console, list(prompts))


def _show_answers(console: Any, answers: list[dict[str, Any]]) -> None:
    from repsft_fast.evaluate.answers import final_answer, same_answer

    for answer in answers:
        reference = final_answer(answer["reference"]) or ""
        right = same_answer(final_answer(answer["answer"]), reference)
        prompt = _short(visible.visible(answer["prompt"].strip(), "\n"), 300)
        visible.show(console, f"\n{visible.one_line(answer['task'])}: {prompt}", "dim")
        reply = _short(visible.visible(answer["answer"].strip(), "\n"), 400)
        visible.show(console, "  " + reply.replace("\n", "\n  "))
        verdict = "right" if right else f"wrong, expected {visible.one_line(reference)}"
        visible.show(console, f"  {'✓' if right else '✗'} {verdict}", "green" if right else "red")


def inspect(config: Config, *, show: int = 3) -> None:
    """Print samples as the model sees them (what is trained between « and »), what was read, lengths, what was dropped and why.

    The text is the same on a terminal, which colours it besides, and in a file.
    """
    from repsft_fast.data.ends import cut_at, ends_in_words, find_ends
    from repsft_fast.data.inspect import summarise, view
    from repsft_fast.data.sample import Loaded
    from repsft_fast.training.parts import _data_settings, build_tokenizer, load_samples, vocabulary_of

    if show < 0:
        raise ConfigError(describe("--show", "is too small", expected="at least 0", got=show))
    console = visible.console()
    tokenizer = build_tokenizer(config)
    splits, account = load_samples(config, tokenizer, vocabulary_of(config, tokenizer))
    for sample in splits.train[:show]:
        seen = view(sample, tokenizer)
        source, task = visible.one_line(seen.source), visible.one_line(seen.task)
        visible.show(console, f"{source}  task {task}  {seen.positions} positions, {seen.trained} trained", "bold")
        visible.show(console, marked(seen.tokens))
        visible.show(console, "")
    figures = summarise(Loaded(splits.train, account.dropped, account.warnings))
    heads = ("task", "samples", "positions", "trained")
    rows = [[name, *map(count, (t.samples, t.positions, t.trained))] for name, t in figures.tasks.items()]
    _show_table(console, [list(heads), *rows])
    lengths = ", ".join(f"{name} {figures.positions[name]}" for name in ("min", "median", "p95", "max"))
    visible.show(console, f"\nlengths in positions: {lengths}")
    highest = max((n for _, _, n in figures.histogram), default=1)
    for first, last, n in figures.histogram:
        bar = "█" * max(round(BAR * n / highest), 1 if n else 0)
        visible.show(console, f"  {first:>6} – {last:<6} {bar:<{BAR}} {n}")
    _show_account(console, account)
    dropped = ", ".join(f"{n} × {reason}" for reason, n in figures.dropped.items()) or "nothing"
    visible.show(console, f"\ndropped: {visible.one_line(dropped)}")
    if figures.duplicates:
        visible.show(console, f"{figures.duplicates} samples are, token for token, an earlier one again")
    ends = find_ends(splits.train, tokenizer, cut_at=cut_at(_data_settings(config)))
    for sentence in ends_in_words(ends, tokenizer):
        visible.show(console, visible.one_line(sentence))
    for warning in figures.warnings:
        visible.show(console, visible.one_line(warning), "yellow")


def _show_account(console: Any, account: Any) -> None:
    """What was read and which of its columns were used: {name: rows} of each."""
    for title, counts in (
        ("read", account.files),
        ("columns used", account.columns_used),
        ("columns not used", account.columns_unused),
    ):
        if counts:
            named = ", ".join(f"{visible.one_line(str(name))} ({n} rows)" for name, n in counts.items())
            visible.show(console, f"{title}: {named}")


def _show_table(console: Any, rows: list[list[str]]) -> None:
    """Columns side by side, each as wide as it must be; the first row heads them."""
    rows = [[visible.one_line(cell) for cell in row] for row in rows]
    widths = [max(map(visible.columns, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        line = "  ".join(visible.padded(cell, width) for cell, width in zip(row, widths, strict=True))
        visible.show(console, line.rstrip(), "" if number else "dim")


def marked(tokens: Sequence[TokenView]) -> Text:
    """The sample as it is shown: what is trained stands between « and », which the sample's own text cannot hold."""
    text = Text()
    for trained, span in itertools.groupby(tokens, key=lambda token: token.trained):
        shown = visible.visible("".join(token.text for token in span), also="«»")
        text.append(f"«{shown}»" if trained else shown, style="black on green" if trained else "dim")
    return text


def doctor() -> None:
    """What this machine has, what will be used, what is missing and how to get it."""
    import torch

    console = visible.console()
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
