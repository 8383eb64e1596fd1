"""The letter that a reply names: the clearest mention counts, and where none is clear there is no answer."""

import time

import pytest

from repsft_fast.evaluate.choices import choice

CASES = [
    # a box
    (r"\boxed{B}", "B"), (r"\boxed{b}", "B"), (r"\boxed{(C)}", "C"), (r"\boxed{\text{B}}", "B"), (r"\boxed{\textbf{(D)}}", "D"),
    (r"\boxed{C. Vitamin D}", "C"), (r"\boxed{\text{(A) } 5}", "A"), (r"\boxed{Option B}", "B"), (r"\boxed{A, C}", None),
    (r"\boxed{A} or rather \boxed{D}", "D"), (r"The answer is A. \boxed{B}", "B"), (r"The answer is (A), \boxed{42}", "A"), (r"\boxed{E}", None),
    # said to be the answer, the last time
    ("The answer is (B)", "B"), ("Answer: B", "B"), ("ANSWER: C", "C"), ("**Answer:** B", "B"), ("**Answer: B**", "B"), ("Answer:\nB", "B"),
    ("The correct option is **D**.", "D"), ("the answer would be D", "D"), ("Answer - C", "C"), ("The correct answer: C) 12", "C"),
    ("answer is (b)", "B"), ("So the answer is **C. Paris**", "C"), ("Answer: option D", "D"), ("The best choice is option C", "C"),
    ("D is the correct answer", "D"), ("(C) is correct", "C"), ("I choose (C).", "C"), ("#### C", "C"), ("Answer: \\text{A}", "A"),
    ("The answer is A. No, the answer is C", "C"), ("Answer is C, not B", "C"), ("Option A is wrong. Option B is too. The correct answer is C.", "C"),
    ("A. foo\nB. bar\nC. baz\nAnswer: B", "B"), ("The answer is $C$", "C"),
    # a line
    ("B", "B"), ("B.", "B"), ("**B**", "B"), ("(B)", "B"), ("B. Paris", "B"), ("(B) Paris", "B"), ("B) Paris", "B"), ("well\nC\n", "C"),
    ("A. foo\nB. bar", None), ("B. bar\nso B.", "B"),
    # marked, alone
    ("it must be (B) then", "B"), ("(A) is wrong so (B)", None), ("I take **C** here", "C"), ("It is B", "B"), ("I think it is B", "B"),
    ("I would go with B because A is wrong", None), ("Mr. B and Mrs. D", None), ("not B", None), ("The answer is not (B)", None), ("The answer is not B", None),
    # the article and the pronoun
    ("A dog is an animal. It is C", "C"), ("A dog", None), ("I think so", None), ("A", "A"), ("The answer is A", "A"), ("The answer is A because it is", "A"),
    ("Answer: A dog has four legs", None), ("The answer is I think B", "B"), ("A cat and (B)", "B"), ("C is cheap, yet I go with **B** here", "B"),
    # no one letter, or one that is no choice
    ("The answer is B or C", None), ("The answer is both A and B", None), ("Answer: A, B", None), ("The answer is (E)", None), ("Answer: X", None),
    ("B is possible. The answer is (E)", None), ("Answer: AB", None), ("Answer: Because", None), ("Answer: don't know", None), ("", None), ("42", None),
    # thoughts
    ("<think>The answer is A</think>The answer is B", "B"), ("<think>The answer is A", None), ("<think>The answer is A</think>", None),
    (r"<think>\boxed{A}", "A"), ("The answer is A</think> So: C", "C"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "letter"), CASES)
def test_the_letter_of_four(text, letter):
    assert choice(text, 4) == letter


def test_only_letters_there_are():
    assert choice("The answer is E", 5) == "E"
    assert choice("The answer is I", 10) == "I"
    assert choice("Answer: J") == "J"
    assert choice("Answer: J", 9) is None
    assert choice("Answer: K") is None
    assert choice("I") == "I"


@pytest.mark.parametrize(
    "text",
    [
        "A " * 40_000,
        "(" * 80_000,
        "answer is " * 10_000,
        "* " * 40_000,
        "answer: " + " " * 20_000,
        "answer:" + "*(" * 20_000,
    ],
)
def test_long_replies_take_little_time(text):
    began = time.process_time()
    choice(text)
    assert time.process_time() - began < 2
