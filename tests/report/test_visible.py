"""What cannot be seen is spelled, what can be is left alone."""

import json

import pytest

from repsft_fast.report import mixture_picture, picture
from repsft_fast.report.visible import columns, one_line, padded, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain [b]text[/b] :smile:", "plain [b]text[/b] :smile:"),
        ("é 日本語 🙂 ½ e\u0301", "é 日本語 🙂 ½ e\u0301"),
        ("a\tb\nc", "a⇥b⏎\nc"),
        ("\x1b[31m\x07\x08\x00\r\x7f", "\\x1b[31m\\x07\\x08\\x00\\x0d\\x7f"),
        ("\x9b31m\x85", "\\x9b31m\\x85"),  # C1: a terminal may read the first as an escape sequence
        ("\u202eabc\u2066\u2069", "\\u202eabc\\u2066\\u2069"),
        ("\u200b\u200d\ufeff\u00ad\u2060", "\\u200b\\u200d\\ufeff\\xad\\u2060"),
        ("\u2028\u2029", "\\u2028\\u2029"),
        ("\ufdd0\uffff\U0010ffff", "\\ufdd0\\uffff\\U0010ffff"),
        ("\ud800 half", "\\ud800 half"),
        ("\u3164\u115f", "\\u3164\\u115f"),
        ("\U000e0041", "\\U000e0041"),  # a tag: text that nobody sees and a model reads
        ("\ufffd", "\ufffd"),
        ("1\u00a0000\u3000", "1\\xa0000\\u3000"),  # looks like a space and is another token
    ],
)
def test_spelling(text, shown):
    assert visible(text) == shown


def test_every_character_is_shown_or_spelled():
    for number in range(0x110000):
        shown = visible(chr(number), "")
        assert shown.isprintable(), hex(number)
        assert shown in (chr(number), "", "⇥") or shown[0] == "\\", hex(number)


def test_one_line_stays_one():
    assert one_line("a\nb\u2028c") == "a⏎b\\u2028c"
    assert one_line(one_line("\x1b\n")) == one_line("\x1b\n")


def test_marks_can_be_spelled_too():
    assert visible("«a»", also="«»") == "\\xaba\\xbb"


def test_wide_characters_take_two_columns():
    assert columns("日本") == 4
    assert padded("日", 4) == "日  "


HOSTILE = "$\\frac{x$ :smile: [/b]\x1b[31m\x00\n_{$"


def words_of(figure):
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text)]


def test_a_picture_takes_no_word_for_a_formula(tmp_path, drawn):
    record = {"kind": "epoch", "update": 1, "epoch": 1, "loss": 1.0, "token_accuracy": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "result.json").write_text(json.dumps({"code": "error", "reason": HOSTILE}))
    picture.draw(tmp_path)
    assert one_line(HOSTILE) in words_of(drawn[0])


def test_a_mixtures_picture_takes_no_tasks_name_for_a_formula(tmp_path, drawn):
    name = "$\\frac{x$\x1b\n"
    common = {"kind": "evaluation", "stage": 0, "errors": {}, "done": 1, "update": 1}
    records = [{"kind": "stage", "update": 0, "stage": 0, "epoch": 0.0, "active": [name], "start": None}]
    records += [
        {**common, "moment": f"m{n}", "epoch": n / 2, "pooled": 0.5, "scores": {name: 0.5}} for n in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "result.json").write_text(json.dumps({"code": "error", "reason": HOSTILE}))
    mixture_picture.draw(tmp_path)
    words = words_of(drawn[0])
    assert words.count(one_line(name)) >= 2, "where it is listed and over its own curve"
    assert one_line(HOSTILE) in words
