"""Budgets that no run has: refused in words, or right."""

import math

import pytest

from repsft_fast.config import Config
from repsft_fast.errors import ConfigError
from repsft_fast.training.budget import budget_of
from tests.data.test_plan import make_plan


def config(**changes):
    return Config.of(
        {
            "run": {"folder": "f"},
            "model": {"path": "m"},
            "data": {"train": {"a": "x", "b": "y"}, "validation": "v"},
            **changes,
        }
    )


@pytest.mark.parametrize("batch", [{"batch_samples": 4}, {"batch_tokens": 50}])
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"budget": {"epochs": 1e308}}, "budget.epochs"),
        ({"budget": {"updates": 2**62, "epochs": None}}, "budget.updates"),
        ({"budget": {"tokens": 2**62, "epochs": None}}, "budget.tokens"),
        (
            {"budget": {"epochs": None}, "mixture": {"policy": "msft", "compute_budget": 1e308}},
            "mixture.compute_budget",
        ),
    ],
)
def test_more_than_can_be_counted(changes, named, batch):
    with pytest.raises(ConfigError, match=rf"^{named}: is more than can be counted"):
        budget_of(config(**changes), make_plan(**batch))


def test_very_many_are_exact():
    assert budget_of(
        config(budget={"epochs": 1e12}), make_plan(batch_samples=4)
    ).updates == 10**12 * math.ceil(30 / 4)


def test_epochs_that_would_be_drawn_for_hours_to_be_counted():
    with pytest.raises(ConfigError, match=r"^budget\.epochs: is too long.*set budget\.updates"):
        budget_of(config(budget={"epochs": 1e9}), make_plan(batch_tokens=50))
