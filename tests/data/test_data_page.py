"""docs/data.md: its table is what the reader does."""

import json
import re
from pathlib import Path

import pytest

from repsft_fast.data.columns import FORMATS
from repsft_fast.data.load import DataSettings, load
from tests.helpers.chat_tokenizers import byte_level

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([^|`]+) \| `(\{.*\})` \| `(.+)` \|$", PAGE, re.MULTILINE)


def trained_runs(sample, tokenizer):
    runs, last = [], False
    for token, flag in zip(sample.ids, sample.trained):
        if flag and not last:
            runs.append([])
        if flag:
            runs[-1].append(token)
        last = flag
    decoded = [tokenizer.decode(run) if tokenizer is not None else " ".join(map(str, run)) for run in runs]
    return "".join(f"«{text}»" for text in decoded)


@pytest.mark.parametrize(("name", "row", "trained"), ROWS, ids=[name for name, _, _ in ROWS])
def test_every_example_trains_what_the_page_says(tmp_path, name, row, trained):
    (tmp_path / "rows.jsonl").write_text(row + "\n", encoding="utf-8")
    ids = "input_ids" in json.loads(row)
    tokenizer = None if ids else byte_level()
    loaded = load(tmp_path / "rows.jsonl", tokenizer)
    found = "".join(trained_runs(sample, tokenizer) for sample in loaded.samples)
    assert found == trained.replace("<im_end>", "<|im_end|>")
    assert not loaded.columns_unused


def test_every_form_has_an_example():
    forms = {
        form
        for form, shape in FORMATS.items()
        for _, row, _ in ROWS
        if shape.missing(json.loads(row)) is None
    }
    assert forms == set(FORMATS)
    assert len(ROWS) == PAGE.partition("\n## Turns")[0].count("\n| ") - 1


def test_every_setting_the_page_names_is_one():
    from repsft_fast.config.reference import settings

    named = set(re.findall(r"`((?:data|tokenizer)\.[a-z_]+)", PAGE))
    assert named <= set(settings())
    assert {
        "data.on_bad_row",
        "data.ignore_columns",
        "tokenizer.special_tokens",
        "tokenizer.template_kwargs",
    } <= named
    assert DataSettings().on_bad_row == "raise"
