"""What transformers makes of a tokenizer.json, held against the file: where the two differ, the file has the
last word.

transformers 5 builds many tokenizers from a class of its own, chosen by `tokenizer_class` or, for some
architectures against it, by `model_type`; of the file it takes the vocabulary alone. A model of such an
architecture whose tokenizer is another would be trained on other tokens than it was made with, or on none.
transformers 4, vLLM and llama.cpp read the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from repsft_fast.models.guards import library

FILE = "tokenizer.json"
# Words, digits, marks, runs of spaces and lines, other scripts. None begins with a space: there even the
# classes of one family differ between versions.
_TEXTS = (
    "Hello world, it's 2024!", "def f(x):\n\treturn  x**2  # 3.14\n\n", "naïve Straße ﬁ e\u0301",
    "北京 данные שלום हिन्दी", "a😀b", "ABC-def_ghi/jkl", "<b>&amp;</b>",
)  # fmt: skip


def as_the_file_says(
    tokenizer: PreTrainedTokenizerBase, folder: Path, where: str
) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """`tokenizer`, loaded from `folder`, or one that splits text as its tokenizer.json says; and what is to
    be said.

    0.5 s for 150k tokens. Not held against it: code that came with the tokenizer, and WordPiece, whose
    splitting is set in tokenizer_config.json too.
    """
    own = type(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if own is PreTrainedTokenizerFast or backend is None or not own.__module__.startswith("transformers."):
        return tokenizer, []
    if not (folder / FILE).is_file():
        return tokenizer, []
    with library(f"{where} {FILE}", str(folder / FILE), "fetch it again"):
        file = _plain(Tokenizer.from_file(str(folder / FILE)))
        texts = _texts(file)
        made = [_ids(tokenizer, text) for text in texts]
        if made == [_ids(file, text) for text in texts] or "WordPiece" in type(file.model).__name__:
            return tokenizer, []
        space = tokenizer.init_kwargs.get("add_prefix_space")
        if isinstance(space, bool):  # of tokenizer_config.json: it goes over the file's for whoever reads it
            spaced = _plain(
                Tokenizer.from_str(_with_space((folder / FILE).read_text(encoding="utf-8"), space))
            )
            if made == [_ids(spaced, text) for text in texts]:
                return tokenizer, []
        plain = PreTrainedTokenizerFast.from_pretrained(folder)
        wanted = [_ids(plain, text) for text in texts]
    if made == wanted:  # its settings change the file's splitting, whoever reads it
        return tokenizer, []
    text, one, other = next(each for each in zip(texts, made, wanted, strict=True) if each[1] != each[2])
    at = next(
        (n for n, (a, b) in enumerate(zip(one or (), other or ())) if a != b),
        min(len(one or ()), len(other or ())),
    )
    # where they part
    into, instead = (f"{'… ' if at and ids else ''}{_some(ids and ids[at:])}" for ids in (one, other))
    words = (
        f"transformers makes a {own.__name__} of it, which splits {text!r} into {into}, and its {FILE} into"
    )
    return plain, [f"{where}: {words} {instead}: it is read as {FILE} says, got {folder}"]


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _with_space(text: str, space: bool) -> str:
    whole = json.loads(text)
    splitting = whole.get("pre_tokenizer") or {}
    for part in (splitting, *(splitting.get("pretokenizers") or ())):
        if "add_prefix_space" in part:
            part["add_prefix_space"] = space
    return json.dumps(whole)


def _texts(file: Tokenizer) -> list[str]:
    """The probes, and words that this vocabulary surely has."""
    known = [
        token
        for token, _ in sorted(file.get_vocab(with_added_tokens=False).items(), key=lambda entry: entry[1])
    ]
    words = [token for token in known if token.isalnum()]
    return [*_TEXTS, " ".join(words[-3:]), "".join(words[len(words) // 2 :][:2])]


def _ids(tokenizer: Any, text: str) -> list[int] | None:
    """None for a text that it cannot split, such as one without a token for the unknown."""
    try:
        if isinstance(tokenizer, Tokenizer):
            return tokenizer.encode(text, add_special_tokens=False).ids
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
    except Exception:  # tokenizers raises plain ones
        return None


def _some(ids: list[int] | None) -> str:
    if ids is None:
        return "nothing"
    return f"[{', '.join(map(str, ids[:6]))}{', …' if len(ids) > 6 else ''}]"
