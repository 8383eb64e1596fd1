"""`repsft VERB`: flags, environment and file become settings, and the verb's function is called. No logic lives here.

pydantic-settings builds the parser, its verbs and its help from the typed settings. The values are read by one rule wherever
they come from (as YAML), so that every problem of file, environment and flags is told at once. A new verb is a class below
and a field of `Repsft`.
"""

import argparse
import inspect
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic_settings import BaseSettings, CliPositionalArg, CliSettingsSource, CliSubCommand

from repsft_fast.config import Config, environment_layer, file_layer, page, text_layer, unknown_setting
from repsft_fast.config.sections import Settings
from repsft_fast.errors import ConfigError, RepsftError, describe, did_you_mean
from repsft_fast.report import visible
from repsft_fast.report.stream import standing
from repsft_fast.report.told import print_error, print_traceback

Options = Mapping[str, Any]


_LAUNCHED = {"WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"}  # any: there may be other ranks


class RunRefused(ConfigError):
    """Settings of a run that cannot be used. It may have other ranks, which wait for this one."""


class Verb(BaseModel):
    """What every verb takes beside settings."""

    traceback: bool = Field(False, description="Show Python's traceback when something fails")


class WithSettings(Verb):
    config: str | None = Field(None, description="YAML file with the settings, or the name of a recipe")


class Train(Settings, WithSettings):
    """Train a model.

    Settings come from --config, then environment variables (REPSFT_OPTIM__LR=2e-5), then flags (--optim.lr 2e-5);
    the last one wins. Values are written as in YAML: null, [a, b], {task: file}.
    """

    dry_run: bool = Field(False, description="Print the resolved settings and the plan, and train nothing")
    resume: bool = Field(False, description="Continue the run in run.folder from its newest whole checkpoint")
    world: int | None = Field(None, description="With --dry-run: rehearse an update on this many GPUs, which need not be here")

    @staticmethod
    def call(config: Config, options: Options) -> Any:
        if options["world"] is not None:
            from repsft_fast.training.dry_run import describe_world

            return describe_world(config, options["world"], dry_run=options["dry_run"])
        from repsft_fast.training.trainer import train

        return train(config, dry_run=options["dry_run"], resume=options["resume"])


class Msft(Train):
    """Train on several tasks at once; each leaves when it overfits, and the run goes back to that task's best moment.

    The same as train with mixture.policy: msft, and settings come the same ways. Name the tasks in data.train as a mapping
    {task: source}, or by data.task_column; give validation rows, or carve them (data.validation_fraction). No budget is
    needed: mixture.compute_budget epochs per stage, mixture.max_stages stages. docs/msft.md says what comes out.
    """

    DEFAULTS: ClassVar[Mapping[str, str]] = {"mixture.policy": "msft"}


class Inspect(Settings, WithSettings):
    """Show samples as the model will see them: trained tokens marked, lengths, and what was dropped and why."""

    DEFAULTS: ClassVar[Mapping[str, str]] = {"run.folder": "not-written", "budget.epochs": "1"}  # which only a run needs

    show: int = Field(3, description="How many samples to show")

    @staticmethod
    def call(config: Config, options: Options) -> Any:
        from repsft_fast.verbs import inspect

        return inspect(config, show=options["show"])


class Demo(Verb):
    """A small model memorises generated reasoning tasks and stops by itself. Nothing is downloaded; minutes on a CPU."""

    folder: str = Field("runs/demo", description="Where the run goes; it must be new or empty")

    @staticmethod
    def call(config: None, options: Options) -> Any:
        from repsft_fast.verbs import demo

        return demo(options["folder"])


