"""Answers taken out of a text: boxes, hashes, numbers, the whole of it; thoughts are no part of a reply."""

import time

import pytest

from repsft_fast.evaluate.extraction import boxed, final_answer, hashes, last_number, number, spoken, whole


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{ a {b {c}} }", "a {b {c}}"),
        (r"\boxed{}", ""),
        (r"\boxed{never closed", None),
        (r"\boxed{a} and \boxed{b", None),
        (r"\boxed{\boxed{4}}", "4"),
        (r"\boxed 4", "4"),
        (r"$\boxed 42$.", "42"),
        (r"it is \boxed -1.5, so", "-1.5"),
        (r"\boxed\frac{1}{2}.", r"\frac{1}{2}"),
        (r"\boxed\text{B}", r"\text{B}"),
        (r"\boxed B", "B"),
        (r"\boxed {4}", "4"),
        (r"\fbox{3}", "3"),
        (r"\boxed{3}, in the \boxed command", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\{1, 2)}", r"\{1, 2)"),
        (r"\boxed{a\\}", r"a\\"),
        ("\\boxed{1,\n2}", "1,\n2"),
        (r"<think>\boxed{3}</think> so \boxed{4}", "4"),
        (r"<think>\boxed{3}</think> so 4", "3"),
        (r"<think>maybe \boxed{3}", "3"),
        ("boxed{4}", None),
        ("nothing", None),
        ("", None),
        ("\\boxed{" * 20_000, None),
        ("\\boxed{\\", None),
    ],
)
def test_boxed(text, answer):
    assert boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("steps\n#### 42", "42"),
        ("#### 1\n#### 2\nmore", "2"),
        ("####", ""),
        ("# 42", None),
        ("a #### b c \r\nd", "b c"),
        ("<think>#### 1</think>#### 2", "2"),
        ("<think>#### 1</think>two", None),
        ("<think>#### 1", None),
    ],
)
def test_hashes(text, answer):
    assert hashes(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("it is 42.", "42"),
        ("1,234,567 sheep", "1,234,567"),
        ("1{,}234", "1{,}234"),
        ("1,2345", "2345"),
        ("x = -3.5e-2!", "-3.5e-2"),
        ("50% of 12", "12"),
        ("about 50%", "50%"),
        (r"about 50\%", r"50\%"),
        (".5", ".5"),
        ("it is −7", "−7"),
        ("10-3", "3"),
        ("pages 3-5", "5"),
        ("pages 3–5", "5"),
        ("(2)-4", "4"),
        ("a loss of -$5", "-$5"),
        ("$-5$", "-5"),
        ("it is 3/4.", "3/4"),
        ("on 12/25/2020", "2020"),
        ("1 1/2 cups", "1 1/2"),
        ("3/4.5", "4.5"),
        ("in 2020 1/2 of them", "1/2"),
        ("10 / 4 = 2.5", "2.5"),
        (r"it is $\frac{3}{4}$", r"\frac{3}{4}"),
        (r"it is $-2\frac{3}{4}$", r"-2\frac{3}{4}"),
        ("<think>4</think> none", None),
        ("5 <think>4", "5"),
        ("<think>4", None),
        ("none at all", None),
        ("- + . e %", None),
        ("", None),
        ("7" * 100_000, "7" * 100_000),
    ],
)
def test_last_number(text, answer):
    assert last_number(text) == answer


def test_whole_and_final():
    assert whole("  a b \n") == "a b"
    assert whole(" \n") is None
    assert whole("<think>a</think> b\n") == "b"
    assert whole("<think>a") is None
    assert final_answer(r"#### 1 \boxed{2}") == "2"
    assert final_answer("thinking #### 1") == "1"
    assert final_answer("just this") == "just this"
    assert final_answer("") is None


def test_a_reader_takes_what_is_said_behind_the_thought():
    assert final_answer(r"<think>\boxed{3}?</think>It is four.") == "It is four."
    assert final_answer(r"<think>\boxed{3}?</think>" + "\n#### 4") == "4"
    assert final_answer(r"<think>\boxed{3}</think>" + " \n") == "3"
    assert final_answer(r"<think>so \boxed{3}, but") == "3"
    assert final_answer("<think>so 3, but") is None
    assert spoken("a</think>b<think>c</think> d <think> e") == " d "


@pytest.mark.parametrize("extract", [boxed, hashes, last_number, final_answer])
@pytest.mark.parametrize(
    "text",
    [
        "1," * 40_000,
        "1 " * 40_000,
        "1/" * 40_000,
        "-" * 80_000,
        "\\boxed " * 20_000,
        "\\frac{1" * 20_000,
        "<think>" * 20_000,
    ],
)
def test_long_replies_take_little_time(extract, text):
    began = time.process_time()
    extract(text)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"It is \boxed{7}, from 3 + 4.", "7"), ("3 + 4 = 7\n#### 7\n(8)", "7"), ("The sum is 7.", "7"), ("none", None),
        ("<think>9</think>so 7", "7"), ("<think>9", None), (r"\boxed{x} or 7", "x"), ("", None),
    ],
)  # fmt: skip
def test_a_number_is_boxed_or_behind_hashes_or_the_last(text, found):
    assert number(text) == found
