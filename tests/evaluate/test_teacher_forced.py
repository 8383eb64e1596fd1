"""Greedy exact match by one forward pass is greedy exact match by generation: token for token up to the first
end token.

A tiny model in fp32, trained until it knows about half of its samples by heart, so that both outcomes occur
often.
"""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from repsft_fast.config import Config
from repsft_fast.data.row_lengths import RowLengths
from repsft_fast.errors import ConfigError, DataError
from repsft_fast.evaluate.answered import Answered
from repsft_fast.evaluate.answers import find_extractor
from repsft_fast.evaluate.generate import generate
from repsft_fast.training.build import build
from repsft_fast.training.step import train_step
from tests.helpers import runs

END, SAMPLES = 2, 160


class Letters:
    """A tokenizer for the eye: every id is a letter, the end token and the special ones are nothing."""

    eos_token_id, pad_token_id = END, 0

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(0x4E00 + i) for i in ids if i > END)


@pytest.fixture(scope="module")
def half_known(tmp_path_factory):
    """(parts, exact match of every sample) of a model that has memorised about half."""
    folder = tmp_path_factory.mktemp("half")
    draw = random.Random(3)
    lines = []
    for number in range(SAMPLES):
        prompt = [1, *(draw.randrange(3, runs.VOCABULARY) for _ in range(draw.randint(3, 8)))]
        reply = [*(draw.randrange(3, runs.VOCABULARY) for _ in range(draw.randint(0, 4))), END]
        lines.append(
            {"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply, "task": f"t{number % 2}"}
        )
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    parts = build(
        Config.of(
            runs.settings(
                folder, tasks=2, batch__samples=16, batch__row_tokens=256, budget__epochs=60, optim__lr=1e-2
            )
        )
    )
    scorer = parts.scorer(parts.data.train)
    for epoch in range(60):
        for update in parts.plan.epoch(0, epoch):
            train_step(parts, update)
            parts.step_done(update, 10)
        parts.ledger.read()
        known = scorer(parts.model).items("exact_match")
        if known.mean() > 0.55:
            break
    assert 0.3 < known.mean() < 0.75, "the test needs both outcomes"
    lengths = np.array([len(parts.data.train.last_reply(i)[1]) for i in range(SAMPLES)])
    assert known[lengths > 3].sum() > 5, "and long replies known by heart"
    assert (1 - known[lengths > 3]).sum() > 5
    return parts, known


def test_every_sample_is_judged_as_generation_judges_it(half_known):
    parts, known = half_known
    store = parts.data.train
    pairs = [store.last_reply(i) for i in range(SAMPLES)]
    replies = generate(parts.model, [p for p, _ in pairs], end_ids=[END], max_new_tokens=12)
    same = np.array(
        [float(reply.ids == reference) for reply, (_, reference) in zip(replies, pairs, strict=True)]
    )
    assert (same == known).all()
    assert min(same.sum(), (1 - same).sum()) > SAMPLES / 4
    assert all(reply.finished for reply, right in zip(replies, known, strict=True) if right)


@pytest.mark.parametrize("row_tokens", [13, 40, 512])
@pytest.mark.parametrize("to", [None, RowLengths((13,), 1, 13), RowLengths((13, 20, 512), 40, 13)], ids=str)
def test_however_the_rows_are_packed(half_known, row_tokens, to):
    from repsft_fast.evaluate.teacher_forced import TeacherForced

    parts, known = half_known
    scorer = TeacherForced(
        parts.data.train, range(SAMPLES), row_tokens=row_tokens, bucket_tokens=1, world=parts.world, to=to
    )
    if to is not None:
        assert {row.padded_tokens for row in scorer._rows} <= set(to.lengths)
        assert len({(row.segments, row.max_seqlen) for row in scorer._rows}) <= len(to.lengths)
    assert (scorer(parts.model).items("exact_match") == known).all()


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_answers_by_generation_agree_where_the_whole_reply_is_the_answer(half_known, batch_size):
    """Every letter is a token here, so the same text is the same tokens: `answer` must find what
    `exact_match` found."""
    parts, known = half_known
    # an empty reply holds no answer
    spoken = [i for i in range(SAMPLES) if len(parts.data.train.last_reply(i)[1]) > 1]
    asked = Answered(
        parts.data.train, spoken, Letters(), extractor="whole", max_new_tokens=12, batch_size=batch_size
    )
    found = asked(parts.model)
    assert asked.end_ids == [END]
    assert (found.right == known[spoken]).all()
    assert 0 < found.right.mean() < 1
    assert found.generated >= sum(len(parts.data.train.last_reply(i)[1]) for i in spoken if known[i])
    assert found.tokens == found.generated + sum(len(p) for p in asked.prompts)


def test_a_reply_that_is_right_and_then_goes_on_is_wrong(half_known):
    """Without its end token a reply is not finished: the limit below cuts every reply one token short."""
    parts, known = half_known
    pairs = [parts.data.train.last_reply(i) for i in range(SAMPLES)]
    for length in range(1, 5):
        chosen = [
            pair for pair, right in zip(pairs, known, strict=True) if right and len(pair[1]) == length + 1
        ]
        if not chosen:
            continue
        replies = generate(parts.model, [p for p, _ in chosen], end_ids=[END], max_new_tokens=length)
        assert not any(reply.finished for reply in replies)
        assert [reply.ids for reply in replies] == [reference[:-1] for _, reference in chosen]


def test_the_last_reply_of_a_conversation_is_the_one_asked_for(tmp_path):
    ids, trained = [1, 5, 6, 7, 8, 9, 10, 2], [0, 0, 1, 1, 0, 0, 1, 1]
    row = {"input_ids": ids, "labels": [i if t else -100 for i, t in zip(ids, trained, strict=True)]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    parts = build(Config.of(runs.settings(tmp_path)))
    assert parts.data.train.last_reply(0) == ([1, 5, 6, 7, 8, 9], [10, 2])


def test_extractors_by_name_by_function_and_unknown(half_known):
    assert find_extractor("boxed")(r"\boxed{3}") == "3"
    assert find_extractor("tests.evaluate.test_teacher_forced:shout", trusted=True)("a") == "A"
    with pytest.raises(ConfigError, match="did you mean hashes"):
        find_extractor("hashs")
    parts, _ = half_known
    with pytest.raises(DataError, match="holds no answer for"):
        Answered(parts.data.train, range(4), Letters(), extractor="boxed")


def shout(text):
    return text.upper()
