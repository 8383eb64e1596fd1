"""Answers taken out of a text, and compared: as text, as numbers, as expressions; never so that a reply could
stop a run."""

import sys
import time

import pytest

from repsft_fast.evaluate.answers import (
    EXTRACTORS,
    boxed,
    final_answer,
    hashes,
    last_number,
    same_answer,
    whole,
)


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
        ("nothing", None),
        ("", None),
        ("\\boxed{" * 20_000, None),
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
    ],
)
def test_hashes(text, answer):
    assert hashes(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("it is 42.", "42"),
        ("1,234,567 sheep", "1,234,567"),
        ("x = -3.5e-2!", "-3.5e-2"),
        ("50% of 12", "12"),
        ("about 50%", "50%"),
        (".5", ".5"),
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
    assert final_answer(r"#### 1 \boxed{2}") == "2"
    assert final_answer("thinking #### 1") == "1"
    assert final_answer("just this") == "just this"
    assert final_answer("") is None
    assert set(EXTRACTORS) == {"final", "boxed", "hashes", "last_number", "choice", "whole"}


@pytest.mark.parametrize(
    ("got", "reference"),
    [
        ("42", "42"), (" 42. ", "42"), ("$42$", "42"), ("1,000", "1000.0"), ("0.50", ".5"), ("-0", "0"), ("50%", "0.5"),
        ("Paris", "Paris"), ("New  York", "New York"), ("1e3", "1000"), ("0.1", "0.10000000000000000"),
    ],
)  # fmt: skip
def test_the_same(got, reference):
    assert same_answer(got, reference)
    assert same_answer(reference, got)


@pytest.mark.parametrize(
    ("got", "reference"),
    [
        (None, "42"), ("", "42"), ("41", "42"), ("paris", "Paris"), ("42", "42.0000001"),
        ("12345678901234567890", "12345678901234567891"),
        ("nan", "0"), ("inf", "1"), ("Infinity", "1"), ("yes", "no"),
    ],
)  # fmt: skip
def test_not_the_same(got, reference):
    assert not same_answer(got, reference)


EXPRESSIONS = [
    (r"\frac{1}{3}", "0.333333"),
    ("x+1", "1+x"),
    ("(1,2)", "(1, 2)"),
    (r"\sqrt{4}", "2"),
    ("3/4x", "0.75x"),
    ("10^3", "1000"),
]


@pytest.mark.parametrize(("got", "reference"), EXPRESSIONS)
def test_expressions_by_value_where_math_verify_is_installed(got, reference):
    pytest.importorskip("math_verify")
    assert same_answer(got, reference)
    assert not same_answer(got, "17")


@pytest.mark.parametrize(("got", "reference"), EXPRESSIONS)
def test_without_math_verify_they_are_compared_as_text(got, reference, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert not same_answer(got, reference)
    assert same_answer(got, got)
    assert same_answer("1,000", "1000")


@pytest.mark.parametrize(
    "reply",
    [
        "9^{9^{9^{9}}}", "9**9**9**9", "9^9^9", "10^{1000000000}", "((9^{99})^{99})^{99}", "99999999999!",
        r"\sum_{i=1}^{10^9} i",
        r"\int_0^1 \sin(x^x^x) dx", "factorial(99999999)", "9^(9^(9^9))", "2^{" * 60,
        "(" * 200, r"\frac{" * 30, "1e999999999+1",
        "{" * 100_000, "9" * 5_000 + "+1", r"\sqrt{9^{999}+1}",
    ],
)  # fmt: skip
def test_no_reply_can_stop_the_run(reply):
    began = time.process_time()
    assert not same_answer(reply, "12")
    assert not same_answer("12", reply)
    assert time.process_time() - began < 5
