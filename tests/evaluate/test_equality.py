"""Answers compared: as text, as numbers with their units, as expressions, and never as products of letters."""

import sys
import time

import pytest

from repsft_fast.evaluate.answers import same_answer
from repsft_fast.evaluate.equality import as_expressions, same_by_text, same_in_process

SAME = [
    ("42", "42"), (" 42. ", "42"), ("$42$", "42"), ("$42$.", "42"), (r"\(42\)", "42"), (r"\[42\]", "42"), ("**42**", "42"), ("1,000", "1000.0"),
    ("1{,}000", "1000"), ("1,00,000", "100000"), ("0.50", ".5"), ("-0", "0"), ("+5", "5"), ("- 5", "-5"), ("−5", "-5"), ("–5", "-5"), ("Paris", "Paris"), (r"\text{(C)}", "C"),
    ("New  York", "New York"), (r"\text{Evelyn}", "Evelyn"), (r"$\textbf{Evelyn}$", "Evelyn"), ("1e3", "1000"), ("0.1", "0.10000000000000000"),
    ("1/2", "0.5"), (r"\frac{1}{2}", "0.5"), (r"\frac12", "2/4"), (r"\dfrac{-1}{2}", r"\dfrac{-1}{2}"), (r"-\frac{1}{2}", "-0.5"), ("1 1/2", "3/2"),
    (r"1\frac{1}{2}", "1.5"), ("-1 1/2", "-1.5"), ("50%", "0.5"), (r"50\%", "0.50"), ("50%", "50"), ("50.5%", "50.5"), ("50 percent", "50%"), ("50%", "1/2"),
    ("$5", "5"), (r"\$5.00", "5"), ("-$5", "-5"), ("5 apples", "5"), (r"5\text{ cm}", "5 cm"), (r"5 \mathrm{~cm}", "5"), ("5 square feet", "5"), ("5kg", "5"), ("5kg", "5 kg"), ("5,", "5"), ("5 cm^2", "5"),
    (r"90^\circ", "90"), ("90°", "90 degrees"), ("5 million", "5,000,000"), ("12 thousand", "12000"), ("9" * 5_000, "9" * 5_000), ("1e400", "1e400"),
]  # fmt: skip
NOT_SAME = [
    ("41", "42"), ("42", "42.0000001"), ("0.0000001", "0.0000002"), ("12345678901234567890", "12345678901234567891"), ("1,2", "12"), ("12,34", "1234"),
    ("10 g", "10 kg"), ("6 AM", "6 PM"), ("2xy", "2"), ("5kg", "5 g"), ("10 million", "10"), ("50%", "5"), ("0.5%", "0.5 million"), ("1 1/2", "1"), ("1/0", "0"), ("-5", "5"), ("1e999", "1e998"),
    ("paris", "Paris"), ("yes", "no"), ("nan", "0"), ("inf", "1"), ("Infinity", "1"), ("", "42"), (None, "42"), ("3 4", "34"),
]  # fmt: skip


@pytest.mark.parametrize(("got", "reference"), SAME)
def test_the_same_by_text(got, reference):
    assert same_by_text(got, reference)
    assert same_by_text(reference, got)


@pytest.mark.parametrize(("got", "reference"), NOT_SAME)
def test_not_the_same(got, reference):
    assert not same_answer(got, reference)
    assert not same_answer(reference, got or "")


# What math-verify calls equal, or could: no mathematics.
PROSE = [
    ("yes", "sey"), ("step 1", "pets 1"), ("4 3 2 1", "1 2 3 4"), ("1 2 3 4", "10"), ("1 -2 -3", "-2 1 -3"), ("2024-01-05", "2024-05-01"), ("2024-01-05", "2018"), ("10-15", "20-25"),
    ("1/2/2024", "1/4/1012"), ("abc12", "cba12"), ("3 apples and 4 pears", "4"), ("the answer is 3", "3"), ("the answer is not 3", "3"), ("11:30 AM", "23/60"),
    ("1.2.3", "1.2.30"), ("A-B", "odd"), (r"\text{step } 1", r"\text{pets } 1"), ("3" * 1_001 + "x", "x" + "3" * 1_001), ("5 or 6", "30"),
]  # fmt: skip


