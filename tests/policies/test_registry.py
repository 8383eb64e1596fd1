"""Policies by name, and the facts of each that the trainer asks instead of its name."""

from typing import get_args

import pytest

from repsft_fast.config.sections import Mixture
from repsft_fast.policies import POLICIES, Msft, MsftSettings, Saturation, SaturationSettings, policy_class

FACTS = ("needs_losses", "looks_ahead", "needs_tasks", "names_result")


def test_the_setting_names_every_policy_and_no_other():
    (names, none) = get_args(Mixture.model_fields["policy"].annotation)
    assert (set(get_args(names)), none) == (set(POLICIES), type(None))


def test_without_a_mixture_it_is_the_saturation_rule():
    assert policy_class(None) is Saturation
    assert all(policy_class(name) is kind for name, kind in POLICIES.items())


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        (None, ()),
        ("sft", ("needs_tasks", "names_result")),
        ("msft", ("needs_tasks", "names_result")),
        ("continual", ("needs_tasks", "names_result")),
        ("sro", ("needs_tasks", "names_result")),
        ("soft_sro", ("needs_tasks", "names_result")),
        ("ies", ("needs_losses", "names_result")),
        ("dynamix", ("looks_ahead", "needs_tasks", "names_result")),
    ],
)
def test_the_facts(name, facts):
    assert tuple(fact for fact in FACTS if getattr(policy_class(name), fact)) == facts


@pytest.mark.parametrize("name", [None, *POLICIES])
def test_its_settings_defaults_can_be_used(name):
    kind = policy_class(name)
    policy = kind(kind.settings_type())
    assert policy.settings.problems() == []
    assert policy.evaluations_per_epoch == policy.settings.evaluations_per_epoch


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, (1, "one run")),
        ("sft", (1, "one run")),
        ("msft", (10, "max_stages 10")),
        ("continual", (3, "3 tasks")),
        ("sro", (2, "2 runs")),
        ("soft_sro", (2, "2 runs")),
        ("ies", (1, "one run")),
        ("dynamix", (1, "one run")),
    ],
)
def test_how_long_a_run_lasts_at_most(name, expected):
    kind = policy_class(name)
    assert kind(kind.settings_type()).most_rollouts(3) == expected


def test_the_accuracy_that_decides():
    assert Saturation(SaturationSettings(token_accuracy=0.5)).accuracy_target == 0.5
    assert Saturation(SaturationSettings(token_accuracy=None)).accuracy_target is None
    assert Msft(MsftSettings(token_accuracy=0.5)).accuracy_target is None
    memorised = MsftSettings(token_accuracy=0.5, exclude_on="saturation")
    assert Msft(memorised).accuracy_target == 0.5
    assert all(kind(kind.settings_type()).accuracy_target is None for kind in POLICIES.values())
