"""Errors on standard error, in the house's form. What they quote of others' text, the terminal shows and does
not obey."""

from __future__ import annotations

import os
import sys
import traceback
from types import TracebackType

from rich.text import Text

from repsft_fast.errors import ConfigError, RepsftError
from repsft_fast.report import visible

# torchrun's, then other launchers', as in distributed.launch: of each the first that is set counts.
_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


def print_error(error: RepsftError) -> None:
    """In red on a terminal. What one rank refuses (exit code 2) all know and one of them tells, unless it
    alone knows it."""
    said = (os.environ.get(name, "").strip() for name in _RANKS)
    rank = next((int(text) for text in said if text.isascii() and text.isdecimal() and len(text) < 12), 0)
    sizes = (os.environ.get(name, "").strip() for name in _SIZES)
    # whatever number is left over: nobody else tells
    alone = next((size for size in sizes if size), "1") == "1"
    known_to_all = error.exit_code == ConfigError.exit_code and not error.every_rank
    if known_to_all and rank != 0 and not alone:
        return
    console = visible.console(sys.stderr)
    problems = error.problems if isinstance(error, ConfigError) else [str(error)]
    title = Text("error" if len(problems) == 1 else f"{len(problems)} errors", style="bold red")
    visible.show(console, title + Text(f" (rank {rank})" if rank else ""))
    for problem in problems:
        visible.show(console, visible.visible(f"  {problem}", "\n"), "red")


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As Python prints it; fit for sys.excepthook."""
    print(
        visible.visible("".join(traceback.format_exception(kind, error, trace)), "\n"),
        end="",
        file=sys.stderr,
    )