@pytest.mark.parametrize(("got", "reference"), PROSE)
def test_words_dates_and_rows_of_numbers_are_no_mathematics(got, reference):
    assert not same_by_text(got, reference)
    assert not same_in_process(got, reference)
    assert not same_in_process(reference, got)


@pytest.mark.parametrize(
    ("got", "reference", "read"),
    [
        ("x+1", "1+x", ("x+1", "1+x")),
        ("$x + 1$.", r"\(1+x\)", ("x + 1", "1+x")),
        (r"5\sqrt{2}\text{ cm}", r"5\sqrt{2}", (r"5\sqrt{2}", r"5\sqrt{2}")),
        (r"5\sqrt{2} meters", r"5\sqrt{2} meters", (r"5\sqrt{2}", r"5\sqrt{2}")),
        (r"5\sqrt{2}\text{ cm}", r"5\sqrt{2}\text{ m}", None),
        (r"5\sqrt{2} million", r"5\sqrt{2}", None),
        ("1 1/2+x", "1.5", (r"1\frac{1}{2}+x", "1.5")),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "1", (r"\begin{pmatrix}1\\2\end{pmatrix}", "1")),
        (r"\log_2 8", "3", (r"\log_2 8", "3")),
        ("x^2 -3x", "2x", ("x^2 -3x", "2x")),
        ("p - q", "word", None),
        ("p - q", "q - p", ("p - q", "q - p")),
    ],
)
def test_what_is_read_as_mathematics(got, reference, read):
    assert as_expressions(got, reference) == read


CHEAP = [
    ("x+1", "1+x"),
    ("(1,2)", "(1, 2)"),
    (r"\sqrt{4}", "2"),
    ("10^3", "1000"),
    (r"\frac{1}{3}", "0.333333"),
    ("x=5", "5"),
    ("p-q", "-q+p"),
]


@pytest.mark.parametrize(("got", "reference"), CHEAP)
def test_expressions_by_value_where_math_verify_is_installed(got, reference):
    pytest.importorskip("math_verify")
    assert same_by_text(got, reference) is None
    assert same_in_process(got, reference)
    assert not same_in_process(got, "17")


def test_what_was_asked_for_is_the_measure():
    """An interval answers an inequality; math-verify takes no inequality for an interval."""
    pytest.importorskip("math_verify")
    assert same_in_process("(1,2)", "1<x<2")
    assert not same_in_process("1<x<2", "(1,2)")


@pytest.mark.parametrize(("got", "reference"), CHEAP)
def test_without_it_they_are_not(got, reference, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert not same_in_process(got, reference)


DEAR = [
    "9^{9^{9^{9}}}", "9**9**9**9", "9^9^9", "10^{1000000000}", "((9^{99})^{99})^{99}", "99999999999!",
    r"\sum_{i=1}^{10^9} i",
    r"\int_0^1 \sin(x^x^x) dx", "factorial(99999999)", "9^(9^(9^9))", "2^{" * 60,
    "(" * 200, r"\frac{" * 30, "1e999999999+1",
    "{" * 100_000, "9" * 5_000 + "+1", r"\sqrt{9^{999}+1}", "9" * 100_000, "1,234" * 20_000, "5 " * 40_000, "1/" * 40_000, "$" * 80_000, "**" * 40_000, "~" * 80_000, "\\(" * 20_000 + "\\)" * 20_000,
]  # fmt: skip


@pytest.mark.parametrize("reply", DEAR)
def test_no_reply_can_stop_the_run(reply):
    began = time.process_time()
    for pair in ((reply, "12"), ("12", reply)):
        assert not same_by_text(*pair)
        assert not same_in_process(*pair)
    assert time.process_time() - began < 5
