"""A name that a row gives two values: a bad row, wherever in the row it is; what else JSON allows and no row
means."""

import json
import time

import pytest

from repsft_fast.checkpoint import files
from repsft_fast.data import tool_calls
from repsft_fast.data.encode import Encoder
from repsft_fast.data.filetypes import once
from repsft_fast.data.load import DataSettings, load
from repsft_fast.errors import DataError
from repsft_fast.report import records

GOOD = '{"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}'
TWICE = {
    "at the top": ('{"input_ids": [3, 4], "input_ids": [3, 5], "labels": [-100, 4]}', "input_ids"),
    "the same number in another type": ('{"input_ids": [3, 4], "labels": [-100, 4], "x": 1, "x": true}', "x"),
    "in a turn": ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "content"),
    "in a tool's schema": (
        '{"messages": [], "tools": [{"function": {"parameters": {"type": "a", "type": "b"}}}]}',
        "type",
    ),
    "three times, two alike": ('{"a": 1, "a": 2, "a": 1, "input_ids": [3]}', "a"),
    "by an escape": ('{"a": 1, "\\u0061": 2}', "a"),
}


@pytest.fixture
def read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def reading(*lines, name="r.jsonl", **settings):
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return load(name, None, DataSettings(**settings), vocab_size=100)

    return reading


@pytest.mark.parametrize("where", TWICE)
def test_it_is_a_bad_row_by_line_and_name(read, where):
    row, name = TWICE[where]
    with pytest.raises(
        DataError, match=rf"^r\.jsonl:2: names '{name}' twice, with two values, got .* and .*; keep the one"
    ):
        read(GOOD, row, GOOD)
    found = read(GOOD, row, GOOD, row, on_bad_row="drop")
    assert len(found.samples) == 2
    assert sum(found.dropped.values()) == 2
    assert "r.jsonl:2, r.jsonl:4" in " ".join(found.warnings)


def test_several_kinds_of_bad_rows_are_one_error(read):
    with pytest.raises(
        DataError, match=r"(?s)^2 of 3 rows cannot be trained on.*r\.jsonl:1: names .*r\.jsonl:3, token"
    ):
        read(TWICE["at the top"][0], GOOD, '{"input_ids": [3, 400], "labels": [-100, 400]}')


def test_none_but_such_rows_is_an_error_in_any_case(read):
    with pytest.raises(DataError, match=r"none of its 1 rows is usable .*names 'input_ids' twice"):
        read(TWICE["at the top"][0], on_bad_row="drop")


def test_what_is_quoted_is_short(read):
    long = json.dumps("x" * 10**6)
    with pytest.raises(DataError) as caught:
        read(f'{{"a": {long}, "a": 1}}', GOOD)
    assert len(str(caught.value)) < 400
    with pytest.raises(DataError) as caught:
        read(f"{{{long}: 1, {long}: 2}}", GOOD)
    assert len(str(caught.value)) < 400


def test_the_same_value_twice_says_one_thing(read):
    assert len(read('{"input_ids": [3, 4], "input_ids": [3, 4], "labels": [-100, 4]}', GOOD).samples) == 2


@pytest.mark.parametrize("name", ["r.json", "r.jsonl.gz"])
def test_in_other_files(read, tmp_path, name):
    rows = [GOOD, TWICE["at the top"][0]]
    if name.endswith("gz"):
        import gzip

        (tmp_path / name).write_bytes(gzip.compress("\n".join(rows).encode()))
        with pytest.raises(DataError, match=rf"^{name}:2: names 'input_ids' twice"):
            load(name, None, vocab_size=100)
    else:
        with pytest.raises(
            DataError, match=r"^r\.json: names 'input_ids' twice, with two values, got \[3, 4\] and \[3, 5\]"
        ):
            read(f"[{','.join(rows)}]", name=name)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (GOOD + GOOD, "is not JSON .Extra data"),
        (GOOD + " x", "is not JSON .Extra data"),
        (GOOD.replace("5]", "NaN]"), "labels|input_ids"),
        (GOOD.replace("5]", "Infinity]"), "labels|input_ids"),
        (GOOD.replace("5]", "1e400]"), "labels|input_ids"),
        (GOOD.replace("5]", "9" * 5000 + "]"), "is not JSON .Exceeds the limit|too long a number"),
        (GOOD.replace("5]", "9" * 30 + "]"), "is not a token id"),
        (GOOD.replace("5]", '"\\ud800"]'), "input_ids"),
        (GOOD + "\0", "holds a NUL byte"),
        ("\ufeff" + GOOD, "is not JSON"),
        ("'a'", "is not JSON"),
        ("1", "is not a row"),
        ("null", "is not a row"),
    ],
)  # fmt: skip
def test_what_no_row_means_is_refused_by_its_line(read, line, words):
    with pytest.raises(DataError, match=rf"r\.jsonl:2.*({words})"):
        read(GOOD, line, GOOD)


def test_a_task_has_a_name_and_no_text(read):
    row = json.loads(GOOD)
    assert read(json.dumps({**row, "task": "t" * 1000}), task_column="task").samples
    with pytest.raises(
        DataError, match=r"r\.jsonl:1, field 'task': is too long for a task's name, .* got 1001 characters"
    ):
        read(json.dumps({**row, "task": "t" * 1001}), task_column="task")


class TestTokenizersThatGiveUp:
    """A pattern of a tokenizer's own that takes for ever: its engine panics after ten million steps."""

    def encoder(self):
        from tokenizers import Regex, Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import Split
        from transformers import PreTrainedTokenizerFast

        made = Tokenizer(WordLevel({"a": 0, "?": 1}, unk_token="?"))
        made.pre_tokenizer = Split(Regex(r"(a+)+$"), "isolated")
        return Encoder(PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?"))

    def test_the_text_is_named(self):
        from repsft_fast.data.placeholders import Piece

        encoder = self.encoder()
        assert encoder([[Piece("a", True)]]) == [([0], [True])]
        with pytest.raises(
            DataError,
            match=r"tokenizer\.path: cannot split a text .*retry-limit.* got 'a{60}!'; mend the row",
        ):
            encoder([[Piece("a", True)], [Piece("a" * 60 + "!", True)]])


@pytest.mark.parametrize("read_pairs", [once, records._once, tool_calls._each_key_once, files._no_duplicates])
def test_thirty_thousand_repeats_cost_one_pass(read_pairs):
    pairs = [(f"k{n}", n) for n in range(30_000)] * 2 + [("k0", [0] * 1000)] * 2
    begun = time.process_time()
    with pytest.raises(ValueError, match="twice"):
        read_pairs(pairs)
    assert read_pairs(pairs[:30_000]) == dict(pairs[:30_000])
    assert time.process_time() - begun < 2


def test_repeats_that_are_alike_are_one_value():
    alike = [(f"k{n}", n) for n in range(30_000)] * 2
    assert once(alike) == dict(alike)
