"""What of a row is the question, the answer, the choices and the group; and what is refused, with its place."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repsft_fast.errors import DataError
from repsft_fast.evaluate.layouts import LAYOUTS, Fields, Item, check, detect

MMLU = {"question": "Two and two?", "choices": ["3", "4", "5", "6"], "answer": 1, "subject": "sums"}
GPQA = {
    "Question": "Which?", "Correct Answer": "right\n", "Incorrect Answer 1": "w1", "Incorrect Answer 2": "w2",
    "Incorrect Answer 3": "w3", "Subdomain": "Optics", "High-level domain": "Physics", "Record ID": "rec7",
}  # fmt: skip


def read(row, layout=None, seed=42, where="f.jsonl:3"):
    fields = Fields(row, where)
    layout = layout or detect(fields)
    check(fields, layout)
    return LAYOUTS[layout].read(fields, seed)


@pytest.mark.parametrize(
    ("row", "layout", "item"),
    [
        ({"prompt": " 1+1? ", "answer": 2}, "plain", Item(" 1+1? ", "2")),
        ({"prompt": "p", "answer": "a", "group": 3, "id": 9}, "plain", Item("p", "a", (), "3", "9")),
        ({"prompt": "p", "answer": "B", "choices": ["x", "y"]}, "plain", Item("p", "B", ("x", "y"))),
        ({"prompt": "p", "answer": "y", "choices": ["x", "y"]}, "plain", Item("p", "B", ("x", "y"))),
        ({"prompt": "p", "answer": 0, "choices": ["x", "y"]}, "plain", Item("p", "A", ("x", "y"))),
        ({"prompt": "p", "answer": "7", "choices": [5, 7.0]}, "plain", Item("p", "B", ("5", "7"))),
        ({"problem": "p", "answer": "033", "id": 60, "solution": "…"}, "aime", Item("p", "33", name="60")),
        ({"ID": "I-1", "Problem": "p", "Answer": 204}, "aime", Item("p", "204", name="I-1")),
        ({"question": "p", "answer": 70.0}, "aime", Item("p", "70")),
        (
            {"problem": "p", "answer": "\\frac{1}{2}", "subject": "Algebra", "level": 2, "unique_id": "t/1"},
            "math500",
            Item("p", "\\frac{1}{2}", group="Algebra", name="t/1"),
        ),
        ({"problem": "p", "answer": "12", "level": "Level 5"}, "math500", Item("p", "12", group="Level 5")),
        ({"problem": "p", "answer": "(1, 2]"}, "math500", Item("p", "(1, 2]")),
        ({"question": "q", "answer": "So.\n#### 1,234"}, "gsm8k", Item("q", "1,234")),
        ({"question": "q", "answer": "x #### $5 \n"}, "gsm8k", Item("q", "5")),
        (MMLU, "mmlu", Item("Two and two?", "B", ("3", "4", "5", "6"), "sums")),
        ({**MMLU, "answer": "D"}, "mmlu", Item("Two and two?", "D", ("3", "4", "5", "6"), "sums")),
        # by its index, though the number is a choice too
        ({**MMLU, "answer": "3"}, "mmlu", Item("Two and two?", "D", ("3", "4", "5", "6"), "sums")),
        ({"question": "q", "A": "x", "B": "y", "C": "z", "answer": "c"}, "mmlu", Item("q", "C", ("x", "y", "z"))),
        (
            {"question": "q", "options": list("abcdefghij"), "answer": "J", "category": "law", "question_id": 5},
            "mmlu",
            Item("q", "J", tuple("abcdefghij"), "law", "5"),
        ),
    ],
)  # fmt: skip
def test_a_layout_is_known_by_its_columns_and_read(row, layout, item):
    assert detect(Fields(row, "f:1")) == layout
    assert read(row) == item


def test_turns_in_front_of_the_question_stay():
    turns = [
        {"role": "system", "content": "Be brief."}, {"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"},
        {"role": "user", "content": "c?"},
    ]  # fmt: skip
    item = read({"messages": turns, "answer": "d"})
    assert item.question == "c?"
    assert item.before == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b"},
    )


def test_the_order_of_gpqas_choices_follows_from_the_question_and_the_seed_alone():
    item = read(GPQA)
    assert (item.group, item.name, item.question) == ("Physics", "rec7", "Which?")
    assert sorted(item.choices) == ["right", "w1", "w2", "w3"]
    assert item.choices["ABCD".index(item.answer)] == "right"
    assert read(dict(reversed(GPQA.items()))) == item, "nor from the order of the columns"
    assert read(GPQA, where="g.csv:99").choices == item.choices
    letters = [read({**GPQA, "Question": f"Which {n}?"}).answer for n in range(400)]
    assert all(70 < letters.count(letter) < 130 for letter in "ABCD")
    orders = {read(GPQA, seed=seed).choices for seed in range(60)}
    assert len(orders) > 15
    assert read({**GPQA, "High-level domain": None}).group == "Optics"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([1], "is not a row, expected an object.*got list"),
        ({"promt": "p", "answer": "a"}, "columns of no layout.*got promt, answer; did you mean 'promt' by 'prompt'"),
        ({"prompt": "p", "anwser": "a"}, "did you mean 'anwser' by 'answer'"),
        ({"text": "t"}, "columns of no layout, expected prompt .*got text; rename"),
        ({"prompt": None, "answer": None}, "got no column"),
        ({"question": "q", "answer": "Paris"}, "columns of no layout"),
        ({"prompt": "p", "Prompt": "q", "answer": 1}, "'prompt' and 'Prompt', which are read as one"),
        ({"prompt": "p", "messages": [], "answer": 1}, "holds a prompt and messages"),
        ({"prompt": [{"role": "user"}], "answer": 1}, "field 'prompt': is not text, got list"),
        ({"prompt": " ", "answer": 1}, "field 'prompt': is empty"),
        ({"prompt": "p", "answer": ""}, "field 'answer': is empty, expected text or a number"),
        ({"prompt": "p", "answer": " \n"}, "field 'answer': is empty"),
        ({"prompt": "p", "answer": True}, "field 'answer': is neither text nor a number.*got True"),
        ({"prompt": "p", "answer": ["a"]}, "neither text nor a number.*got \\['a'\\]"),
        ({"prompt": "p", "answer": float("nan")}, "neither text nor a number.*got nan"),
        ({"prompt": "p", "answer": "\ud800"}, "half a surrogate"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}], "answer": 1},
            "ends with a turn of the assistant, expected user; remove the last turn",
        ),
        ({"messages": [{"role": "system", "content": "q"}], "answer": 1}, "a turn of the system.*the user's turn"),
        ({"messages": [], "answer": 1}, "field 'messages': is empty"),
        ({"prompt": "p", "answer": "A", "choices": ["x"]}, "no multiple choice, expected 2 to 10 choices, got 1"),
        ({"prompt": "p", "answer": "A", "choices": list("abcdefghijk")}, "no multiple choice.*got 11"),
        ({"prompt": "p", "answer": "A", "choices": ["x", "y", " x"]}, "two choices of one text.*got 'x'"),
        ({"prompt": "p", "answer": "A", "choices": "x, y"}, "field 'choices': is not a list of choices"),
        ({"prompt": "p", "answer": "A", "choices": ["x", None]}, r"field 'choices'\[1\]: is neither text"),
        ({"prompt": "p", "answer": 2, "choices": ["x", "y"]}, "none of the choices, expected one of A, B, or 0 to 1, or a"),
        ({"prompt": "p", "answer": "C", "choices": ["x", "y"]}, "is none of the choices.*got 'C'"),
        ({"prompt": "p", "answer": "(A)", "choices": ["x", "y"]}, "is none of the choices"),
        ({"prompt": "p", "answer": -1, "choices": ["x", "y"]}, "is none of the choices"),
        ({"prompt": "p", "answer": "A", "choices": ["B", "A"]}, r"could mean A \('B'\) and B \('A'\)"),
        ({"prompt": "p", "answer": 1, "choices": ["1", "2"]}, r"could mean A \('1'\) and B \('2'\)"),
        ({**MMLU, "answer": 4}, "is none of the choices, expected one of A, B, C, D, or 0 to 3, got 4"),
        ({**MMLU, "answer": "4"}, "is none of the choices"),
        ({**MMLU, "answer": None}, "columns of no layout"),
        ({"question": "q", "A": "x", "C": "y", "answer": "A"}, "lacks a choice, got a, c"),
        ({**GPQA, "Incorrect Answer 2": "right "}, "two choices of one text.*got 'right'"),
        ({"prompt": "p", "answer": 1, "System": "Be terse."}, "field 'System': holds a part of the question, and is not read.*got 'Be terse.'"),
        ({**MMLU, "image": {"bytes": "…"}}, "field 'image': holds a part of the question"),
        ({"question": "q", "context": "c", "answer": "x #### 1"}, "field 'context': holds a part of the question"),
        ({"question": "q", "answer": "sum ####"}, "field 'answer': ends in no number, expected #### 42"),
        ({"question": "q", "answer": "#### 10:30"}, "ends in no number"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_asked_or_judged_are_refused_with_their_place(row, words):
    with pytest.raises(DataError, match=rf"^f.jsonl:3.*{words}"):
        read(row)


@pytest.mark.parametrize(
    ("row", "layout", "words"),
    [
        ({"problem": "p", "answer": "x+1"}, "aime", "is no answer of AIME, expected a whole number.*math500"),
        ({"problem": "p", "answer": 12.5}, "aime", "is no answer of AIME"),
        ({"problem": "p", "answer": 1000}, "aime", "is no answer of AIME"),
        ({"problem": "p", "answer": True}, "aime", "is no answer of AIME"),
        ({"question": "q", "answer": "42"}, "gsm8k", "ends in no number"),
        ({"question": "q", "anser": "42"}, "gsm8k", "lacks a column of the layout gsm8k.*expected answer, got question, anser; did you mean 'anser'"),
        ({"question": "q", "answer": "A"}, "mmlu", r"lacks .*expected choices\|options\|a"),
        ({**GPQA, "Correct Answer": None}, "gpqa", "lacks .*expected correct answer"),
    ],
)  # fmt: skip
def test_rows_that_are_not_of_the_layout_that_was_named(row, layout, words):
    with pytest.raises(DataError, match=rf"^f.jsonl:3.*{words}"):
        read(row, layout)


def test_columns_of_a_part_of_the_question_that_say_nothing_are_let_pass():
    assert read({"prompt": "p", "answer": 1, "tools": [], "system": ""}).question == "p"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from("AB01"),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner)
    ),
    max_leaves=6,
)
NAMES = [
    "prompt",
    "messages",
    "answer",
    "choices",
    "group",
    "id",
    "question",
    "problem",
    "subject",
    "A",
    "B",
    "C",
]
NAMES += ["Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "options", "level", "system"]


GOOD = [
    {"prompt": "p", "answer": "A"},
    {"question": "q", "answer": "#### 1"},
    {"problem": "p", "answer": 7},
    MMLU,
    GPQA,
]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(GOOD), st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3))
def test_whatever_stands_in_a_row_is_read_or_refused(good, changes):
    try:
        item = read({**good, **changes})
    except DataError:
        return
    assert item.question.strip()
    assert item.answer
    assert isinstance(item.answer + item.group + item.name, str)
    if item.choices:
        assert item.answer in "ABCDEFGHIJ"[: len(item.choices)]
        assert len(item.choices) >= 2


def test_columns_that_are_read_are_told_from_those_that_are_not():
    fields = Fields({"Problem": "p", "answer": "1", "url": "…", "year": None}, "f:1")
    LAYOUTS["aime"].read(fields, 0)
    assert (fields.columns, fields.used) == (["Problem", "answer", "url"], {"Problem", "answer"})
