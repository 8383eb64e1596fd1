"""The matrix of chat templates and conversations: every mask is right or the row is refused, and what was
trained still is.

The independent masks are tested too: by hand-written expectations, and by a renderer whose masks are off.
"""

import dataclasses
import json

import pytest

from repsft_fast.data import spans
from repsft_fast.data.template import ChatTemplate
from tests.data import template_matrix
from tests.data.template_matrix import FEW, KINDS, LONG, RESULTS, recorded, run, summary, table, template_of
from tests.helpers import independent_masks
from tests.helpers.chat_tokenizers import BLOCKS, CHATML, LLAMA3, QWEN3, SPECIALS
from tests.helpers.independent_masks import Template, judge, masks, shown
from tests.helpers.marked_chats import Case, answer, quoted, said, with_quotes

TEMPLATES = table()
THINKING = ("<think>", "</think>")
OWN = {
    "chatml": Template("chatml", CHATML, None, "<|im_end|>", SPECIALS, THINKING),
    "blocks": Template("blocks", BLOCKS, None, "<|im_end|>", SPECIALS, THINKING),
    "llama3": Template("llama3", LLAMA3, "<|begin|>", "<|eot_id|>", SPECIALS, THINKING),
    "qwen3": Template("qwen3", QWEN3, None, "<|im_end|>", SPECIALS, THINKING),
}
USER, ANSWER = said("user"), answer()


def results(verdicts):
    """Fails at a wrong mask, with all that is needed to see it."""
    wrong = {
        kind: dataclasses.asdict(verdict) for kind, verdict in verdicts.items() if verdict.outcome == "WRONG"
    }
    assert not wrong, json.dumps(wrong, ensure_ascii=False, indent=1)
    return summary(verdicts)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_trains_what_it_should_or_refuses(name):
    got = results(run(template_of(TEMPLATES[name]), {kind: KINDS[kind] for kind in FEW}))
    kept = recorded()[name]["short"]
    for outcome in ("refused", "dropped"):
        assert got[outcome] == [kind for kind in kept[outcome] if kind in FEW], outcome


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_with_every_kind_of_conversation(name):
    """Last run whole: 2026-11-28."""
    assert results(run(template_of(TEMPLATES[name]))) == recorded()[name]["short"]


@pytest.mark.parametrize(
    "name", ["qwen_2_5", "llama_3_1", "mistral_small_3", "phi_3", "granite_4_0", "qwen_3_training"]
)
def test_a_long_chat_is_trained_as_a_short_one(name):
    assert len(LONG.asked()) > spans.MANY_TURNS
    verdict = judge(template_of(TEMPLATES[name]), LONG)
    assert verdict.outcome == "trained", verdict


def test_the_table_and_the_results_name_the_same_templates():
    assert len(TEMPLATES) >= 40
    assert set(recorded()) == set(TEMPLATES)
    assert {path.stem for path in template_matrix.TEMPLATES.glob("*.jinja")} == set(TEMPLATES)
    for name, result in recorded().items():
        for which in ("short", "original"):
            counts = result[which]
            if counts is not None:
                assert counts["trained"] + len(counts["refused"]) + len(counts["dropped"]) == len(KINDS), name
                assert "WRONG" not in counts, name
    assert RESULTS.read_text(encoding="utf-8").count("\n") == len(TEMPLATES) + 2  # a line each


@pytest.mark.parametrize(
    ("template", "case", "expected"),
    [
        ("chatml", Case((USER, ANSWER, USER, ANSWER)), ["A1<|im_end|>", "A3<|im_end|>"]),
        ("chatml", Case((USER, ANSWER, USER, ANSWER), trainable=(1,)), ["A1<|im_end|>"]),
        ("chatml", Case((USER, ANSWER, USER, ANSWER), train_on="last"), ["A3<|im_end|>"]),
        ("blocks", Case((USER, ANSWER, USER, ANSWER)), ["A1<|im_end|>", "A3<|im_end|>"]),
        ("llama3", Case((USER, answer(lead="\n", trail=" "))), ["A1<|eot_id|>"]),
        ("qwen3", Case((USER, answer(reasoning="field"))), ["<think>\nR1\n</think>\n\nA1<|im_end|>"]),
    ],
)
def test_the_independent_masks_say_what_a_person_says(template, case, expected):
    found = masks(OWN[template], case, len(case.makers))
    texts = [found.text[span.starts[0] : span.ends[0]] for span in found.spans]
    for turn in (1, 3):
        for letter, short, body in (("c", "A", " some words "), ("r", "R", " first\nthen ")):
            whole = f"zq{turn:03}{letter}00z{body}zq{turn:03}{letter}01z"
            texts = [text.replace(whole, f"{short}{turn}") for text in texts]
    assert texts == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OWN)
