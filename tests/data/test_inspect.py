import pytest
from hypothesis import given
from hypothesis import strategies as st

from repsft_fast.data.inspect import TaskSummary, histogram, summarise, view
from repsft_fast.data.sample import Loaded, Sample
from tests.helpers.chat_tokenizers import byte_level, metaspace


def test_a_sample_is_shown_token_by_token():
    tokenizer = byte_level()
    ids = tokenizer("he é<think>", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    flags = [False, *[True] * (len(ids) - 1)]
    shown = view(Sample(ids, flags, "t", 2.0, "f:3"), tokenizer)
    assert [(token.text, token.trained) for token in shown.tokens] == [
        ("he", False),
        (" ", True),
        ("é", True),  # of two tokens that make one character the first shows it
        ("", True),
        ("<think>", True),
        ("<|im_end|>", True),
    ]
    assert [token.id for token in shown.tokens] == ids
    assert (shown.task, shown.weight, shown.source, shown.positions, shown.trained) == ("t", 2.0, "f:3", 5, 5)


def test_half_a_character_is_spelled_as_the_vocabulary_spells_it():
    tokenizer = byte_level()
    ids = tokenizer("é", add_special_tokens=False)["input_ids"]
    assert [
        token.text for token in view(Sample([*ids[:1], *ids], [False, True, True]), tokenizer).tokens
    ] == ["Ã", "é", ""]
    assert [token.text for token in view(Sample(ids, [False, True]), tokenizer).tokens] == ["Ã", "©"], (
        "trained in one half only"
    )


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_the_tokens_texts_make_the_whole_text(make):
    tokenizer = make()
    text = (
        "how a hat, a house\nand a <|im_end|> there"
        if make is metaspace
        else "a 日本語 and a 🙂 he\n\n  two<think>"
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    shown = view(Sample(ids, [False, *[True] * (len(ids) - 1)]), tokenizer)
    assert "".join(token.text for token in shown.tokens) == tokenizer.decode(ids)


def test_without_a_tokenizer_the_ids_stand_for_the_text():
    assert [token.text for token in view(Sample([7, 9], [False, True]), None).tokens] == ["<7>", "<9>"]


@given(st.lists(st.integers(1, 500), max_size=50), st.integers(1, 20))
def test_a_histogram_covers_every_length_once(lengths, bins):
    bars = histogram(lengths, bins)
    assert len(bars) <= bins
    assert sum(count for _, _, count in bars) == len(lengths)
    for first, last, count in bars:
        assert count == sum(first <= length <= last for length in lengths)
    assert [first for first, _, _ in bars[1:]] == [last + 1 for _, last, _ in bars[:-1]]


def test_the_summary_counts_samples_tokens_duplicates_and_drops():
    samples = [
        Sample([1] * n, [False] * (n - 2) + [True] * 2, task)
        for n, task in ((3, "a"), (5, "b"), (5, "b"), (9, "a"))
    ]
    summary = summarise(Loaded(samples, {"over-long": 3}, ["look"]), bins=2)
    assert summary.tasks == {"a": TaskSummary(2, 10, 4), "b": TaskSummary(2, 8, 4)}
    assert summary.positions == {"min": 2, "median": 4, "p95": 8, "max": 8, "total": 18}
    assert summary.trained["total"] == 8
    assert summary.histogram == [(2, 5, 3), (6, 8, 1)]
    assert (summary.duplicates, summary.dropped, summary.warnings) == (1, {"over-long": 3}, ["look"])


@pytest.mark.parametrize("bins", [1, 3])
def test_nothing_to_show_is_no_error(bins):
    assert summarise(Loaded([]), bins).histogram == []
