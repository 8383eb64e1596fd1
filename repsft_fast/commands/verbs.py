"""The verbs of `repsft`: what each takes beside the settings, and which command it calls.

pydantic-settings builds the parser and its help from these classes. A new verb is a class here, a field of
`Repsft` and a module beside this one. Nothing here imports torch: `repsft --help` must not wait for it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, Field
from pydantic_settings import BaseSettings, CliPositionalArg, CliSubCommand

from repsft_fast.config import Config
from repsft_fast.config.sections import Settings

Options = Mapping[str, Any]


class Verb(BaseModel):
    """What every verb takes beside settings."""

    traceback: bool = Field(False, description="Show Python's traceback when something fails")


class WithSettings(Verb):
    config: str | None = Field(None, description="YAML file with the settings, or the name of a recipe")


class Train(Settings, WithSettings):
    """Train a model.

    Settings come from --config, then environment variables (REPSFT_OPTIM__LR=2e-5), then flags (--optim.lr
    2e-5); the last one wins. Values are written as in YAML: null, [a, b], {task: file}.
    """

    dry_run: bool = Field(False, description="Print the resolved settings and the plan, and train nothing")
    resume: bool = Field(False, description="Continue the run in run.folder from its newest whole checkpoint")
    world: int | None = Field(
        None, description="With --dry-run: rehearse an update on this many GPUs, which need not be here"
    )

    @staticmethod
    def call(config: Config, options: Options) -> Any:
        from repsft_fast.commands.train import train

        return train(config, **{name: options[name] for name in ("dry_run", "resume", "world")})


class Msft(Train):
    """Train on several tasks at once; each leaves when it overfits, and the run goes back to that task's best
    moment.

    The same as train with mixture.policy: msft, and settings come the same ways. Name the tasks in data.train
    as a mapping {task: source}, or by data.task_column; give validation rows, or carve them
    (data.validation_fraction). No budget is needed: mixture.compute_budget epochs per stage,
    mixture.max_stages stages. docs/msft.md says what comes out.
    """

    DEFAULTS: ClassVar[Mapping[str, str]] = {"mixture.policy": "msft"}


class Inspect(Settings, WithSettings):
    """Show samples as the model will see them: trained tokens marked, lengths, and what was dropped and
    why."""

    # which only a run needs
    DEFAULTS: ClassVar[Mapping[str, str]] = {"run.folder": "not-written", "budget.epochs": "1"}

    show: int = Field(3, description="How many samples to show")

    @staticmethod
    def call(config: Config, options: Options) -> Any:
        from repsft_fast.commands.inspect import inspect

        return inspect(config, show=options["show"])


class Eval(Settings, WithSettings):
    """Judge a model by what it says: accuracy over several replies, Pass@k, termination, lengths, entropy.

    MODEL: a run's folder, a model's, one of adapters, or a hub id. Tasks are files, hub ids or
    reasoning-gym:TASK?size=50&seed=9; a run's folder brings its own settings. Every reply is kept in a file;
    an evaluation that was killed goes on when the same command is given again. docs/evaluation.md has the
    forms of files and what each figure means.
    """

    # which only a run needs
    DEFAULTS: ClassVar[Mapping[str, str]] = {
        "run.folder": "not-written",
        "data.train": "not-read",
        "budget.epochs": "1",
        "model.path": "not-loaded",
    }
    # short names of settings
    ALIASES: ClassVar[Mapping[str, str]] = {"tasks": "evaluate.tasks", "engine": "evaluate.engine"}

    of: CliPositionalArg[str] = Field(description="The model: a folder or a hub id")
    tasks: str | None = Field(
        None, description="What it is asked: a source, {name: source}, or more of them [evaluate.tasks]"
    )
    engine: str | None = Field(None, description="auto, loop, batching or vllm [evaluate.engine]")
    # not --n: torchrun would take it for one of its own
    replies: int | None = Field(None, description="Replies to each problem, of every task [n]")
    temperature: float | None = Field(None, description="0: greedy")
    top_p: float | None = Field(None, description="Nucleus that is drawn from")
    max_tokens: int | None = Field(None, description="Longest reply in tokens")
    limit: int | None = Field(None, description="This many problems of a task")
    rows: str | None = Field(
        None, description="Rows of data, as in data.train: loss, token accuracy, entropy … without generating"
    )
    base: str | None = Field(
        None, description="A second model beside it, with differences; auto: what the run began with"
    )
    to: str | None = Field(None, description="Folder of the results; without it evals/ and the model's name")
    as_json: bool = Field(False, alias="json", description="Print the results as JSON")

    @staticmethod
    def settings_file(options: Options) -> str | None:
        """A run's folder brings the settings of the run."""
        from repsft_fast.commands.evaluate_models import settings_file

        return settings_file(options["of"])

    @staticmethod
    def call(config: Config, options: Options) -> Any:
        from repsft_fast.commands.evaluate import evaluate

        named = ("replies", "temperature", "top_p", "max_tokens", "limit", "rows", "base", "to", "as_json")
        return evaluate(config, options["of"], **{name: options[name] for name in named})


class Demo(Verb):
    """A small model memorises generated reasoning tasks and stops by itself. Nothing is downloaded; minutes
    on a CPU."""

    folder: str = Field("runs/demo", description="Where the run goes; it must be new or empty")

    @staticmethod
    def call(config: None, options: Options) -> Any:
        from repsft_fast.commands.demo import demo

        return demo(options["folder"])


