"""`repsft VERB`: flags, environment and file become settings, and the verb's command is called.

The verbs are in `commands.verbs`, each one's work in a module beside it; the parser is `commands.parser`. The
values are read by one rule wherever they come from (as YAML), so that every problem of file, environment and
flags is told at once. Besides that only the exit code is decided here.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from repsft_fast.commands.parser import build_parser
from repsft_fast.commands.verbs import Bench, Options, Repsft, Train, Verb
from repsft_fast.config import Config, environment_layer, file_layer, text_layer, unknown_setting
from repsft_fast.config.sections import Settings
from repsft_fast.errors import ConfigError, RepsftError, describe, did_you_mean
from repsft_fast.report import visible
from repsft_fast.report.stream import standing
from repsft_fast.report.told import print_error, print_traceback

# any: there may be other ranks
_LAUNCHED = {"WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"}


class RunRefused(ConfigError):
    """Settings of a run that cannot be used. It may have other ranks, which wait for this one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 done or stopped by rule, 1 error, 2 usage, 128 + n saved after signal n.

    What becomes of the streams it prints to ends nothing. A verb that is there to print and could not says so
    with 1.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with standing() as out:
        code = _main(arguments)
        out.flush()
        if code == 0 and out.trouble and not out.left and _is_there_to_print(arguments):
            code = 1
            print_error(RepsftError(f"{out.trouble}: what was asked for is not all there"))
    return code


def _is_there_to_print(arguments: Sequence[str]) -> bool:
    """Whether what it prints is what was asked for, and not an account of what it does."""
    if not arguments or {"--dry-run", "--help", "-h"} & set(arguments):
        return True
    return arguments[0] not in ("train", "msft", "demo", "export")


def _main(arguments: Sequence[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        visible.escaping(stream)
    if not arguments:
        build_parser().print_help(sys.stderr)
        return 2
    try:
        return run(arguments)
    except SystemExit as stop:  # argparse, after it printed help or what is wrong with the flags
        if isinstance(stop.code, str):  # a library's last words
            visible.show(visible.console(sys.stderr), visible.visible(stop.code, "\n"))
            return 1
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return 130
    except RepsftError as error:
        if "--traceback" in arguments:
            print_traceback(type(error), error, error.__traceback__)
        print_error(error)
        if isinstance(error, RunRefused) and not _LAUNCHED.isdisjoint(os.environ):
            from repsft_fast import distributed

            distributed.abort_launch(error)
        return error.exit_code
    except Exception:
        sys.excepthook = print_traceback  # a bug is not dressed up, and what it quotes is not obeyed
        raise


def run(arguments: Sequence[str]) -> int:
    """Parse, build the settings, call the verb's command. Raises RepsftError."""
    if not arguments[0].startswith("-") and arguments[0] not in Repsft.VERBS:
        near = did_you_mean(arguments[0], Repsft.VERBS)
        raise ConfigError(
            f"{arguments[0]} is not a verb"
            + (f"; did you mean {near}?" if near else f"; there are {', '.join(Repsft.VERBS)}")
        )
    if arguments[0] == "bench":
        return Bench.hand_on(arguments[1:])
    parsed, left = build_parser().parse_known_args(list(arguments))
    given = vars(parsed)
    name = given.pop(":subcommand")
    if name is None:
        raise ConfigError(f"a verb is missing; there are {', '.join(Repsft.VERBS)}")
    verb = Repsft.VERBS[name]
    values = {key.removeprefix(f"{name}."): value for key, value in given.items() if value is not None}

    # Problems of options, flags and settings are told in one go.
    problems: list[str] = []
    options = _options(verb, values, problems)
    problems += _unknown_arguments(left, list(options), issubclass(verb, Settings))
    for option, setting in getattr(verb, "ALIASES", {}).items():
        if (short := options.pop(option)) is not None:
            values[setting] = short
    if options.get("config", "") is None and hasattr(verb, "settings_file"):
        options["config"] = verb.settings_file(options)
    defaults = getattr(verb, "DEFAULTS", {})
    config = _settings(options, values, problems, defaults) if issubclass(verb, Settings) else None
    if problems and issubclass(verb, Train) and not options["dry_run"]:
        raise RunRefused(problems)
    if problems:
        raise ConfigError(problems)
    result = verb.call(config, options)  # type: ignore[attr-defined]
    return int(getattr(result, "exit_code", 0))


def _options(verb: type[Verb], values: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """The verb's own options, typed, taken out of `values`."""
    options = {}
    for name, info in verb.model_fields.items():
        if name not in Settings.model_fields or not issubclass(verb, Settings):
            given = values.pop(info.alias or name, info.default)
            try:
                options[name] = TypeAdapter[Any](info.annotation or str).validate_python(given)
            except ValidationError as error:
                flag = f"--{(info.alias or name).replace('_', '-')}"
                problems.append(
                    describe(flag, "cannot be used", expected=error.errors()[0]["msg"], got=given)
                )
                options[name] = info.default
    return options


def _settings(
    options: Options, values: Mapping[str, str], problems: list[str], defaults: Mapping[str, str]
) -> Config | None:
    """defaults: the verb's own, below file, environment and flags."""
    layers = []
    try:
        if defaults:
            layers.append(text_layer("verb", defaults, {name: name for name in defaults}))
        if options["config"] is not None:
            layers.append(file_layer(options["config"]))
        layers.append(environment_layer(os.environ))
        layers.append(text_layer("flags", values, {name: f"--{name}" for name in values}))
        return Config.from_layers(layers)
    except ConfigError as error:
        problems += error.problems
        return None


def _unknown_arguments(left: Sequence[str], options: Sequence[str], has_settings: bool) -> list[str]:
    """The problems with flags no parser knew, each flag's value left out."""
    problems = []
    after_flag = False
    for argument in left:
        name = argument.removeprefix("--").partition("=")[0]
        if argument.startswith("--"):
            near = did_you_mean(name.replace("-", "_"), options)
            if near:
                problems.append(f"--{name} is not an option; did you mean --{near.replace('_', '-')}?")
            else:
                problems.append(unknown_setting(name) if has_settings else f"--{name} is not an option")
        elif not after_flag:
            problems.append(describe("command line", "an argument that belongs to no flag", got=argument))
        after_flag = argument.startswith("--") and "=" not in argument
    return problems