def test_every_kind_under_plain_templates_is_right_or_refused(name, kind):
    verdict = judge(OWN[name], KINDS[kind])
    assert verdict.outcome != "WRONG", verdict
    if name == "chatml":
        lost = "call" in kind or "argument" in kind or "null" in kind or kind in REASONED
        expected = (
            "refused" if lost else "dropped" if kind in ("only an empty answer", "none marked") else "trained"
        )
        assert verdict.outcome == ("trained" if kind == "tools, no call" else expected), verdict


REASONED = [
    kind for kind, case in KINDS.items() if any("reasoning_content" in message for message in case.messages)
]


def _off(change):
    """A renderer whose trained flags are changed; change(pieces) → pieces."""

    class Off(ChatTemplate):
        def __call__(self, conversation, where):
            rendered = super().__call__(conversation, where)
            return rendered and dataclasses.replace(rendered, pieces=tuple(change(list(rendered.pieces))))

    return Off


def _flip(number, trained):
    return lambda pieces: [
        *pieces[:number],
        dataclasses.replace(pieces[number], trained=trained),
        *pieces[number + 1 :],
    ]


def _shift_start(pieces):
    first, second = pieces[0], pieces[1]
    return [
        dataclasses.replace(first, text=first.text[:-1]),
        dataclasses.replace(second, text=first.text[-1] + second.text),
        *pieces[2:],
    ]


def _longer_end(pieces):
    trained = pieces[1]
    return [
        pieces[0],
        dataclasses.replace(trained, text=trained.text + pieces[2].text[:1]),
        dataclasses.replace(pieces[2], text=pieces[2].text[1:]),
        *pieces[3:],
    ]


@pytest.mark.parametrize(
    "change",
    [
        _flip(0, True),
        _flip(1, False),
        _flip(2, True),
        _shift_start,
        _longer_end,
        lambda pieces: pieces[:2],
        lambda pieces: pieces[1:],
    ],
    ids=[
        "prompt trained",
        "turn lost",
        "opener trained",
        "a character early",
        "a character late",
        "second turn gone",
        "no prompt",
    ],
)
def test_masks_that_are_off_are_seen(change, monkeypatch):
    case = Case((USER, ANSWER, USER, ANSWER))
    assert judge(OWN["chatml"], case).outcome == "trained"
    independent_masks._ours.cache_clear()
    monkeypatch.setattr(independent_masks, "ChatTemplate", _off(change))
    assert judge(OWN["chatml"], case).outcome == "WRONG"
    independent_masks._ours.cache_clear()


def test_ids_of_quoted_special_tokens_are_spelled_and_compared(monkeypatch):
    case = Case((said("user", quoted(1)), answer(f" {quoted(0)} ")))
    assert judge(OWN["chatml"], case).outcome == "trained"
    independent_masks._ours.cache_clear()
    monkeypatch.setattr(
        independent_masks,
        "ChatTemplate",
        _off(lambda pieces: [dataclasses.replace(piece, raw=False) for piece in pieces]),
    )
    verdict = judge(OWN["chatml"], case)
    assert (verdict.outcome, verdict.reason) == ("WRONG", "the characters are right, the ids are not")
    independent_masks._ours.cache_clear()
    assert with_quotes(case.messages, ["<a>", "<b>"])[0]["content"] == "zq000c00z<b>zq000c01z"


def test_what_the_template_loses_is_never_trained(monkeypatch):
    """A renderer that refuses nothing is seen: the text of a tool call that the template does not write."""
    monkeypatch.setattr(spans, "check_turn", lambda *arguments: None)
    verdict = judge(OWN["chatml"], KINDS["call beside content"])
    assert verdict.outcome == "WRONG"
    assert "lost" in verdict.reason


def test_the_command_prints_a_line_a_template_and_fails_at_a_wrong_mask(capsys, monkeypatch, tmp_path):
    name = next(iter(TEMPLATES))
    monkeypatch.setattr(template_matrix, "KINDS", {"one": KINDS["one"]})
    monkeypatch.setattr(template_matrix, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(template_matrix, "run", lambda template: run(template, {"one": KINDS["one"]}))
    assert template_matrix.main([name, "--write"]) == 0
    assert capsys.readouterr().out.startswith(name)
    assert list(json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))) == [name]
    monkeypatch.setattr(
        template_matrix,
        "run",
        lambda template: {"one": independent_masks.Verdict("WRONG", "other characters are trained")},
    )
    assert template_matrix.main([name]) == 1
    assert "WRONG: other characters" in capsys.readouterr().out


def test_shown_marks_what_is_trained():
    assert shown("abcd", [False, True, True, False]) == "a⟦bc⟧d"
