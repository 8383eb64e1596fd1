"""What sections must agree on. Each rule names the settings it reads, so a setting that is itself wrong
silences its rules."""

import itertools
import sys
from collections.abc import Iterator

from repsft_fast.config.model_checks import Finding, of_the_model
from repsft_fast.config.sections import Settings
from repsft_fast.config.unused import without_effect
from repsft_fast.config.values import Sources
from repsft_fast.errors import describe, did_you_mean
from repsft_fast.policies import policy_class

# evaluate.answers has the functions
EXTRACTORS = ("final", "boxed", "hashes", "choice", "last_number", "number", "whole")
# a row of them takes 100 MB before a model has seen it; no row of samples is so long
MOST_BUCKET_TOKENS = 1 << 22


def contradictions(config: Settings) -> Iterator[Finding]:
    """Every combination of settings that cannot be used."""
    yield from of_the_model(config)
    yield from _data(config)
    yield from _batch(config)
    yield from _length_of_the_run(config)
    yield from _what_is_kept(config)
    yield from _mixture(config)
    yield from _own_code(config)
    yield from _of_tasks(config)


def warnings(config: Settings) -> list[str]:
    """Combinations that work but are probably not meant."""
    found = []

    # What costs quality and shows in no figure of the run.
    stop, schedule = config.stop, config.schedule
    stops_early = [n for n in ("token_accuracy", "plateau_epochs") if getattr(stop, n) is not None]
    if schedule.name in ("cosine", "linear") and stops_early:
        names = " and ".join(f"stop.{name}" for name in stops_early)
        found.append(
            f"schedule.name: {schedule.name} falls over the whole budget, so when {names} ends the run early"
            " the learning rate is still high; use schedule.name: wsd, whose decay starts when the rule"
            " fires"
        )
    if config.model.param_dtype == "bfloat16" and config.optim.name != "adamw8bit":
        found.append(
            "model.param_dtype: bfloat16 weights without a float32 copy stall once updates are smaller than"
            " bfloat16's step, which happens after many epochs; use float32, or optim.name: adamw8bit, which"
            " rounds stochastically"
        )

    return found + without_effect(config)


def _data(config: Settings) -> Iterator[Finding]:
    """What is read, and in which role. None twice."""
    data = config.data
    for name in ("train", "validation", "test"):
        sources = getattr(data, name)
        if sources is not None and not sources:
            yield (f"data.{name}",), describe(f"data.{name}", "names no source", got=sources)
        if isinstance(sources, list) and len(set(sources)) < len(sources):
            yield (f"data.{name}",), describe(f"data.{name}", "names a source twice", got=sources)
    for part in ("validation", "test"):
        if getattr(data, part) is not None and getattr(data, f"{part}_fraction"):
            yield (
                (f"data.{part}", f"data.{part}_fraction"),
                describe(
                    f"data.{part}_fraction",
                    f"{part} rows are given by data.{part} too",
                    todo="keep one of the two",
                ),
            )
    if data.validation_fraction + data.test_fraction >= 1:
        yield (
            ("data.validation_fraction", "data.test_fraction"),
            describe(
                "data.validation_fraction",
                "leaves no training samples beside data.test_fraction",
                expected="a sum below 1",
                got=data.validation_fraction + data.test_fraction,
            ),
        )
    if data.task_column is not None and isinstance(data.train, dict):
        yield (
            ("data.task_column", "data.train"),
            describe("data.task_column", "data.train already names the tasks", todo="drop one of the two"),
        )
    if data.task_column is not None and data.task_column == data.weight_column:
        yield (
            ("data.weight_column", "data.task_column"),
            describe(
                "data.weight_column",
                "names data.task_column too",
                got=data.weight_column,
                todo="correct one of the two",
            ),
        )


def _batch(config: Settings) -> Iterator[Finding]:
    """How much an update and a row hold."""
    data, batch = config.data, config.batch
    if batch.samples is None and batch.tokens is None:
        yield (
            ("batch.samples", "batch.tokens"),
            describe("batch", "has neither samples nor tokens", todo="set batch.samples"),
        )
    if batch.samples is not None and batch.tokens is not None:
        yield (
            ("batch.samples", "batch.tokens"),
            describe(
                "batch.tokens",
                "batch.samples is set too",
                todo="set batch.samples: null, or drop batch.tokens",
            ),
        )
    rows = batch.row_tokens if isinstance(batch.row_tokens, int) else None  # auto: made to fit
    if isinstance(batch.bucket_tokens, int) and rows is not None and rows % batch.bucket_tokens:
        yield (
            ("batch.row_tokens", "batch.bucket_tokens"),
            describe(
                "batch.row_tokens",
                "is not a multiple of batch.bucket_tokens",
                got=f"{batch.row_tokens} and {batch.bucket_tokens}",
            ),
        )
    if isinstance(batch.bucket_tokens, int) and batch.bucket_tokens > MOST_BUCKET_TOKENS:
        yield (
            ("batch.bucket_tokens",),
            describe(
                "batch.bucket_tokens",
                "even the shortest row would be padded to so many slots, for which no memory is there",
                expected=f"at most {MOST_BUCKET_TOKENS}",
                got=batch.bucket_tokens,
                todo="lower it, or set it to auto; batch.row_tokens alone says how long a row may get",
            ),
        )
    yield from _row_lengths(config)
    if data.max_tokens is not None and rows is not None and data.max_tokens > rows + 1:
        yield (
            ("data.max_tokens", "batch.row_tokens"),
            describe(
                "data.max_tokens",
                "a sample this long fits into no row",
                expected=f"at most batch.row_tokens + 1 = {rows + 1}",
                got=data.max_tokens,
                todo="raise batch.row_tokens",
            ),
        )


