"""What the settings are called, and what somebody meant who wrote another name."""

import functools
import types
from collections.abc import Collection, Iterator
from typing import Any, Union, get_args, get_origin

from repsft_fast.config import foreign
from repsft_fast.config.foreign_values import SCALARS
from repsft_fast.config.sections import Section, Settings
from repsft_fast.errors import did_you_mean, spelled


def inner_section(annotation: Any) -> tuple[type[Section] | None, bool]:
    """The section a field holds (None: it holds a value), and whether it may be null."""
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    for member in members:
        if isinstance(member, type) and issubclass(member, Section):
            return member, type(None) in members
    return None, False


@functools.cache
def setting_names() -> tuple[str, ...]:
    """Every setting's dotted name, in order."""

    def walk(section: type[Section], above: str) -> Iterator[str]:
        for name, info in section.model_fields.items():
            inner, _ = inner_section(info.annotation)
            if inner is None:
                yield f"{above}{name}"
            else:
                yield from walk(inner, f"{above}{name}.")

    return tuple(walk(Settings, ""))


def unknown_setting(name: str, *, section: bool = False) -> str:
    """The sentence for a name that is no setting, with the one probably meant. section: settings were written
    below it.

    Looked for in turn: the name in another spelling, another trainer's name for it, the same word in another
    section, a similar word in this one, a name similar to another trainer's, a similar name anywhere.
    """
    names = setting_names()
    known = (*dict.fromkeys(n.rpartition(".")[0] for n in names), *names) if section else names
    suggestion = _spelled_otherwise(name, known) or foreign.ours(name)
    if suggestion is None and not section and "." not in name:  # `--modle owner/name`
        suggestion = SCALARS.get(did_you_mean(foreign.plain(name), SCALARS, cutoff=0.8) or "")
    if suggestion is None:
        above, _, last = foreign.plain(name).rpartition(".")
        elsewhere = [n for n in known if n.rpartition(".")[2] == last]
        siblings = {n.rpartition(".")[2]: n for n in known if n.rpartition(".")[0] == above}
        near = did_you_mean(last, siblings)
        suggestion = elsewhere[0] if elsewhere else siblings[near] if near else foreign.nearly(name)
        suggestion = suggestion or did_you_mean(foreign.plain(name), known)
    return f"{spelled(name)} is not a setting" + (f"; {foreign.question(suggestion)}" if suggestion else "")


def _spelled_otherwise(name: str, known: Collection[str]) -> str | None:
    """`Optim.LR`, `optim.warmup-fraction`, `optim_lr`, and `optimizer.lr`, whose section is one of ours by
    another name."""
    section, _, last = foreign.plain(name).rpartition(".")
    joined = {setting.replace(".", "_"): setting for setting in known}
    spellings = (
        foreign.plain(name),
        f"{foreign.SECTIONS.get(section, section)}.{last}",
        joined.get(foreign.plain(name)),
    )
    return next((spelling for spelling in spellings if spelling != name and spelling in known), None)