class Export(Verb):
    """Write the model folder of a run from one of its checkpoints: of a run that was killed, or that could not save its model.

    The weights are those the run would save if it ended there: the best validation's with evaluate.keep: best, the result of a
    mixture's policy, else the last. From the newest whole checkpoint, into the run's folder; with --to into a new one. The data
    is not needed.
    """

    run: CliPositionalArg[str] = Field(description="The run's folder")
    to: str | None = Field(None, description="A new or empty folder for the model; without it, the run's own")
    generation: int | None = Field(None, description="The checkpoint: 12 for checkpoints/gen-00000012. With --to")
    merge: str | None = Field(None, description="true: adapters added into the weights; false: alone [model.lora.merge]")
    dtype: str | None = Field(None, description="Type of the weights: auto, float32, bfloat16, float16 [model.save_dtype]")
    base: str | None = Field(None, description="Where the model of model.path lies now, if it was moved")

    @staticmethod
    def call(config: None, options: Options) -> Any:
        from repsft_fast.verbs import export

        return export(options["run"], **{name: options[name] for name in ("to", "generation", "merge", "dtype", "base")})


class Doctor(Verb):
    """Say what this machine has: versions, devices, which kernels and optimizers can be used, and what is missing."""

    settings: bool = Field(False, description="Print every setting as a page of markdown (docs/settings.md)")
    plan: bool = Field(False, description="Print what models hold per GPU and how long a row fits, from their shapes alone")
    models: str | None = Field(None, description="With --plan: names, hub ids or config.json files, with commas")
    gpus: str = Field("1,8,64", description="With --plan: numbers of GPUs")

    @staticmethod
    def call(config: None, options: Options) -> Any:
        if options["settings"]:
            print(page.settings_page(), end="")
            return None
        if options["plan"]:
            from repsft_fast.verbs import plan_sizes

            return plan_sizes(options["models"], options["gpus"])
        from repsft_fast.verbs import doctor

        return doctor()


class Selftest(WithSettings):
    """Check the laws (packing, exact resume, no pickle …) on this machine, with your model and data or built-in ones.

    About a minute. A few samples of the data are cut short; nothing is written outside a temporary folder.
    """

    @staticmethod
    def call(config: None, options: Options) -> Any:
        from repsft_fast.training.selftest import selftest

        given = options["config"]
        return selftest(None if given is None else Config.of(given, environment=os.environ))


class Bench(Verb):
    """Time this checkout and hold it to its records: run, compare A B, gate. See benchmarks/README.md."""

    @staticmethod
    def hand_on(arguments: Sequence[str]) -> int:
        """Everything after `bench` is read by `benchmarks.commands`, which has verbs of its own."""
        from repsft_fast.verbs import bench

        return bench(arguments)