def _row_lengths(config: Settings) -> Iterator[Finding]:
    """Lengths that are named must be lengths of packed rows."""
    batch = config.batch
    if isinstance(batch.row_lengths, str):
        return
    here, lengths = ("batch.row_lengths",), batch.row_lengths
    if not lengths or any(a >= b for a, b in itertools.pairwise(lengths)):
        yield here, describe(*here, "are not ascending", expected="at least one, each once", got=lengths)
    elif batch.row_tokens == "auto":
        wrong = "says how long a row may get, and so does batch.row_tokens: auto"
        todo = f"set batch.row_tokens to {lengths[-1]} or more"
        yield (*here, "batch.row_tokens"), describe(*here, wrong, got=lengths, todo=todo)
    elif lengths[-1] > batch.row_tokens:
        wrong = "has a row longer than batch.row_tokens"
        yield (
            (*here, "batch.row_tokens"),
            describe(*here, wrong, expected=f"at most {batch.row_tokens}", got=lengths[-1]),
        )
    if isinstance(batch.bucket_tokens, int):
        wrong, todo = "says what rows are padded to, and so does batch.bucket_tokens", "drop one of them"
        yield (*here, "batch.bucket_tokens"), describe(*here, wrong, got=batch.bucket_tokens, todo=todo)
    if not batch.pack:
        wrong, todo = "pads rows, and batch.pack: false gives the model a sample as it is", "set it to auto"
        yield (*here, "batch.pack"), describe(*here, wrong, todo=todo)


def _length_of_the_run(config: Settings) -> Iterator[Finding]:
    """What ends the run, and what must fit in before."""
    budget, optim = config.budget, config.optim
    # A mixture's policy ends by itself: compute_budget × its stages.
    limits = (budget.updates, budget.epochs, budget.tokens, config.mixture.policy)
    if all(limit is None for limit in limits):
        yield (
            ("budget.updates", "budget.epochs", "budget.tokens", "mixture.policy"),
            describe("budget", "has no limit", todo="set budget.epochs, budget.updates or budget.tokens"),
        )
    if optim.warmup_fraction is not None and optim.warmup_updates is not None:
        yield (
            ("optim.warmup_fraction", "optim.warmup_updates"),
            describe("optim.warmup_updates", "optim.warmup_fraction is set too", todo="keep one of the two"),
        )
    if (
        optim.warmup_updates is not None
        and budget.updates is not None
        and optim.warmup_updates >= budget.updates
    ):
        yield (
            ("optim.warmup_updates", "budget.updates"),
            describe(
                "optim.warmup_updates",
                "is longer than the run",
                expected=f"less than budget.updates = {budget.updates}",
                got=optim.warmup_updates,
            ),
        )


def _what_is_kept(config: Settings) -> Iterator[Finding]:
    """What stays of the run: weights, checkpoints, figures."""
    has_validation = config.data.validation is not None or config.data.validation_fraction > 0
    for name, wanted in (
        ("evaluate.keep", config.evaluate.keep == "best"),
        ("checkpoint.keep_best", config.checkpoint.keep_best),
    ):
        if wanted and not has_validation:
            yield (
                (name, "data.validation", "data.validation_fraction"),
                describe(
                    name,
                    "the best is judged on validation data and there is none",
                    todo="set data.validation or data.validation_fraction",
                ),
            )
    if config.checkpoint.every_updates is not None and config.checkpoint.every_minutes is not None:
        yield (
            ("checkpoint.every_updates", "checkpoint.every_minutes"),
            describe(
                "checkpoint.every_minutes", "checkpoint.every_updates is set too", todo="keep one of the two"
            ),
        )
    if len(set(config.log.trackers)) < len(config.log.trackers):
        yield ("log.trackers",), describe("log.trackers", "names a tracker twice", got=config.log.trackers)


