"""Random conversations × chat templates of different families: every mask is the independent one, or the row
is refused.

    python -m tests.hostile.test_chat_fuzz --conversations 10000 [--seed 1] [NAME …]

does without pytest what `-m slow` does, and prints how many were trained, refused and dropped.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter

import pytest

from tests.data.template_matrix import table, template_of
from tests.helpers.independent_masks import judge
from tests.helpers.marked_chats import Case, Maker, answer, quoted, result, said, shared

FAMILIES = (
    "llama_2", "llama_3_1", "qwen_2_5", "qwen_3", "qwen_3_training", "mistral_nemo", "gemma_3", "phi_3",
    "deepseek_v3_1", "gpt_oss_training", "glm_4_5_training", "granite_4_0",
)  # fmt: skip
FEW, WHOLE = 150, 10_000

BODIES = (
    " some words ", " ", "\n", "\n\n two\n lines \n", " \t ", " für 你好 \U0001f600 ", " {'a': \"b\"} ", 
    " \\n {{ x }} {% if %} ",
    " <b>&amp;</b> ", " e\u0301\u200d\u202e ", " </s ", " 1234567890 ", " ```\ncode\n``` ",
)  # fmt: skip
SPACES = ("", "", "", " ", "\n", "\n\n", " \n ", "\t")


def body(draw: random.Random) -> str:
    text = draw.choice(BODIES)
    return f"{text}{quoted(draw.randrange(40))}{draw.choice(BODIES)}" if draw.random() < 0.15 else text


def arguments(draw: random.Random, depth: int = 0) -> dict[str, object]:
    """Of a call: at least one text, by which its place is found."""
    kinds = [
        lambda: draw.choice(BODIES), lambda: draw.randrange(10_000, 99_999), lambda: draw.choice([True, False, None]),
        lambda: draw.randrange(10_000, 99_999) + 0.5, lambda: [draw.choice(BODIES), draw.randrange(10_000, 99_999)],
        lambda: arguments(draw, depth + 1) if depth < 3 else "",
    ]  # fmt: skip
    values = [draw.choice(kinds)() for _ in range(draw.randint(0, 2))]
    return {shared("k", number): value for number, value in enumerate(["", *values])}


def answered(draw: random.Random, calls: int) -> Maker:
    """An assistant's turn with so many calls."""
    return answer(
        body(draw),
        draw.choice(SPACES),
        draw.choice(SPACES),
        empty=draw.random() < (0.5 if calls else 0.05),
        reasoning=draw.choice((None, None, None, "field", "think")),
        calls=tuple(arguments(draw) for _ in range(calls)),
    )


def orderly(draw: random.Random, length: int) -> list[Maker]:
    """As real chats go: system, then user and assistant in turn, calls followed by their results."""
    chat: list[Maker] = [said("system", body(draw))] if draw.random() < 0.3 else []
    while len(chat) < length:
        chat.append(said("user", body(draw), draw.choice(SPACES), draw.choice(SPACES)))
        calls = draw.choice((0, 0, 0, 1, 2))
        while calls and len(chat) < length:
            chat.append(answered(draw, calls))
            chat += [result(number, number) for number in range(calls)]
            calls = draw.choice((0, 0, 1))
        if draw.random() < 0.95:
            chat.append(answered(draw, 0))
    return chat


def disorderly(draw: random.Random, length: int) -> list[Maker]:
    """Any roles in any order."""
    roles = ("user", "user", "assistant", "assistant", "system", "tool")
    chat: list[Maker] = []
    for role in draw.choices(roles, k=length):
        if role == "assistant":
            chat.append(answered(draw, draw.choice((0, 0, 1))))
        else:
            chat.append(
                result()
                if role == "tool"
                else said(role, body(draw), draw.choice(SPACES), draw.choice(SPACES))
            )
    return chat


def conversation(seed: int) -> Case:
    draw = random.Random(seed)
    length = draw.randint(1, 12)
    chat = orderly(draw, length) if draw.random() < 0.7 else disorderly(draw, length)
    marks = (
        tuple(number for number in range(len(chat)) if draw.random() < 0.5) if draw.random() < 0.2 else None
    )
    return Case(tuple(chat), draw.choice((0, 0, 1, 3)), marks, draw.choice(("all", "all", "all", "last")))


def run(name: str, conversations: int, seed: int) -> tuple[Counter[str], list[str]]:
    """(how often each outcome came, what was wrong)."""
    template = template_of(table()[name])
    outcomes, wrong = Counter[str](), []
    for number in range(conversations):
        verdict = judge(template, conversation(seed * 1_000_000 + number))
        outcomes[verdict.outcome] += 1
        if verdict.outcome == "WRONG":
            given = json.dumps(verdict.conversation, ensure_ascii=False)
            place = f"{name}, conversation {seed * 1_000_000 + number}: {verdict.reason}"
            wrong.append(
                f"{place}\ngiven    {given}\nexpected {verdict.expected!r}\ngot      {verdict.got!r}"
            )
    return outcomes, wrong


@pytest.mark.parametrize("name", FAMILIES)
def test_random_conversations_train_what_they_should_or_are_refused(name):
    outcomes, wrong = run(name, FEW, seed=1)
    assert not wrong, "\n\n".join(wrong[:3])
    assert outcomes["trained"] >= FEW // 20, outcomes  # a fuzz that is refused everywhere tests nothing


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", FAMILIES)
def test_ten_thousand_random_conversations(name):
    outcomes, wrong = run(name, WHOLE, seed=2)
    assert not wrong, "\n\n".join(wrong[:3])
    assert outcomes["trained"] >= WHOLE // 20, outcomes


def test_a_conversation_is_the_same_for_its_seed_and_they_hold_every_kind_of_turn():
    assert [conversation(number).messages for number in range(20)] == [
        conversation(number).messages for number in range(20)
    ]
    cases = [conversation(number) for number in range(FEW)]
    messages = [message for case in cases for message in case.messages]
    assert {message["role"] for message in messages} == {"system", "user", "assistant", "tool"}
    assert any(message.get("reasoning_content") for message in messages)
    assert any("<think>" in message["content"] for message in messages)
    assert any(len(message.get("tool_calls", ())) == 2 for message in messages)
    assert {case.train_on for case in cases} == {"all", "last"}
    assert {len(case.messages) for case in cases} >= set(range(1, 13))


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="test_chat_fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=FAMILIES, help="templates")
    parser.add_argument("--conversations", type=int, default=WHOLE)
    parser.add_argument("--seed", type=int, default=2)
    options = parser.parse_args(given)
    failed = 0
    for name in options.names:
        start = time.perf_counter()
        outcomes, wrong = run(name, options.conversations, options.seed)
        failed += len(wrong)
        print(f"{name:24} {dict(outcomes)} in {time.perf_counter() - start:.0f} s", flush=True)
        print("\n\n".join(wrong[:3]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
