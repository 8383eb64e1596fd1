"""Settings that do nothing beside the others: whoever wrote them expects something of them."""

from collections.abc import Iterator

from repsft_fast.config.sections import Mixture, Settings

# Settings of msft that say nothing where another rule decides.
OF_THE_TESTED_RULE = tuple(f"mixture.{name}" for name in ("alpha", "z", "min_looks", "min_delta", "patience"))
_OF_A_FALL = ("mixture.rule", "mixture.schedule", "mixture.data", *OF_THE_TESTED_RULE)
_OF_MSFT = ("mixture.exclude_on", "mixture.rehearsal", "mixture.optimizer", *_OF_A_FALL)


def without_effect(config: Settings) -> list[str]:
    """A warning for every setting that is not at its default and does nothing, by the first reason there
    is."""
    found: dict[str, str] = {}
    for names, why in (*_elsewhere(config), *_of_a_mixture(config)):
        for name in names:
            if _is_changed(config, name):
                found.setdefault(name, f"{name}: has no effect {why}")
    return list(found.values())


def _is_changed(config: Settings, name: str) -> bool:
    """null asks for nothing, also where it is no default."""
    section, field = name.split(".")
    given = getattr(config, section)
    value = getattr(given, field)
    return value is not None and value != type(given).model_fields[field].default


def _elsewhere(config: Settings) -> Iterator[tuple[tuple[str, ...], str]]:
    """(settings, why they do nothing) that no mixture's policy has to do with."""
    if config.model.lora is not None and not config.model.lora.merge:
        yield ("model.save_dtype",), "on adapters, saved as they are kept; set model.lora.merge, or drop it"
    of_the_decay = ("schedule.decay_fraction", "stop.decay_token_accuracy")
    if config.schedule.name != "wsd":
        yield of_the_decay, "without schedule.name: wsd, whose decay it is about; drop it"
    if config.mixture.policy is not None:
        policy = f"mixture.policy: {config.mixture.policy}"
        yield ("evaluate.keep",), f"with {policy}, which names the result itself; drop it"
        yield ("evaluate.every_epochs",), f"with {policy}; set mixture.evaluations_per_epoch"
        ends = ("stop.plateau_epochs", "stop.plateau_min_delta", *of_the_decay)
        by_accuracy = config.mixture.policy == "msft" and config.mixture.exclude_on == "saturation"
        yield (
            ends if by_accuracy else (*ends, "stop.token_accuracy"),
            (f"with {policy}, which ends the run itself; drop it"),
        )
    if config.evaluate.tasks is None:
        of_tasks = tuple(f"evaluate.{name}" for name in ("tasks_every_epochs", "engine", "batch_replies"))
        yield of_tasks, "without evaluate.tasks; drop it"
    if config.stop.token_accuracy is None:
        yield ("stop.decay_token_accuracy",), "without stop.token_accuracy; drop it"
    if config.stop.plateau_epochs is None:
        yield ("stop.plateau_min_delta",), "without stop.plateau_epochs"


def _of_a_mixture(config: Settings) -> Iterator[tuple[tuple[str, ...], str]]:
    """The same of `mixture.*`."""
    mixture, policy = config.mixture, f"with mixture.policy: {config.mixture.policy}"
    if mixture.policy is None:
        always = ("weights", "temperature")
        others = tuple(f"mixture.{name}" for name in Mixture.model_fields if name not in always)
        yield others, "without mixture.policy"
    elif mixture.policy != "msft":
        yield _OF_MSFT, f"on training {policy}; only msft has it"
        if mixture.policy != "sft_resets":
            yield ("mixture.max_stages",), f"on training {policy}, which makes as many stages as it needs"
        if mixture.policy == "continual":
            yield ("mixture.keep",), f"{policy}, whose result is the last task's first peak"
    elif mixture.exclude_on == "saturation":
        yield _OF_A_FALL, "on training with mixture.exclude_on: saturation, which looks for no fall"
    elif mixture.rule == "paper":
        yield OF_THE_TESTED_RULE, "on training with mixture.rule: paper"
    elif mixture.z is not None:
        yield ("mixture.alpha",), "beside mixture.z, which replaces it"
    if mixture.metric != "answer":
        yield ("mixture.extractor", "mixture.answer_tokens"), "without mixture.metric: answer"