class Export(Verb):
    """Write the model folder of a run from one of its checkpoints: of a run that was killed, or that could
    not save its model.

    The weights are those the run would save if it ended there: the best validation's with evaluate.keep:
    best, the result of a mixture's policy, else the last. From the newest whole checkpoint, into the run's
    folder; with --to into a new one. The data is not needed.
    """

    run: CliPositionalArg[str] = Field(description="The run's folder")
    to: str | None = Field(None, description="A new or empty folder for the model; without it, the run's own")
    generation: int | None = Field(
        None, description="The checkpoint: 12 for checkpoints/gen-00000012. With --to"
    )
    merge: str | None = Field(
        None, description="true: adapters added into the weights; false: alone [model.lora.merge]"
    )
    dtype: str | None = Field(
        None, description="Type of the weights: auto, float32, bfloat16, float16 [model.save_dtype]"
    )
    base: str | None = Field(None, description="Where the model of model.path lies now, if it was moved")

    @staticmethod
    def call(config: None, options: Options) -> Any:
        from repsft_fast.commands.export import export

        return export(
            options["run"], **{name: options[name] for name in ("to", "generation", "merge", "dtype", "base")}
        )


class Compare(Verb):
    """One table over finished runs: mean over seeds ± 95 % interval, difference to a baseline, tokens, FLOPs.

    RUN: folders of runs, or a folder that holds runs. Runs whose settings differ in nothing but run.seed are
    one arm. Scores are the test rows' where the runs have some.
    """

    runs: CliPositionalArg[list[str]] = Field(description="Folders of runs, or of folders of runs")
    baseline: str | None = Field(
        None, description="The arm that the others are compared with, or a part of its name; else the first"
    )
    by: str | None = Field(
        None, description="Settings that alone make an arm, with commas: mixture.policy,mixture.rule"
    )
    names: str | None = Field(None, description="The arms' names in the table, in their order, with commas")
    metric: str | None = Field(
        None, description="exact_match, token_accuracy, loss, nll or answer; else what the runs decided by"
    )
    pool: str | None = Field(None, description="items: mean over rows; tasks: mean over tasks")
    markdown: bool = Field(False, description="As a table of markdown")
    as_json: bool = Field(False, alias="json", description="As JSON, every run in it")

    @staticmethod
    def call(config: None, options: Options) -> Any:
        from repsft_fast.commands.compare import compare

        named = ("baseline", "by", "names", "metric", "pool", "markdown", "as_json")
        return compare(options["runs"], **{name: options[name] for name in named})


class Doctor(Verb):
    """Say what this machine has: versions, devices, which kernels and optimizers can be used, and what is
    missing."""

    settings: bool = Field(False, description="Print every setting as a page of markdown (docs/settings.md)")
    plan: bool = Field(
        False, description="Print what models hold per GPU and how long a row fits, from their shapes alone"
    )
    models: str | None = Field(
        None, description="With --plan: names, hub ids or config.json files, with commas"
    )
    gpus: str = Field("1,8,64", description="With --plan: numbers of GPUs")

    @staticmethod
    def call(config: None, options: Options) -> Any:
        from repsft_fast.commands import doctor

        if options["settings"]:
            return doctor.settings_page()
        if options["plan"]:
            return doctor.plan_sizes(options["models"], options["gpus"])
        return doctor.doctor()


class Selftest(WithSettings):
    """Check the laws (packing, exact resume, no pickle …) on this machine, with your model and data or
    built-in ones.

    About a minute. A few samples of the data are cut short; nothing is written outside a temporary folder.
    """

    @staticmethod
    def call(config: None, options: Options) -> Any:
        from repsft_fast.commands.selftest import selftest

        return selftest(options["config"])


class Bench(Verb):
    """Time this checkout and hold it to its records: run, compare A B, gate. See benchmarks/README.md."""

    @staticmethod
    def hand_on(arguments: Sequence[str]) -> int:
        """Everything after `bench` is read by `python -m benchmarks`, which has verbs of its own."""
        from repsft_fast.commands.bench import bench

        return bench(arguments)


class Repsft(BaseSettings):
    """Fast, exact fine-tuning on little data, many times over, and on mixtures of tasks."""

    train: CliSubCommand[Train] = Field(description="train a model")
    msft: CliSubCommand[Msft] = Field(description="train a model on several tasks, each until it overfits")
    demo: CliSubCommand[Demo] = Field(description="a small run on generated data, from nothing to its stop")
    eval: CliSubCommand[Eval] = Field(description="judge a model by tasks: accuracy, Pass@k, termination")
    export: CliSubCommand[Export] = Field(description="write the model of a run from a checkpoint")
    inspect: CliSubCommand[Inspect] = Field(description="show samples as the model sees them")
    compare: CliSubCommand[Compare] = Field(description="one table over finished runs")
    doctor: CliSubCommand[Doctor] = Field(description="what this machine has and what is missing")
    selftest: CliSubCommand[Selftest] = Field(description="the laws, checked on this machine")
    bench: CliSubCommand[Bench] = Field(description="in a checkout: run | compare A B | gate")

    VERBS: ClassVar[dict[str, type[Verb]]] = {
        "train": Train,
        "msft": Msft,
        "demo": Demo,
        "eval": Eval,
        "export": Export,
        "inspect": Inspect,
        "compare": Compare,
        "doctor": Doctor,
        "selftest": Selftest,
        "bench": Bench,
    }
