"""Choices by log-likelihood: against plain torch, one choice at a time, and against lm-eval's own."""

import functools
import json
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from repsft_fast import distributed
from repsft_fast.errors import ConfigError, DataError
from repsft_fast.evaluate.asked import Problem, Task
from repsft_fast.evaluate.multiple_choice import ChoiceProbe
from repsft_fast.evaluate.task_files import read_task
from repsft_fast.evaluate.teacher_forced import TeacherForced
from repsft_fast.models import load_model
from tests.helpers import tiny
from tests.helpers.chat_tokenizers import byte_level, metaspace
from tests.helpers.ranks import run_ranks

SUBJECTS = ("abstract_algebra", "law", "")


def rows(count=24):
    return [
        {
            "question": f"What is {n} times {n + 1}? " + "So? " * (n % 5), "subject": SUBJECTS[n % 3] or None,
            "choices": [f"{n * k + k} {'it is ' * (k % 2)}" for k in range(1, 5)], "answer": n % 4,
        }
        for n in range(count)
    ]  # fmt: skip


def write(folder, plain=False):
    made = rows()
    if plain:
        made = [
            {"prompt": f"{r['question']}\n", "choices": r["choices"], "answer": "ABCD"[r["answer"]]}
            for r in made
        ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return read_task("mmlu", path, kind="choice")[0]


def model_of(vocabulary=300):
    torch.manual_seed(0)
    return load_model(tiny.config("llama", vocab_size=vocabulary))


def probe_of(task, tokenizer=None, world=None, row_tokens=1024):
    packing = {"row_tokens": row_tokens, "bucket_tokens": 1, "world": world or distributed.alone("cpu")}
    scorer = functools.partial(lambda store: TeacherForced(store, range(len(store.index)), **packing))
    return ChoiceProbe(task, tokenizer or byte_level(), device="cpu", scorer=scorer)


def one_by_one(model, task, tokenizer):
    """[problems][choices] log-probabilities by a plain forward pass over each text alone."""
    found = []
    with torch.no_grad():
        for problem in task.problems:
            line = []
            for choice in problem.compared:
                start = len(tokenizer(problem.text.rstrip(), add_special_tokens=False)["input_ids"])
                ids = tokenizer(f"{problem.text} {choice}", add_special_tokens=False)["input_ids"]
                logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
                line.append(sum(logits[at - 1, ids[at]].item() for at in range(start, len(ids))))
            found.append(line)
    return np.array(found)


@pytest.mark.parametrize("tokenizer", [byte_level(), metaspace()], ids=["bytes", "metaspace"])
@pytest.mark.parametrize("plain", [False, True], ids=["letters", "texts"])
def test_log_probabilities_are_those_of_each_choice_alone(tmp_path, plain, tokenizer):
    task, model = write(tmp_path, plain), model_of()
    found = probe_of(task, tokenizer)(model)
    assert model.training
    expected = one_by_one(model, task, tokenizer)
    got = np.array([problem.logprobs for problem in found.problems])
    assert np.abs(got - expected).max() < 1e-4
    if tokenizer is byte_level() and not plain:
        assert found.trained == 24 * 4 * 2, "a blank and a letter"
    best = expected.argmax(1)
    by_length = (expected / [[len(choice) for choice in p.compared] for p in task.problems]).argmax(1)
    right = np.array(["ABCD".index(problem.answer) for problem in task.problems])
    assert [problem.chosen for problem in found.problems] == ["ABCD"[n] for n in best]
    assert [problem.right for problem in found.problems] == (best == right).tolist()
    assert [problem.right_by_length for problem in found.problems] == (by_length == right).tolist()
    assert found.accuracy == (best == right).mean()
    assert found.accuracy_by_length == (by_length == right).mean()
    assert (best != by_length).any() == plain, "letters are of one length"
    others = np.where(np.arange(4) == right[:, None], -np.inf, expected).max(1)
    margins = expected[np.arange(len(right)), right] - others
    assert np.abs([problem.margin for problem in found.problems] - margins).max() < 1e-4
    assert (best == right)[margins > 0].all()
    assert not (best == right)[margins < 0].any()


def test_results_by_group_and_as_json(tmp_path):
    found = probe_of(write(tmp_path))(model_of())
    groups = found.by_group()
    assert list(groups) == ["", "abstract_algebra", "law"]
    assert [count for count, _ in groups.values()] == [8, 8, 8]
    assert np.mean([accuracy for _, accuracy in groups.values()]) == pytest.approx(found.accuracy)
    of_law = [problem.right for problem in found.problems if problem.group == "law"]
    assert groups["law"] == (8, np.mean(of_law))
    told = json.loads(json.dumps({**found.to_json(), "lines": found.lines()}, allow_nan=False))
    assert (told["problems"], told["accuracy"], told["not_finite"]) == (24, found.accuracy, 0)
    assert told["margin"] == pytest.approx(np.mean([problem.margin for problem in found.problems]))
    assert told["groups"]["law"] == {"problems": 8, "accuracy": groups["law"][1]}
    assert told["lines"][3]["chosen"] == found.problems[3].chosen


def chosen_on(world, task):
    return probe_of(task, world=world, row_tokens=400)(model_of()).problems


def test_neither_packing_nor_ranks_move_a_number(tmp_path):
    task, model = write(tmp_path), model_of()
    found = [probe_of(task, row_tokens=row_tokens)(model).problems for row_tokens in (300, 400, 9999)]
    for others in found[1:]:
        assert [problem.chosen for problem in others] == [problem.chosen for problem in found[0]]
        assert (
            np.abs(np.array([[*a.logprobs] for a in others]) - [[*b.logprobs] for b in found[0]]).max() < 1e-4
        )
    assert run_ranks(chosen_on, task) == [found[1], found[1]]


def test_a_model_of_numbers_that_are_not_finite_chooses_nothing(tmp_path):
    model = model_of()
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    found = probe_of(write(tmp_path))(model)
    assert {(problem.chosen, problem.right, problem.right_by_length) for problem in found.problems} == {
        ("", False, False)
    }
    assert found.accuracy == 0.0
    told = json.loads(json.dumps({**found.to_json(), "lines": found.lines()}, allow_nan=False))
    assert (told["not_finite"], told["margin"], told["lines"][0]["logprobs"]) == (24, None, None)


def test_ties_go_to_the_first(tmp_path):
    model = model_of()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = probe_of(write(tmp_path))(model)
    assert {problem.chosen for problem in found.problems} == {"A"}
    assert found.accuracy == 0.25


def test_what_cannot_be_compared_is_refused(tmp_path):
    task = write(tmp_path)
    with pytest.raises(ConfigError, match=r"^t: compares no choices, got generate"):
        probe_of(Task("t", task.problems))
    with pytest.raises(DataError, match=r"rows.jsonl:\d+: has a token id past the vocabulary"):
        probe_of(task)(model_of(200))
    learned = model_of()
    learned.position_limit = 100
    with pytest.raises(DataError, match=r"rows.jsonl:\d+: is longer than the positions .*at most 100 tokens"):
        probe_of(task)(learned)
    words = Tokenizer(models.WordLevel({"x": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for text, compared, wrong in (
        (" ", ("a", "b"), "behind no text"),
        ("x", ("a", " "), "without a token of its own"),
    ):
        problem = Problem("1", (), "A", choices=("a", "b"), where="f:1", text=text, compared=compared)
        with pytest.raises(DataError, match=f"^f:1: .*{wrong}"):
            probe_of(Task("t", (problem,), kind="choice"), PreTrainedTokenizerFast(tokenizer_object=words))


@pytest.mark.parametrize("tokenizer", [byte_level(), metaspace()], ids=["bytes", "metaspace"])
@pytest.mark.parametrize("plain", [False, True], ids=["letters", "texts"])
def test_equal_to_lm_evals_own_log_likelihoods(tmp_path, plain, tokenizer):
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    task, model = write(tmp_path, plain), model_of()
    found = probe_of(task, tokenizer)(model)
    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=(problem.text, f" {choice}"), idx=0)
        for problem in task.problems
        for choice in problem.compared
    ]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=5).loglikelihood(asked, disable_tqdm=True)
    ours = [number for problem in found.problems for number in problem.logprobs]
    assert np.abs(np.array([number for number, _ in theirs]) - ours).max() < 1e-4
