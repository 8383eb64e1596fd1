"""A setting that does nothing beside the others is told by its name, and one that does something is not."""

import pytest

from repsft_fast.config import Config
from repsft_fast.config.sections import Mixture, Schedule, Stop

LEAST = {"run.folder": "r", "model.path": "m", "data.train": {"a": "x", "b": "y"}, "budget.epochs": 3}
# Another value than the default's of every setting of the sections whose settings depend on others.
OTHER = {
    "schedule.decay_fraction": 0.2, "stop.decay_token_accuracy": 0.9, "stop.plateau_min_delta": 0.1,
    "stop.plateau_epochs": 3, "stop.probe_samples": 5, "mixture.rule": "paper", "mixture.compute_budget": 2,
    "mixture.evaluations_per_epoch": 2, "mixture.max_stages": 3, "mixture.optimizer": "restore",
    "mixture.schedule": "rewind", "mixture.data": "rewind", "mixture.exclude_on": "saturation",
    "mixture.rehearsal": 0.1, "mixture.metric": "nll", "mixture.extractor": "boxed", "mixture.answer_tokens": 9,
    "mixture.pool": "tasks", "mixture.keep": "last", "mixture.alpha": 0.2, "mixture.z": 3, "mixture.min_looks": 4,
    "mixture.min_delta": 0.1, "mixture.patience": 3, "mixture.weights": {"a": 1, "b": 2}, "mixture.temperature": 2,
    "stop.token_accuracy": 0.9,
}  # fmt: skip
TESTED = {f"mixture.{name}" for name in ("alpha", "z", "min_looks", "min_delta", "patience")}
OF_A_FALL = {"mixture.rule", "mixture.schedule", "mixture.data"} | TESTED
OF_MSFT = {"mixture.exclude_on", "mixture.rehearsal", "mixture.optimizer"} | OF_A_FALL
ANSWERS = {"mixture.extractor", "mixture.answer_tokens"}
OF_THE_DECAY = {"schedule.decay_fraction", "stop.decay_token_accuracy"}
ALWAYS = {"mixture.weights", "mixture.temperature"}
MIXTURE = {name for name in OTHER if name.startswith("mixture.")} - ALWAYS
# A policy ends the run itself: these, and whatever without stop.plateau_epochs has no effect either.
ENDS = {"stop.plateau_epochs", "stop.plateau_min_delta", "stop.token_accuracy"} | OF_THE_DECAY
PLAIN = MIXTURE | {"stop.plateau_min_delta"}


def policy(name, **more):
    return {"mixture.policy": name, "data.validation_fraction": 0.5, **more}


WITHOUT = [
    ({}, PLAIN),
    ({"stop.plateau_epochs": 2}, MIXTURE),
    ({"stop.token_accuracy": None}, PLAIN | {"stop.decay_token_accuracy"}),
    *[({"schedule.name": name, "stop.token_accuracy": 0.97}, PLAIN | OF_THE_DECAY) for name in ("cosine", "constant")],
    (policy("msft"), ENDS | ANSWERS),
    (policy("msft", **{"stop.plateau_epochs": 2}), ENDS | ANSWERS),
    (policy("msft", **{"mixture.metric": "answer"}), ENDS),
    (policy("msft", **{"mixture.rule": "paper"}), ENDS | ANSWERS | TESTED),
    (policy("msft", **{"mixture.z": 2.0}), ENDS | ANSWERS | {"mixture.alpha"}),
    (
        policy("msft", **{"mixture.exclude_on": "saturation"}),
        (ENDS - {"stop.token_accuracy"}) | ANSWERS | OF_A_FALL,
    ),
    (policy("sft_resets"), ENDS | ANSWERS | OF_MSFT),
    *[
        (policy(name), ENDS | ANSWERS | OF_MSFT | {"mixture.max_stages"})
        for name in ("sft", "sro", "soft_sro", "ies", "dynamix")
    ],
    (policy("continual"), ENDS | ANSWERS | OF_MSFT | {"mixture.max_stages", "mixture.keep"}),
]  # fmt: skip


def named(settings):
    """Settings that are told to have no effect, each once."""
    found = [text.split(":")[0] for text in Config.of({**LEAST, **settings}).warnings if "no effect" in text]
    assert len(set(found)) == len(found)
    return set(found)


@pytest.mark.parametrize(("settings", "expected"), WITHOUT)
def test_alone_and_by_its_name(settings, expected):
    """Every other setting in turn, beside these."""
    assert named(settings) - set(settings) == set()
    for name, value in OTHER.items():
        if name not in settings:
            told = named({**settings, name: value})
            assert (name in told) == (name in expected), name


def test_every_setting_of_these_sections_is_tried():
    sections = {"mixture": Mixture, "schedule": Schedule, "stop": Stop}
    all_of_them = {f"{name}.{field}" for name, kind in sections.items() for field in kind.model_fields}
    assert all_of_them - {"mixture.policy", "schedule.name"} == set(OTHER)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"schedule.name": "constant", "stop.decay_token_accuracy": 0.9},
            "stop.decay_token_accuracy: has no effect without schedule.name: wsd, whose decay it is about; drop it",
        ),
        (
            {"stop.token_accuracy": None, "stop.decay_token_accuracy": 0.9},
            "stop.decay_token_accuracy: has no effect without stop.token_accuracy; drop it",
        ),
        (policy("sft", **{"mixture.z": 2}), "mixture.z: has no effect on training with mixture.policy: sft; only msft has it"),
        (
            {"model.lora": {}, "model.save_dtype": "bfloat16"},
            "model.save_dtype: has no effect on adapters, saved as they are kept; set model.lora.merge, or drop it",
        ),
    ],
)  # fmt: skip
def test_in_words(settings, words):
    assert Config.of({**LEAST, **settings}).warnings == [words]


@pytest.mark.parametrize("recipe", ["demo", "msft", "msft_paper", "paper_a", "repetition", "smollm2"])
def test_no_recipe_has_one(recipe):
    assert [text for text in Config.of(recipe).warnings if "no effect" in text] == []
