"""`repsft inspect`: samples as the model will see them, what was read, and what was dropped and why."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from repsft_fast.config import Config
from repsft_fast.data.ends import cut_at, ends_in_words, find_ends
from repsft_fast.data.inspect import SampleView, Summary, TokenView, summarise, view
from repsft_fast.data.sample import Loaded
from repsft_fast.errors import ConfigError, describe
from repsft_fast.report import visible
from repsft_fast.report.format import count
from repsft_fast.training.build import build_tokenizer, vocabulary_of
from repsft_fast.training.samples import _data_settings, load_samples

BAR = 40


def inspect(config: Config, *, show: int = 3) -> None:
    """Print samples as the model sees them (what is trained between « and »), what was read, lengths, what
    was dropped and why.

    The text is the same on a terminal, which colours it besides, and in a file.
    """
    if show < 0:
        raise ConfigError(describe("--show", "is too small", expected="at least 0", got=show))
    console = visible.console()
    tokenizer = build_tokenizer(config)
    splits, account = load_samples(config, tokenizer, vocabulary_of(config, tokenizer))
    for sample in splits.train[:show]:
        _show_sample(console, view(sample, tokenizer))

    # All that is trained on, whatever few of it were shown.
    figures = summarise(Loaded(splits.train, account.dropped, account.warnings))
    _show_figures(console, figures)
    _show_account(console, account)
    dropped = ", ".join(f"{n} × {reason}" for reason, n in figures.dropped.items()) or "nothing"
    visible.show(console, f"\ndropped: {visible.one_line(dropped)}")
    if figures.duplicates:
        visible.show(console, f"{figures.duplicates} samples are, token for token, an earlier one again")

    # Last, so that what may be wrong stands next to the prompt.
    ends = find_ends(splits.train, tokenizer, cut_at=cut_at(_data_settings(config)))
    for sentence in ends_in_words(ends, tokenizer):
        visible.show(console, visible.one_line(sentence))
    for warning in figures.warnings:
        visible.show(console, visible.one_line(warning), "yellow")


def _show_sample(console: Any, seen: SampleView) -> None:
    source, task = visible.one_line(seen.source), visible.one_line(seen.task)
    visible.show(
        console, f"{source}  task {task}  {seen.positions} positions, {seen.trained} trained", "bold"
    )
    visible.show(console, marked(seen.tokens))
    visible.show(console, "")


def _show_figures(console: Any, figures: Summary) -> None:
    """A table of the tasks, and how the lengths are distributed."""
    heads = ("task", "samples", "positions", "trained")
    rows = [[name, *map(count, (t.samples, t.positions, t.trained))] for name, t in figures.tasks.items()]
    _show_table(console, [list(heads), *rows])
    lengths = ", ".join(f"{name} {figures.positions[name]}" for name in ("min", "median", "p95", "max"))
    visible.show(console, f"\nlengths in positions: {lengths}")
    highest = max((n for _, _, n in figures.histogram), default=1)
    for first, last, n in figures.histogram:
        bar = "█" * max(round(BAR * n / highest), 1 if n else 0)
        visible.show(console, f"  {first:>6} – {last:<6} {bar:<{BAR}} {n}")


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
    """The sample as it is shown: what is trained stands between « and », which the sample's own text cannot
    hold."""
    text = Text()
    for trained, span in itertools.groupby(tokens, key=lambda token: token.trained):
        shown = visible.visible("".join(token.text for token in span), also="«»")
        text.append(f"«{shown}»" if trained else shown, style="black on green" if trained else "dim")
    return text
