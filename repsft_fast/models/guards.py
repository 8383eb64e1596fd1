"""Where libraries read what strangers wrote: all they raise becomes one ModelError, all they print is kept
from the user.

A model's sizes are summed before memory is taken for them: a vocabulary of a billion would else take the
machine down first.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers.utils import logging as transformers_logging

from repsft_fast.errors import ModelError, RepsftError, describe

SECONDS = 20.0  # to build a model without memory; the largest public ones take two
LARGEST = 2**50  # bytes of one model: nothing is trained that large
MOST_PARTS = 100_000  # layers, experts, labels: transformers makes a list entry or a module of each
MOST_ENTRIES = 20_000  # of one list or table: transformers copies and compares them again and again
WIDEST_HEAD = 2**16  # of which rotary tables are computed, in memory, before a size is summed
_PARTS = ("layer", "block", "depth", "expert", "head", "labels", "codebook", "stage")
_ROTARY = ("head_dim", "rotary_dim", "rotary_ndims", "kv_channels")
_SILENT = 60  # above logging.CRITICAL
# Their messages alone say little.
_NAMED = (
    LookupError, AttributeError, TypeError, NotImplementedError, ArithmeticError, AssertionError,
    RecursionError, SystemExit,
)  # fmt: skip


@contextlib.contextmanager
def library(
    where: str,
    got: object,
    todo: str | None = None,
    *,
    instead: Callable[[BaseException], ModelError] | None = None,
) -> Iterator[None]:
    """Any exception inside becomes ModelError: where, the library's first words, got, todo; or what `instead`
    makes of it.

    Our own errors and a GPU out of memory pass as they are.
    """
    try:
        with quiet():
            yield
    except (RepsftError, torch.OutOfMemoryError, KeyboardInterrupt, GeneratorExit):
        raise
    # a panic of tokenizers' Rust is no Exception, nor is it when code beside a model exits
    except BaseException as error:
        if not isinstance(error, Exception | SystemExit) and type(error).__name__ != "PanicException":
            raise
        made = (
            instead(error)
            if instead is not None
            else ModelError(describe(where, first_words(error), got=got, todo=todo))
        )
        raise made from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' reports, progress bars and warnings: what matters of them is said by us."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(_SILENT)
    if bars:
        transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def first_words(error: BaseException, limit: int = 300) -> str:
    """The first two lines of a library's message, with the exception's name where the message alone says
    little."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2])
    if not text or isinstance(error, _NAMED):
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= limit else f"{text[:limit]}…"


def check_counts(settings: Any, where: str) -> None:
    """ModelError for a count of layers, experts, heads or labels, a width of heads, a length of a list, that
    no model has.

    Its lists and tables alone would take minutes.
    """
    if isinstance(settings, Mapping):
        for name, value in settings.items():
            word, many = str(name).lower(), isinstance(value, int | float) and value > MOST_PARTS
            if isinstance(value, list | Mapping) and len(value) > MOST_ENTRIES:
                wrong, expected = "has more entries than any model's", f"at most {MOST_ENTRIES}"
                raise ModelError(describe(f"{where} {name}", wrong, expected=expected, got=len(value)))
            if word.endswith(_ROTARY) and isinstance(value, int | float) and value > WIDEST_HEAD:
                raise ModelError(
                    describe(
                        f"{where} {name}",
                        "is wider than any head",
                        expected=f"at most {WIDEST_HEAD}",
                        got=value,
                    )
                )
            if many and any(part in word for part in _PARTS) and not word.endswith(("dim", "size")):
                expected = f"at most {MOST_PARTS}"
                raise ModelError(
                    describe(f"{where} {name}", "is more than any model has", expected=expected, got=value)
                )
            check_counts(value, where)


@contextlib.contextmanager
def bounded_building(where: str, got: object) -> Iterator[None]:
    """ModelError when the model built inside takes over SECONDS or grows beyond LARGEST: for building on
    meta."""
    end, total = time.monotonic() + SECONDS, 0

    def seen(module: nn.Module, name: str, value: Any) -> None:
        nonlocal total
        total += value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
        if total > LARGEST:
            wrong = (
                f"describes a model of over {size(LARGEST)}; {type(module).__name__}.{name} is"
                f" {list(value.shape)}"
            )
            raise ModelError(describe(where, wrong, got=got, todo="correct its sizes"))
        if time.monotonic() > end:
            wrong = f"describes a model that takes over {SECONDS:g} s to build without its weights"
            raise ModelError(describe(where, wrong, got=got, todo="correct its number of layers"))

    hooks = register_module_parameter_registration_hook(seen), register_module_buffer_registration_hook(seen)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_memory(model: nn.Module, dtype: torch.dtype, place: torch.device, where: str, got: object) -> None:
    """ModelError when the weights of `model` (on meta), held in `dtype`, are more than all memory at
    `place`."""
    if place.type == "meta":
        return
    # Each dimension is a Python number: the product cannot overflow.
    largest = max(model.named_parameters(), key=lambda entry: entry[1].numel(), default=None)
    needed = dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
    there = torch.cuda.get_device_properties(place).total_memory if place.type == "cuda" else machine_memory()
    if largest is not None and there is not None and needed > there:
        name, weight = largest
        wrong = (
            f"its weights are {size(needed)} in {str(dtype).removeprefix('torch.')}, of which {name}"
            f" {list(weight.shape)} is"
        )
        wrong += f" {size(weight.numel() * dtype.itemsize)}; {place.type} has {size(there)} in all"
        raise ModelError(describe(where, wrong, got=got, todo="correct the sizes, or take a larger machine"))


def machine_memory() -> int | None:
    """Bytes this process may have: the machine's, or its control group's where that is less. None where
    neither is said."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            found.append(int(Path(file).read_text(encoding="ascii")))
    return min((value for value in found if value > 0), default=None)


def size(number: int) -> str:
    """
    >>> size(2_500_000_000)
    '2.5 GB'
    """
    for unit, word in ((10**15, "PB"), (10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if number >= unit:
            return f"{number / unit:,.1f} {word}"
    return f"{number:,} bytes"
