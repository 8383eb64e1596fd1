"""docs/models.md says what is so: a dozen of its rows are made again here, all of them by the slow test."""

import json

import pytest
from transformers.utils import logging

from tests.helpers.architectures import NAMES
from tests.models.matrix import COLUMNS, PAGE, RESULTS, outcome, page

KEPT = json.loads(RESULTS.read_text())
# One of each kind: plain, biased head, learned positions, experts, sinks, windows, state, lengths, alone
# only, refused.
DOZEN = (
    "llama", "phi", "gpt2", "opt", "qwen3_moe", "gpt_oss", "gemma2", "qwen3_next", "mamba", "stablelm", "gptj",
    "llama, dynamic RoPE", "phi3, longrope", "llama4_text, chunks of 8", "bert",
)  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


@pytest.mark.parametrize("name", DOZEN)
def test_a_row_of_the_table(name):
    assert outcome(name) == KEPT[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_row_of_the_table(name):
    assert outcome(name) == KEPT[name]


def test_nothing_fails_and_nothing_is_half_exact():
    """Every architecture is exact, or refused in our words, in every column."""
    assert set(KEPT) == set(NAMES)
    fails = {
        (name, column)
        for name, found in KEPT.items()
        for column, words in found.items()
        if words.startswith("FAILS")
    }
    assert not fails
    assert all("not tried" in found or set(found) <= set(COLUMNS) for found in KEPT.values())


def test_at_least_sixty_architectures_are_exact():
    exact = [name for name, found in KEPT.items() if found.get("one a row") == "exact"]
    assert len(exact) >= 60


def test_the_page_is_made_of_the_results():
    assert PAGE.read_text() == page(KEPT)