class Repsft(BaseSettings):
    """Fast, exact fine-tuning on little data, many times over, and on mixtures of tasks."""

    train: CliSubCommand[Train] = Field(description="train a model")
    msft: CliSubCommand[Msft] = Field(description="train a model on several tasks, each until it overfits")
    demo: CliSubCommand[Demo] = Field(description="a small run on generated data, from nothing to its stop")
    export: CliSubCommand[Export] = Field(description="write the model of a run from a checkpoint")
    inspect: CliSubCommand[Inspect] = Field(description="show samples as the model sees them")
    doctor: CliSubCommand[Doctor] = Field(description="what this machine has and what is missing")
    selftest: CliSubCommand[Selftest] = Field(description="the laws, checked on this machine")
    bench: CliSubCommand[Bench] = Field(description="in a checkout: run | compare A B | gate")

    VERBS: ClassVar[dict[str, type[Verb]]] = {
        "train": Train,
        "msft": Msft,
        "demo": Demo,
        "export": Export,
        "inspect": Inspect,
        "doctor": Doctor,
        "selftest": Selftest,
        "bench": Bench,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 done or stopped by rule, 1 error, 2 usage, 128 + n saved after signal n.

    What becomes of the streams it prints to ends nothing. A verb that is there to print and could not says so with 1.
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
    runs = ("train", "msft", "demo", "export")
    return bool({"--dry-run", "--help", "-h"} & set(arguments)) or not arguments or arguments[0] not in runs


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

            distributed.refuse(error)
        return error.exit_code
    except Exception:
        sys.excepthook = print_traceback  # a bug is not dressed up, and what it quotes is not obeyed
        raise


def run(arguments: Sequence[str]) -> int:
    """Parse, build the settings, call the verb's function. Raises RepsftError."""
    if not arguments[0].startswith("-") and arguments[0] not in Repsft.VERBS:
        near = did_you_mean(arguments[0], Repsft.VERBS)
        raise ConfigError(
            f"{arguments[0]} is not a verb" + (f"; did you mean {near}?" if near else f"; there are {', '.join(Repsft.VERBS)}")
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
    problems: list[str] = []
    options = _options(verb, values, problems)
    problems += _unknown_arguments(left, list(options), issubclass(verb, Settings))
    defaults = getattr(verb, "DEFAULTS", {})
    config = _settings(options, values, problems, defaults) if issubclass(verb, Settings) else None
    if problems:
        raise (RunRefused if issubclass(verb, Train) and not options["dry_run"] else ConfigError)(problems)
    result = verb.call(config, options)  # type: ignore[attr-defined]
    return int(getattr(result, "exit_code", 0))


def _options(verb: type[Verb], values: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """The verb's own options, typed, taken out of `values`."""
    options = {}
    for name, info in verb.model_fields.items():
        if name not in Settings.model_fields or not issubclass(verb, Settings):
            given = values.pop(name, info.default)
            try:
                options[name] = TypeAdapter[Any](info.annotation or str).validate_python(given)
            except ValidationError as error:
                flag = f"--{name.replace('_', '-')}"
                problems.append(describe(flag, "cannot be used", expected=error.errors()[0]["msg"], got=given))
                options[name] = info.default
    return options


def _settings(options: Options, values: Mapping[str, str], problems: list[str], defaults: Mapping[str, str]) -> Config | None:
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


def build_parser() -> argparse.ArgumentParser:
    """The parser pydantic-settings makes of the verbs, with this command's manners: a short usage, brief flags."""
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
        f"repsft {name} [--config FILE] [--section.setting VALUE ...] [options]"
        if takes_settings
        else f"repsft {name} {'RUN ' if name == 'export' else ''}[options]"
    )
    return verbs.add_parser(name, usage=usage, **{**kwargs, "description": inspect.cleandoc(Repsft.VERBS[name].__doc__ or "")})


def _add_group(parser: argparse.ArgumentParser, title: str, **_: Any) -> Any:
    section = title.removesuffix(" options")
    return parser.add_argument_group(section, page.sections()[section])


def _add_argument(parser: Any, *names: str, **kwargs: Any) -> None:
    """One flag. Every value is taken as text (settings read it as YAML), none is interpreted by argparse."""
    name = names[0].removeprefix("--")
    if name in page.settings():
        setting = page.settings()[name]
        default = "required" if setting.default is None else setting.default
        text = f"{setting.meaning} [{default}]".replace("%", "%%")
        kwargs |= {"metavar": setting.short_kind, "help": text}
        if setting.short_kind == "true|false":
            kwargs |= {"nargs": "?", "const": "true"}  # a bare --model.compile means true
    elif name in page.sections():
        kwargs |= {"metavar": "{...}", "help": argparse.SUPPRESS}  # a whole section as a mapping works, and needs no line
    elif kwargs.get("metavar") == "bool":
        names = tuple(name.replace("_", "-") for name in names)
        kwargs = {
            "dest": kwargs["dest"],
            "action": "store_true",
            "default": argparse.SUPPRESS,
            "help": _without_default(kwargs),
        }
    elif "metavar" in kwargs:
        words = {"str": "TEXT", "int": "N"}
        kwargs |= {"metavar": words.get(kwargs["metavar"], kwargs["metavar"]), "help": _without_default(kwargs)}
    parser.add_argument(*names, **kwargs)


def _without_default(kwargs: Mapping[str, Any]) -> str:
    return re.sub(r" \((default|required).*", "", kwargs["help"])


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
