"""What a run decides once (law 12): what a trial, free memory or what can be imported answers where settings
leave it open, and what decides bits.

A run's first process decides, for all ranks alike. The values stand in run.yaml, where a setting can say
them, and in every checkpoint; a resumption takes them from there, whatever it would decide itself. A setting
that names another value wins, and it is said that the run no longer equals the one that was not interrupted.

Each is a module with the names of `Item`; `ITEMS` is the table. Who adds one writes that file and its line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from repsft_fast.distributed import raise_together
from repsft_fast.rundir.folder import is_open
from repsft_fast.training import attention, chunks, compiled, graph_choice, row_lengths, row_tokens
from repsft_fast.training.parts import Parts

_LATER = "choices"  # in a checkpoint's `decided`, beside what had its own key before there was a table
_OWN_KEY = ("chunk_bytes",)


class Item(Protocol):
    """One thing decided once: a module of functions. Values are what JSON can say and gives back equal.

    NAME     its key in checkpoints
    SETTING  the dotted setting that it answers where that is null or auto; None: no setting names it
    now      what this run uses, as asked or as it was decided
    use      take a value of the run before. ConfigError with the way out where it cannot be had here, on any
             rank alone; sends no message between ranks. Nothing in the run's folder has been changed yet
    words    a value as people read it; "": nothing is decided yet, and nothing is said of it
    before   what versions without this item did under these settings, for their checkpoints; None: that
             cannot be known, and what is decided now holds
    written  a value as SETTING says it, in run.yaml; None: the setting is left open
    """

    @property
    def NAME(self) -> str: ...

    @property
    def SETTING(self) -> str | None: ...

    def now(self, parts: Parts, /) -> Any: ...

    def use(self, parts: Parts, value: Any, /) -> None: ...

    def words(self, value: Any, /) -> str: ...

    def before(self, parts: Parts, /) -> Any: ...

    def written(self, value: Any, /) -> Any: ...


ITEMS: tuple[Item, ...] = (
    chunks,
    attention,
    row_tokens,
    row_lengths,
    compiled,
    graph_choice,
)


def settings_decided() -> tuple[str, ...]:
    """Dotted names of the settings that run.yaml gets values for."""
    return tuple(item.SETTING for item in ITEMS if item.SETTING is not None)


def as_settings(parts: Parts) -> dict[str, Any]:
    """{dotted setting: value} of what this run uses, for run.yaml; without those that are left open."""
    found = {item.SETTING: item.written(item.now(parts)) for item in ITEMS if item.SETTING is not None}
    return {name: value for name, value in found.items() if value is not None}


def record(parts: Parts) -> dict[str, Any]:
    """For a checkpoint's `decided`: {"chunk_bytes": …, "choices": {name: value}}."""
    values = {item.NAME: item.now(parts) for item in ITEMS}
    own = {name: values.pop(name) for name in _OWN_KEY if name in values}
    return own | {_LATER: values}


def resume(parts: Parts, saved: Mapping[str, Any]) -> list[str]:
    """Take what the run before used, from a checkpoint's `decided`; {} from a version that wrote none. What
    to say about it. All ranks call it, before anything in the run's folder is changed.

    ConfigError where a value cannot be had here and no setting asks for another.
    """
    values = {**saved.get(_LATER, {}), **{name: saved[name] for name in _OWN_KEY if name in saved}}
    said: list[str] = []
    with raise_together(parts.world):
        for item in ITEMS:
            if item.NAME in values:
                said += _take(item, parts, values[item.NAME])
            elif (before := item.before(parts)) is not None:
                said += _take(item, parts, before)
            elif (now := item.now(parts)) is not None:
                wrong = f"an older version wrote the checkpoint, which names no {_name(item)}"
                said.append(f"{wrong}: {item.words(now)} from here on")
    if _LATER not in saved and (rounded := _rounded_before(parts)) is not None:
        said.append(rounded)
    return said


def _rounded_before(parts: Parts) -> str | None:
    """What versions without this table rounded to the type that is computed in, and this one does not: where
    they computed through FSDP2, on one rank too; None: nothing."""
    computed: torch.dtype = parts.model.compute_dtype
    if computed.itemsize >= 4 or (parts.world.size == 1 and getattr(parts.model, "masters", None) is None):
        return None
    what = "the weights of a row's tokens"
    if parts.world.size == 1:
        what += " and the gradient of the head (and of an embedding tied to it)"
    what += f" to {str(computed).removeprefix('torch.')}"
    return (
        f"an older version wrote the checkpoint, which rounded {what}; this one does not, so the run will not"
        " equal one that was not interrupted bit for bit"
    )


def begin_anew(parts: Parts, settings: Mapping[str, Any]) -> list[str]:
    """Take what a run that was ended before its first checkpoint has written into run.yaml: {dotted setting:
    value}. What to say about it. All ranks call it, before anything in the run's folder is changed."""
    said: list[str] = []
    with raise_together(parts.world):
        for item in ITEMS:
            if (name := item.SETTING) is None or name not in settings:
                continue
            # a setting may say less than a checkpoint does
            if item.written(item.now(parts)) != settings[name]:
                said += _take(item, parts, settings[name])
    return said


def _take(item: Item, parts: Parts, saved: Any) -> Sequence[str]:
    now = item.now(parts)
    if now == saved:
        return ()
    name = _name(item)
    # A setting that was asked for, tried and not to be had has its answer, which it keeps.
    asked = item.SETTING is not None and not is_open(parts.config, item.SETTING)
    tried = item is compiled and saved in (compiled.FAILED, compiled.SEPARATE) and now is True
    if asked and not tried:
        return (
            f"{name} is {item.words(now)} as asked, and was {item.words(saved)} before: sums are rounded"
            " otherwise from here on, so the run will not equal one that was not interrupted bit for bit",
        )
    item.use(parts, saved)
    if not item.words(now):
        return ()
    return (f"{name} stays {item.words(saved)}, as the run began; begun now it would be {item.words(now)}",)


def _name(item: Item) -> str:
    return item.SETTING or item.NAME.replace("_", " ")
