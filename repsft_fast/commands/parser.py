"""The parser of the command line, as pydantic-settings makes it of the verbs: a short usage, brief flags,
every value as text."""

import argparse
import inspect
import re
from collections.abc import Mapping
from typing import Any

from pydantic_settings import CliSettingsSource

from repsft_fast.commands.verbs import Repsft
from repsft_fast.config import reference
from repsft_fast.config.sections import Settings

_POSITIONAL = {
    "eval": "MODEL ",
    "export": "RUN ",
    "compare": "RUN [RUN ...] ",
}  # what a verb takes without a flag


def build_parser() -> argparse.ArgumentParser:
    """The parser pydantic-settings makes of the verbs, with this command's manners: a short usage, brief
    flags."""
    source: CliSettingsSource = CliSettingsSource(
        Repsft,
        cli_prog_name="repsft",
        cli_hide_none_type=True,
        formatter_class=_Help,
        add_argument_method=_add_argument,
        add_argument_group_method=_add_group,
        add_parser_method=_add_verb,
    )
    return source.root_parser


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **kwargs: Any):
        super().__init__(prog, **{"max_help_position": 36, **kwargs})


def _add_verb(verbs: Any, name: str, **kwargs: Any) -> argparse.ArgumentParser:
    takes_settings = issubclass(Repsft.VERBS[name], Settings)
    usage = (
        f"repsft {name} {_POSITIONAL.get(name, '')}[--config FILE] [--section.setting VALUE ...] [options]"
        if takes_settings
        else f"repsft {name} {_POSITIONAL.get(name, '')}[options]"
    )
    return verbs.add_parser(
        name, usage=usage, **{**kwargs, "description": inspect.cleandoc(Repsft.VERBS[name].__doc__ or "")}
    )


def _add_group(parser: argparse.ArgumentParser, title: str, **_: Any) -> Any:
    section = title.removesuffix(" options")
    return parser.add_argument_group(section, reference.sections()[section])


def _add_argument(parser: Any, *names: str, **kwargs: Any) -> None:
    """One flag. Every value is taken as text (settings read it as YAML), none is interpreted by argparse."""
    name = names[0].removeprefix("--")
    if name in reference.settings():
        setting = reference.settings()[name]
        default = "required" if setting.default is None else setting.default
        text = f"{setting.meaning} [{default}]".replace("%", "%%")
        kwargs |= {"metavar": setting.short_kind, "help": text}
        if setting.short_kind.endswith("true|false"):
            kwargs |= {"nargs": "?", "const": "true"}  # a bare --model.compile means true
    elif name in reference.sections():
        # a whole section as a mapping works, and needs no line
        kwargs |= {"metavar": "{...}", "help": argparse.SUPPRESS}
    elif kwargs.get("metavar") == "bool":
        names = tuple(name.replace("_", "-") for name in names)
        kwargs = {
            "dest": kwargs["dest"],
            "action": "store_true",
            "default": argparse.SUPPRESS,
            "help": _without_default(kwargs),
        }
    elif "metavar" in kwargs:
        words = {"str": "TEXT", "int": "N", "float": "X"}
        if names[0].startswith("-"):
            names = tuple(f"--{name.lstrip('-').replace('_', '-')}" for name in names)
        kwargs |= {
            "metavar": words.get(kwargs["metavar"], kwargs["metavar"]),
            "help": _without_default(kwargs),
        }
    if kwargs.get("metavar") == "OF":  # of `eval`, whose settings have a section called model
        kwargs["metavar"] = "MODEL"
    parser.add_argument(*names, **kwargs)


def _without_default(kwargs: Mapping[str, Any]) -> str:
    return re.sub(r" \((default|required).*", "", kwargs["help"])
