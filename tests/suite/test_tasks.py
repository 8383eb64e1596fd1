"""From settings to tasks: how replies are drawn, what is asked as text, and prompts in a form nobody learned."""

import json

import pytest

from repsft_fast.config import Config
from repsft_fast.config.task_sections import EvalTask
from repsft_fast.errors import ConfigError, DataError
from repsft_fast.evaluate.asked import Sampling, Task
from repsft_fast.evaluate.replies import Asked
from repsft_fast.suite.tasks import asked_of, digest, other_form, read_tasks, sampling_of
from tests.helpers.chat_tokenizers import byte_level

BASE = {
    "run.folder": "x",
    "data.train": "a.jsonl",
    "budget.epochs": 1,
    "model.config": {"model_type": "llama"},
}


@pytest.fixture
def read(tmp_path):
    def reading(rows, name="task.jsonl", **settings):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {"source": str(tmp_path / name), **settings}
        return Config.of({**BASE, "evaluate.tasks": {"t": task}})

    return reading


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (1, 0.0, 1.0)), ({"n": 4}, (4, 0.6, 0.95)), ({"n": 4, "temperature": 1.0}, (4, 1.0, 0.95)),
        ({"temperature": 0.7}, (1, 0.7, 1.0)), ({"n": 2, "top_p": 1}, (2, 0.6, 1.0)),
    ],
)  # fmt: skip
def test_one_reply_is_greedy_and_several_are_drawn(settings, expected):
    found = sampling_of(EvalTask(source="a", **settings), 7)
    assert found == Sampling(*expected, 4096, 7)


def test_an_own_extractor_stands_in_place_of_the_layouts(read):
    rows = [{"prompt": "1?", "answer": "1"}, {"prompt": "2?", "answer": "2"}]
    assert read_tasks(read(rows, extractor="boxed")).tasks[0].extractor == "boxed"
    choices = [{"prompt": "1?", "choices": ["a", "b"], "answer": 0}]
    with pytest.raises(ConfigError, match=r"evaluate.tasks \[t\]: compares choices by likelihood"):
        read_tasks(read(choices, by="likelihood", extractor="boxed"))


@pytest.mark.parametrize(
    ("answers", "extractor"),
    [
        (["1", "2.5", "-3"], "number"),
        (["1", "two"], "final"),
        (["1", "2 apples"], "final"),
        (["Monday"], "final"),
    ],
)
def test_answers_that_are_all_numbers_are_looked_for_as_numbers(read, answers, extractor):
    """A model that says "the sum is 7" has answered, though not in a box."""
    rows = [{"prompt": f"{number}?", "answer": answer} for number, answer in enumerate(answers)]
    assert read_tasks(read(rows)).tasks[0].extractor == extractor


def test_all_problems_of_all_tasks_are_told_at_once(tmp_path, read):
    good = read([{"prompt": "1?", "answer": "1"}]).evaluate.tasks["t"]
    asked = {"one": str(tmp_path / "no1.jsonl"), "two": str(tmp_path / "no2.jsonl"), "three": good}
    with pytest.raises(DataError, match=r"(?s)no1.jsonl.*no2.jsonl"):
        read_tasks(Config.of({**BASE, "evaluate.tasks": asked}))


def test_chat_false_asks_the_text_as_it_is(read):
    rows = [{"prompt": "two words", "answer": "1"}]
    tokenizer = byte_level()
    for chat in (True, False):
        config = read(rows, chat=chat)
        asked, _ = asked_of(read_tasks(config), tokenizer, config)
        text = tokenizer.decode(asked[0].prompts[0])
        assert text.endswith("two words") != chat
        assert ("<|im_start|>assistant" in text) == chat
    several = [{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"},
                             {"role": "user", "content": "3"}], "answer": "4"}]  # fmt: skip
    with pytest.raises(DataError, match="is a chat of several turns, which no text says"):
        read_tasks(read(several, chat=False))


def test_ranks_that_ask_other_things_are_told_apart(read):
    config = read([{"prompt": "1?", "answer": "1"}])
    asked, _ = asked_of(read_tasks(config), byte_level(), config)
    other, _ = asked_of(read_tasks(read([{"prompt": "2?", "answer": "1"}])), byte_level(), config)
    assert digest(asked) == digest(asked) != digest(other)


class TestOtherForm:
    """A model that is asked in a form it was not trained in is judged on that form."""

    def said(self, prompts, trained, kind="generate"):
        asked = [Asked(Task("t", (), kind=kind), tuple(map(tuple, prompts)))]
        return other_form(asked, trained, byte_level())

    @pytest.mark.parametrize(
        ("prompts", "trained"),
        [
            ([[9, 1, 2, 3], [8, 1, 2, 3]], [[7, 1, 2, 3], [6, 5, 1, 2, 3]]),  # the same generation prompt
            ([[9, 1], [8, 2]], [[7, 3], [6, 4]]),  # text, both
            ([[9, 1], [8, 1]], [[7, 3], [6, 3]]),  # ends of one token say nothing: a question mark, a colon
            ([[9, 1, 2, 3], [8, 1, 2, 3]], [[7, 1, 2, 3], [6, 4]]),  # some of what is trained on
            ([[5, 9, 1, 2, 3], [5, 8, 1, 2, 3]], [[7, 0, 1, 2, 3]] * 2),  # longer common ends are cut alike
            ([[4, 1, 2, 3]], [[7, 1, 2, 3], [6, 1, 2, 3]]),  # one problem
        ],
    )
    def test_what_is_learnt_is_asked(self, prompts, trained):
        assert self.said(prompts, trained) == []

    @pytest.mark.parametrize(
        ("prompts", "trained"),
        [
            ([[9, 1, 2, 3], [8, 1, 2, 3]], [[7, 3], [6, 4]]),  # a chat of a model of texts
            ([[9, 1], [8, 2]], [[7, 1, 2, 3], [6, 1, 2, 3]]),  # texts of a model of chats
            ([[9, 1, 2, 3], [8, 1, 2, 3]], [[7, 1, 2, 4], [6, 1, 2, 4]]),  # another template
            ([[4, 1, 2, 3]], [[7, 1, 2, 4], [6, 1, 2, 4]]),
        ],
    )
    def test_another_form_is_told(self, prompts, trained):
        (text,) = self.said(prompts, trained)
        assert "is asked in another form than it learns (evaluate.tasks [t.chat])" in text
        assert self.said(prompts, trained, kind="choice") == []
        assert self.said(prompts, []) == []
