"""Building the parts: the tokenizer and its template."""

import pytest

from repsft_fast.config import Config
from repsft_fast.data.store import TokenStore
from repsft_fast.errors import DataError
from repsft_fast.training.build import build, build_tokenizer
from tests.helpers import runs
from tests.helpers.chat_tokenizers import BLOCKS, byte_level


def test_a_chat_template_is_text_or_a_file_that_is_there(tmp_path):
    byte_level().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "chat.jinja").write_text(BLOCKS)

    def template(value):
        given = {"path": str(tmp_path / "tokenizer"), "chat_template": value}
        return build_tokenizer(Config.of({**runs.settings(tmp_path), "tokenizer": given})).chat_template

    assert template(BLOCKS) == template(str(tmp_path / "chat.jinja")) == BLOCKS
    with pytest.raises(
        DataError, match=r"^tokenizer\.chat_template: is neither a template nor a readable file"
    ):
        template(str(tmp_path / "chatt.jinja"))


def test_memory_that_cannot_be_pinned_is_told_once(tmp_path, monkeypatch):
    def refuse(store):
        store.notes.append("pinned host memory was refused")
        return False

    monkeypatch.setattr(TokenStore, "_can_pin", refuse)
    parts = build(Config.of(runs.settings(tmp_path, data__validation_fraction=0.25)))
    assert parts.data.validation is not None
    assert parts.data.warnings.count("pinned host memory was refused") == 1
