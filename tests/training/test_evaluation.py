"""A few prompts answered at the end of a run: trained ones beside held-out ones, told apart."""

import pytest
import torch

from repsft_fast import train
from repsft_fast.commands.demo import show_answers
from tests.helpers import spelling


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spelling")
    return spelling.settings(
        folder, data__validation=str(folder / "validation.jsonl"), evaluate__generate_samples=2
    )


def test_what_was_trained_on_is_answered_and_what_was_not_is_shown_beside_it(settings, tmp_path, capsys):
    torch.manual_seed(0)
    result = train(settings, {"run.folder": str(tmp_path / "run"), "stop.token_accuracy": 1.0})
    answers = result.more["answers"]
    assert [answer["seen"] for answer in answers] == [True, True, False, False]
    assert result.token_accuracy == 1.0
    assert (
        [answer["answer"] for answer in answers[:2]]
        == [answer["reference"] for answer in answers[:2]]
        == ["nus", "pam"]
    )
    assert {answer["prompt"].split()[-1] for answer in answers[2:]} == {"dog", "tub"}
    show_answers(answers)
    printed = capsys.readouterr().out
    assert (
        printed.index("Trained on")
        < printed.index("✓ right")
        < printed.index("Never seen")
        < printed.index("Reverse dog")
    )


def test_without_held_out_samples_all_are_trained_ones(settings, tmp_path):
    changes = {"run.folder": str(tmp_path / "run"), "data.validation": None, "budget.epochs": 1}
    answers = train(settings, changes).more["answers"]
    assert [answer["seen"] for answer in answers] == [True, True]
