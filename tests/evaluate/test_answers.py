"""From a reply to its verdict: what each extractor takes out of adversarial replies, and whether it is right."""

import pytest

from repsft_fast.evaluate.answers import EXTRACTORS, answer_in, find_extractor, same_answer
from repsft_fast.evaluate.choices import choice
from repsft_fast.evaluate.extraction import last_number, whole

NO, YES, NONE = False, True, None
# extractor, reply, what is taken out, the reference, right?; of expressions only those that are compared without
# math-verify too
REPLIES = [
    ("number", "3 and 4 are 7 in all.", "7", "7", YES),
    ("number", r"\boxed{7}, which is 3 + 4", "7", "7", YES),
    ("number", "none at all", NONE, "7", NO),
    ("boxed", r"So $x = \boxed{42}$.", "42", "42", YES),
    ("boxed", r"\boxed{41}? No: \boxed{42}", "42", "42", YES),
    ("boxed", r"\boxed{42}? No: \boxed{41}", "41", "42", NO),
    ("boxed", "It is 42.", NONE, "42", NO),
    ("boxed", "", NONE, "42", NO),
    ("boxed", r"\boxed{}", NONE, "42", NO),
    ("boxed", r"\boxed{ }", NONE, "42", NO),
    ("boxed", r"\boxed{42", NONE, "42", NO),
    ("boxed", r"\boxed{42} is wrong, it is \boxed{4", NONE, "42", NO),
    ("boxed", r"\boxed{\boxed{42}}", "42", "42", YES),
    ("boxed", r"\boxed{\text{42}}", r"\text{42}", "42", YES),
    ("boxed", r"\boxed{42.}", "42.", "42", YES),
    ("boxed", r"\boxed{042}", "042", "42", YES),
    ("boxed", r"\boxed{$42$}", "$42$", "42", YES),
    ("boxed", r"\boxed{42\text{ apples}}", r"42\text{ apples}", "42", YES),
    ("boxed", r"\boxed{42\text{ g}}", r"42\text{ g}", "42 kg", NO),
    ("boxed", r"\boxed{42, 43}", "42, 43", "42", NO),
    ("boxed", r"\boxed{4,2}", "4,2", "42", NO),
    ("boxed", r"\boxed{1{,}042}", "1{,}042", "1042", YES),
    ("boxed", r"\boxed{-\frac{1}{2}}", r"-\frac{1}{2}", "-0.5", YES),
    ("boxed", r"\boxed{\{1, 2\}}", r"\{1, 2\}", r"\{1, 2\}", YES),
    ("boxed", r"\boxed 42", "42", "42", YES),
    ("boxed", r"\fbox{42}", "42", "42", YES),
    ("boxed", r"<think>\boxed{41}</think>\boxed{42}", "42", "42", YES),
    ("boxed", r"<think>\boxed{42}, let me check", "42", "42", YES),
    ("boxed", r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", "Evelyn", YES),
    ("boxed", r"\boxed{\text{yes}}", r"\text{yes}", "sey", NO),
    ("boxed", r"\boxed{50\%}", r"50\%", "50", YES),
    ("boxed", r"\boxed{42}" + "\n\nThe answer is 41.", "42", "42", YES),
    ("boxed", r"\boxed{nan}", "nan", "42", NO),
    ("boxed", r"\boxed{1e1000000000}", "1e1000000000", "42", NO),
    ("boxed", r"\boxed{" + "{" * 5_000, NONE, "42", NO),
    ("boxed", "\\boxed{42\u200b}", "42\u200b", "42", NO),
    ("boxed", "\\boxed{４２}", "４２", "42", YES),
    ("hashes", "6*7=42\n#### 42", "42", "42", YES),
    ("hashes", "#### 41\nno\n#### 42", "42", "42", YES),
    ("hashes", "#### $42", "$42", "42", YES),
    ("hashes", "#### 42 dollars.", "42 dollars.", "42", YES),
    ("hashes", "#### 1,042", "1,042", "1042", YES),
    ("hashes", "#### 42.00", "42.00", "42", YES),
    ("hashes", "####42", "42", "42", YES),
    ("hashes", "### 42", NONE, "42", NO),
    ("hashes", "####\n42", NONE, "42", NO),
    ("hashes", "<think>#### 42", NONE, "42", NO),
    ("hashes", "#### -42", "-42", "42", NO),
    ("last_number", "It costs $1,042.", "1,042", "1042", YES),
    ("last_number", "It is 42, not 41", "41", "42", NO),
    ("last_number", "x = −42", "−42", "-42", YES),
    ("last_number", "50 - 8 = 42", "42", "42", YES),
    ("last_number", "from 40-42", "42", "42", YES),
    ("last_number", "three quarters, 3/4", "3/4", "0.75", YES),
    ("last_number", "that is 42%", "42%", "0.42", YES),
    ("last_number", "<think>42</think>I do not know", NONE, "42", NO),
    ("last_number", "<think>maybe 42", NONE, "42", NO),
    ("last_number", "forty-two", NONE, "42", NO),
    ("last_number", "4.2e1", "4.2e1", "42", YES),
    ("choice", "The answer is (B).", "B", "B", YES),
    ("choice", r"\boxed{\text{B}}", "B", "B", YES),
    ("choice", "A nice question. I say C", "C", "A", NO),
    ("choice", "A or B", NONE, "A", NO),
    ("choice", "The answer is E", NONE, "E", NO),
    ("choice", "<think>(B)", NONE, "B", NO),
    ("whole", " 42\n", "42", "42", YES),
    ("whole", "<think>hm</think>\n42", "42", "42", YES),
    ("whole", "The answer is 42", "The answer is 42", "42", NO),
    ("whole", "4 2", "4 2", "42", NO),
    ("whole", "3 2 1", "3 2 1", "1 2 3", NO),
    ("whole", "2024-01-05", "2024-01-05", "2024-05-01", NO),
    ("final", r"#### 41 \boxed{42}", "42", "42", YES),
    ("final", "so\n#### 42", "42", "42", YES),
    ("final", "42", "42", "42", YES),
    ("final", r"<think>\boxed{41}</think>42", "42", "42", YES),
    ("final", r"<think>\boxed{41}</think>" + "\n#### 42", "42", "42", YES),
    ("final", "<think>42", NONE, "42", NO),
]  # fmt: skip


@pytest.mark.parametrize(("extractor", "reply", "taken", "reference", "right"), REPLIES)
def test_of_a_reply_to_its_verdict(extractor, reply, taken, reference, right):
    answer = answer_in(find_extractor(extractor), reply, choices=4)
    assert answer == taken
    assert same_answer(answer, reference) is right


def test_there_are_enough_of_them_for_every_extractor():
    assert len(REPLIES) >= 60
    assert {row[0] for row in REPLIES} == set(EXTRACTORS)


def test_a_reply_may_begin_inside_a_thought():
    assert answer_in(last_number, "so 42", prompt="<user>6*7?<model>") == "42"
    assert answer_in(last_number, "so 42", prompt="<user>6*7?<model><think>\n") is None
    assert answer_in(last_number, "so 42</think>43", prompt="<user>6*7?<model><think>\n") == "43"
    assert answer_in(last_number, "so 42", prompt="Write <think> first.\n") == "42"


def test_choices_are_those_of_the_problem():
    assert answer_in(choice, "Answer: E") == "E"
    assert answer_in(choice, "Answer: E", choices=5) == "E"
    assert answer_in(choice, "Answer: E", choices=4) is None
    assert answer_in(whole, "Answer: E", choices=4) == "Answer: E"


def test_expressions_are_the_same_in_value():
    pytest.importorskip("math_verify")
    assert same_answer(r"2\sqrt{2}", r"\sqrt{8}")
    assert not same_answer(r"2\sqrt{2}", r"\sqrt{2}")
    assert not same_answer("9^{9^{9^9}}", "7")
