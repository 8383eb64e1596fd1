"""What every setting is, for `repsft train --help` and for docs/settings.md (which a test keeps equal to
this)."""

import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import ByteSize
from pydantic_core import PydanticUndefined

from repsft_fast.config.names import inner_section
from repsft_fast.config.sections import Section, Settings
from repsft_fast.config.task_sections import EvalTask

OF_A_TASK = "evaluate.tasks.NAME"


@dataclass(frozen=True)
class Setting:
    """One setting in words."""

    name: str  # optim.lr
    kind: str  # what its value may be
    short_kind: str  # the same, short, for the left side of a help text
    default: str | None  # as YAML; None: it must be given
    meaning: str


@functools.cache
def sections() -> dict[str, str]:
    """Dotted section → what it is about, in order."""
    return {name: _first_paragraph(section) for name, section in _walk(Settings, "")}


@functools.cache
def settings() -> dict[str, Setting]:
    """Dotted name → the setting, in order."""
    return {
        setting.name: setting
        for above, section in _walk(Settings, "")
        for setting in _of_section(above, section)
    }


def _of_section(above: str, section: type[Section]) -> Iterator[Setting]:
    for name, info in section.model_fields.items():
        if inner_section(info.annotation)[0] is None:
            kind = _kind(info.annotation, tuple(info.metadata))
            default = None if info.default is PydanticUndefined else _yaml(info.default)
            meaning = " ".join((info.description or "").split())  # a line break would end the table's row
            yield Setting(f"{above}.{name}", kind, _short(info.annotation), default, meaning)


_ABOUT = """# Settings

Made by `repsft doctor --settings`; a test keeps it in step with the code.

A setting comes from its default, then the YAML file (`--config run.yaml`), then the environment
(`REPSFT_OPTIM__LR=2e-5`), then a flag (`--optim.lr 2e-5`); the last one wins. Values of variables and flags \
are
written as in YAML: `null`, `[a, b]`, `{task: file}`. Sizes in bytes may be written `512MiB` or `2GiB`.
Paths may begin with `~` and hold variables (`$SCRATCH/runs`), which are filled in; one that is not set is \
refused.
Unknown settings are refused; [coming_from.md](coming_from.md) has other trainers' names. The resolved \
settings of
a run lie in its folder as `run.yaml`."""


def settings_page() -> str:
    """docs/settings.md."""
    lines = [_ABOUT]
    for section, about in sections().items():
        lines += _table(section, about, [s for s in settings().values() if _above(s) == section])
        if section == "evaluate":
            lines += _table(OF_A_TASK, _first_paragraph(EvalTask), [*_of_section(OF_A_TASK, EvalTask)])
    return "\n".join(lines) + "\n"


def _above(setting: Setting) -> str:
    return setting.name.rpartition(".")[0]


def _table(title: str, about: str, rows: list[Setting]) -> Iterator[str]:
    yield from ("", f"## {title}", "", about, "")
    yield from ("| setting | value | default | meaning |", "|---|---|---|---|")
    for setting in rows:
        default = "*required*" if setting.default is None else f"`{setting.default}`"
        cells = (f"`{setting.name}`", setting.kind, default, setting.meaning)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _walk(section: type[Section], above: str) -> Iterator[tuple[str, type[Section]]]:
    for name, info in section.model_fields.items():
        inner, _ = inner_section(info.annotation)
        if inner is not None:
            dotted = f"{above}.{name}" if above else name
            yield dotted, inner
            yield from _walk(inner, dotted)


def _first_paragraph(section: type[Section]) -> str:
    return " ".join((section.__doc__ or "").partition("\n\n")[0].split())


def _yaml(value: Any) -> str:
    if isinstance(value, float):
        return repr(value)
    plain = int(value) if isinstance(value, ByteSize) else list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n").strip()


_PLAIN = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    ByteSize: "size in bytes",
    type(None): "null",
}
_SHORT = {str: "TEXT", int: "N", float: "X", bool: "true|false", ByteSize: "BYTES"}


def _kind(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """A type in words: `whole number ≥ 1`, `auto, liger or none`, `text or null`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        inner = annotation.__metadata__
        # Field(ge=1) inside Annotated keeps its bounds one level further down.
        bounds = tuple(bound for item in inner for bound in getattr(item, "metadata", None) or [item])
        return _kind(arguments[0], (*bounds, *metadata))
    if origin is Literal:
        return _alternatives([f"`{word}`" for word in arguments])
    if origin in (Union, types.UnionType):
        return _alternatives([_kind(one, metadata if one is not type(None) else ()) for one in arguments])
    if origin is list:
        return f"list of {_kind(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)} × {_kind(arguments[0])}"
    if origin is dict:
        return "mapping" if arguments[1] is Any else f"mapping to {_kind(arguments[1])}"
    if issubclass(annotation, Section):
        return "settings"
    return _PLAIN[annotation] + _bounds(metadata)


def _bounds(metadata: tuple[Any, ...]) -> str:
    signs = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}
    bounds = [
        (sign, getattr(m, field))
        for m in metadata
        for kind, (sign, field) in signs.items()
        if isinstance(m, kind)
    ]
    # nobody needs to be told of int64's end
    said = [f"{sign} {bound:g}" for sign, bound in bounds if bound < 2**62]
    return " " + ", ".join(said) if said else ""


def _alternatives(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _short(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return _short(arguments[0])
    if origin is Literal:
        return "|".join(arguments)
    if origin in (Union, types.UnionType):
        return "|".join(dict.fromkeys(_short(one) for one in arguments if one is not type(None)))
    if origin is list or origin is tuple:
        return "[…]"
    if origin is dict:
        return "{…}"
    return _SHORT[annotation]
