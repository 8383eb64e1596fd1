"""A few prompts answered at the end of a run: trained ones beside held-out ones, told apart."""

import json

import pytest
import torch

from repsft_fast import train
from repsft_fast.commands.demo import build_tokenizer, show_answers
from tests.helpers import runs

WORDS = ["sun", "map", "top", "net", "rat", "pin", "dog", "tub"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spelling")
    rows = [{"prompt": f"Reverse {word}", "completion": word[::-1]} for word in WORDS]
    for name, part in (("train", rows[:6]), ("validation", rows[6:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    build_tokenizer([" ".join(row.values()) for row in rows], 300, folder / "tokenizer")
    return runs.settings(
        folder,
        model__config=runs.MODEL | {"vocab_size": 320, "eos_token_id": 3},
        tokenizer__path=str(folder / "tokenizer"),
        data__validation=str(folder / "validation.jsonl"),
        budget__epochs=60,
        evaluate__generate_samples=2,
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