def _own_code(config: Settings) -> Iterator[Finding]:
    """Extractors may name code: seen here by their names alone, before anything is imported."""
    asked = {"mixture.extractor": config.mixture.extractor}
    for task, settings in (config.evaluate.tasks or {}).items():
        if settings.extractor is not None:
            asked[f"evaluate.tasks [{task}.extractor]"] = settings.extractor
    for where, name in asked.items():
        module, colon, _ = name.partition(":")
        wrong, todo = None, None
        if not colon and name not in EXTRACTORS:
            near = did_you_mean(name, EXTRACTORS)
            wrong, todo = "is not known", f"did you mean {near}?" if near else None
        elif colon and module.partition(".")[0] in sys.stdlib_module_names:
            wrong = f"is of {module}, a module of Python's own library, which reads no answers"
            todo = "write a function in a module of your own, under another name"
        elif colon and not config.model.trust_remote_code:
            wrong = "names code, which is not run unasked"
            todo = "read it, and set model.trust_remote_code to true if it may run here"
        if wrong is not None:
            expected = f"one of {', '.join(EXTRACTORS)} or package.module:function"
            setting = where.partition(" ")[0]
            yield (
                (setting, "model.trust_remote_code"),
                describe(where, wrong, expected=expected, got=name, todo=todo),
            )


def _of_tasks(config: Settings) -> Iterator[Finding]:
    """What a task's settings say together."""
    for name, task in (config.evaluate.tasks or {}).items():
        where = f"evaluate.tasks [{name}]"
        if task.n > 1 and task.temperature == 0:
            wrong = f"asks for {task.n} replies at temperature 0, which are one reply {task.n} times"
            yield ("evaluate.tasks",), describe(where, wrong, todo="n: 1, or a temperature above 0")


def _mixture(config: Settings) -> Iterator[Finding]:
    """What a policy needs to decide by."""
    mixture, data = config.mixture, config.data
    yield from _weights(config)
    if mixture.policy is None:
        return
    named = data.task_column is not None or isinstance(data.train, dict)
    if policy_class(mixture.policy).needs_tasks and not named:
        yield (
            ("mixture.policy", "data.train", "data.task_column"),
            describe(
                "mixture.policy",
                f"{mixture.policy} needs to know the tasks",
                todo="set data.task_column, or write data.train as a mapping {task: source}",
            ),
        )
    if mixture.metric == "answer" and config.model.path is None and config.tokenizer.path is None:
        yield (
            ("mixture.metric", "model.path", "tokenizer.path"),
            describe(
                "mixture.metric", "answer reads text, and there is no tokenizer", todo="set tokenizer.path"
            ),
        )
    if data.validation is None and not data.validation_fraction:
        yield (
            ("mixture.policy", "data.validation", "data.validation_fraction"),
            describe(
                "mixture.policy",
                f"{mixture.policy} scores tasks on validation rows and there are none",
                todo="set data.validation or data.validation_fraction",
            ),
        )
    if mixture.exclude_on == "saturation" and config.stop.token_accuracy is None:
        yield (
            ("mixture.exclude_on", "stop.token_accuracy"),
            describe(
                "mixture.exclude_on",
                "saturation is judged by stop.token_accuracy, which is null",
                todo="set stop.token_accuracy",
            ),
        )
    if mixture.compute_budget * mixture.evaluations_per_epoch < 1:
        yield (
            ("mixture.compute_budget", "mixture.evaluations_per_epoch"),
            describe(
                "mixture.compute_budget",
                "a stage would end before its first evaluation",
                expected=(
                    f"at least 1 / mixture.evaluations_per_epoch = {1 / mixture.evaluations_per_epoch:g}"
                ),
                got=mixture.compute_budget,
            ),
        )


def _weights(config: Settings) -> Iterator[Finding]:
    """How often tasks are drawn, with a policy or without."""
    mixture, data = config.mixture, config.data
    if mixture.weights is not None and mixture.temperature is not None:
        yield (
            ("mixture.weights", "mixture.temperature"),
            describe("mixture.temperature", "mixture.weights is set too", todo="keep one of the two"),
        )
    if mixture.weights is not None:
        if not any(weight > 0 for weight in mixture.weights.values()):
            yield ("mixture.weights",), describe("mixture.weights", "sum to 0", got=mixture.weights)
        tasks = _tasks(data.train)
        for name in sorted(set(mixture.weights) - set(tasks)) if tasks else ():
            yield (
                ("mixture.weights", "data.train"),
                describe(
                    f"mixture.weights.{name}", "is not a task", expected=f"one of {', '.join(sorted(tasks))}"
                ),
            )


def _tasks(sources: Sources) -> list[str]:
    return list(sources) if isinstance(sources, dict) else []
