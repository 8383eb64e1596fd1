"""Replies become lines with verdicts, and lines become figures; every verdict is its reply's."""

from repsft_fast.evaluate.asked import Generation, Problem, Task
from repsft_fast.evaluate.judging import Judge
from repsft_fast.evaluate.replies import Asked
from repsft_fast.evaluate.scores import Figure, score
from repsft_fast.suite.evaluation import Answered
from repsft_fast.suite.results import interval_words, judged_lines, problems_of


class Letters:
    """A tokenizer of characters."""

    def decode(self, ids, **_):
        return "".join(map(chr, ids))


def problem(name, answer, **more):
    return Problem(name, ({"role": "user", "content": "?"},), answer, **more)


def test_every_reply_has_its_own_verdict():
    task = Task("t", (problem("a", "4", group="g"), problem("b", "1/2")), extractor="boxed")
    asked = Asked(task, ((63,), (63,)))
    texts = {(0, 0): r"\boxed{4}", (0, 1): "no box", (1, 0): r"\boxed{0.5}", (1, 1): r"\boxed{3}"}
    found = {key: Generation([1] * (n + 1), n != 2, 0.5) for n, key in enumerate(texts)}
    answered = Answered(found, 1.0, 10, texts)
    with Judge() as judge:
        lines = judged_lines(asked, answered, judge, Letters(), trusted=False)
    assert [(line["problem"], line["draw"], line["verdict"], line["answer"]) for line in lines] == [
        ("a", 0, "right", "4"), ("a", 1, "no answer", None), ("b", 0, "right", "0.5"), ("b", 1, "wrong", "3"),
    ]  # fmt: skip
    assert lines[0] == {
        "prompt": 0, "draw": 0, "problem": "a", "group": "g", "verdict": "right", "answer": "4", "reference": "4",
        "tokens": 1, "text": r"\boxed{4}", "ids": [1], "finished": True, "entropy": 0.5,
    }  # fmt: skip
    problems = problems_of(task, lines)
    scores = score(problems)
    assert (scores.acc.value, scores.right_without_end, scores.no_answer) == (0.5, 1, 1)
    assert [len(one.draws) for one in problems] == [2, 2]
    assert problems[1].draws[0].tokens == 3


def test_the_end_of_a_prompt_may_have_begun_a_thought():
    """Templates of reasoning models open <think> themselves: what stands inside it is no answer."""
    task = Task("t", (problem("a", "4"),), extractor="last_number")
    prompt = tuple(map(ord, "2+2?<think>"))
    texts = {(0, 0): "maybe 5</think>it is 4", (0, 1): "maybe 4"}
    answered = Answered({key: Generation([1], True) for key in texts}, 1.0, 1, texts)
    with Judge() as judge:
        lines = judged_lines(Asked(task, (prompt,)), answered, judge, Letters(), trusted=False)
    assert [line["verdict"] for line in lines] == ["right", "no answer"]


def test_a_figure_in_words():
    assert interval_words(Figure(0.41, 0.352, 0.469)) == "41.0 % (35.2–46.9)"
    assert interval_words(Figure(0.41, 0.352, 0.469), interval=False) == "41.0 %"
    assert interval_words(Figure(0.41)) == "41.0 %"
    assert interval_words(Figure(None)) == "–"
