"""GSM8K replies scored as lm-eval's own filters and metric score them, but where ours differ on purpose.

lm_eval_rows.json: reply, reference, lm-eval 0.4.13's verdicts (strict-match, flexible-extract: `regex` and
`exact_match` with gsm8k.yaml's settings, version 3.0), and where ours differ, why.
"""

import collections
import json
from pathlib import Path

import pytest

from repsft_fast.evaluate.answers import EXTRACTORS, answer_in, same_answer
from repsft_fast.evaluate.extraction import hashes

ROWS = json.loads(Path(__file__).with_name("lm_eval_rows.json").read_text(encoding="utf-8"))
FILTERS = {
    "hashes": {"regex_pattern": r"#### (\-?[0-9\.\,]+)"},
    "last_number": {"regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)", "group_select": -1},
}
WHY = {
    "last": "of several #### ours takes the last, theirs the first",
    "marks": "ours reads #### without a space, and a number behind $, +, −, a space or **",
    "line": "what stands on the line of #### is the answer: 5 million is not 5",
    "value": "ours compares values: 42.0, 042 and 42 are one number",
    "thousands": "4,2 is not 42",
    "fraction": "3/4 is a number",
    "subtracts": "a minus behind a digit is none of the number's: 10-15, x=3-4",
    "signs": "−7, 1e3, 1{,}042 and other digits are numbers",
    "dots": "the dots of a sentence are none of the number's",
    "thought": "a thought is no part of the reply",
}


@pytest.mark.parametrize(("at", "extractor"), enumerate(FILTERS))
def test_our_verdicts_are_theirs_but_where_it_is_said_why(at, extractor):
    wrong = []
    for reply, reference, *theirs, why in ROWS:
        ours = same_answer(answer_in(EXTRACTORS[extractor], reply), reference)
        if (ours == theirs[at]) == (extractor in why):
            wrong.append((reply, reference, ours))
    assert wrong == []


def test_there_are_enough_rows_and_every_reason_is_known():
    assert len(ROWS) >= 200
    assert len({(reply, reference) for reply, reference, *_ in ROWS}) == len(ROWS)
    given = collections.Counter(why for *_, whys in ROWS for why in whys.values())
    assert set(given) == set(WHY)
    assert sum(given.values()) < len(ROWS) / 4


@pytest.mark.parametrize(("at", "extractor"), enumerate(FILTERS))
def test_the_table_is_what_lm_eval_says(at, extractor):
    pytest.importorskip("lm_eval")
    from lm_eval.api.metrics import exact_match_fn
    from lm_eval.filters.extraction import RegexFilter

    ignored = [",", "\\$", "(?s).*#### ", "\\.$"]
    chosen = RegexFilter(**FILTERS[extractor])
    for reply, reference, *theirs, _ in ROWS:
        found = chosen.apply([[reply]], [{}])[0][0]
        target = f"steps\n#### {reference}"
        assert hashes(target) == reference
        said = exact_match_fn(
            predictions=[found],
            references=[target],
            regexes_to_ignore=ignored,
            ignore_case=True,
            ignore_punctuation=False,
        )
        assert bool(said["exact_match"]) == theirs[at], reply
